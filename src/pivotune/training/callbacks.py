"""Callbacks of a run: `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pivotune.text.files import write_text


class MetricsFile(TrainerCallback):
    """Append every log line to `metrics.jsonl`, with its step; a resumed run begins with the lines of its checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and (state.log_history or self._path.exists()):
            # The checkpoint knows all lines up to its step; the file may hold later ones, a broken one, or none.
            write_text(self._path, "".join(map(_as_line, map(_step_first, state.log_history))))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_as_line({"step": state.global_step, **logs}))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line cut short by a crash is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def _step_first(line: dict[str, Any]) -> dict[str, Any]:
    return {"step": line["step"], **line}


def _as_line(logs: dict[str, Any]) -> str:
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in logs.items()}
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"
