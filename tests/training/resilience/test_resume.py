"""Every checkpoint of a run, resumed, leads to the run's own end bit for bit: weights, optimizer, log lines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from peft import LoraConfig
from tiny_training import assert_same, make_pairs, tiny_trainer, weights
from transformers import EarlyStoppingCallback, TrainerCallback

import pivotune.training.resilience.fault_tolerant as trainer_module
from pivotune.errors import UsageError
from pivotune.training.metrics import MetricsFile
from pivotune.training.resilience.checkpoints import checkpoints, find_checkpoint_damage
from pivotune.training.resilience.preemption import StoppedBySignalError, StopSignals

# Two epochs of 5 optimizer steps (the last one of an epoch is short), a checkpoint after every step.
COMMON = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 3,  # a log window that checkpoints cut through
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "english_ratio": 0.25,
    "dataloader_num_workers": 0,
}
LORA = {"peft_config": LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")}
FROZEN = {"conversion_signal": "feature", "thinking_signal": "feature", "feature_english": "frozen"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deep supervision": ({"supervision_schedule": "cosine"}, {}),
    "a phase": ({"supervision": {"phase": {"steps": 4, "learning_rate": 3e-3}}}, {}),
    "a moving average": ({"ema": 0.7}, {}),
    "a moving average of adapters": ({"ema": 0.7}, LORA),
    "kept English": ({"supervision": {"keep_english": {"kl": 0.5}}}, LORA),
    "adapters with dropout": ({"supervision_schedule": "linear"}, LORA),
    "cached English features": (FROZEN, {}),
    "rows at random": ({"train_sampling_strategy": "random", "gradient_accumulation_steps": 3}, {}),
    "evaluation and log lines by epoch": (
        {"eval_strategy": "epoch", "logging_strategy": "epoch", "logging_steps": 500, "method": "tft"},
        {"eval_dataset": make_pairs(5, seed=9)},
    ),
    "a step limit in the middle of an epoch": (
        {"max_steps": 7, "eval_strategy": "steps", "eval_steps": 2, "optim": "adafactor"},
        {"eval_dataset": make_pairs(5, seed=9)},
    ),
    "an evaluation at the last step of an epoch": (
        {"eval_strategy": "steps", "eval_steps": 5, "logging_strategy": "epoch", "logging_steps": 500, "method": "tft"},
        {"eval_dataset": make_pairs(5, seed=9)},
    ),
    "data workers": ({"dataloader_num_workers": 1, "save_steps": 4}, LORA),
}
# Between them weights, adapters, an average, a schedule and files of the starting model; the others are exhaustive.
_QUICK = ("deep supervision", "a moving average of adapters", "kept English")


def trainer_of(folder: Path, case: str, callbacks: tuple[Any, ...] = ()) -> Any:
    options, constructor = CASES[case]
    folder.mkdir(exist_ok=True)
    metrics = MetricsFile(folder / "metrics.jsonl")
    return tiny_trainer(
        folder,
        model=build_tiny_model(attention_dropout=0.2),
        rows=make_pairs(18),
        trainer={**constructor, "callbacks": [metrics, *callbacks], "stop_signals": StopSignals()},
        **{**COMMON, **options},
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without what the clock says."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "per_second" not in k and "runtime" not in k} for line in found]


def write_lines(folder: Path, found: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))


def optimizer_state(trainer: Any) -> dict[str, torch.Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    return {f"{key}.{name}": torch.as_tensor(value).clone() for key, found in state.items() for name, value in found.items()
            if value is not None}  # fmt: skip


def assert_same_end(one: Any, other: Any) -> None:
    assert_same(weights(one.model), weights(other.model))
    assert_same(optimizer_state(one), optimizer_state(other))
    assert lines(Path(one.args.output_dir)) == lines(Path(other.args.output_dir))
    assert one.state.total_flos == other.state.total_flos


@pytest.mark.parametrize(
    "case", [case if case in _QUICK else pytest.param(case, marks=pytest.mark.exhaustive) for case in CASES]
)
def test_every_checkpoint_leads_to_the_same_end(tmp_path, case):
    whole = trainer_of(tmp_path / "whole", case)
    end = whole.train()
    saved = checkpoints(tmp_path / "whole")
    assert len(saved) == (3 if "workers" in case else whole.state.global_step)
    assert len({line["step"] for line in lines(tmp_path / "whole")}) > 1
    # The newest, one in the middle of an epoch and of a log window, and (of ten) the last of the first epoch.
    for checkpoint in saved[:6:3] if len(saved) < 10 else (saved[0], saved[3], saved[5]):
        folder = tmp_path / checkpoint.name
        resumed = trainer_of(folder, case)
        # As another run left it.
        torch.manual_seed(1234)
        shutil.copytree(checkpoint, folder / checkpoint.name, dirs_exist_ok=True)
        result = resumed.train(resume_from_checkpoint=str(folder / checkpoint.name))
        assert_same_end(resumed, whole)
        assert result.training_loss == end.training_loss


class Signal(TrainerCallback):
    """A signal that comes at a step, or in the middle of the evaluation after it."""

    def __init__(self, trainer: Any, step: int, *, evaluating: bool) -> None:
        self.signals, self.step, self.evaluating = trainer.save_and_stop.signals, step, evaluating
        self.batches = 0
        trainer.add_callback(self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and not self.evaluating:
            self.signals.received = "SIGTERM"

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.batches += state.global_step == self.step
        # Not the first held-out batch: one language has been evaluated and logged before.
        if self.evaluating and self.batches == 3:
            self.signals.received = "SIGTERM"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Callable[[str], Any]:
    """Return the trainer of a case after its whole run; each is trained once."""

    @cache
    def train(case: str) -> Any:
        whole = trainer_of(tmp_path_factory.mktemp("whole"), case)
        whole.train()
        return whole

    return train


@pytest.mark.parametrize(
    ("case", "step", "evaluating"),
    [
        ("deep supervision", 3, False),
        ("evaluation and log lines by epoch", 4, False),
        ("evaluation and log lines by epoch", 5, True),
        ("a step limit in the middle of an epoch", 3, False),
        ("a step limit in the middle of an epoch", 4, True),
        ("a step limit in the middle of an epoch", 6, False),
        ("an evaluation at the last step of an epoch", 4, False),
    ],
)
def test_stopped_by_a_signal_and_resumed(tmp_path, monkeypatch, uninterrupted, case, step, evaluating):
    """The step is finished and saved; an evaluation that was due, or half done, is made up for."""
    monkeypatch.setitem(COMMON, "per_device_eval_batch_size", 2)
    whole = uninterrupted(case)
    stopped = trainer_of(tmp_path / "run", case)
    Signal(stopped, step, evaluating=evaluating)
    with pytest.raises(StoppedBySignalError) as raised:
        stopped.train()
    at = step if evaluating else step + 1
    assert raised.value.checkpoint == str(tmp_path / "run" / f"checkpoint-{at}")
    assert checkpoints(tmp_path / "run")[0].name == f"checkpoint-{at}"
    resumed = trainer_of(tmp_path / "run", case)
    resumed.train(resume_from_checkpoint=True)
    if case == "an evaluation at the last step of an epoch":
        # The epoch's line was written on leaving, before that of the evaluation.
        by_kind = sorted(lines(tmp_path / "run"), key=lambda line: (line["step"], "train_loss" in line, "loss" in line))
        assert by_kind != lines(tmp_path / "run")
        write_lines(tmp_path / "run", by_kind)
    assert_same_end(resumed, whole)


# ---- the best checkpoint, and early stopping ----

BEST = {
    "learning_rate": 1e-3,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "per_device_eval_batch_size": 2,
    "max_steps": 4,
}


def best_trainer(folder: Path, *callbacks: Any, **changes: Any) -> Any:
    """Better with every step: its best checkpoint is the last."""
    trainer = {"eval_dataset": make_pairs(16), "callbacks": list(callbacks), "stop_signals": StopSignals()}
    return tiny_trainer(folder, trainer=trainer, **{**BEST, **changes})


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", [{"save_strategy": "steps"}, {"save_strategy": "best", "save_steps": 500}])
@pytest.mark.parametrize("step", [1, 3])
def test_an_evaluation_that_is_made_up_for_finds_the_best_checkpoint(tmp_path, strategy, step):
    whole = best_trainer(tmp_path / "whole", **strategy)
    whole.train()
    assert whole.state.best_global_step == 4
    stopped = best_trainer(tmp_path / "run", **strategy)
    Signal(stopped, step, evaluating=False)
    with pytest.raises(StoppedBySignalError):
        stopped.train()
    resumed = best_trainer(tmp_path / "run", **strategy, save_total_limit=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-4")
    assert_same(weights(resumed.model), weights(whole.model))


class Patience(EarlyStoppingCallback):
    """Early stopping under another name."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("callback", [EarlyStoppingCallback, Patience])
@pytest.mark.parametrize(("step", "evaluating"), [(1, False), (2, False), (2, True)])
def test_early_stopping_is_where_it_would_have_been(tmp_path, callback, step, evaluating):
    """The rate is so high that the second evaluation is worse than the first, and the third."""
    options = {"learning_rate": 1.0, "max_steps": 8, "num_train_epochs": 2}
    whole = best_trainer(tmp_path / "whole", callback(2), **options)
    whole.train()
    assert (whole.state.best_global_step, whole.state.global_step) == (1, 3)
    stopped = best_trainer(tmp_path / "run", callback(2), **options)
    Signal(stopped, step, evaluating=evaluating)
    with pytest.raises(StoppedBySignalError):
        stopped.train()
    resumed = best_trainer(tmp_path / "run", callback(2), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert_same(weights(resumed.model), weights(whole.model))
    # A process that is killed after the last step does not train on either.
    again = best_trainer(tmp_path / "whole", callback(2), **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert_same(weights(again.model), weights(whole.model))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


class DamageBest(TrainerCallback):
    """Damages the best checkpoint before the last step, and keeps the weights after it."""

    weights: dict[str, torch.Tensor]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == args.max_steps:
            flip(Path(state.best_model_checkpoint) / "model.safetensors")
            self.weights = weights(model)


def test_a_damaged_best_checkpoint_is_not_loaded(tmp_path, caplog):
    """Nor is the last checkpoint deleted in its favour."""
    damage = DamageBest()
    trainer = best_trainer(tmp_path, damage, learning_rate=1.0, save_total_limit=1)
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert_same(weights(trainer.model), damage.weights)
    assert "checkpoint-1 is damaged (model.safetensors is not what was written (SHA-256)); the last w" in caplog.text
    assert (tmp_path / "checkpoint-4").is_dir()


# ---- which checkpoint ----


@pytest.mark.parametrize("best", [False, True])
def test_a_checkpoint_that_was_passed_over_does_not_displace_others(tmp_path, caplog, best):
    """Limits keep the newest by step, which would be the damaged one until the run comes there again."""
    options = {"max_steps": 6, "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": best}
    whole = best_trainer(tmp_path, **options)
    whole.train()
    flip(tmp_path / "checkpoint-6" / "model.safetensors")
    stopped = best_trainer(tmp_path, save_total_limit=1, **options)
    Signal(stopped, 4, evaluating=False)
    with pytest.raises(StoppedBySignalError):
        stopped.train(resume_from_checkpoint=True)
    assert f"{tmp_path / 'checkpoint-6'} is damaged and passed over: model.safetensors" in caplog.text
    names = ["checkpoint-4", "checkpoint-5"] if best else ["checkpoint-5"]
    # What could not be read may be readable another time.
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "passed-over-checkpoint-6"]
    resumed = best_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed.model), weights(whole.model))


def test_newer_checkpoints_than_the_named_one_are_kept_under_another_name(tmp_path, caplog):
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    again = tiny_trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=3)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-3", "passed-over-checkpoint-3", "passed-over-checkpoint-4",
    ]  # fmt: skip
    assert find_checkpoint_damage(tmp_path / "passed-over-checkpoint-4") is None
    assert f"it is now {tmp_path / 'passed-over-checkpoint-4'}" in caplog.text


def test_checksums_are_compared_however_the_checkpoint_is_named(tmp_path, monkeypatch):
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    newest, older = checkpoints(tmp_path)
    flip(newest / "optimizer.pt")
    for named in (newest, str(newest)):
        with pytest.raises(UsageError, match=r"checkpoint-4 is damaged: optimizer\.pt is not what was written"):
            tiny_trainer(tmp_path).train(resume_from_checkpoint=named)
    asked: list[Path] = []
    check = trainer_module.resumed_order
    monkeypatch.setattr(trainer_module, "resumed_order", lambda path, now: asked.append(path) or check(path, now))
    resumed = tiny_trainer(tmp_path, trainer={"verified_checkpoint": older})
    monkeypatch.setattr(trainer_module, "find_checkpoint_damage", pytest.fail)
    resumed.train(resume_from_checkpoint=older)
    tiny_trainer(tmp_path).train(resume_from_checkpoint=True)
    assert asked == [older, older]
    assert resumed.state.global_step == 4


# ---- other settings than the checkpoint's ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"learning_rate": 1e-3},
            r"begun with learning_rate 0\.01 and this run has 0\.001; set training\.learning_rate=0\.01",
        ),
        ({"weight_decay": 0.1}, "begun with weight_decay 0.0 and this run has 0.1"),
        ({"optim": "sgd"}, "begun with optim adamw_torch_fused and this run has sgd"),
        ({"lr_scheduler_type": "cosine"}, "begun with lr_scheduler_type linear and this run has cosine"),
    ],
)
def test_what_lies_in_the_states_of_a_checkpoint_cannot_change(tmp_path, changes, message):
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    with pytest.raises(UsageError, match=message):
        tiny_trainer(tmp_path, max_steps=2, **changes).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_weights_alone_is_not_resumed_from(tmp_path):
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=2, save_only_model=True).train()
    with pytest.raises(
        UsageError, match=r"checkpoint-4 has no state of the optimizer \(training\.save_only_model: true\)"
    ):
        tiny_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_intervals_are_those_of_the_resumed_run(tmp_path):
    """And the starting weights are evaluated once."""
    heldout = {"trainer": {"eval_dataset": make_pairs(4)}, "eval_on_start": True}
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=2, logging_steps=2, max_steps=2, **heldout).train()
    resumed = tiny_trainer(tmp_path, save_strategy="steps", save_steps=1, logging_steps=1, **heldout)
    resumed.train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-3").is_dir()
    logged = [line["step"] for line in resumed.state.log_history if "loss" in line]
    assert logged == [2, 3, 4]
    assert [line["step"] for line in resumed.state.log_history if "eval_target_nll" in line] == [0]
