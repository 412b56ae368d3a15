"""`pivotune train`: fine-tune a model and write a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pivotune.cli import options
from pivotune.cli.common import (
    SEVERAL_PROCESSES,
    check_inputs,
    console,
    print_json,
    progress,
    quiet_libraries,
    reported_once,
    safe,
    stop_signals,
)
from pivotune.errors import TrainingError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from pivotune.config.settings import RunConfig
    from pivotune.runs.execute import RunResult
    from pivotune.training.resilience.preemption import StopSignals


def train(
    config: Annotated[Path, typer.Argument(help="Run configuration (YAML); `pivotune init` prints one.")],
    changes: options.Changes = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    auto_resume: Annotated[bool, typer.Option("--auto-resume", help="Go on with the run, or start it.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in output_dir.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")] = False,
) -> None:
    """Fine-tune a model and write a run folder."""
    from pivotune.config.yaml_text import load_config

    if overwrite and (resume or auto_resume):
        raise UsageError(f"{'--resume' if resume else '--auto-resume'} and --overwrite exclude each other")
    with reported_once():
        run_config = load_config(config, changes or [])
    out = console(as_json)
    from pivotune.runs.folder import check_same_run, claim_run_folder, has_trained, holds_run, is_finished
    from pivotune.training.resilience.checkpoints import kept, remove_replaced

    folder = Path(run_config.output_dir)
    if auto_resume and not resume:
        resume = holds_run(folder) and has_trained(folder)
        if resume and is_finished(folder):
            check_same_run(folder, run_config)
            remove_replaced(folder)
            out.print(f"{safe(folder)} holds a finished run; --resume trains it further", soft_wrap=True)
            if as_json:
                print_json({"run": str(folder), **json.loads((folder / "results.json").read_text(encoding="utf-8"))})
            return
    data = run_config.data
    sources = [path for source in data.sources for path in (source.path, source.english)]
    with reported_once():
        sources += [data.validation, data.validation_english]
        check_inputs([run_config.model], sources, revision=run_config.revision)
    if not (overwrite or SEVERAL_PROCESSES):  # else `prepare_run` does it, after all other checks
        claim_run_folder(run_config, resume=resume)

    def next_step(checkpoint: str | None) -> str:
        return f"{f'saved {checkpoint}' if checkpoint else kept(folder)}; go on with --resume"

    with stop_signals(next_step) as signals:
        result = _run(run_config, out, signals, resume=resume, overwrite=overwrite)
    if as_json:
        print_json({"run": str(result.folder), **result.results})
        return
    from pivotune.cli.training_display import describe_result

    describe_result(out, result, run_config.supervision)


def _run(config: RunConfig, out: Console, signals: StopSignals, *, resume: bool, overwrite: bool) -> RunResult:
    """Prepare and train. A failure after a signal counts as the signal's, because data workers receive it too."""
    quiet_libraries()
    from pivotune.runs.prepare import prepare_run

    try:
        with reported_once():
            prepared = prepare_run(config, overwrite=overwrite, resume=resume)
        # Imported after the checks: a mistake is reported before torch is loaded, as far as the checks need no torch.
        from pivotune.cli.training_display import TrainingProgress, describe_run, describe_training
        from pivotune.report.figures.layers import reported_figures
        from pivotune.runs.execute import execute_run

        if resume:
            start = prepared.checkpoint or "no checkpoint yet, from the beginning"
            out.print(f"resuming: {safe(start)}", soft_wrap=True)
        describe_run(out, prepared)
        describe_training(out, prepared)
        with TrainingProgress() as bar:
            options: dict[str, Any] = {"progress": progress, "stop_signals": signals, "draw": reported_figures}
            return execute_run(prepared, resume=resume, callbacks=[bar], **options)
    except TrainingError:
        signals.check()
        raise
