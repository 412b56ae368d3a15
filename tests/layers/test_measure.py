from __future__ import annotations

import pytest
import torch
from conftest import NUM_LAYERS, build_tiny_model, build_tiny_tokenizer
from tiny_batches import hook_count
from tiny_training import make_pairs

from pivotune.data.examples import Pair, Side
from pivotune.errors import UsageError
from pivotune.layers.measure import analyze_layers, num_sequences
from pivotune.layers.selection import select_layers
from pivotune.lenses.logit import lens_logits
from pivotune.models.architecture import find_architecture
from pivotune.models.taps import tap

PAIRS = make_pairs(9)


@torch.no_grad()
def entropies(model, sides: list[Side]) -> tuple[torch.Tensor, int]:
    """Mean entropy per layer over query and answer tokens, each row alone and without padding; and how many tokens."""
    architecture = find_architecture(model)
    rows = []
    for side in sides:
        ids = torch.from_numpy(side.ids).long()[None]
        with tap(architecture, range(NUM_LAYERS + 1)) as taps:
            model(input_ids=ids)
        counted = [*range(*side.query), *range(side.answer, len(side.ids))]
        states = torch.stack([taps.hidden_states[layer][0, counted] for layer in range(NUM_LAYERS + 1)])
        log_p = lens_logits(architecture, states).double().log_softmax(-1)
        rows.append(-(log_p.exp() * log_p).sum(-1))
    whole = torch.cat(rows, dim=1)
    return whole.mean(dim=1), whole.shape[1]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_both_sides_equal_every_row_alone(batch_size):
    model = build_tiny_model()
    analysis = analyze_layers(
        model,
        build_tiny_tokenizer(),
        PAIRS,
        model_name="tiny",
        language="sw",
        batch_size=batch_size,
        tokens_per_row=None,
    )
    for side in ("target", "english"):
        expected, tokens = entropies(model, [getattr(pair, side) for pair in PAIRS])
        assert analysis[side]["entropy"] == pytest.approx(expected.tolist(), rel=1e-5)
        assert (analysis[side]["tokens"], analysis[side]["sequences"]) == (tokens, 9)
    assert analysis["target"]["entropy"] != analysis["english"]["entropy"]
    assert (analysis["model"], analysis["language"], analysis["num_layers"]) == ("tiny", "sw", NUM_LAYERS)


def test_layers_follow_from_the_target_profile():
    analysis = analyze_layers(build_tiny_model(), build_tiny_tokenizer(), PAIRS)
    selection = select_layers(analysis["target"]["entropy"])
    assert {name: analysis[name] for name in ("conversion", "thinking", "method", "reason")} == {
        name: value for name, value in selection.to_dict().items() if name != "falls"
    }


def test_template_tokens_do_not_count():
    """They are read by the model but not measured."""
    analysis = analyze_layers(build_tiny_model(), build_tiny_tokenizer(), PAIRS, tokens_per_row=None)
    expected = sum(pair.target.num_query_tokens + pair.target.num_answer_tokens for pair in PAIRS)
    assert analysis["target"]["tokens"] == expected < sum(len(pair.target.ids) for pair in PAIRS)


def test_tokens_of_a_row_are_limited():
    analysis = analyze_layers(build_tiny_model(), build_tiny_tokenizer(), PAIRS, tokens_per_row=3)
    counts = [pair.target.num_query_tokens + pair.target.num_answer_tokens for pair in PAIRS]
    assert analysis["target"]["tokens"] == sum(min(3, count) for count in counts) < sum(counts)


def test_rows_without_english():
    pairs = [Pair(PAIRS[0].target, PAIRS[0].english), *(Pair(pair.target, None) for pair in PAIRS[1:])]
    analysis = analyze_layers(build_tiny_model(), build_tiny_tokenizer(), pairs)
    assert analysis["english"]["sequences"] == 1
    assert num_sequences(pairs) == 10
    alone = analyze_layers(build_tiny_model(), build_tiny_tokenizer(), pairs[1:])
    assert alone["english"] is None
    with pytest.raises(UsageError, match="needs rows with a target-language prompt"):
        analyze_layers(build_tiny_model(), build_tiny_tokenizer(), [Pair(None, PAIRS[0].english)])


def test_progress_goes_through_both_languages():
    done: list[int] = []
    analyze_layers(build_tiny_model(), build_tiny_tokenizer(), PAIRS, batch_size=4, progress=done.append)
    assert done == [4, 8, 9, 13, 17, 18]
    assert done[-1] == num_sequences(PAIRS)


def test_model_is_left_as_it_was():
    model = build_tiny_model().train()
    analyze_layers(model, build_tiny_tokenizer(), PAIRS)
    assert model.training
    assert hook_count(model) == 0
    assert all(parameter.grad is None for parameter in model.parameters())
