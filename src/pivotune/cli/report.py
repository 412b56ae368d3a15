"""`pivotune report`: everything that is known of some runs, as one page that opens offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pivotune.cli.common import check_out, print_lines, stderr, stdout, write_out
from pivotune.errors import UsageError

_RUNS_HELP = "Run folders, results files, or folders of runs."
_FIGURES_HELP = "Also write every figure here as PNG, SVG and PDF."
_BASELINE_HELP = "Row of the table to compare with; default: method tft, else the first."


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help=_RUNS_HELP)],
    out: Annotated[Path, typer.Option(help="The page, one HTML file.")] = Path("report.html"),
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help=_FIGURES_HELP)] = None,
    baseline: Annotated[str | None, typer.Option(metavar="ROW", help=_BASELINE_HELP)] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Report of runs",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier page.")] = False,
) -> None:
    """Show runs as one page: methods and data, real differences, figures, answers side by side."""
    check_out(out, ".html", overwrite=overwrite)
    if figures is not None and figures.exists() and not figures.is_dir():
        raise UsageError(f"--figures: {figures} is a file; name a folder")
    from pivotune.report.report import render_report, report_sections, save_figures
    from pivotune.report.runs import read_material

    with stderr.status("reading the runs"):
        sections = report_sections(read_material([path.expanduser() for path in runs], baseline=baseline))
        write_out(out, render_report(sections, title))
    written = []
    if figures is not None:
        with stderr.status("writing the figures"):
            written = save_figures(sections, figures)
    print_lines(stdout, f"saved {out}" + (f" and {len(written)} files in {figures}" if written else ""))
