from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_model
from tiny_batches import gradients, make_batch, signal, supervise
from tiny_training import tiny_trainer, weights

from pivotune.config.supervision import BalanceConfig, SupervisionConfig
from pivotune.errors import UsageError
from pivotune.models.architecture import find_architecture
from pivotune.objectives.deep_supervision import DeepSupervisionLoss
from pivotune.training import gradient_balance
from pivotune.training.gradient_balance import GradientBalance, GradientFigures, measure_gradients

LAYERS = {"conversion": 1, "thinking": 3}
SUPERVISION = supervise(
    conversion=signal(kind="logits", layer=1), thinking=signal(kind="logits", layer=3), logits_gradient="prompt"
)


def flat(model, loss, layer: int) -> torch.Tensor:
    found = gradients(model, loss)
    blocks = find_architecture(model).blocks[:layer]
    names = {id(p) for block in blocks for p in block.parameters()}
    return torch.cat([found[n].flatten() for n, p in model.named_parameters() if id(p) in names and n in found])


def test_figures_are_those_of_separate_backward_passes(distinct_family):
    model, batch = build_tiny_model(distinct_family), make_batch(8)
    figures = measure_gradients(model, batch, DeepSupervisionLoss(SUPERVISION), LAYERS)
    assert all(parameter.grad is None for parameter in model.parameters())
    english = {name: tensor[batch["english_answer"]] for name, tensor in batch.items()}
    for name, layer in LAYERS.items():

        def mean(term, rows=batch):
            found = DeepSupervisionLoss(SUPERVISION).terms(model, rows)[term]
            return found.sum / found.count

        own, task = flat(model, mean(name), layer), flat(model, mean("tft"), layer)
        replay = flat(model, mean("tft", english), layer)
        assert figures[name].ratio == pytest.approx((own.norm() / task.norm()).item(), rel=1e-4)
        assert figures[name].cosine == pytest.approx(torch.cosine_similarity(own, task, dim=0).item(), abs=1e-4)
        assert figures[name].english_cosine == pytest.approx(
            torch.cosine_similarity(own, replay, dim=0).item(), abs=1e-4
        )


def test_large_models_are_sampled(monkeypatch):
    model, batch = build_tiny_model(), make_batch(8)
    losses = DeepSupervisionLoss(SUPERVISION)
    whole = measure_gradients(model, batch, losses, LAYERS)
    block = sum(p.numel() for p in find_architecture(model).blocks[0].parameters())
    monkeypatch.setattr(gradient_balance, "LARGEST_SAMPLE", 2 * block)
    sampled = measure_gradients(model, batch, losses, LAYERS)
    assert sampled["thinking"].ratio != whole["thinking"].ratio
    assert sampled["conversion"].ratio == pytest.approx(whole["conversion"].ratio, rel=1e-5)


def test_rows_without_a_loss_have_no_figure():
    batch = make_batch(8)
    target = {name: tensor[~batch["english_attention_mask"].any(1)] for name, tensor in batch.items()}
    assert measure_gradients(build_tiny_model(), target, DeepSupervisionLoss(SUPERVISION), LAYERS) == {}


@pytest.mark.parametrize(("english", "factor"), [(0.2, 0.25), (None, 0.25), (-0.01, 0.0)])
def test_factors_bound_and_gate(monkeypatch, english, factor):
    """Weight 0.5 and ratio 4 make a share of 2, bounded by 0.5: a factor of one quarter."""
    figures = {"thinking": GradientFigures(4.0, 0.1, english), "conversion": GradientFigures(0.1, 0.1, english)}
    monkeypatch.setattr(gradient_balance, "measure_gradients", lambda *args: figures)
    balance = GradientBalance(BalanceConfig(mode="gradient", max_share=0.5), LAYERS)
    term_weights = {"tft": 1.0, "thinking": 0.5, "conversion": 0.5}
    balance.measure(build_tiny_model(), {}, DeepSupervisionLoss(SUPERVISION), term_weights, 0, lambda values: values)
    gated = 0.0 if factor == 0 else 1.0
    assert balance.factors == {"thinking": factor, "conversion": gated}
    logged = balance.take_figures()
    assert logged["thinking_gradient_share"] == pytest.approx(2.0 * factor)
    assert logged["thinking_factor"] == factor
    assert balance.take_figures() == {}
    assert ("thinking_english_cosine" in logged) == (english is not None)


def step_logs(trainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "loss" in line]


def trained(folder, mode: str, **changes):
    supervision = {**SUPERVISION.model_dump(), "balance": {"mode": mode, "every": 2, "max_share": 0.01}}
    options = {"supervision": supervision, "max_steps": 4, "logging_steps": 1, "learning_rate": 0.01, **changes}
    trainer = tiny_trainer(folder, **options)
    trainer.train()
    return trainer


def test_measuring_changes_no_number_and_balancing_does(tmp_path, monkeypatch):
    measured = trained(tmp_path / "a", "none")
    lines = step_logs(measured)
    assert ["thinking_gradient_share" in line for line in lines] == [True, False, True, False]
    balanced = trained(tmp_path / "b", "gradient")
    assert all(line["thinking_gradient_share"] <= 0.01 + 1e-6 for line in step_logs(balanced)[::2])
    monkeypatch.setattr(GradientBalance, "due", lambda self, step: False)
    plain = trained(tmp_path / "c", "none")
    one, two, three = (weights(trainer.model) for trainer in (measured, plain, balanced))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)


def test_a_resumed_run_keeps_its_factors(tmp_path):
    whole = trained(tmp_path / "a", "gradient", save_strategy="steps", save_steps=3)
    resumed = tiny_trainer(
        tmp_path / "a",
        supervision={**SUPERVISION.model_dump(), "balance": {"mode": "gradient", "every": 2, "max_share": 0.01}},
        max_steps=4, logging_steps=1, learning_rate=0.01, save_strategy="steps", save_steps=3,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert all(torch.equal(one, two) for one, two in zip(
        weights(whole.model).values(), weights(resumed.model).values(), strict=True
    ))  # fmt: skip


def test_gradients_that_cannot_be_taken_one_by_one(tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(
        UsageError, match="balance: gradient cannot be measured where activation checkpoints are reentrant"
    ):
        trained(tmp_path, "gradient", **options)
    assert not any("thinking_cosine" in line for line in step_logs(trained(tmp_path, "none", **options)))


def test_short_form():
    assert SupervisionConfig.model_validate({"balance": "gradient"}).balance.mode == "gradient"
