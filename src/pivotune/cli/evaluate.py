"""`pivotune evaluate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pivotune.cli import evaluation_options as options
from pivotune.cli.common import (
    batch_size_option,
    console,
    print_json,
    printable,
    progress,
    quiet_libraries,
    safe,
    stderr,
    words,
)
from pivotune.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from pivotune.evaluation.run import PreparedEvaluation


def evaluate(
    run_or_model: Annotated[
        str | None, typer.Argument(help="Run folder, model folder, Hub name or bundled model.", show_default=False)
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated: tasks (xquad_vi), sets (xquad), groups (paper, qa, understanding, translation, english),"
            " alignment_vi, or multiple-choice tasks of lm-evaluation-harness."
        ),
    ] = "",
    languages: options.Languages = "",
    data_dir: options.DataDir = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="results.json, or a folder for it; default: the run folder, or results/MODEL.", show_default=False
        ),
    ] = None,
    limit: options.Limit = None,
    seed: Annotated[int | None, typer.Option(help="Draw the --limit items at random with this seed.")] = None,
    batch_size: options.BatchSize = "auto",
    template: Annotated[
        str | None, typer.Option(help="chat, alpaca, a Jinja file or none; default: what a run was trained with.")
    ] = None,
    split: options.Split = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Your own parallel text, for the tasks pairs_vi and alignment_vi.")
    ] = None,
    english: Annotated[
        Path | None, typer.Option(help="The English side of --pairs, where it is a file of its own.")
    ] = None,
    max_new_tokens: options.MaxNewTokens = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for answers, so that an interrupted evaluation goes on; default: beside the results."
        ),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no answers.")] = False,
    backend: options.Backend = "hf",
    dtype: options.Dtype = "auto",
    comet: Annotated[str | None, typer.Option(help="COMET checkpoint for translations.")] = None,
    skip_missing: options.SkipMissing = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the model's own code run.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    list_tasks: Annotated[
        bool, typer.Option("--list-tasks", help="Print all sets and their languages and exit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")] = False,
) -> None:
    """Measure a model on benchmarks in its language and in English; results go into results.json."""
    quiet_libraries()
    if list_tasks:
        _list_tasks(console(as_json), as_json)
        return
    if run_or_model is None:
        raise UsageError("missing argument RUN_OR_MODEL; see pivotune evaluate --help")
    if not tasks.strip():
        raise UsageError("--tasks: none given; for instance --tasks xquad_vi,xquad_en, or --list-tasks to see all")
    if english is not None and pairs is None:
        raise UsageError("--english goes with --pairs")
    from pivotune.evaluation.prepare import EvaluationSettings
    from pivotune.evaluation.run import execute_evaluation, prepare_evaluation

    folder = out or _default_out(run_or_model)
    _check_out(folder, run_or_model)
    settings = EvaluationSettings(
        data_dir=data_dir,
        split=split,
        limit=limit,
        seed=seed,
        batch_size=batch_size_option(batch_size),
        template=template,
        backend=backend,
        dtype=dtype,
        cache=None if no_cache else cache or _beside(folder),
        pairs=None if pairs is None else (pairs, english),
        comet=comet,
        max_new_tokens=max_new_tokens,
        skip_missing=skip_missing,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    prepared = prepare_evaluation(run_or_model, words(tasks), settings, words(languages))
    _describe(console(as_json), prepared)
    _tell_replaced(folder, prepared)
    results = execute_evaluation(prepared, folder, progress=progress, on_task=_tell_done)
    names = [task.task.name for task in prepared.tasks]
    if as_json:
        print_json({**results, "tasks": {name: results["tasks"][name] for name in names}})
    else:
        _show(console(as_json), {name: results["tasks"][name] for name in names}, folder)


def _check_out(folder: Path, model: str) -> None:
    """What is wrong with the place for the results shows before anything is read."""
    from pivotune.results.files import check_target

    if folder.exists() and not folder.is_dir() and folder.suffix != ".json":
        raise UsageError(f"--out: {folder} is a file; give a folder or a .json file")
    check_target(folder, model)


def _default_out(model: str) -> Path:
    """A run keeps its results; other models get a folder of their own here."""
    folder = Path(model).expanduser()
    if (folder / "config.yaml").is_file():
        return folder
    name = folder.resolve().name if folder.is_dir() else model.removeprefix("bundled:")
    return Path("results") / re.sub(r"[^\w.-]+", "--", name)


def _beside(out: Path) -> Path:
    from pivotune.evaluation.cache import CACHE_FOLDER
    from pivotune.results.files import results_paths

    return results_paths(out)[0].parent / CACHE_FOLDER


def _describe(out: Console, prepared: PreparedEvaluation) -> None:
    """What is measured, and one whole prompt: wrong templates fail silently otherwise."""
    from rich.text import Text

    out.print(f"model     {printable(prepared.model)}", soft_wrap=True, markup=False)
    out.print(f"template  {printable(prepared.prompter.name)}", soft_wrap=True, markup=False)
    for task in prepared.tasks:
        size = len(task.requests) or len(task.pairs or ())
        line = f"{task.task.name}: {size} items ({task.split}) from {', '.join(task.origin[:2])}"
        if len(task.origin) > 2:
            line += f" and {len(task.origin) - 2} more"
        out.print(printable(line), soft_wrap=True, markup=False)
        for reason, count in task.left_out.items():
            out.print(f"  left out: {count} items: {printable(reason)}", soft_wrap=True, markup=False)
        if task.truncated:
            note = f"  {task.truncated} prompts are longer than the model reads and lose their beginning"
            out.print(note, soft_wrap=True, style="yellow", markup=False)
    for reason in prepared.missing:
        out.print(f"left out: {printable(reason)}", soft_wrap=True, style="yellow", markup=False)
    asked = next((task.requests[0] for task in prepared.tasks if task.requests), None)
    if asked is not None:
        gold = asked.likelihoods[asked.item.gold or 0].continuation
        shown = Text.assemble((printable(asked.context.text), "cyan"), (printable(gold), "green"))
        out.print("first prompt, and its [green]gold answer[/]:")
        out.print(shown, soft_wrap=True)


def _tell_replaced(folder: Path, prepared: PreparedEvaluation) -> None:
    """A task that was measured before is replaced: whoever tries a small --limit should know."""
    from pivotune.results.files import read_entries

    entries = read_entries(folder)
    for task in prepared.tasks:
        earlier = entries.get(task.task.name)
        if earlier is not None and earlier.get("n") != (len(task.requests) or len(task.pairs or ())):
            line = f"{task.task.name}: the earlier result (n = {earlier.get('n')}) in {folder} is replaced"
            stderr.print(printable(line), style="yellow", soft_wrap=True, markup=False)


def _tell_done(name: str, entry: dict[str, Any]) -> None:
    """A log file gets no moving bars, but wants to know how far the evaluation is."""
    if not stderr.is_terminal:
        line = f"{name}: {entry['metric']} {_number(entry['value'])} ± {_number(entry['stderr'])} (n = {entry['n']})"
        stderr.print(printable(line), soft_wrap=True, markup=False)


def _show(out: Console, tasks: dict[str, Any], folder: Path) -> None:
    from rich.table import Column, Table

    from pivotune.results.files import results_paths

    figure_columns = [Column(title, justify="right", no_wrap=True) for title in ("value", "± s.e.", "n")]
    table = Table(
        Column("task", overflow="fold"),
        Column("metric", overflow="fold"),
        *figure_columns,
        "gold NLL per token",
        "in its language",
        "notes",
    )
    for name, task in tasks.items():
        metrics = task["metrics"]
        for index, metric in enumerate(_main_metrics(task)):
            figure = metrics[metric]
            first = index == 0
            table.add_row(
                safe(name) if first else "",
                safe(metric),
                _number(figure["value"]),
                _number(figure["stderr"]),
                str(figure["n"]),
                _number(metrics.get("nll_per_token", {}).get("value"), 3) if first else "",
                _in_language(metrics) if first else "",
                safe(_notes(task)) if first else "",
            )
    out.print(table)
    if not any(task["language"] == "en" or "_en-" in name or name.endswith("-en") for name, task in tasks.items()):
        out.print("English was not evaluated: --tasks english measures harm to it", style="dim", soft_wrap=True)
    path, _ = results_paths(folder)
    saved = f"saved    {path}   (compare: pivotune compare {folder} OTHER)"
    out.print(printable(saved), soft_wrap=True, markup=False)


def _main_metrics(task: dict[str, Any]) -> list[str]:
    shown = ("exact_match", "bleu", "comet", "centered_retrieval_accuracy", "cosine")
    secondary = [name for name in shown if name in task["metrics"]]
    return [task["metric"], *secondary]


def _in_language(metrics: dict[str, Any]) -> str:
    """Of the answers that are long enough to tell, whose number stands beside."""
    figure = metrics.get("in_language")
    return f"{figure['value']:.0f}% of {figure['n']}" if figure else ""


def _notes(task: dict[str, Any]) -> str:
    notes = []
    if task.get("truncated"):
        notes.append(f"{task['truncated']} prompts cut")
    if empty := task["metrics"].get("empty_answers", {}).get("value"):
        notes.append(f"{empty:.0f}% empty")
    return ", ".join(notes)


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _list_tasks(out: Console, as_json: bool) -> None:
    from rich.table import Table

    from pivotune.evaluation.registry import GROUPS, benchmarks

    known = benchmarks()
    if as_json:
        print_json({"groups": GROUPS, "benchmarks": {name: list(b.languages) for name, b in known.items()}})
        return
    table = Table("set", "title", "languages (set_language is a task)", "publisher")
    for name, benchmark in known.items():
        languages = " ".join(sorted(benchmark.languages)) + (" ..." if benchmark.open_ended else "")
        table.add_row(name, benchmark.title, languages, benchmark.homepage)
    out.print(table)
    out.print("groups: " + "; ".join(f"{group}: {' '.join(names)}" for group, names in GROUPS.items()), soft_wrap=True)
    stderr.print(
        "alignment_LANG, alignment_SET_LANG (flores, ntrex, tatoeba, pairs) compare hidden states layer by layer"
    )
