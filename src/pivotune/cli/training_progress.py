"""Progress of training on the terminal: one bar, with the latest loss terms."""

from __future__ import annotations

from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pivotune.cli.common import progress_bar, stderr

_SHOWN = ("loss", "tft_loss", "conversion_loss", "thinking_loss")


class TrainingProgress(TrainerCallback):
    """A bar over optimizer steps on the main process. A context manager: leaving it stops the drawing, also by an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __init__(self, title: str = "Training") -> None:
        self._title = title
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._bar = progress_bar()
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        shown = {name: logs[name] for name in _SHOWN if logs and name in logs}
        if not (self._bar and shown):
            return
        note = "  ".join(f"{name.removesuffix('_loss')} {value:.3f}" for name, value in shown.items())
        self._bar.update(self._task, note=note)
        if not stderr.is_terminal:
            # A log file gets no moving bar, but wants to know how far the run is.
            stderr.print(f"{self._title}: step {state.global_step} of {state.max_steps}  {note}", soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop drawing."""
        if self._bar:
            self._bar.stop()
            self._bar = None
