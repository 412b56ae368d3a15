from __future__ import annotations

import inspect
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import assert_same, make_pairs, tiny_trainer, weights
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from pivotune.errors import UsageError
from pivotune.training.resilience.checkpoints import CHECKSUMS, checkpoints
from pivotune.training.resilience.counters import TrainingDivergedError
from pivotune.training.resilience.fault_tolerant import OVERRIDDEN, FaultTolerantTrainer
from pivotune.training.trainer import DeepSupervisionTrainer

# Four optimizer steps of two micro-batches.
OPTIONS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "nonfinite": "skip"}


class Poison(TrainerCallback):
    """Losses or gradients that are no numbers at some steps (from 1); keeps the weights after every step."""

    def __init__(self, trainer: Any, *steps: int, gradient: bool = False) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.rates: list[float] = []
        compute_loss, training_step = trainer.compute_loss, trainer.training_step

        def loss(*args: Any, **options: Any) -> Any:
            bad = trainer.state.global_step + 1 in steps and not gradient
            return compute_loss(*args, **options) * (math.nan if bad else 1.0)

        def step(model: Any, *args: Any, **options: Any) -> Any:
            result = training_step(model, *args, **options)
            if trainer.state.global_step + 1 in steps and gradient:
                next(model.parameters()).grad[0, 0] = math.inf
            return result

        trainer.compute_loss, trainer.training_step = loss, step
        trainer.add_callback(self)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        self.weights.append(weights(model))
        self.rates.append(lr_scheduler.get_last_lr()[0])


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_skipped_step_changes_nothing_but_the_schedule(tmp_path, caplog, gradient, clip):
    trainer = tiny_trainer(tmp_path, max_grad_norm=clip, weight_decay=0.1, **OPTIONS)
    poison = Poison(trainer, 2, gradient=gradient)
    trainer.train()
    assert_same(poison.weights[0], poison.weights[1])
    assert any(not torch.equal(tensor, poison.weights[2][name]) for name, tensor in poison.weights[1].items())
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {3}
    assert len(set(poison.rates)) == 4
    assert trainer.state.global_step == 4
    found = "the gradient is not a finite number" if gradient else "the loss is not a finite number"
    (message,) = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert message.startswith(f"{found} at step 2 (")
    assert message.endswith(": step skipped (1 of at most 10)")


def test_log_lines_are_means_over_the_steps_that_were_done(tmp_path):
    """The line of a step that was skipped alone has no loss; a window with one leaves it out."""
    trainer = tiny_trainer(tmp_path, **OPTIONS)
    Poison(trainer, 3)
    single = trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line.get("skipped_steps") for line in lines] == [None, None, 1, 1]
    assert math.isnan(lines[2]["loss"])
    assert "tft_loss" not in lines[2]
    done = [lines[index]["loss"] for index in (0, 1, 3)]
    wide = tiny_trainer(tmp_path, logging_steps=4, **OPTIONS)
    Poison(wide, 3)
    together = wide.train()
    (line,) = [line for line in wide.state.log_history if "loss" in line]
    assert line["loss"] == pytest.approx(sum(done) / 3, rel=1e-6)
    assert single.training_loss == pytest.approx(together.training_loss, rel=1e-6)
    assert single.training_loss == pytest.approx(sum(done) / 3, rel=1e-6)


def test_more_than_the_limit_stops_before_the_weights_change(tmp_path):
    trainer = tiny_trainer(tmp_path, skip_limit=1, **OPTIONS)
    poison = Poison(trainer, 2, 4)
    with pytest.raises(TrainingDivergedError, match=r"at step 4 .* 1 steps were skipped before.*faults.skip_limit"):
        trainer.train()
    assert_same(weights(trainer.model), poison.weights[2])


def test_rows_are_named_by_their_numbers_in_the_file(tmp_path, monkeypatch):
    """Those of the bad micro-batch, not of the whole step."""
    trainer = tiny_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    compute_loss, seen = trainer.compute_loss, []

    def poisoned(model: Any, inputs: Any, **options: Any) -> Any:
        seen.append(sorted(inputs["row_numbers"].tolist()))
        return compute_loss(model, inputs, **options) * (math.nan if len(seen) == 4 else 1.0)

    monkeypatch.setattr(trainer, "compute_loss", poisoned)
    with pytest.raises(TrainingDivergedError) as raised:
        trainer.train()
    assert f"at step 2 (no term by itself; rows {seen[3][0]}, {seen[3][1]})" in str(raised.value)
    assert seen[2] != seen[3]
    assert {number for numbers in seen for number in numbers} <= {pair.number for pair in make_pairs(16)}


def test_checkpoints_hold_no_pickle_that_runs_code(tmp_path):
    """What torch saves is read as tensors and plain values only; a planted program is refused, not run."""
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer = tiny_trainer(tmp_path, **options)
    trainer.train()
    (newest, older) = checkpoints(tmp_path)
    assert {path.suffix for path in newest.iterdir()} <= {".json", ".jinja", ".safetensors", ".pt", ".pth"}
    assert not (newest / "training_args.bin").exists()
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(older / name, weights_only=True)

    class Planted:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "planted"),)

    (older / CHECKSUMS).unlink()
    for name in ("optimizer.pt", "rng_state.pth"):
        kept = (older / name).read_bytes()
        torch.save(Planted(), older / name, pickle_module=pickle)
        with pytest.raises(UsageError, match="not read"):
            tiny_trainer(tmp_path, **options).train(resume_from_checkpoint=str(older))
        assert not (tmp_path / "planted").exists()
        (older / name).write_bytes(kept)


def test_counters_stand_in_the_checkpoint(tmp_path):
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=2, logging_steps=4)
    trainer.train()
    state = json.loads((Path(tmp_path) / "checkpoint-2" / "trainer_state.json").read_text())
    counters = state["stateful_callbacks"]["PivotuneCounters"]["attributes"]
    assert (counters["skipped_steps"], counters["window_steps"]) == (0, 2)
    assert counters["loss_sum"] > 0


def test_a_checkpoint_of_a_plain_trainer_goes_on(tmp_path):
    """It knows nothing of the callbacks here, nor of one that the user adds."""
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["stateful_callbacks"] = {}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / CHECKSUMS).unlink()
    stopping = {"eval_dataset": make_pairs(4), "callbacks": [EarlyStoppingCallback(9)]}
    resumed = tiny_trainer(
        tmp_path, trainer=stopping, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True,
    )  # fmt: skip
    result = resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    done = [line["loss"] for line in resumed.state.log_history if "loss" in line][-2:]
    assert result.training_loss == pytest.approx(sum(done) / 2)


def test_overridden_methods_of_transformers_are_listed_and_exist():
    """A release that drops, renames or no longer calls one of them must not pass unnoticed."""
    private = {
        name: kind
        for kind in DeepSupervisionTrainer.__mro__[: DeepSupervisionTrainer.__mro__.index(Trainer)]
        for name, value in vars(kind).items()
        if name.startswith("_") and not name.startswith("__") and callable(value) and hasattr(Trainer, name)
    }
    assert private.keys() == OVERRIDDEN.keys()
    assert len(OVERRIDDEN) <= 5
    assert set(private.values()) == {FaultTolerantTrainer}
    source = inspect.getsource(Trainer)
    for name in OVERRIDDEN:
        assert name in vars(Trainer)
        assert f"self.{name}(" in source
    # Called or set here without being overridden.
    for name in ("_evaluate", "_determine_best_metric", "_initial_global_step", "_train_batch_size"):
        assert f"self.{name}" in source
