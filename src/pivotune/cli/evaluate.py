"""`pivotune evaluate`: measure a model on benchmarks; results go into results.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pivotune.cli import options
from pivotune.cli.common import (
    check_inputs,
    console,
    print_json,
    print_lines,
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

_MODEL_HELP = "Run folder, model folder, Hub name or bundled model."
_TASKS_HELP = (
    "Comma-separated: tasks (xquad_vi), sets (xquad), groups (paper, qa, understanding, translation, english), "
    "alignment_vi, or multiple-choice tasks of lm-evaluation-harness."
)
_SECONDARY_METRICS = ("exact_match", "acc_norm", "bleu", "comet", "centered_retrieval_accuracy", "cosine")


def evaluate(
    run_or_model: Annotated[str | None, typer.Argument(help=_MODEL_HELP, show_default=False)] = None,
    tasks: Annotated[str, typer.Option(help=_TASKS_HELP)] = "",
    languages: options.Languages = "",
    data_dir: options.DataDir = None,
    out: Annotated[Path | None, typer.Option(help="results.json or its folder; default: the run's.")] = None,
    limit: options.Limit = None,
    seed: Annotated[int | None, typer.Option(help="Draw the --limit items at random with this seed.")] = None,
    batch_size: options.BatchSize = "auto",
    template: Annotated[str | None, typer.Option(help="chat, alpaca, Jinja file, none; default: the run's.")] = None,
    pivot: Annotated[str | None, typer.Option(help="plug: English answer first; none; default: the run's.")] = None,
    split: options.Split = None,
    pairs: Annotated[Path | None, typer.Option(help="Your own parallel text, for pairs_vi and alignment_vi.")] = None,
    english: Annotated[Path | None, typer.Option(help="English side of --pairs, if it is a file of its own.")] = None,
    max_new_tokens: options.MaxNewTokens = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for answers; default: beside the results.")] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no answers.")] = False,
    backend: options.Backend = "hf",
    dtype: options.Dtype = "auto",
    comet: Annotated[str | None, typer.Option(help="COMET checkpoint for translations.")] = None,
    skip_missing: options.SkipMissing = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    list_tasks: Annotated[bool, typer.Option("--list-tasks", help="Print all sets and languages and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")] = False,
) -> None:
    """Measure a model on benchmarks in its language and in English; results go into results.json."""
    if list_tasks:
        _list_tasks(console(as_json), as_json)
        return
    if run_or_model is None:
        raise UsageError("missing argument RUN_OR_MODEL; see pivotune evaluate --help")
    if not tasks.strip():
        raise UsageError("--tasks: none given; for instance --tasks xquad_vi,xquad_en, or --list-tasks to see all")
    if english is not None and pairs is None:
        raise UsageError("--english goes with --pairs")
    codes = options.parse_languages(languages)
    from pivotune.evaluation.cache import CACHE_FOLDER
    from pivotune.evaluation.prepare import EvaluationSettings, prepare_evaluation
    from pivotune.results.files import check_target, results_paths

    folder = out or _default_out(run_or_model)
    if folder.exists() and not folder.is_dir() and folder.suffix != ".json":
        raise UsageError(f"--out: {folder} is a file; give a folder or a .json file")
    check_target(folder, run_or_model)
    settings = EvaluationSettings(
        data_dir=data_dir,
        split=split,
        limit=limit,
        seed=seed,
        batch_size=options.parse_batch_size(batch_size),
        template=template,
        pivot=pivot,
        backend=backend,
        dtype=dtype,
        cache=None if no_cache else cache or results_paths(folder)[0].parent / CACHE_FOLDER,
        pairs=None if pairs is None else (pairs, english),
        comet=comet,
        max_new_tokens=max_new_tokens,
        skip_missing=skip_missing,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    check_inputs([run_or_model], revision=revision)
    quiet_libraries()
    prepared = prepare_evaluation(run_or_model, words(tasks), settings, codes)
    from pivotune.evaluation.run import execute_evaluation

    _describe(console(as_json), prepared, folder)
    results = execute_evaluation(prepared, folder, progress=progress, on_task=_log_result)
    measured = {task.task.name: results["tasks"][task.task.name] for task in prepared.tasks}
    if as_json:
        print_json({**results, "tasks": measured})
    else:
        _show(console(as_json), measured, folder)


def _default_out(model: str) -> Path:
    """Return the folder of a run, or a folder here for another model."""
    folder = Path(model).expanduser()
    if (folder / "config.yaml").is_file():
        return folder
    name = folder.resolve().name if folder.is_dir() else model.removeprefix("bundled:")
    return Path("results") / re.sub(r"[^\w.-]+", "--", name)


def _describe(out: Console, prepared: PreparedEvaluation, folder: Path) -> None:
    """Print model and tasks, and one whole prompt, because wrong templates fail silently."""
    from rich.text import Text

    from pivotune.results.files import read_entries

    entries = read_entries(folder)
    print_lines(out, f"model     {prepared.model}", f"template  {prepared.prompter.name}")
    for task in prepared.tasks:
        size = len(task.requests) or len(task.pairs or ())
        line = f"{task.task.name}: {size} items ({task.split}) from {', '.join(task.origin[:2])}"
        if len(task.origin) > 2:
            line += f" and {len(task.origin) - 2} more"
        if task.marker:
            line += f"; an English answer first, then {task.marker.strip()}"
        print_lines(out, line, *(f"  left out: {count} items: {reason}" for reason, count in task.left_out.items()))
        if task.truncated:
            note = f"  {task.truncated} prompts are longer than the model reads and lose their beginning"
            print_lines(out, note, style="yellow")
        earlier = entries.get(task.task.name)
        if earlier is not None and earlier.get("n") != size:  # as with a small --limit
            note = f"{task.task.name}: the earlier result (n = {earlier.get('n')}) in {folder} is replaced"
            print_lines(stderr, note, style="yellow")
    print_lines(out, *(f"left out: {reason}" for reason in prepared.missing), style="yellow")
    if asked := next((task.requests[0] for task in prepared.tasks if task.requests), None):
        gold = asked.likelihoods[asked.item.gold or 0].continuation
        parts = ((asked.context.text, "cyan"), ("..." * bool(asked.pivot) + asked.marker, "dim"), (gold, "green"))
        shown = Text.assemble(*((printable(text), style) for text, style in parts))
        out.print("first prompt, and its [green]gold answer[/]:")
        out.print(shown, soft_wrap=True)


def _log_result(name: str, entry: dict[str, Any]) -> None:
    """Print a finished task in a log file, which shows no moving bars."""
    if not stderr.is_terminal:
        figure = f"{_number(entry['value'])} ± {_number(entry['stderr'])} (n = {entry['n']})"
        print_lines(stderr, f"{name}: {entry['metric']} {figure}")


def _show(out: Console, tasks: dict[str, Any], folder: Path) -> None:
    """Print a table of the results; a task's first line is its main metric."""
    from rich.table import Column, Table

    from pivotune.results.files import results_paths

    names = [Column("task", overflow="fold"), Column("metric", no_wrap=True)]
    numbers = [Column(title, justify="right", no_wrap=True) for title in ("value", "± s.e.", "n")]
    table = Table(*names, *numbers, "gold NLL per token", "in its language", "notes")
    for name, task in tasks.items():
        metrics = task["metrics"]
        notes = [f"{task['truncated']} prompts cut"] if task.get("truncated") else []
        if empty := metrics.get("empty_answers", {}).get("value"):
            notes.append(f"{empty:.0f}% empty")
        if unmarked := metrics.get("no_marker", {}).get("value"):
            notes.append(f"{unmarked:.0f}% no marker")
        # Only of the answers that are long enough for language identification, hence with their number.
        language = metrics.get("in_language")
        in_language = f"{language['value']:.0f}% of {language['n']}" if language else ""
        last = [_number(metrics.get("nll_per_token", {}).get("value"), 3), in_language, safe(", ".join(notes))]
        label = safe(name)
        for metric in (task["metric"], *(metric for metric in _SECONDARY_METRICS if metric in metrics)):
            figure = metrics[metric]
            cells = (_number(figure["value"]), _number(figure["stderr"]), str(figure["n"]))
            table.add_row(label, safe(metric), *cells, *last)
            label, last = "", ["", "", ""]
    out.print(table)
    if not any(task["language"] == "en" or "_en-" in name or name.endswith("-en") for name, task in tasks.items()):
        out.print("English was not evaluated: --tasks english measures harm to it", style="dim", soft_wrap=True)
    print_lines(out, f"saved    {results_paths(folder)[0]}   (compare: pivotune compare {folder} OTHER)")


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
    stderr.print("alignment_LANG, alignment_SET_LANG (flores, ntrex, tatoeba, pairs) compare hidden states by layer")
