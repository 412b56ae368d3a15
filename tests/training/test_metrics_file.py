from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from pivotune.report.figures.layers import reported_figures
from pivotune.results.files import read_metrics
from pivotune.training.metrics import FigureLog, MetricsFile


@pytest.fixture
def arguments(tmp_path) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")


def at(step: int, *, first: bool = True, lines: list[dict] | None = None) -> TrainerState:
    return TrainerState(global_step=step, is_world_process_zero=first, log_history=lines or [])


def log(callback: MetricsFile, arguments: TrainingArguments, step: int, **logs) -> None:
    callback.on_log(arguments, at(step), TrainerControl(), logs=logs)


def test_a_line_per_log_with_its_step(tmp_path, arguments):
    callback = MetricsFile(tmp_path / "metrics.jsonl")
    log(callback, arguments, 1, loss=2.5, tft_loss=2.0)
    log(callback, arguments, 2, eval_target_nll=1.5)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 2.5, "tft_loss": 2.0},
        {"step": 2, "eval_target_nll": 1.5},
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_lacks_becomes_null(tmp_path, arguments, value):
    log(MetricsFile(tmp_path / "metrics.jsonl"), arguments, 1, grad_norm=value)
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "grad_norm": None}


def test_other_ranks_and_empty_lines_write_nothing(tmp_path, arguments):
    callback = MetricsFile(tmp_path / "metrics.jsonl")
    callback.on_log(arguments, at(1, first=False), TrainerControl(), logs={"loss": 1.0})
    callback.on_log(arguments, at(1), TrainerControl(), logs={})
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("resumed_at", [3, 5, 0])
@pytest.mark.parametrize("left", ["more", "less", "nothing"])
def test_a_resumed_run_begins_with_the_lines_of_its_checkpoint(tmp_path, arguments, resumed_at, left):
    """Whatever a killed process left in the file; none where it was stopped before its first checkpoint."""
    callback = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, {"more": 6, "less": 2, "nothing": 1}[left]):
        log(callback, arguments, step, loss=float(step))
    # As the trainer keeps them: the step last, and what JSON lacks.
    lines = [{"loss": math.nan if step == 2 else float(step), "step": step} for step in range(1, resumed_at + 1)]
    callback.on_train_begin(arguments, at(resumed_at, lines=lines), TrainerControl())
    expected = [{"step": step, "loss": None if step == 2 else float(step)} for step in range(1, resumed_at + 1)]
    text = (tmp_path / "metrics.jsonl").read_text() if resumed_at or left != "nothing" else ""
    assert text == "".join(json.dumps(line) + "\n" for line in expected)
    log(callback, arguments, resumed_at + 1, loss=9.0)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": resumed_at + 1, "loss": 9.0}


def test_a_line_cut_by_a_crash_is_left_out(tmp_path, arguments):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    callback = MetricsFile(path)
    callback.on_train_begin(arguments, at(1, lines=[{"loss": 2.0, "step": 1}]), TrainerControl())
    log(callback, arguments, 2, loss=1.0)
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


class _Media:
    """Stands in for the modules wandb and trackio."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, bytes]] = []

    def Image(self, path):  # noqa: N802
        return Path(path).read_bytes()

    def log(self, values):
        self.logged += values.items()


def begin(callbacks, draw, *, step=0):
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=callbacks))
    state = TrainerState(global_step=step)
    state.is_world_process_zero = True
    FigureLog(trainer, draw).on_train_begin(None, state, None)


def test_figures_reach_the_integrations_that_are_on():
    wandb, trackio = _Media(), _Media()
    callbacks = [SimpleNamespace(_wandb=wandb), SimpleNamespace(_trackio=trackio), SimpleNamespace(tb_writer=None)]
    begin(callbacks, lambda: {"layers/analysis": b"png"})
    assert wandb.logged == trackio.logged == [("layers/analysis", b"png")]
    begin(callbacks, lambda: {"layers/analysis": b"again"}, step=3)
    assert len(wandb.logged) == 1


def test_nothing_is_drawn_without_an_integration():
    begin([SimpleNamespace(tb_writer=None)], lambda: pytest.fail("drawn"))


def test_a_figure_that_cannot_be_drawn_is_a_warning(caplog):
    def draw():
        raise ImportError("No module named 'vl_convert'")

    begin([SimpleNamespace(_wandb=_Media())], draw)
    assert caplog.messages == ["the figures were not reported: ImportError: No module named 'vl_convert'"]


def test_tensorboard_gets_the_picture(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = tensorboard.SummaryWriter(str(tmp_path))
    layers = {"model": "m", "num_layers": 1, "conversion": 0, "thinking": 1, "method": "explicit"}
    layers["target"] = {"entropy": [2.0, 1.0]}
    begin([SimpleNamespace(tb_writer=writer)], lambda: reported_figures(layers, {1: (0.5, 2.0)}))
    writer.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert found.Tags()["images"] == ["layers/analysis", "layers/lens"]
    assert found.Images("layers/lens")[0].encoded_image_string.startswith(b"\x89PNG")
