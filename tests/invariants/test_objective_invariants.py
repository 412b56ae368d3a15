"""Invariants of the losses for every architecture and every signal."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from conftest import DISTINCT_FAMILIES, NUM_LAYERS, build_tiny_model
from tiny_batches import (
    attention_implementations,
    build_tied_pair,
    collate,
    gradients,
    hook_count,
    make_batch,
    make_examples,
    relative_difference,
    signal,
    single_rows,
    supervise,
    values,
)
from torch import Tensor, nn

from pivotune.config.supervision import SupervisionConfig
from pivotune.forward.passes import separate_passes, shared_passes
from pivotune.models.architecture import find_architecture
from pivotune.objectives.base import weighted_total
from pivotune.objectives.deep_supervision import deep_supervision_terms, term_counts

TFT = supervise()
# Between them every kind of pass and loss.
SUPERVISIONS = {
    "logits": supervise(
        conversion=signal(kind="logits", layer=1), thinking=signal(kind="logits", layer=2)
    ),
    "positional": supervise(
        conversion=signal(kind="logits", layer=1), thinking=signal(kind="logits", layer=2), logits_mode="positional"
    ),
    "feature": supervise(
        conversion=signal(kind="feature", layer=1), thinking=signal(kind="feature", layer=2), span="query+answer"
    ),
    "joint": supervise(
        conversion=signal(kind="feature", layer=1), thinking=signal(kind="feature", layer=2), english="joint"
    ),
    "mixed": supervise(
        conversion=signal(kind="feature", layer=1), thinking=signal(kind="logits", layer=2), pooling="last"
    ),
}  # fmt: skip
WEIGHTS = {"tft": 1.0, "conversion": 0.3, "thinking": 0.7}
OFF = {"tft": 1.0, "conversion": 0.0, "thinking": 0.0}
INNER = ("conversion", "thinking")


# Objectives know no family, and families no objective: every signal on one family, and on the others the two that between
# them run branches of both kinds and a pass of their own.
OTHERS = [family for family in DISTINCT_FAMILIES if family != "llama"]
_PAIRS = [("llama", name) for name in SUPERVISIONS] + [
    (other, name) for other in OTHERS for name in ("logits", "mixed")
]
families_and_signals = pytest.mark.parametrize(
    ("family", "supervision"),
    [pytest.param(family, SUPERVISIONS[name], id=f"{family}-{name}") for family, name in _PAIRS],
)


def total(model: nn.Module, batch: dict[str, Tensor], config: SupervisionConfig, weights=WEIGHTS, **options) -> Tensor:
    terms = deep_supervision_terms(model, batch, config, **options)
    return weighted_total(terms, weights, term_counts(batch, config))


def inner_loss(model: nn.Module, batch: dict[str, Tensor], config: SupervisionConfig) -> Tensor:
    terms = deep_supervision_terms(model, batch, config)
    return terms["conversion"].sum + terms["thinking"].sum


# --- weight 0 is plain fine-tuning ---------------------------------------------------------------------------------


# The trainer leaves terms of weight 0 out. Without that branches in the same forward change how products are rounded.
@families_and_signals
@pytest.mark.parametrize("options", [{"run_passes": separate_passes}, {"skip": frozenset(INNER)}])
def test_weight_zero_equals_tft_bit_for_bit(family, supervision, options):
    model, batch = build_tiny_model(family), make_batch(4)
    plain = total(model, batch, TFT, run_passes=options.get("run_passes"))
    other = total(model, batch, supervision, OFF, **options)
    assert torch.equal(plain, other)
    expected, actual = gradients(model, plain), gradients(model, other)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())
    # The comparison could fail: with weights the loss and its gradient are others.
    weighted = total(model, batch, supervision)
    assert weighted.item() > plain.item() + 1e-3
    assert relative_difference(gradients(model, weighted), expected) > 1e-4


# --- one window, however it is cut ---------------------------------------------------------------------------------


def window_gradients(model: nn.Module, config: SupervisionConfig, rows: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of 8 examples in micro-batches of `rows`, divided by the counts of the whole window."""
    examples = make_examples(8)
    batches = [collate(examples[start : start + rows]) for start in range(0, 8, rows)]
    counts = [term_counts(batch, config) for batch in batches]
    window = {name: torch.stack([count[name] for count in counts]).sum() for name in counts[0]}
    model.zero_grad()
    loss = 0.0
    for batch in batches:
        part = weighted_total(deep_supervision_terms(model, batch, config), WEIGHTS, window)
        part.backward()
        loss += part.item()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Rounding alone puts gradients in float32 up to 1.2e-6 (Gemma 3) from those in float64, where the test is stricter.
@families_and_signals
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-7)])
def test_accumulation_window_is_one_step_however_it_is_cut(family, supervision, dtype, tolerance):
    model = build_tiny_model(family).to(dtype)
    loss, expected = window_gradients(model, supervision, 8)
    for rows in (1, 4) if dtype == torch.float64 else (1,):
        other_loss, actual = window_gradients(model, supervision, rows)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert relative_difference(actual, expected) < tolerance


@pytest.mark.parametrize("supervision", SUPERVISIONS.values(), ids=SUPERVISIONS)
def test_micro_batches_divided_by_their_own_counts_are_another_step(supervision):
    """The window test would miss this if all rows were alike."""
    model = build_tiny_model()
    _, expected = window_gradients(model, supervision, 8)
    model.zero_grad()
    for row in make_examples(8):
        (total(model, collate([row]), supervision) / 8).backward()
    wrong = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_difference(wrong, expected) > 1e-3


@families_and_signals
def test_counts_from_masks_equal_those_of_the_terms(family, supervision):
    model, examples = build_tiny_model(family), make_examples(8)
    for chosen in (examples, [e for e in examples if e.english_prompt], [e for e in examples if not e.english_prompt]):
        batch = collate(chosen)
        terms = deep_supervision_terms(model, batch, supervision)
        assert values(terms).keys() == term_counts(batch, supervision).keys()
        assert {n: count for n, (_, count) in values(terms).items()} == {
            n: int(count) for n, count in term_counts(batch, supervision).items()
        }


# --- rows do not touch each other ----------------------------------------------------------------------------------


@families_and_signals
def test_row_alone_equals_the_row_in_a_padded_batch(family, supervision):
    model, examples = build_tiny_model(family), make_examples(4)
    alone = [values(deep_supervision_terms(model, collate([example]), supervision)) for example in examples]
    padded = [values(deep_supervision_terms(model, row, supervision)) for row in single_rows(collate(examples))]
    together = values(deep_supervision_terms(model, collate(examples), supervision))
    for name, (loss, count) in together.items():
        assert count == sum(row[name][1] for row in alone)
        assert loss == pytest.approx(sum(row[name][0] for row in alone), rel=1e-5, abs=1e-5)
        for one, other in zip(alone, padded, strict=True):
            assert other[name][1] == one[name][1]
            assert other[name][0] == pytest.approx(one[name][0], rel=1e-5, abs=1e-5)


@families_and_signals
def test_english_replay_rows_change_the_answer_loss_only(family, supervision):
    model, examples = build_tiny_model(family), make_examples(8)
    target = [example for example in examples if not example.english_prompt]
    replay = [example for example in examples if example.english_prompt]
    without = deep_supervision_terms(model, collate(target), supervision)
    with_replay = deep_supervision_terms(model, collate(examples), supervision)
    for name in INNER:
        assert int(with_replay[name].count) == int(without[name].count)
        assert with_replay[name].sum.item() == pytest.approx(without[name].sum.item(), rel=1e-5)
    assert with_replay["tft"].sum.item() > without["tft"].sum.item() + 1
    one, other = (inner_loss(model, collate(rows), supervision) for rows in (target, examples))
    assert relative_difference(gradients(model, one), gradients(model, other)) < 1e-5
    # Alone they have no inner loss, hence no gradient from one.
    alone = deep_supervision_terms(model, collate(replay), supervision)
    for name in INNER:
        assert values(alone)[name] == (0.0, 0)
        if alone[name].sum.requires_grad:
            loss = deep_supervision_terms(model, collate(replay), supervision)[name].sum
            assert all(not gradient.any() for gradient in gradients(model, loss).values())


# --- the frozen head -----------------------------------------------------------------------------------------------


@families_and_signals
def test_inner_losses_reach_only_the_blocks_below_them(family, supervision):
    """Neither head nor final norm, nor a block above layer 2 (joint features reach all blocks through the English side)."""
    _, model = build_tied_pair(family)
    architecture = find_architecture(model)
    found = gradients(model, inner_loss(model, make_batch(4), supervision))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    below, above = (
        {names[id(p)] for block in blocks for p in block.parameters()}
        for blocks in (architecture.blocks[:2], architecture.blocks[2:])
    )
    norm = {names[id(p)] for p in architecture.final_norm.parameters()}
    assert names[id(architecture.lm_head.weight)] not in found
    assert below <= found.keys()
    assert not norm & found.keys()
    if supervision.feature.english != "joint":
        assert not above & found.keys()
    else:
        assert above <= found.keys()


@families_and_signals
def test_tied_embeddings_get_inner_gradient_through_the_network_only(family, supervision):
    """The embedding's gradient is that of a copy in which the head is a matrix of its own."""
    tied, untied = build_tied_pair(family)
    batch = make_batch(4)
    loss, copied = inner_loss(tied, batch, supervision), inner_loss(untied, batch, supervision)
    assert torch.equal(loss, copied)
    found, expected = gradients(tied, loss), gradients(untied, copied)
    assert untied.get_output_embeddings().weight.grad is None
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    # The answer loss does train the head: there the two models differ.
    both, network = (gradients(model, total(model, batch, TFT)) for model in (tied, untied))
    assert len(network) == len(both) + 1
    assert relative_difference(both, {name: network[name] for name in both}) > 1e-3


# --- the model is left as it was -----------------------------------------------------------------------------------


class InterruptionError(Exception):
    pass


def interrupt(model: nn.Module, call: int):
    """Make the `call`-th pass of the model fail in its first block's attention."""
    calls = []

    def hook(module, args) -> None:
        calls.append(1)
        if len(calls) == call:
            raise InterruptionError

    return find_architecture(model).blocks[0].register_forward_pre_hook(hook)


PASSES = [
    ("logits", shared_passes, 1),
    ("mixed", shared_passes, 2),
    ("logits", separate_passes, 3),
    ("mixed", separate_passes, 3),
    ("feature", shared_passes, 2),
    ("positional", shared_passes, 1),
]


@pytest.mark.parametrize(
    ("family", "name", "run_passes", "passes"),
    [("llama", *each) for each in PASSES] + [(other, *each) for other in OTHERS for each in PASSES[:2]],
)
def test_nothing_stays_in_the_model_after_an_exception_in_any_pass(family, name, run_passes, passes):
    model, batch = build_tiny_model(family), make_batch(4)
    config = SUPERVISIONS[name]
    before = hook_count(model), attention_implementations(model)
    expected = values(deep_supervision_terms(model, batch, config, run_passes=run_passes))
    for call in range(1, passes + 2):
        handle = interrupt(model, call)
        with pytest.raises(InterruptionError) if call <= passes else nullcontext():
            deep_supervision_terms(model, batch, config, run_passes=run_passes)
        handle.remove()
        assert (hook_count(model), attention_implementations(model)) == before
        assert len(find_architecture(model).blocks) == NUM_LAYERS
    assert values(deep_supervision_terms(model, batch, config, run_passes=run_passes)) == expected


@families_and_signals
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(family, supervision, use_reentrant):
    model, batch = build_tiny_model(family).train(), make_batch(4)
    loss = total(model, batch, supervision)
    expected = gradients(model, loss)
    # transformers renamed the method; the old name warns from 5.2x on and goes with v6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    checkpointed = total(model, batch, supervision)
    assert checkpointed.item() == pytest.approx(loss.item(), rel=1e-6)
    assert relative_difference(gradients(model, checkpointed), expected) < 1e-6
