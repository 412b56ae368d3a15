from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import build_tiny_model, build_tiny_tokenizer, tiny_rows

from pivotune.config.registry import METHODS
from pivotune.config.settings import CrossLingualConfig
from pivotune.config.yaml_text import parse_config
from pivotune.data.datasets import training_examples
from pivotune.data.rows import Row
from pivotune.data.sources import load_rows
from pivotune.errors import UsageError
from pivotune.methods.base import required_sides
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.preparation import EncodingConfig, encode_dataset, read_rows, rewritten

ROW = Row("hỏi", "đáp", "ask", "answer", "vào", "input", ({"role": "user", "content": "x"},), ())
KINDS = {
    ("hỏi", "answer", "vào"): "english answer",
    ("ask", "đáp", "input"): "english prompt",
    ("Translate into English:\n\nđáp", "answer", ""): "into English",
    ("Translate into Vietnamese:\n\nanswer", "đáp", ""): "into Vietnamese",
    ("hỏi", "đáp", "vào"): "as it is",
}


def kinds(count: int, *, seed: int = 0, language: str | None = "vi", **shares: float) -> list[str]:
    settings = SimpleNamespace(
        method="cross-lingual",
        cross_lingual=CrossLingualConfig(**shares),
        seed=seed,
        data=SimpleNamespace(languages=[language] if language else []),
    )
    found = []
    for row in rewritten([ROW] * count, settings):
        # Rows replayed in English are read from the English side.
        assert (row.prompt_en, row.completion_en, row.input_en) == ("ask", "answer", "input")
        kind = KINDS[row.prompt, row.completion, row.input]
        assert bool(row.history) == (kind in ("english answer", "as it is"))
        found.append(kind)
    return found


def test_a_third_of_the_rows_is_answered_in_english():
    assert Counter(kinds(99)) == {"english answer": 33, "as it is": 66}


def test_every_share():
    shares = {"english_answers": 0.25, "english_prompts": 0.125, "translations": 0.5}
    found = kinds(80, **shares)
    assert Counter(found) == {
        "english answer": 20, "english prompt": 10, "into English": 20, "into Vietnamese": 20, "as it is": 10,
    }  # fmt: skip
    assert kinds(80, **shares) == found
    assert kinds(80, seed=1, **shares) != found
    assert set(kinds(40, translations=1.0, english_answers=0.0)) == {"into English", "into Vietnamese"}


def test_translations_name_the_language_of_the_row():
    settings = SimpleNamespace(
        method="cross-lingual", cross_lingual=CrossLingualConfig(translations=1.0, english_answers=0.0), seed=0,
        data=EncodingConfig(language=["vi", "zh"]),
    )  # fmt: skip
    given = [replace(ROW, language="zh")] * 20 + [ROW] * 20
    prompts = [row.prompt for row in rewritten(given, settings) if "English" not in row.prompt]
    assert Counter(prompts[: len(prompts) - prompts[::-1].index("Translate into Chinese:\n\nanswer")]) == {
        "Translate into Chinese:\n\nanswer": prompts.count("Translate into Chinese:\n\nanswer")
    }
    assert set(prompts) == {f"Translate into {name}:\n\nanswer" for name in ("Chinese", "Vietnamese")}


def test_translations_need_a_language_that_is_known():
    with pytest.raises(UsageError, match=r"cross_lingual\.translations: .* set data\.language"):
        kinds(4, language=None, translations=0.5)
    with pytest.raises(UsageError, match="language 'vn' is unknown"):
        kinds(4, language="vn", translations=0.5)


def test_shares_above_one_are_refused():
    config = {"model": "m", "data": {"train": "rows.jsonl"}, "output_dir": "run"}
    with pytest.raises(UsageError, match=r"cross_lingual: the shares add up to 1\.2; allowed: at most 1"):
        parse_config({**config, "cross_lingual": {"english_answers": 0.6, "translations": 0.6}})


def test_trained_rows_hold_the_prompt_and_answer_of_their_kind(tmp_path):
    """In Python as from YAML; replayed rows stay whole English rows."""
    tokenizer, model = build_tiny_tokenizer(), build_tiny_model()
    args = DeepSupervisionConfig(
        output_dir=str(tmp_path), method="cross-lingual", cross_lingual={"english_answers": 1.0}, report_to="none"
    )
    pairs = encode_dataset(tiny_rows(12), args, tokenizer, model.config)
    plain = encode_dataset(
        tiny_rows(12), DeepSupervisionConfig(output_dir=str(tmp_path), method="tft"), tokenizer, model.config
    )
    examples = training_examples(pairs, METHODS["cross-lingual"], english_ratio=0.25, seed=0)
    assert [example.english_prompt for example in examples].count(True) == 3
    for example, pair in zip(examples, plain, strict=True):
        prompt = (pair.english if example.english_prompt else pair.target).ids
        start = example.main.answer
        assert example.main.ids[:start].tolist() == prompt[:start].tolist()
        assert example.main.ids[start:].tolist() == pair.english.ids[pair.english.answer :].tolist()
        assert example.parallel is None
    # Held-out rows are scored as they are.
    heldout = encode_dataset(tiny_rows(12), args, tokenizer, model.config, heldout=True)
    assert [pair.target.ids.tolist() for pair in heldout] == [pair.target.ids.tolist() for pair in plain]


def test_rows_without_an_english_side_are_refused():
    rows = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(UsageError, match="method cross-lingual"):
        read_rows(rows, "cross-lingual", EncodingConfig())
    sides = required_sides(METHODS["cross-lingual"], 0.0, heldout=True)
    assert (sides.target, sides.english) == (True, False)
    assert load_rows(rows, need_english=False)
