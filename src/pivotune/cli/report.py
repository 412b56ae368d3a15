"""`pivotune report`: everything that is known of some runs, as one page that opens offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pivotune.cli.common import print_lines, stderr, stdout
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
    check_page_path(out, overwrite=overwrite)
    if figures is not None and figures.exists() and not figures.is_dir():
        raise UsageError(f"--figures: {figures} is a file; name a folder")
    from pivotune.report.report import render_report, report_sections, save_figures
    from pivotune.report.runs import read_material

    with stderr.status("reading the runs"):
        sections = report_sections(read_material([path.expanduser() for path in runs], baseline=baseline))
        write_page(out, render_report(sections, title))
    written = []
    if figures is not None:
        with stderr.status("writing the figures"):
            written = list(save_figures(sections, figures))
    print_lines(stdout, f"saved {out}" + (f" and {len(written)} files in {figures}" if written else ""))


def check_page_path(path: Path, *, overwrite: bool, allowed: tuple[str, ...] = (".html",)) -> None:
    """Refuse a page that cannot be written, before anything is computed."""
    if path.is_dir():
        raise UsageError(f"--out: {path} is a folder; name a file, such as {path / 'report.html'}")
    if path.suffix not in allowed:
        raise UsageError(f"--out: {path} ends in {path.suffix or 'nothing'!r}; allowed: {', '.join(allowed)}")
    if not path.parent.is_dir():
        raise UsageError(f"--out: {path.parent} is not a folder")
    if path.exists() and not overwrite:
        raise UsageError(f"--out: {path} exists; add --overwrite or name another file")


def write_page(path: Path, page: str) -> None:
    """Write a page."""
    from pivotune.text.files import write_text

    try:
        write_text(path, page)
    except OSError as error:
        raise UsageError(f"--out: {path} cannot be written ({error.strerror or error})") from error
