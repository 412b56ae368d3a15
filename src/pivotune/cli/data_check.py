"""`pivotune data check`: problems of training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pivotune.cli.common import (
    check_inputs,
    check_out,
    own_options,
    print_json,
    progress,
    quiet_libraries,
    safe,
    stdout,
    write_out,
)
from pivotune.cli.data_prepare import Against, EvalData, evaluation_texts, print_overlap
from pivotune.cli.options import FoldSystem
from pivotune.errors import UsageError
from pivotune.text.words import counted

if TYPE_CHECKING:
    from rich.console import Console

    from pivotune.data.check import DataCheck

_EXCERPT_CHARACTERS = 160
# In the order in which the texts of a row are shown.
_TEXT_TITLES = {
    "prompt": "prompt",
    "prompt_en": "English prompt",
    "completion": "answer",
    "completion_en": "English answer",
}


def check(
    data: Annotated[list[str], typer.Argument(help="Rows in the target language with their English.")],
    language: Annotated[str, typer.Option("--lang", help="Code of the target language: vi, zh, pt_BR...")],
    english: Annotated[str | None, typer.Option(help="Aligned English file beside one data file.")] = None,
    model: Annotated[str | None, typer.Option(help="Its tokenizer gives lengths in tokens and the cuts.")] = None,
    template: Annotated[str | None, typer.Option(help="chat, alpaca or a Jinja file.")] = None,
    fold_system: FoldSystem = False,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Limit of training, with --model.")] = 256,
    max_completion_tokens: Annotated[int, typer.Option(min=1, help="Limit of training, with --model.")] = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="Check only the first usable rows of each file.")] = None,
    show: Annotated[int, typer.Option(min=0, help="Rows to show for each kind of problem.")] = 3,
    clean: Annotated[
        Path | None, typer.Option("--write-clean", help="Write the rows without defects here (.jsonl), with a report.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Also write the result as a page (.html) or as JSON (.json).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --out.")] = False,
    against: Against = "",
    eval_data: EvalData = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, with all row numbers.")] = False,
) -> None:
    """Check parallel rows: lengths, damaged text, cut answers, repeated and untranslated rows, misaligned pairs."""
    for option, given in (("--template", template is not None), ("--fold-system", fold_system)):
        if given and model is None:
            raise UsageError(f"{option}: needs --model, whose tokenizer it is for")
    if english is not None and len(data) > 1:
        raise UsageError(f"--english: belongs to one data file, found {len(data)}; check them one by one")
    from pivotune.data.check import check_clean_path, check_rows, report_path, write_clean
    from pivotune.data.sources import concatenate, load_rows
    from pivotune.text.languages import check_language, is_english

    check_language(language, "--lang")
    if is_english(language):
        raise UsageError(f"--lang: {language} is English, the other side of every row; name the target language")
    if clean is not None:
        check_clean_path(clean, *data, english)
    if out is not None:
        check_out(out, ".html", ".json", overwrite=overwrite)
    check_inputs([model] if model else [], [*data, english])
    tasks = evaluation_texts(against, eval_data, language)
    encoder = None
    if model is not None:
        from pivotune.data.examples import Encoder, Limits
        from pivotune.data.templates import load_template
        from pivotune.models.loading import load_tokenizer, read_config
        from pivotune.training.preparation import context_length

        quiet_libraries()
        limits = Limits(max_prompt_tokens, max_completion_tokens, context_length(read_config(model)))
        tokenizer = load_tokenizer(model)
        with own_options():
            encoder = Encoder(tokenizer, load_template(template, tokenizer), limits, fold_system=fold_system)
    options: dict[str, Any] = {"english": english, "on_bad_row": "skip", "needed_by": "data check", "limit": limit}
    rows = concatenate([load_rows(source, **options) for source in data])
    with progress("Checking rows", len(rows)) as advance:
        found = check_rows(rows, language=language, encoder=encoder, examples=show, progress=advance)
    overlap = {}
    if tasks:
        from pivotune.data.prepare.overlap import find_overlap

        with progress("Comparing with evaluation sets", len(rows)) as advance:
            overlap = find_overlap(rows, tasks, advance)
    written = write_clean(clean, rows, found) if clean else 0
    if out is not None:
        _write_check(out, found)
    # The target side of the first row that fits the limits.
    pairs = encoder.encode(rows[:100], on_bad_row="skip") if encoder else []
    example = pairs[0].target if pairs else None
    if as_json:
        from pivotune.data.examples import preview

        shown = preview(encoder.tokenizer, example) if encoder and example else None
        segments = shown and [{**segment._asdict(), "loss": segment.role == "answer"} for segment in shown]
        reports = {"overlap": {name: one.to_dict(rows) for name, one in overlap.items()}} if tasks else {}
        print_json({**found.to_dict(), **reports, "example": segments})
    else:
        print_check(stdout, found)
        print_overlap(stdout, overlap)
        if encoder and example:
            from pivotune.cli.training_display import print_example

            stdout.print()
            print_example(stdout, encoder.tokenizer, example)
        stdout.print(f"[bold]verdict[/]  {found.verdict}", soft_wrap=True)
        if clean:
            line = f"{counted(written)} in {clean}; the others and why in {report_path(clean)}"
            stdout.print(f"[bold]written[/]  {safe(line)}", soft_wrap=True)
        if out is not None:
            stdout.print(f"[bold]saved[/]    {safe(out)}", soft_wrap=True)
    if clean and not written:
        raise UsageError(f"{found.source}: every usable row has a defect; {report_path(clean)} says which")


def _write_check(path: Path, found: DataCheck) -> None:
    """Write the result as JSON, which `pivotune report` reads in a run folder, or as a page."""
    content = found.to_dict()
    if path.suffix == ".json":
        write_out(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
        return
    from pivotune.report.page import Section, render_page
    from pivotune.report.pages.data import check_blocks

    write_out(path, render_page("Data check", [Section("Rows", check_blocks(content))], subtitle=found.source))


def print_check(out: Console, found: DataCheck) -> None:
    """Print counts, lengths, problems with example rows, and notes."""
    out.print(
        f"[bold]data[/]     {safe(found.source)}: {counted(found.total)}, {found.usable:,} usable", soft_wrap=True
    )
    for reason, count in found.skipped.items():
        place = f" (first: {found.skipped_at[reason]})" if reason in found.skipped_at else ""
        out.print(f"         left out: {counted(count)}: {safe(reason + place)}", soft_wrap=True)
    for reason, count in found.too_long.items():
        of_rows = f"{count:,} of {counted(found.measured)}"
        out.print(f"         would be refused in training: {of_rows}: {safe(reason)}", soft_wrap=True)
    if found.cut is not None:
        for part, option in (("prompts", "max_prompt_tokens"), ("answers", "max_completion_tokens")):
            share = found.cut[part] / found.measured
            cut = f"{part} cut in {found.cut[part]:,} rows ({share:.1%}) at data.{option} {found.cut[option]}"
            out.print(f"         {cut}", soft_wrap=True)
    if found.measured < found.usable:
        out.print(f"         (tokens are counted on {counted(found.measured)} spread over the data)")
    _print_tables(out, found)
    for problem in found.problems:
        if problem.examples:
            out.print(f"\n[bold]{problem.title}[/] ({problem.count:,})")
        for finding in problem.examples:
            # Each text on a line of its own, so that text from right to left cannot reorder anything else.
            heading = f"{finding.number}[/] {_excerpt(finding.row.id)}: {_excerpt(finding.note)}"
            out.print(f"  [bold]row {heading}", soft_wrap=True)
            for name, title in _TEXT_TITLES.items():
                out.print(f"    [dim]{title + ':':<16}[/]{_excerpt(getattr(finding.row, name))}", soft_wrap=True)
    for line in (*map(str, found.shifts), *found.notes):
        out.print(f"[bold yellow]note[/]     {safe(line)}", soft_wrap=True)


def _print_tables(out: Console, found: DataCheck) -> None:
    """Print lengths and problem counts."""
    from rich.table import Table

    if found.lengths:
        table = Table(f"length in {found.unit}", "median", "95 %", "max")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, lengths in found.lengths.items():
            table.add_row(_TEXT_TITLES[name], f"{lengths.median:,.0f}", f"{lengths.p95:,.0f}", f"{lengths.max:,}")
        out.print(table)
    if not found.problems:
        out.print("no problems found in the rows that can be used" if found.skipped else "no problems found")
        return
    table = Table("problem", "rows", "share", "what to do")
    for problem in found.problems:
        cells = (problem.title, f"{problem.count:,}", f"{problem.count / found.usable:.1%}", problem.advice)
        table.add_row(*cells, style="red" if problem.defect else None)
    out.print(table)


def _excerpt(text: str) -> str:
    """Return the start of a text in one line, safe to print."""
    line = " ".join(text.split())
    return safe(line if len(line) <= _EXCERPT_CHARACTERS else f"{line[:_EXCERPT_CHARACTERS]}...")
