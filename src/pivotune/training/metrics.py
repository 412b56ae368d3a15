"""The figures of a log line, and `metrics.jsonl`: means of loss terms, and speed, since the last line."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from pivotune.objectives.base import LossTerm
from pivotune.text.files import finite, write_text

logger = logging.getLogger(__name__)
# Target: the main sequence (English for replayed rows). English: the parallel side. Padding: of both.
_TOKENS = ("target", "english", "padding")
# Counts of a training, in each log line since the line before: rows, their tokens, their answers' tokens, and tokens of the
# parallel side.
_TRAINED = ("rows", "tokens", "answer_tokens", "english_tokens")


class LogWindow:
    """Sums of the loss terms on the device, read once per log line so that no step waits for the device.

    Args:
        names: the loss terms, in the same order on all ranks.
        device: device of the batches.

    Attributes:
        empty: True if nothing was added since the last `clear`.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = tuple(names)
        self._device = device
        self.clear()

    def clear(self) -> None:
        self._sums = torch.zeros(len(self._names), device=self._device)
        # Items of the terms, tokens, rows.
        self._counts = torch.zeros(len(self._names) + len(_TOKENS) + 1, dtype=torch.long, device=self._device)
        self.empty = True
        self._started = time.perf_counter()

    def mark(self) -> None:
        """Mark the begin of an optimizer step for `rollback`."""
        self._marked = self._sums.clone(), self._counts.clone()

    def rollback(self) -> None:
        """Drop everything added since `mark`."""
        self._sums, self._counts = self._marked

    def state(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON: sums over all ranks, and their seconds."""
        return {
            "sums": sum_over_ranks(self._sums.clone()).tolist(),
            "counts": sum_over_ranks(self._counts.clone()).tolist(),
            "empty": self.empty,
            "seconds": 0.0 if self.empty else time.perf_counter() - self._started,
        }

    def restore(self, state: Mapping[str, Any], *, counts: bool = True) -> None:
        """Continue from a `state`.

        Args:
            counts: True on one rank, which takes over the sums of all.
        """
        self.clear()
        if counts and len(state["counts"]) == len(self._counts):
            self._sums += torch.tensor(state["sums"], device=self._device)
            self._counts += torch.tensor(state["counts"], device=self._device)
        self.empty, self._started = state["empty"], time.perf_counter() - state["seconds"]

    def start(self) -> None:
        """Start the clock at the first step, not at the last log line: evaluation and saving lie between."""
        if self.empty:
            self._started = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leave out seconds that were no training."""
        self._started += seconds

    def add(self, terms: Mapping[str, LossTerm], batch: Mapping[str, Tensor]) -> None:
        """Add one micro-batch; terms that were left out count as 0."""
        zero = torch.zeros((), device=self._device)
        found = [terms.get(name, LossTerm(zero, zero)) for name in self._names]
        self._sums += torch.stack([term.sum.detach().float() for term in found])
        # A rank without a row reads a blank one.
        rows = batch["attention_mask"].any(dim=1).sum()
        self._counts += torch.stack([*(term.count.long() for term in found), *token_counts(batch), rows])
        self.empty = False

    def metrics(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return `<term>_loss`, `<side>_tokens_per_second`, `padding_share` and `trained_<count>`, over all ranks."""
        sums, counts = sum_over_ranks(self._sums).tolist(), sum_over_ranks(self._counts).tolist()
        # Read the clock after the sums: the device runs behind the program.
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        items, (*sides, rows) = counts[: len(self._names)], counts[len(self._names) :]
        tokens = dict(zip(_TOKENS, sides, strict=True))
        trained = (rows, tokens["target"], items[self._names.index("tft")], tokens["english"])
        return {
            **{f"{name}_loss": total / n for name, total, n in zip(self._names, sums, counts, strict=False) if n},
            **{f"{side}_tokens_per_second": count / elapsed for side, count in tokens.items()},
            "padding_share": tokens["padding"] / max(sum(tokens.values()), 1),
            **{f"trained_{name}": count for name, count in zip(_TRAINED, trained, strict=True)},
        }


def token_counts(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return target tokens, English tokens and padded places of a collated batch."""
    target, english = batch["attention_mask"], batch["english_attention_mask"]
    tokens = target.sum(), english.sum()
    return *tokens, target.numel() + english.numel() - tokens[0] - tokens[1]


def trained_totals(log_history: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the counts of a whole training from its log lines; a resumed one has those of its checkpoint."""
    return {name: sum(int(line.get(f"trained_{name}", 0)) for line in log_history) for name in _TRAINED}


class MetricsFile(TrainerCallback):
    """Append every log line with its step to `metrics.jsonl`; a resumed run begins with the lines of its checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and (state.log_history or self._path.exists()):
            # The checkpoint holds all lines up to its step; the file may hold later ones, a broken one, or none.
            write_text(self._path, "".join(map(_as_line, state.log_history)))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the last step, so that a run shorter than `logging_steps` has a loss."""
        if args.logging_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_as_line({"step": state.global_step, **logs}))


class FigureLog(TrainerCallback):
    """Send figures to TensorBoard, W&B and Trackio when a training begins; a fault there is a warning.

    Args:
        trainer: its integrations hold the writers.
        draw: returns figures as PNG by name.
    """

    def __init__(self, trainer: Any, draw: Callable[[], Mapping[str, bytes]]) -> None:
        self._trainer, self._draw = trainer, draw

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        integrations = self._trainer.callback_handler.callbacks
        # Attributes of the callbacks of Transformers.
        writers = [one.tb_writer for one in integrations if getattr(one, "tb_writer", None)]
        modules = [one._wandb for one in integrations if getattr(one, "_wandb", None)]
        modules += [one._trackio for one in integrations if getattr(one, "_trackio", None)]
        if not state.is_world_process_zero or state.global_step or not (writers or modules):
            return
        try:
            with TemporaryDirectory() as folder:
                for name, content in self._draw().items():
                    path = Path(folder, f"{name.replace('/', '-')}.png")
                    path.write_bytes(content)
                    for module in modules:
                        module.log({name: module.Image(str(path))})
                    for writer in writers:
                        import numpy as np
                        from PIL import Image  # type: ignore[import-not-found]  # comes with tensorboard

                        writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), 0, dataformats="HWC")
        except Exception as error:  # no picture is worth a training
            logger.warning("the figures were not reported: %s: %s", type(error).__name__, error)


def _as_line(logs: dict[str, Any]) -> str:
    return json.dumps(finite({"step": logs["step"], **logs}), ensure_ascii=False, allow_nan=False) + "\n"
