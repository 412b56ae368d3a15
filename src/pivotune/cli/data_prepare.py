"""`pivotune data prepare`: rows from known instruction sets and parallel corpora."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pivotune.cli.common import check_out, progress, safe, stdout, words
from pivotune.errors import UsageError
from pivotune.text.words import counted

if TYPE_CHECKING:
    from rich.console import Console

    from pivotune.data.prepare.overlap import Overlap

Against = Annotated[str, typer.Option(help="Evaluation sets to compare with, as for evaluate: xquad_vi,mlqa_vi.")]
EvalData = Annotated[Path | None, typer.Option(help="Folder with the sets' files; default: the Hub.")]


def prepare(
    source: Annotated[
        str, typer.Argument(help="Rows or sentences: a file (also .tmx, .tsv, Moses), or a Hub dataset.")
    ],
    language: Annotated[str, typer.Option("--lang", help="Code of the language of the rows: vi, zh, pt_BR...")],
    out: Annotated[Path, typer.Option(help="File of the rows (.jsonl); report and card are written beside it.")],
    english: Annotated[str | None, typer.Option(help="The English side, if it is a source of its own.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns of the sentence and of its English: vi,en or 2,1.", show_default="found")
    ] = None,
    task: Annotated[
        str, typer.Option(help="Rows from sentences: continue (the second half is the answer), translate.")
    ] = ("continue"),
    near_duplicates: Annotated[
        float, typer.Option(min=0, max=1, help="Similarity from which the later row is left out; 0 keeps all.")
    ] = 0.8,
    validation: Annotated[int, typer.Option(min=0, help="Rows to hold out in a second file.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Draws the held-out rows.")] = 0,
    against: Against = "",
    eval_data: EvalData = None,
    remove_overlap: Annotated[
        bool, typer.Option("--remove-overlap", help="Leave out rows that share text with a set of --against.")
    ] = False,
    license: Annotated[str, typer.Option(help="License of the rows, for the card: cc-by-4.0...")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files.")] = False,
) -> None:
    """Make rows from known instruction sets and parallel corpora: near-duplicates out, split, with a dataset card."""
    from pivotune.data.check import check_clean_path
    from pivotune.data.hub import parse_hub_name
    from pivotune.data.prepare.run import PrepareSettings, prepare_rows, write_prepared, written_paths
    from pivotune.data.prepare.tasks import TASKS
    from pivotune.text.languages import find_language

    target, pair = find_language(language), words(columns or "")
    if task not in TASKS:
        raise UsageError(f"--task: {task!r} found; allowed: {', '.join(TASKS)}")
    if columns is not None and len(pair) != 2:
        raise UsageError(f"--columns: {columns!r} found; allowed: two names, TARGET,ENGLISH")
    if target.code == "en" and english is not None:
        raise UsageError("--english: the rows are English already (--lang en); name the target language")
    if remove_overlap and not against:
        raise UsageError("--remove-overlap: needs --against, the evaluation sets")
    paths = written_paths(out)
    for path in (paths["rows"], paths["validation"]):
        check_clean_path(path, source, english, option="--out")
    for path in paths.values():
        check_out(path, path.suffix, overwrite=overwrite)
    for name in filter(None, (source, english)):
        parse_hub_name(name, ".tmx")  # refuses a missing file, before sets are read
    tasks = evaluation_texts(against, eval_data, target.code)
    settings = PrepareSettings(
        source=source,
        language=target,
        english=english,
        columns=(pair[0], pair[1]) if pair else None,
        task=task,
        near_duplicates=near_duplicates,
        validation=validation,
        seed=seed,
        remove_overlap=remove_overlap,
        license=license,
    )
    prepared = prepare_rows(settings, tasks, progress)
    write_prepared(out, prepared)
    rows = prepared.rows
    lines = [f"[bold]data[/]     {safe(rows.source)}: {counted(rows.total)}, {len(rows):,} usable"]
    for reason, count in (*rows.skipped.items(), *prepared.reasons().items()):
        lines.append(f"         left out: {counted(count)}: {safe(reason)}")
    lines += [f"[bold yellow]note[/]     {safe(note)}" for note in rows.notes]
    if not prepared.has_english:
        lines.append(
            "[bold yellow]note[/]     the rows have no English side; give it with --english, or train methods without it"
        )
    lines.append(
        f"[bold]written[/]  {counted(len(prepared.training))} in {safe(out)}; the others and why in {safe(paths['report'])}"
    )
    if len(prepared.validation):
        lines.append(f"         {counted(len(prepared.validation), 'held-out row')} in {safe(paths['validation'])}")
    lines.append(f"         dataset card: {safe(paths['card'])}")
    if target.code == "en":
        lines.append(f"[bold]next[/]     pivotune data translate {safe(out)} --to LANGUAGE --model MODEL --out PAIRS")
    elif prepared.has_english and not (prepared.are_sentences and task == "translate"):  # its prompts are in English
        lines.append(f"[bold]next[/]     pivotune data check {safe(out)} --lang {target.code}")
    for line in lines:
        stdout.print(line, soft_wrap=True)
    print_overlap(stdout, prepared.overlap)


def evaluation_texts(against: str, eval_data: Path | None, language: str) -> dict[str, list[list[str]]]:
    """Read the sets of `--against`; messages name the options of this verb."""
    if not against:
        if eval_data is not None:
            raise UsageError("--eval-data: needs --against, the evaluation sets")
        return {}
    from pivotune.evaluation import registry

    if eval_data is not None and not eval_data.is_dir():
        raise UsageError(f"--eval-data: {eval_data} is not a folder")
    try:
        return registry.evaluation_texts(words(against), [language], eval_data)
    except UsageError as error:
        raise UsageError(str(error).replace("--tasks", "--against").replace("--data-dir", "--eval-data")) from error


def print_overlap(out: Console, overlap: Mapping[str, Overlap]) -> None:
    from rich.table import Table

    if overlap:
        table = Table("evaluation set", "items", "long enough", "items in the rows", "rows")
        for name, found in overlap.items():
            counts = (found.items, found.compared, len(found.found), len(found.rows))
            table.add_row(safe(name), *(f"{count:,}" for count in counts))
        out.print(table)
