"""`method: plug`: an English answer, a marker line and the target's answer in training and in held-out rows."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import build_tiny_model, build_tiny_tokenizer, tiny_rows

from pivotune.config.registry import METHODS
from pivotune.data.datasets import training_examples
from pivotune.data.rows import Row
from pivotune.errors import UsageError
from pivotune.estimate.rows import TYPICAL_TOKENS, assumed_pairs
from pivotune.methods.base import marker_in, required_sides
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.preparation import encode_dataset, rewritten

PLUG = METHODS["plug"]
MODEL_CONFIG = build_tiny_model().config


def arguments(folder: Any, **data: Any) -> DeepSupervisionConfig:
    return DeepSupervisionConfig(str(folder), method="plug", data={"language": "sw", **data}, report_to="none")


def text_of(side: Any, start: int = 0) -> str:
    return build_tiny_tokenizer().decode(side.ids[start:].tolist())


@pytest.mark.parametrize("heldout", [False, True])
def test_answers_have_two_parts(tmp_path, heldout):
    pairs = encode_dataset(tiny_rows(4), arguments(tmp_path), build_tiny_tokenizer(), MODEL_CONFIG, heldout=heldout)
    row = tiny_rows(4)[1]
    assert text_of(pairs[1].target) == (
        f"<|user|>\n{row['prompt']}<|end|>\n<|assistant|>\n"
        f"{row['completion_en']}\n\n[Swahili]\n{row['completion']}<|end|>"
    )
    assert text_of(pairs[1].english, pairs[1].english.answer) == f"{row['completion_en']}<|end|>"


def test_replayed_rows_are_answered_in_english_at_once(tmp_path):
    pairs = encode_dataset(tiny_rows(8), arguments(tmp_path), build_tiny_tokenizer(), MODEL_CONFIG)
    examples = training_examples(pairs, PLUG, english_ratio=0.25, seed=0)
    texts = [text_of(example.main) for example in examples]
    assert [("[Swahili]" in text, "Which number" in text) for text in texts].count((False, True)) == 2
    assert [("[Swahili]" in text, "Which number" in text) for text in texts].count((True, False)) == 6


def test_both_parts_have_the_limit_of_an_answer(tmp_path):
    """The target's part comes last: under the limit of one answer it would be cut away."""
    args = arguments(tmp_path, max_completion_tokens=40)
    assert args.limits(256).completion == 80
    row = {**tiny_rows(1)[0], "completion": "Ndiyo " * 50}
    (pair,) = encode_dataset([row], args, build_tiny_tokenizer(), MODEL_CONFIG)
    assert pair.target.num_answer_tokens == 80
    assert "[Swahili]\nNdiyo" in text_of(pair.target)


def test_held_out_rows_need_english_too():
    sides = required_sides(PLUG, 0.25, heldout=True)
    assert (sides.target, sides.english, sides.needed_by) == (True, True, "method plug")


@pytest.mark.parametrize(
    ("language", "message"),
    [(None, "method plug: answers name the language; set data.language"), ("xyz", "language 'xyz' is unknown")],
)
def test_a_language_with_a_name_is_needed(tmp_path, language, message):
    with pytest.raises(UsageError, match=message):
        encode_dataset(tiny_rows(4), arguments(tmp_path, language=language), build_tiny_tokenizer(), MODEL_CONFIG)


def test_the_marker_names_the_language_of_the_row(tmp_path):
    rows = [Row("a", "b", "c", "d", language=code) for code in ("sw", "", "vi")]
    found = rewritten(rows, arguments(tmp_path, language=["vi", "sw"]))
    assert [row.completion for row in found] == ["d\n\n[Swahili]\nb", *["d\n\n[Vietnamese]\nb"] * 2]


def test_the_marker_names_the_language():
    assert marker_in(PLUG.pivot_marker, "vie_Latn") == "\n\n[Vietnamese]\n"
    assert marker_in(METHODS["tft"].pivot_marker, "vi") == ""


def test_assumed_rows_have_answers_of_two_parts(tmp_path):
    pair = assumed_pairs(arguments(tmp_path, max_completion_tokens=256))[-1]
    assert pair.target.num_answer_tokens == TYPICAL_TOKENS["target"][1] + TYPICAL_TOKENS["english"][1]
