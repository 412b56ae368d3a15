from __future__ import annotations

import numpy as np
import pytest
from conftest import build_tiny_tokenizer, tiny_rows

from pivotune.config.registry import METHODS
from pivotune.data.datasets import training_examples
from pivotune.data.examples import Encoder, Limits
from pivotune.data.sources import load_rows
from pivotune.data.templates import load_template
from pivotune.errors import UsageError
from pivotune.methods.base import required_sides
from pivotune.training.preparation import EncodingConfig, read_rows


def test_a_third_of_the_target_rows_is_answered_in_english():
    replayed = np.zeros(100, dtype=bool)
    replayed[::4] = True
    plan = METHODS["cross-lingual"].plan(replayed)
    assert plan.rows.tolist() == list(range(100))
    assert (plan.english_prompt == replayed).all()
    mixed = plan.english_answer & ~plan.english_prompt
    assert mixed.sum() == 25
    assert (plan.english_answer[replayed]).all()
    assert not plan.parallel.any()
    again = METHODS["cross-lingual"].plan(replayed)
    assert (again.english_answer == plan.english_answer).all()


def test_examples_hold_the_target_prompt_and_the_english_answer():
    tokenizer = build_tiny_tokenizer()
    encoder = Encoder(tokenizer, load_template(None, tokenizer), Limits())
    pairs = list(encoder.encode_lazily(load_rows(tiny_rows(12)), on_bad_row="error", source="rows"))
    examples = training_examples(pairs, METHODS["cross-lingual"], english_ratio=0.25, seed=0)
    kinds = [(example.english_prompt, example.english_answer) for example in examples]
    assert kinds.count((True, True)) == 3
    assert kinds.count((False, True)) == 3
    for example, pair in zip(examples, pairs, strict=True):
        prompt = (pair.english if example.english_prompt else pair.target).ids
        answer = pair.english if example.english_answer else pair.target
        start = example.main.answer
        assert example.main.ids[:start].tolist() == prompt[:start].tolist()
        assert example.main.ids[start:].tolist() == answer.ids[answer.answer :].tolist()
        assert example.parallel is None


def test_rows_without_an_english_side_are_refused():
    rows = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(UsageError, match="method cross-lingual"):
        read_rows(rows, "cross-lingual", EncodingConfig())
    sides = required_sides(METHODS["cross-lingual"], 0.0, heldout=True)
    assert (sides.target, sides.english) == (True, False)
