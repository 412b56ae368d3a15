from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from tiny_training import arguments, assert_same, make_pairs, run_config, step_logs, tiny_trainer, weights
from torch import nn

from pivotune.config.registry import METHODS
from pivotune.config.supervision import SupervisionConfig
from pivotune.data.datasets import training_examples
from pivotune.errors import UsageError
from pivotune.objectives.deep_supervision import deep_supervision_terms
from pivotune.runs.prepare import prepare_run

STEPS, PHASE = 6, 3
PLAIN = {
    "max_steps": STEPS,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.1,
    "supervision_schedule": "linear",
    "conversion_weight": 0.7,
    "thinking_weight": 0.4,
}


def phase(**options: Any) -> dict[str, Any]:
    return {**PLAIN, "supervision": {"phase": {"steps": PHASE, **options}}}


def by_hand(trainer: Any, *, task: bool, learning_rate: float | None) -> nn.Module:
    """The run written out: losses that do not train are not computed, so that their weights have no gradient."""
    model = build_tiny_model()
    decayed = trainer.get_decay_parameter_names(model)
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in decayed], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    loader = trainer.get_train_dataloader()
    batches = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        trainer.state.epoch = epoch
        batches += list(loader)
    for step, batch in enumerate(batches[:STEPS]):
        terms = deep_supervision_terms(model, batch, trainer.supervision)
        means = {name: term.sum / term.count.clamp(min=1) for name, term in terms.items()}
        factor = 1 - step / (PHASE - 1)
        aligning = factor * (0.7 * means["conversion"] + 0.4 * means["thinking"]) if factor > 0 else None
        losses = [aligning] if step < PHASE else [means["tft"]]
        losses += [means["tft"]] if step < PHASE and task else []
        used = [loss for loss in losses if loss is not None]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate if step < PHASE and learning_rate else 1e-2
        optimizer.zero_grad()
        if used:
            torch.stack(used).sum().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(("task", "learning_rate"), [(False, None), (False, 3e-3), (True, 3e-3)])
def test_the_run_is_the_one_written_out(tmp_path, task, learning_rate):
    options = phase(task=task, learning_rate=learning_rate)
    trainer = tiny_trainer(tmp_path, **options)
    expected = weights(by_hand(tiny_trainer(tmp_path, **options), task=task, learning_rate=learning_rate))
    trainer.train()
    assert_same(weights(trainer.model), expected, tolerance=2e-4)
    without = tiny_trainer(tmp_path, **PLAIN)
    without.train()
    assert (weights(without.model)["lm_head.weight"] - expected["lm_head.weight"]).abs().max() > 1e-3


def test_weights_above_the_layers_stay_as_they_are_in_the_phase(tmp_path):
    """Also under weight decay."""
    before = weights(build_tiny_model())
    trainer = tiny_trainer(tmp_path, **{**phase(), "max_steps": PHASE + 1})
    seen = {}

    def look(*args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == PHASE - 1:
            seen.update(weights(trainer.model))

    trainer.create_optimizer().register_step_post_hook(look)
    trainer.train()
    moved = {name for name, tensor in seen.items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("model.layers.2.") for name in moved)
    assert not {"lm_head.weight", "model.norm.weight"} & moved
    assert not any(name.startswith("model.layers.3.") for name in moved)


@pytest.mark.parametrize("kind", ["linear", "reduce_lr_on_plateau"])
def test_the_scheduled_learning_rate_is_back_after_the_phase(tmp_path, kind):
    """A scheduler by steps sets it anew in every step; one by evaluations changes the value that it finds."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 100, "metric_for_best_model": "eval_target_loss"}
    options = {**phase(learning_rate=3e-3), **evaluation, "lr_scheduler_type": kind}
    trainer, rates = tiny_trainer(tmp_path, trainer={"eval_dataset": make_pairs(2)}, **options), []
    trainer.create_optimizer().register_step_pre_hook(lambda used, *_: rates.append(used.param_groups[0]["lr"]))
    trainer.train()
    after = [1e-2 * (1 - step / STEPS) for step in range(PHASE, STEPS)] if kind == "linear" else [1e-2] * 3
    assert rates == pytest.approx([3e-3] * PHASE + after)
    assert [line["learning_rate"] for line in step_logs(trainer)] == pytest.approx(rates)


def test_log_lines_report_the_phase(tmp_path):
    trainer = tiny_trainer(tmp_path, **phase(learning_rate=3e-3))
    trainer.train()
    lines = step_logs(trainer)
    assert [line["supervision_factor"] for line in lines] == [1.0, 0.5, 0.0, 0.0, 0.0, 0.0]
    assert [line["learning_rate"] for line in lines] == [3e-3] * PHASE + [1e-2] * 3
    assert ["thinking_loss" in line for line in lines] == [True, True, *[False] * 4]
    assert all("tft_loss" in line for line in lines)
    assert lines[0]["loss"] == pytest.approx(0.7 * lines[0]["conversion_loss"] + 0.4 * lines[0]["thinking_loss"])
    assert lines[3]["loss"] == pytest.approx(lines[3]["tft_loss"])


def test_in_turn_inner_losses_and_the_task_train_alone(tmp_path):
    """The optimizer sees one kind of gradient in each step, and the schedule runs over the whole run."""
    trainer = tiny_trainer(tmp_path, **PLAIN, supervision={"alternate": True})
    trainer.balance.layers = {}
    trainer.train()
    lines = step_logs(trainer)
    assert [line["supervision_factor"] for line in lines] == pytest.approx([1.0, 0, 0.6, 0, 0.2, 0])
    assert ["thinking_loss" in line for line in lines] == [True, False] * 3
    for line in lines[::2]:
        inner = 0.7 * line["conversion_loss"] + 0.4 * line["thinking_loss"]
        assert line["loss"] == pytest.approx(line["supervision_factor"] * inner)
    assert [line["loss"] for line in lines[1::2]] == pytest.approx([line["tft_loss"] for line in lines[1::2]])
    # The head belongs to L_TFT alone.
    steps = next(s["step"] for p, s in trainer.optimizer.state.items() if p is trainer.model.lm_head.weight)
    assert int(steps) == 3


def test_in_turn_and_a_phase_are_refused():
    with pytest.raises(ValueError, match=r"supervision\.alternate: a phase has steps of its own"):
        SupervisionConfig(alternate=True, phase={"steps": 3})


def test_no_pass_of_an_inner_loss_runs_after_the_phase(tmp_path):
    trainer = tiny_trainer(tmp_path, **{**phase(), "supervision_schedule": "constant"})
    run_passes, branches = trainer._losses._run_passes, []

    def record(model: Any, batch: Any, request: Any) -> Any:
        branches.append(set(request.branches))
        return run_passes(model, batch, request)

    trainer._losses._run_passes = record
    trainer.balance.layers = {}  # measures gradients at the first step
    trainer.train()
    assert branches == [{"conversion", "thinking"}] * PHASE + [set()] * 3


def test_a_batch_of_replayed_rows_alone(tmp_path):
    """It has nothing to align: no weight moves, and training goes on."""
    trainer = tiny_trainer(tmp_path, **{**phase(), "max_steps": 4, "supervision_schedule": "constant"})
    trainer.train_dataset.examples = training_examples(make_pairs(16), METHODS["english-only"])
    trainer.train()
    lines = step_logs(trainer)
    assert [line["grad_norm"] > 0 for line in lines] == [False] * PHASE + [True]
    assert [line["loss"] > 0 for line in lines] == [False] * PHASE + [True]


def test_a_method_without_inner_losses_has_no_phase(tmp_path):
    one, other = tiny_trainer(tmp_path, method="tft", **phase()), tiny_trainer(tmp_path, method="tft", **PLAIN)
    for trainer in (one, other):
        trainer.train()
    assert step_logs(one) == step_logs(other)
    assert_same(weights(one.model), weights(other.model))


# ---- mistakes ----


def test_a_phase_that_takes_the_whole_run(tmp_path):
    trainer = tiny_trainer(tmp_path, **{**phase(), "max_steps": PHASE})
    start = weights(trainer.model)
    with pytest.raises(
        UsageError, match=r"^supervision\.phase\.steps: 3 is not below the run's 3 optimizer steps; no "
    ):
        trainer.train()
    assert_same(weights(trainer.model), start)


@pytest.mark.parametrize(("steps", "refused"), [(7, False), (8, True)])
def test_a_run_counts_its_steps_before_the_model_is_loaded(tmp_path, steps, refused):
    """16 rows in batches of 4, two epochs."""
    training = {**run_config(tmp_path).training, "max_steps": -1, "num_train_epochs": 2}
    config = run_config(tmp_path, training=training, supervision={"phase": {"steps": steps}})
    if not refused:
        prepare_run(config)
        return
    with pytest.raises(UsageError, match=r"^supervision\.phase\.steps: 8 is not below the run's 8 optimizer steps"):
        prepare_run(config)


@pytest.mark.parametrize("option", [{"task": True}, {"learning_rate": 1e-4}])
def test_options_without_a_phase(tmp_path, option):
    with pytest.raises(UsageError, match=r"task and learning_rate belong to a phase; set supervision\.phase\.steps$"):
        arguments(tmp_path, supervision={"phase": option})
