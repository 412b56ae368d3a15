"""Output of training on the terminal: the run before it starts, a progress bar with the loss terms, and the result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerState

from pivotune.cli.common import print_lines, printable, progress_bar, safe, stderr
from pivotune.cli.estimate import gibibytes, training_line
from pivotune.config.registry import METHODS
from pivotune.config.supervision import SupervisionConfig
from pivotune.data.examples import preview
from pivotune.runs.model_card import trained_line
from pivotune.text.words import counted
from pivotune.training.lens_fitting import LENS_FILE, read_lens_figures

if TYPE_CHECKING:
    from rich.console import Console

    from pivotune.data.examples import Side
    from pivotune.runs.execute import RunResult
    from pivotune.runs.prepare import PreparedRun

_SHOWN = ("loss", "tft_loss", "conversion_loss", "thinking_loss")
_ROLE_STYLES = {"template": "dim", "query": "cyan", "answer": "green"}


class TrainingProgress(TrainerCallback):
    """A bar over optimizer steps on the main process; as a context manager it also stops when training raises."""

    def __init__(self, title: str = "Training") -> None:
        self._title = title
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._bar = progress_bar()
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._bar:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {name: logs[name] for name in _SHOWN if logs and name in logs}
        if not (self._bar and shown):
            return
        note = "  ".join(f"{name.removesuffix('_loss')} {value:.3f}" for name, value in shown.items())
        self._bar.update(self._task, note=note)
        if not stderr.is_terminal:
            # A log file shows no moving bar, so each logged step is a line.
            stderr.print(f"{self._title}: step {state.global_step} of {state.max_steps}  {note}", soft_wrap=True)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop drawing."""
        if self._bar:
            self._bar.stop()
            self._bar = None


def describe_run(out: Console, prepared: PreparedRun) -> None:
    """Print model, method and rows, and one decoded example with its mask, because wrong masks fail silently."""
    config, report = prepared.config, prepared.report
    method, name = METHODS[config.method], config.method
    if method.inner_losses:
        active = config.supervision.active().items()
        terms = [f"{term} {one.signal} at layer {one.layer}, weight {one.weight:g}" for term, one in active]
        name += f": {'; '.join(terms)}; {config.supervision.schedule} schedule; {config.supervision.lens} lens"
        if config.supervision.alternate:
            name += ", in turn with L_TFT"
        if steps := config.supervision.phase.steps:
            name += f" over the first {steps} steps, then L_TFT alone"
    out.print(f"[bold]model[/]    {safe(config.model)}", soft_wrap=True)
    out.print(f"[bold]method[/]   {name}", soft_wrap=True)
    out.print(f"[bold]data[/]     {counted(len(prepared.train))} to train on, {len(prepared.validation)} held out")
    replayed = round(config.data.english_ratio * len(prepared.train))
    if method.replay and replayed:
        out.print(f"         {replayed} of them in English (data.english_ratio {config.data.english_ratio:g})")
    saved = [f"moving average with decay {config.ema:g}"] if config.ema is not None else []
    if config.interpolate < 1:
        saved.append(f"{config.interpolate:g} x trained + {1 - config.interpolate:g} x starting")
    if saved:
        out.print(f"[bold]weights[/]  scored and saved: {'; '.join(saved)}")
    if report.cut:
        cut = ", ".join(f"{part} of {counted(count)}" for part, count in report.cut.items())
        out.print(f"         cut at the token limits: {safe(cut)}")
    for noun, skipped in (("row", prepared.skipped), ("held-out row", prepared.heldout_skipped)):
        for reason, count in skipped.items():
            out.print(f"         left out: {counted(count, noun)}: {safe(reason)}", soft_wrap=True)
    for note in prepared.notes:
        out.print(f"         {safe(note)}", soft_wrap=True)
    print_example(out, prepared.tokenizer, getattr(prepared.train[0], method.main_language))


def print_example(out: Console, tokenizer: Any, side: Side) -> None:
    """Print one example decoded from its tokens, coloured by role."""
    out.print("[bold]example[/]  (only the [green]answer[/] is trained on; [cyan]query[/]; [dim]template[/])")
    segments = ((printable(segment.text), _ROLE_STYLES[segment.role]) for segment in preview(tokenizer, side))
    out.print(Text.assemble(*segments), soft_wrap=True)


def describe_training(out: Console, prepared: PreparedRun) -> None:
    """Print trained parameters, steps and the estimated peak memory; nothing where the estimate fails."""
    if out.quiet:
        return
    from pivotune.estimate.estimate import startup_estimate

    found = startup_estimate(prepared.config, prepared.args, prepared.train)
    if found is None:
        return
    line = training_line(prepared.config, prepared.args, found)
    if found.peak is not None:
        has = "" if found.device.memory is None else f" (has {gibibytes(found.device.memory)})"
        line += f"; estimated peak {gibibytes(found.peak)} a device{has}"
    out.print(f"[bold]training[/] {line}", soft_wrap=True)
    if found.peak and found.device.memory and found.peak > found.device.memory:
        warning = "the device's memory will probably not suffice; `pivotune estimate` lists changes that fit"
        out.print(f"[bold yellow]warning[/]  {warning}", soft_wrap=True)


def describe_result(out: Console, result: RunResult, supervision: SupervisionConfig) -> None:
    """Print the chosen layers, the held-out NLL before and after training, and the model's folder."""
    if chosen := result.layers:
        layers = ", ".join(f"{name} {chosen[name]}" for name in supervision.active())
        out.print(f"[bold]layers[/]   {layers} ({safe(chosen['reason'])})", soft_wrap=True)
    if (lens := result.folder / LENS_FILE).is_file():
        figures = read_lens_figures(lens).items()
        found = [f"{one.kl:.2f} at layer {layer} (logit lens {one.logit_kl:.2f})" for layer, one in figures]
        out.print(f"[bold]lens[/]     KL from the output in nats: {', '.join(found)}", soft_wrap=True)
    if trained := trained_line(result.results):
        out.print(f"[bold]trained[/]  {trained}", soft_wrap=True)
    if result.results["tasks"]:
        table = Table("held-out rows", "n", "NLL per token before", "after", "NLL per character before", "after")
        for name, task in result.results["tasks"].items():
            base = task["base"]
            numbers = (base["value"], task["value"], base["nll_per_character"], task["nll_per_character"])
            table.add_row(safe(name.removeprefix("heldout_")), str(task["n"]), *(f"{number:.3f}" for number in numbers))
        out.print(table)
    print_lines(out, f"saved    {result.folder / 'model'}   (chat with it: pivotune chat {result.folder})")
