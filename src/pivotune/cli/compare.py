"""`pivotune compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pivotune.cli.common import print_json, printable, stderr, stdout, words
from pivotune.errors import UsageError

if TYPE_CHECKING:
    from pivotune.compare.comparison import Comparison
    from pivotune.compare.seed_groups import Row

_FORMATS = ("terminal", "markdown", "latex", "csv", "json")


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Run folders, results files, or folders of runs. Runs that differ in seed only make one row.",
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Run, or name of a row, that differences are to; default: method tft, else the first.",
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(metavar="GLOBS", help="Comma-separated: xquad_vi,xnli_*. English is shown with any choice.")
    ] = "",
    metrics: Annotated[
        str, typer.Option(metavar="GLOBS", help="primary (each task's own), all, or names: f1,nll_per_*.")
    ] = "primary",
    names: Annotated[str, typer.Option(help="Comma-separated names of the rows, in their order.")] = "",
    out: Annotated[
        list[Path] | None, typer.Option(help="Also write table.md, .tex, .csv or .json. Repeatable.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="Of what is printed: " + ", ".join(_FORMATS) + ".")
    ] = "terminal",
    resamples: Annotated[int, typer.Option(min=1000, max=1_000_000, help="Of the bootstrap.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Compare runs on their tasks: best in bold, differences to a baseline with paired 95 % intervals."""
    form = "json" if as_json else form
    if form not in _FORMATS:
        raise UsageError(f"--format: {form!r} found; allowed: {', '.join(_FORMATS)}")
    from pivotune.compare.comparison import compare_rows

    warnings: list[str] = []
    rows, chosen = _load([path.expanduser() for path in runs], baseline, warnings)
    _check_out(out or [], rows, overwrite)
    rows = _rename(rows, words(names))
    with stderr.status(f"resampling {resamples:,} times") as status:
        comparison = compare_rows(
            rows,
            baseline=chosen,
            tasks=words(tasks),
            metrics=words(metrics) or ("primary",),
            resamples=resamples,
            seed=seed,
            warnings=warnings,
            progress=lambda done, total: status.update(f"resampling {resamples:,} times: {done} of {total} columns"),
        )
    _write(out or [], comparison)
    _show(comparison, form)


def _load(runs: list[Path], baseline: str | None, warnings: list[str]) -> tuple[list[Row], int | None]:
    """The rows with the baseline among them, and its index; None leaves the choice to the comparison."""
    from pivotune.compare.seed_groups import find_row, load_rows

    rows = load_rows(runs, warnings)
    if baseline is None:
        return rows, None
    found = find_row(rows, baseline)
    path = Path(baseline).expanduser()
    if found is None and path.exists():
        warnings.clear()
        rows = load_rows([path, *runs], warnings)
        found = find_row(rows, baseline)
    if found is None:
        labels = ", ".join(row.label for row in rows)
        raise UsageError(f"--baseline: {baseline} is no file or folder and no row; the rows are: {labels}")
    return rows, found


def _check_out(paths: list[Path], rows: list[Row], overwrite: bool) -> None:
    """Everything about the files is checked before anything is computed."""
    from pivotune.compare.formats import FORMATS

    results = {run.results.path.resolve() for row in rows for run in row.runs}
    for path in paths:
        if path.suffix not in FORMATS:
            raise UsageError(f"--out: {path} ends in {path.suffix or 'nothing'!r}; allowed: {', '.join(FORMATS)}")
        if path.resolve() in results:
            raise UsageError(f"--out: {path} holds results that are compared; name another file")
        if path.is_dir() or not path.parent.is_dir():
            raise UsageError(
                f"--out: {path if path.is_dir() else path.parent} is {'a' if path.is_dir() else 'no'} folder"
            )
        if path.exists() and not overwrite:
            raise UsageError(f"--out: {path} exists; add --overwrite or name another file")


def _rename(rows: list[Row], names: list[str]) -> list[Row]:
    from dataclasses import replace

    if not names:
        return rows
    labels = ", ".join(row.label for row in rows)
    if len(names) != len(rows):
        raise UsageError(f"--names: {len(names)} names for {len(rows)} rows ({labels})")
    if len(set(names)) < len(names):
        raise UsageError(f"--names: {', '.join(names)}: every row needs a name of its own")
    return [replace(row, label=name) for row, name in zip(rows, names, strict=True)]


def _write(paths: list[Path], comparison: Comparison) -> None:
    from pivotune.compare.formats import FORMATS, render
    from pivotune.text.files import write_text

    for path in paths:
        try:
            write_text(path, render(comparison, FORMATS[path.suffix]))
        except OSError as error:
            raise UsageError(f"--out: {path} cannot be written ({error.strerror or error})") from error
        stderr.print(printable(f"saved {path}"), soft_wrap=True, markup=False)


def _show(comparison: Comparison, form: str) -> None:
    from pivotune.compare.formats import render, to_dict
    from pivotune.compare.terminal import render_terminal

    if form == "json":
        print_json(to_dict(comparison))
    elif form == "terminal":
        for part in render_terminal(comparison, stdout.width, printable):
            stdout.print(part)
    else:
        print(render(comparison, form), end="")
