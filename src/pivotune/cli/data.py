"""`pivotune data`: what is in training data, and whether it is any good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pivotune.cli.common import console, print_json, progress, quiet_libraries
from pivotune.cli.common import safe as _safe
from pivotune.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from pivotune.data.check import DataCheck, Finding
    from pivotune.data.examples import Encoder, Side
    from pivotune.data.sources import Rows

_EXCERPT_CHARACTERS = 160
_TEXT_TITLES = {
    "prompt": "prompt",
    "completion": "answer",
    "prompt_en": "English prompt",
    "completion_en": "English answer",
}

app = typer.Typer(help="Look at training data.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """Look at training data."""


@app.command()
def check(
    data: Annotated[str, typer.Argument(help="Rows in the target language with their English.")],
    language: Annotated[str, typer.Option("--lang", help="Code of the target language: vi, zh, pt_BR...")],
    english: Annotated[str | None, typer.Option(help="Aligned English file beside the data.")] = None,
    model: Annotated[str | None, typer.Option(help="Its tokenizer gives lengths in tokens and what is cut.")] = None,
    template: Annotated[str | None, typer.Option(help="chat, alpaca or a Jinja file.")] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Limit of training, with --model.")] = 256,
    max_completion_tokens: Annotated[int, typer.Option(min=1, help="Limit of training, with --model.")] = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="Check only the first usable rows.")] = None,
    show: Annotated[int, typer.Option(min=0, help="Rows to show for each kind of problem.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, with all row numbers.")] = False,
) -> None:
    """Check parallel rows: lengths, repeated and untranslated rows, wrong languages, misaligned or shifted pairs."""
    if template is not None and model is None:
        raise UsageError("--template: needs --model, whose tokenizer it is for")
    from pivotune.data.check import base_language, check_rows
    from pivotune.data.sources import load_rows

    if base_language(language) == "en":
        raise UsageError(f"--lang: {language} is English, the other side of every row; name the target language")
    encoder = _encoder(model, template, max_prompt_tokens, max_completion_tokens) if model else None
    rows = load_rows(data, english=english, on_bad_row="skip", needed_by="data check", limit=limit)
    with progress("Checking rows", len(rows)) as advance:
        found = check_rows(rows, language=language, encoder=encoder, examples=show, progress=advance)
    example = _first_example(encoder, rows) if encoder else None
    if as_json:
        print_json({**found.to_dict(), "example": _segments(encoder, example)})
    else:
        print_check(console(as_json), found)
        _print_example(console(as_json), encoder, example)
        console(as_json).print(f"[bold]verdict[/]  {found.verdict}", soft_wrap=True)


def print_check(out: Console, found: DataCheck) -> None:
    """Counts, lengths, problems with examples, and doubts."""
    _print_counts(out, found)
    _print_lengths(out, found)
    _print_problems(out, found)
    for problem in found.problems:
        if problem.examples:
            out.print(f"\n[bold]{problem.title}[/] ({problem.count:,})")
        for finding in problem.examples:
            _print_finding(out, finding)
    for line in (*map(str, found.shifts), *found.notes):
        out.print(f"[bold yellow]note[/]     {_safe(line)}", soft_wrap=True)


def _print_counts(out: Console, found: DataCheck) -> None:
    out.print(f"[bold]data[/]     {_safe(found.source)}: {found.total:,} rows, {found.usable:,} usable", soft_wrap=True)
    for reason, count in found.skipped.items():
        out.print(f"         left out: {count:,} rows: {_safe(reason)}", soft_wrap=True)
    for reason, count in found.too_long.items():
        of_rows = f"{count:,} of {found.measured:,} rows"
        out.print(f"         would be refused in training: {of_rows}: {_safe(reason)}", soft_wrap=True)
    if found.cut is not None:
        for part, option in (("prompts", "max_prompt_tokens"), ("answers", "max_completion_tokens")):
            share = found.cut[part] / found.measured
            cut = f"{part} cut in {found.cut[part]:,} rows ({share:.1%}) at data.{option} {found.cut[option]}"
            out.print(f"         {cut}", soft_wrap=True)
    if found.measured < found.usable:
        out.print(f"         (tokens are counted on {found.measured:,} rows spread over the data)")


def _print_lengths(out: Console, found: DataCheck) -> None:
    from rich.table import Table

    if not found.lengths:
        return
    table = Table(f"length in {found.unit}", *("median", "95 %", "max"))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, lengths in found.lengths.items():
        table.add_row(_TEXT_TITLES[name], f"{lengths.median:,.0f}", f"{lengths.p95:,.0f}", f"{lengths.max:,}")
    out.print(table)


def _print_problems(out: Console, found: DataCheck) -> None:
    from rich.table import Table

    if not found.problems:
        out.print("no problems found in the rows that can be used" if found.skipped else "no problems found")
        return
    table = Table("problem", "rows", "share", "what to do")
    for problem in found.problems:
        share = f"{problem.count / found.usable:.1%}"
        table.add_row(
            problem.title, f"{problem.count:,}", share, problem.advice, style="red" if problem.defect else None
        )
    out.print(table)


def _print_finding(out: Console, finding: Finding) -> None:
    """One row; each text on a line of its own, so that text from right to left cannot reorder anything else."""
    row = finding.row
    out.print(
        f"  [bold]row {finding.number}[/] {_safe(_excerpt(row.id))}: {_safe(_excerpt(finding.note))}", soft_wrap=True
    )
    texts = (row.prompt, row.prompt_en, row.completion, row.completion_en)
    for name, text in zip(("prompt", "prompt_en", "completion", "completion_en"), texts, strict=True):
        out.print(f"    [dim]{_TEXT_TITLES[name] + ':':<16}[/]{_safe(_excerpt(text))}", soft_wrap=True)


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _EXCERPT_CHARACTERS else f"{line[:_EXCERPT_CHARACTERS]}..."


def _encoder(model: str, template: str | None, max_prompt_tokens: int, max_completion_tokens: int) -> Encoder:
    from pivotune.data.examples import Encoder, Limits
    from pivotune.data.templates import load_template
    from pivotune.models.loading import load_tokenizer, read_config
    from pivotune.training.preparation import context_length

    quiet_libraries()
    limits = Limits(max_prompt_tokens, max_completion_tokens, context_length(read_config(model)))
    tokenizer = load_tokenizer(model)
    return Encoder(tokenizer, load_template(template, tokenizer), limits)


def _first_example(encoder: Encoder, rows: Rows) -> Side | None:
    """The target side of the first row that fits the limits."""
    pairs = encoder.encode(rows[:100], on_bad_row="skip")
    return pairs[0].target if pairs else None


def _segments(encoder: Encoder | None, example: Side | None) -> list[dict[str, Any]] | None:
    from pivotune.data.examples import preview

    if encoder is None or example is None:
        return None
    return [{**segment._asdict(), "loss": segment.role == "answer"} for segment in preview(encoder.tokenizer, example)]


def _print_example(out: Console, encoder: Encoder | None, example: Side | None) -> None:
    """One row as the model sees it: a wrong mask fails silently in training."""
    from pivotune.cli.train import mask_text

    if encoder is None or example is None:
        return
    out.print("\n[bold]example[/]  (only the [green]answer[/] is trained on; [cyan]query[/]; [dim]template[/])")
    out.print(mask_text(encoder.tokenizer, example), soft_wrap=True)
