"""`pivotune export` and `pivotune push`: the model of a run as a folder of its own, here or on the Hub."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from pivotune.cli.common import print_json, print_lines, quiet_libraries, stderr, stdout
from pivotune.errors import UsageError

Run = Annotated[Path, typer.Argument(help="Finished run.")]
MergeLora = Annotated[bool, typer.Option("--merge-lora", help="Write the whole model, not the adapters alone.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the weights: auto, float32 or bfloat16.")]
Interpolate = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Share of the trained weights; the rest are the starting ones.")
]


def export(
    run: Run,
    to: Annotated[Path, typer.Option(help="Folder to write: new, or empty.")],
    merge_lora: MergeLora = False,
    dtype: Dtype = "auto",
    interpolate: Interpolate = 1.0,
) -> None:
    """Write the model, tokenizer and card of a run into a folder that needs nothing else."""
    options: dict[str, Any] = {"merge_lora": merge_lora, "dtype": dtype, "interpolate": interpolate}
    from pivotune.runs.publish import check_export, export_run

    run, to = run.expanduser(), to.expanduser()
    check_export(run, to, merge_lora=merge_lora, dtype=dtype)
    quiet_libraries()
    with stderr.status("Exporting"):
        _draw(run)
        folder = export_run(run, to, **options)
    load = f"AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    print_lines(stdout, f"saved {folder}: model, tokenizer and card; {load}")


def push(
    run: Run,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Model repository on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the files; upload nothing.")] = False,
    merge_lora: MergeLora = False,
    dtype: Dtype = "auto",
    interpolate: Interpolate = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the files as JSON.")] = False,
) -> None:
    """Upload the model, tokenizer and card of a run to the Hugging Face Hub (log in with `hf auth login`)."""
    options: dict[str, Any] = {"merge_lora": merge_lora, "dtype": dtype, "interpolate": interpolate}
    from pivotune.runs.publish import check_export, push_run

    run = run.expanduser()
    check_export(run, merge_lora=merge_lora, dtype=dtype)
    quiet_libraries()
    with stderr.status("Uploading"):
        _draw(run)
        files = push_run(run, repository, private=private, dry_run=dry_run, **options)
    if as_json:
        print_json({"repository": repository, "uploaded": not dry_run, "files": files})
        return
    print_lines(stdout, *(f"{size:>14,} bytes  {name}" for name, size in files.items()))
    done = "nothing was uploaded (--dry-run)" if dry_run else f"https://huggingface.co/{repository}"
    print_lines(stdout, done)


def _draw(run: Path) -> None:
    """Draw the course of training for the card, unless the run has the picture, or its folder cannot be written."""
    from pivotune.runs.folder import TRAINING_PICTURE

    if (run / TRAINING_PICTURE).is_file() or not (run / "metrics.jsonl").is_file():
        return
    from pivotune.report.figures.base import save_figure
    from pivotune.report.figures.training import training_figure
    from pivotune.results.files import read_metrics

    with suppress(UsageError):
        save_figure(training_figure({run.name: read_metrics(run / "metrics.jsonl")}), run / TRAINING_PICTURE)
