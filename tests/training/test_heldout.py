from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny_model, build_tiny_tokenizer
from tiny_batches import hook_count, make_examples

from pivotune.data.examples import Example
from pivotune.training.heldout import RowScore, greedy_answers, score_answers, summarize

EXAMPLES = make_examples(8)


def by_hand(model: Any, example: Example) -> float:
    ids, first = example.main.ids.tolist(), example.main.answer
    with torch.no_grad():
        log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    return -sum(log_probabilities[at - 1, ids[at]].item() for at in range(first, len(ids)))


# Sliding window, soft-cap, absolute positions, and the plain case.
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_those_of_each_row_alone(family, batch_size):
    """In the order given, whatever rows share a batch; 8 rows in batches of 3 leave an uneven last one."""
    model = build_tiny_model(family)
    scores = score_answers(model, EXAMPLES, pad_token_id=0, batch_size=batch_size)
    assert [score.nll for score in scores] == pytest.approx([by_hand(model, one) for one in EXAMPLES], rel=1e-5)
    assert [score.tokens for score in scores] == [len(one.main.ids) - one.main.answer for one in EXAMPLES]
    assert [score.characters for score in scores] == [one.main.characters for one in EXAMPLES]
    assert len({round(score.nll, 3) for score in scores}) == len(scores)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_dropout_off(training):
    model = build_tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train(training)
    scores = score_answers(model, EXAMPLES, pad_token_id=0)
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert hook_count(model) == 0
    model.eval()
    assert [score.nll for score in scores] == pytest.approx([by_hand(model, one) for one in EXAMPLES], rel=1e-5)


def test_mode_is_restored_after_an_error():
    model = build_tiny_model().train()

    def fail(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_answers(model, EXAMPLES, pad_token_id=0, progress=fail)
    assert model.training


def test_progress_counts_rows():
    done: list[int] = []
    score_answers(build_tiny_model(), EXAMPLES, pad_token_id=0, batch_size=3, progress=done.append)
    assert done == [3, 6, 8]


def test_autocast_is_near_float32():
    model = build_tiny_model()
    half = [score.nll for score in score_answers(model, EXAMPLES, pad_token_id=0, autocast=True)]
    full = [score.nll for score in score_answers(model, EXAMPLES, pad_token_id=0)]
    assert half == pytest.approx(full, rel=0.05)
    assert half != full


def test_no_rows_no_scores():
    assert score_answers(build_tiny_model(), [], pad_token_id=0) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_answers_are_those_of_each_prompt_alone(family, batch_size):
    """Padding on the left must change nothing: neither positions nor attention."""
    model, tokenizer = build_tiny_model(family), build_tiny_tokenizer()
    answers = greedy_answers(model, tokenizer, EXAMPLES, max_new_tokens=6, batch_size=batch_size)
    expected = []
    for example in EXAMPLES:
        prompt = torch.from_numpy(example.main.ids[: example.main.answer]).long()[None]
        output = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False,
            eos_token_id=[2, tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        expected.append(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip())
    assert answers == expected
    assert len(set(answers)) > 4


def test_greedy_answers_end_at_either_end_of_text():
    """The tokenizer's, and what the model's own generation settings add to it."""
    model, tokenizer = build_tiny_model(), build_tiny_tokenizer()
    prompt = EXAMPLES[0].main.ids[: EXAMPLES[0].main.answer]
    ids = torch.from_numpy(np.asarray(prompt)).long()[None]
    free = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                          eos_token_id=None, pad_token_id=0)[0, ids.shape[1] :].tolist()  # fmt: skip
    stop = free[2]
    model.generation_config.eos_token_id = [stop]
    expected = tokenizer.decode(free[: free.index(stop)], skip_special_tokens=True).strip()
    assert greedy_answers(model, tokenizer, EXAMPLES[:1], max_new_tokens=6) == [expected]
    model.generation_config.eos_token_id = 2
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    assert greedy_answers(model, tokenizer, EXAMPLES[:1], max_new_tokens=6) == [expected]
    assert expected != tokenizer.decode(free, skip_special_tokens=True).strip()


def test_greedy_answers_restore_the_mode():
    model = build_tiny_model().train()
    greedy_answers(model, build_tiny_tokenizer(), EXAMPLES[:2], max_new_tokens=1)
    assert model.training


def test_summary_by_hand():
    """NLL 6 + 2 + 4 over 3 + 2 + 1 tokens: mean 2; residuals 0, -2, 2 have standard deviation 2; 2 / (2 sqrt 3)."""
    scores = [RowScore(6.0, 3, 12), RowScore(2.0, 2, 8), RowScore(4.0, 1, 4)]
    summary = summarize(scores)
    assert summary.nll == 2.0
    assert summary.nll_per_character == 0.5
    assert summary.stderr == pytest.approx(1 / math.sqrt(3))
    assert summary.rows == 3


def test_rows_of_equal_length_have_the_usual_standard_error():
    nll = np.random.default_rng(0).gamma(2.0, size=50)
    summary = summarize([RowScore(5 * value, 5, 20) for value in nll])
    assert summary.nll == pytest.approx(nll.mean())
    assert summary.stderr == pytest.approx(nll.std(ddof=1) / math.sqrt(50))


def test_one_row_has_no_standard_error():
    summary = summarize([RowScore(6.0, 3, 12)])
    assert (summary.nll, summary.rows) == (2.0, 1)
    assert math.isnan(summary.stderr)
