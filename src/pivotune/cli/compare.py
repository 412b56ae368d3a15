"""`pivotune compare`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pivotune.cli.common import check_out, print_json, print_lines, stderr, stdout, words, write_out
from pivotune.errors import UsageError

if TYPE_CHECKING:
    from pivotune.compare.seed_groups import SeedGroup

_FORMATS = ("terminal", "markdown", "latex", "csv", "json")
_RUNS_HELP = "Run folders, results files, or folders of runs. Runs that differ in seed only make one row."
_BASELINE_HELP = "Run or name of a row to compare with; default: method tft, else the first."


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help=_RUNS_HELP)],
    baseline: Annotated[str | None, typer.Option(metavar="RUN", help=_BASELINE_HELP)] = None,
    tasks: Annotated[str, typer.Option(metavar="GLOBS", help="xquad_vi,xnli_*. English is always shown.")] = "",
    metrics: Annotated[str, typer.Option(metavar="GLOBS", help="primary, all, or names: f1,nll_per_*.")] = "primary",
    names: Annotated[str, typer.Option(help="Comma-separated names of the rows, in their order.")] = "",
    out: Annotated[list[Path] | None, typer.Option(help="Also write .md, .tex, .csv or .json. Repeatable.")] = None,
    form: Annotated[str, typer.Option("--format", help=", ".join(_FORMATS) + ".")] = "terminal",
    resamples: Annotated[int, typer.Option(min=1000, max=1_000_000, help="Bootstrap resamples.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Compare runs on their tasks: best in bold, differences to a baseline with 95 % intervals."""
    form = "json" if as_json else form
    if form not in _FORMATS:
        raise UsageError(f"--format: {form!r} found; allowed: {', '.join(_FORMATS)}")
    from pivotune.compare.comparison import compare_groups
    from pivotune.compare.formats import FORMATS, render, render_terminal, to_dict

    warnings: list[str] = []
    groups, chosen = _load([path.expanduser() for path in runs], baseline, words(names), warnings)
    results = {run.results.path.resolve() for group in groups for run in group.runs}
    for path in out or []:
        if path.resolve() in results:
            raise UsageError(f"--out: {path} holds results that are compared; name another file")
        check_out(path, *FORMATS, overwrite=overwrite)
    with stderr.status(f"resampling {resamples:,} times") as status:
        comparison = compare_groups(
            groups,
            baseline=chosen,
            tasks=words(tasks),
            metrics=words(metrics) or ("primary",),
            resamples=resamples,
            seed=seed,
            warnings=warnings,
            progress=lambda done, total: status.update(f"resampling {resamples:,} times: {done} of {total} columns"),
        )
    for path in out or []:
        write_out(path, render(comparison, FORMATS[path.suffix]))
        print_lines(stderr, f"saved {path}")
    if form == "json":
        print_json(to_dict(comparison))
    elif form == "terminal":
        for part in render_terminal(comparison, stdout.width):
            stdout.print(part)
    else:
        print(render(comparison, form), end="")


def _load(
    runs: list[Path], baseline: str | None, names: list[str], warnings: list[str]
) -> tuple[list[SeedGroup], int | None]:
    """Return the groups under their new names, the baseline among them, and the baseline's index if one is given."""
    from pivotune.compare.seed_groups import find_group, load_groups

    groups = load_groups(runs, warnings)
    index = None if baseline is None else find_group(groups, baseline)
    if baseline is not None and index is None and (path := Path(baseline).expanduser()).exists():
        warnings.clear()
        groups = load_groups([path, *runs], warnings)
        index = find_group(groups, baseline)
    labels = ", ".join(group.label for group in groups)
    if baseline is not None and index is None:
        raise UsageError(f"--baseline: {baseline} is neither a file, a folder nor a row; the rows are: {labels}")
    if names:
        if len(names) != len(groups):
            raise UsageError(f"--names: {len(names)} names for {len(groups)} rows ({labels})")
        if len(set(names)) < len(names):
            raise UsageError(f"--names: {', '.join(names)}: every row needs a different name")
        groups = [replace(group, label=name) for group, name in zip(groups, names, strict=True)]
    return groups, index
