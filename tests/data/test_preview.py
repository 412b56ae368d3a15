from __future__ import annotations

import pytest
from conftest import build_tiny_tokenizer, tiny_rows

from pivotune.data.examples import Encoder, Limits, preview
from pivotune.data.sources import load_rows
from pivotune.data.templates import load_template


def encode(rows, tokenizer, template="chat", limits=Limits()):  # noqa: B008
    return Encoder(tokenizer, load_template(template, tokenizer), limits).encode(load_rows(rows))


@pytest.mark.parametrize("template", ["chat", "alpaca"])
@pytest.mark.parametrize("side", ["target", "english"])
def test_segments_are_the_decoded_sequence(template, side, tokenizer):
    for pair in encode(tiny_rows(8), tokenizer, template):
        encoded = getattr(pair, side)
        segments = preview(tokenizer, encoded)
        whole = tokenizer.decode(encoded.ids.tolist(), skip_special_tokens=False)
        assert "".join(segment.text for segment in segments) == whole
        assert sum(segment.num_tokens for segment in segments) == len(encoded.ids)
        assert [segment.role for segment in segments] == ["template", "query", "template", "answer"]


def test_roles_in_the_chat_template(tokenizer):
    row = tiny_rows(3)[2]
    (pair,) = encode([row], tokenizer)
    start, query, middle, answer = preview(tokenizer, pair.target)
    assert (start.text, query.text) == ("<|user|>\n", row["prompt"])
    assert (middle.text, answer.text) == ("<|end|>\n<|assistant|>\n", row["completion"] + "<|end|>")
    assert query.num_tokens == pair.target.num_query_tokens
    assert answer.num_tokens == pair.target.num_answer_tokens
    english = {segment.role: segment.text for segment in preview(tokenizer, pair.english)}
    assert english["query"] == row["prompt_en"]
    assert english["answer"] == row["completion_en"] + "<|end|>"


def test_what_was_cut_is_not_shown(tokenizer):
    row = tiny_rows(3)[2]
    (pair,) = encode([row], tokenizer, limits=Limits(prompt=12, completion=5))
    shown = {segment.role: segment for segment in preview(tokenizer, pair.target)}
    assert shown["answer"].num_tokens <= 5
    assert row["completion"].startswith(shown["answer"].text)
    assert row["prompt"].startswith(shown["query"].text)
    assert shown["query"].text != row["prompt"]


def test_a_part_without_tokens_is_left_out(tmp_path):
    tokenizer = build_tiny_tokenizer()
    path = tmp_path / "bare.jinja"
    path.write_text("{{ prompt }}\n{{ completion }}", encoding="utf-8")
    (pair,) = encode(tiny_rows(1), tokenizer, str(path))
    assert [segment.role for segment in preview(tokenizer, pair.target)] == ["query", "template", "answer"]
