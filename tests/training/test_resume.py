"""Every checkpoint of a run, resumed, leads to the run's own end bit for bit: weights, optimizer, log lines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from peft import LoraConfig
from tiny_training import assert_same, make_pairs, tiny_trainer, weights

from pivotune.training.callbacks import MetricsFile
from pivotune.training.checkpoints import checkpoints
from pivotune.training.signals import StoppedBySignalError, StopSignals

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
    "adapters with dropout": ({"supervision_schedule": "linear"}, LORA),
    "cached English features": (FROZEN, {}),
    "rows at random": ({"train_sampling_strategy": "random", "gradient_accumulation_steps": 3}, {}),
    "evaluation and log lines by epoch": (
        {"eval_strategy": "epoch", "logging_strategy": "epoch", "method": "tft"},
        {"eval_dataset": make_pairs(5, seed=9)},
    ),
    "a step limit in the middle of an epoch": (
        {"max_steps": 7, "eval_strategy": "steps", "eval_steps": 2, "optim": "adafactor"},
        {"eval_dataset": make_pairs(5, seed=9)},
    ),
    "data workers": ({"dataloader_num_workers": 1, "save_steps": 4}, LORA),
}


def trainer_of(folder: Path, case: str, callbacks: tuple[Any, ...] = ()) -> Any:
    options, constructor = CASES[case]
    folder.mkdir(exist_ok=True)
    metrics = MetricsFile(folder / "metrics.jsonl")
    return tiny_trainer(
        folder,
        model=build_tiny_model(attention_dropout=0.2),
        rows=make_pairs(18),
        trainer={**constructor, "callbacks": [metrics, *callbacks]},
        **{**COMMON, **options},
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without what the clock says."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "per_second" not in k and "runtime" not in k} for line in found]


def optimizer_state(trainer: Any) -> dict[str, torch.Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    return {f"{key}.{name}": torch.as_tensor(value).clone() for key, found in state.items() for name, value in found.items()
            if value is not None}  # fmt: skip


def assert_same_end(one: Any, other: Any) -> None:
    assert_same(weights(one.model), weights(other.model))
    assert_same(optimizer_state(one), optimizer_state(other))
    assert lines(Path(one.args.output_dir)) == lines(Path(other.args.output_dir))
    assert one.state.total_flos == other.state.total_flos


@pytest.mark.parametrize("case", CASES)
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


class Signal:
    """A signal that comes at a step, or in the middle of the evaluation after it."""

    def __init__(self, trainer: Any, step: int, *, evaluating: bool) -> None:
        self.trainer, self.step, self.evaluating = trainer, step, evaluating
        trainer.stop_signals = StopSignals()
        inner = trainer._leave_evaluation_if_stopped if evaluating else trainer._begin_step
        setattr(trainer, "_leave_evaluation_if_stopped" if evaluating else "_begin_step", lambda: self.come(inner))
        self.calls = 0

    def come(self, inner: Any) -> None:
        if self.trainer.state.global_step == self.step:
            self.calls += 1
            # Not the first held-out batch: one language has been evaluated and logged before.
            if not self.evaluating or self.calls == 3:
                self.trainer.stop_signals.received = "SIGTERM"
        inner()


@pytest.mark.parametrize(
    ("case", "step", "evaluating"),
    [
        ("deep supervision", 3, False),
        ("evaluation and log lines by epoch", 4, False),
        ("evaluation and log lines by epoch", 5, True),
        ("a step limit in the middle of an epoch", 3, False),
        ("a step limit in the middle of an epoch", 4, True),
        ("a step limit in the middle of an epoch", 6, False),
    ],
)
def test_stopped_by_a_signal_and_resumed(tmp_path, monkeypatch, case, step, evaluating):
    """The step is finished and saved; an evaluation that was due, or half done, is made up for."""
    monkeypatch.setitem(COMMON, "per_device_eval_batch_size", 2)
    whole = trainer_of(tmp_path / "whole", case)
    whole.train()
    stopped = trainer_of(tmp_path / "run", case)
    Signal(stopped, step, evaluating=evaluating)
    with pytest.raises(StoppedBySignalError) as raised:
        stopped.train()
    at = step if evaluating else step + 1
    assert raised.value.checkpoint == str(tmp_path / "run" / f"checkpoint-{at}")
    assert checkpoints(tmp_path / "run")[0].name == f"checkpoint-{at}"
    resumed = trainer_of(tmp_path / "run", case)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, whole)
