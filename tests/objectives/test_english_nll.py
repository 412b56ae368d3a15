from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_model
from tiny_batches import by_hand_logits, gradients, make_batch, make_examples, signal, supervise
from torch import Tensor, nn

from pivotune.config.supervision import SupervisionConfig
from pivotune.models.architecture import find_architecture
from pivotune.objectives.deep_supervision import deep_supervision_terms
from pivotune.objectives.english_nll import positional_targets

LAYERS = {"conversion": 1, "thinking": 3}
SIDES = {"conversion": "query", "thinking": "answer"}


def supervision(**options) -> SupervisionConfig:
    signals = {name: signal(kind="logits", layer=layer) for name, layer in LAYERS.items()}
    return supervise(**signals, **options)


def english_tokens(example, side: str) -> list[int]:
    english = example.parallel
    return (english.ids[slice(*english.query)] if side == "query" else english.ids[english.answer :]).tolist()


def last_state(model: nn.Module, tokens: list[int], layer: int) -> Tensor:
    """`h_layer` at the last of the tokens, from a plain pass of the whole model."""
    seen = []
    block = find_architecture(model).blocks[layer - 1]
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output))
    model(input_ids=torch.tensor([tokens]), use_cache=False)
    handle.remove()
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return output[0, -1]


def negative_log_likelihood(model: nn.Module, state: Tensor, token: int, norm: str) -> Tensor:
    """-log softmax(transform(W norm(h)))[token], the head and the norm as constants."""
    architecture = find_architecture(model)
    if norm == "final":
        state = architecture.final_norm(state)
    return -by_hand_logits(model, architecture.lm_head, state).log_softmax(dim=-1)[token]


def naive_autoregressive(model: nn.Module, name: str, norm: str) -> list[Tensor]:
    """For each row and each English token: one pass over the prompt and the English tokens before it."""
    losses = []
    for example in make_examples(4):
        if example.parallel is None:
            continue
        prompt = example.main.ids[: example.main.answer].tolist()
        tokens = english_tokens(example, SIDES[name])
        for place, token in enumerate(tokens):
            state = last_state(model, prompt + tokens[:place], LAYERS[name])
            losses.append(negative_log_likelihood(model, state, token, norm))
    return losses


def freeze_readout(model: nn.Module) -> None:
    architecture = find_architecture(model)
    for module in (architecture.final_norm, architecture.lm_head):
        module.requires_grad_(False)


@pytest.mark.parametrize("norm", ["final", "none"])
def test_autoregressive_loss_equals_a_naive_loop_over_tokens(distinct_family, norm):
    model = build_tiny_model(distinct_family)
    terms = deep_supervision_terms(model, make_batch(4), supervision(logits_norm=norm))
    for name in LAYERS:
        with torch.no_grad():
            losses = naive_autoregressive(model, name, norm)
        assert int(terms[name].count) == len(losses)
        assert terms[name].sum.item() == pytest.approx(sum(losses).item(), rel=2e-5)


def test_autoregressive_gradient_equals_that_of_the_naive_loop():
    """With norm and head frozen by `requires_grad_` in the naive loop; here without touching them."""
    model = build_tiny_model("gemma2", tie_word_embeddings=False)
    actual = {
        name: gradients(model, deep_supervision_terms(model, make_batch(4), supervision())[name].sum) for name in LAYERS
    }
    freeze_readout(model)
    for name in LAYERS:
        expected = gradients(model, sum(naive_autoregressive(model, name, "final")))
        # Both losses go through one call of the head, so what only the other one reaches gets zeros.
        assert expected.keys() <= actual[name].keys()
        for parameter, gradient in actual[name].items():
            wanted = expected.get(parameter, torch.zeros_like(gradient))
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def naive_positional(model: nn.Module, name: str, norm: str) -> list[Tensor]:
    losses = []
    for example in make_examples(4):
        if example.parallel is None:
            continue
        main = example.main
        start, end = main.query if name == "conversion" else (main.answer - 1, len(main.ids) - 1)
        tokens = english_tokens(example, SIDES[name])
        for position, token in zip(range(start, end), tokens, strict=False):  # cut to the shorter side
            state = last_state(model, main.ids[: position + 1].tolist(), LAYERS[name])
            losses.append(negative_log_likelihood(model, state, token, norm))
    return losses


@pytest.mark.parametrize("norm", ["final", "none"])
def test_positional_loss_equals_naive_indexing(distinct_family, norm):
    model = build_tiny_model(distinct_family)
    terms = deep_supervision_terms(model, make_batch(4), supervision(logits_mode="positional", logits_norm=norm))
    for name in LAYERS:
        with torch.no_grad():
            losses = naive_positional(model, name, norm)
        assert int(terms[name].count) == len(losses)
        assert terms[name].sum.item() == pytest.approx(sum(losses).item(), rel=2e-5)


def test_positional_targets_worked_out_by_hand():
    no, yes = False, True
    batch = {
        "query_mask": torch.tensor([[no, yes, yes, yes, no, no], [yes, no, no, no, no, no]]),
        "labels": torch.tensor([[-100, -100, -100, -100, 4, 5], [-100, -100, 6, 7, 8, 9]]),
        "english_input_ids": torch.tensor([[20, 21, 22, 23, 24], [30, 31, 32, 33, 34]]),
        "english_query_mask": torch.tensor([[no, yes, yes, no, no], [yes, yes, no, no, no]]),
        "english_answer_mask": torch.tensor([[no, no, no, yes, yes], [no, no, yes, no, no]]),
    }
    positions, labels = positional_targets(batch, "query")
    assert positions.nonzero().tolist() == [[0, 1], [0, 2], [1, 0]]
    assert labels.tolist() == [21, 22, 30]
    positions, labels = positional_targets(batch, "answer")
    # The position before an answer token predicts it.
    assert positions.nonzero().tolist() == [[0, 3], [0, 4], [1, 1]]
    assert labels.tolist() == [23, 24, 32]
