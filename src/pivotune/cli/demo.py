"""`pivotune demo`: the main job on a small real model and real facts, on a laptop CPU."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pivotune.cli.common import console, print_json, print_lines, printable, progress, quiet_libraries, write_out

if TYPE_CHECKING:
    from rich.console import Console

_NAMES = {"base": "base", "tft": "TFT", "deep-supervision": "deep supervision"}


def demo(
    language: Annotated[str, typer.Option("--lang", help="ar, de, es, fr, id, ja, pt, sw, vi or zh.")] = "vi",
    out: Annotated[Path, typer.Option(help="Folder for data, runs, results and pictures.")] = Path("demo-run"),
    rows: Annotated[int, typer.Option(min=1, help="Training rows.")] = 320,
    signal: Annotated[str, typer.Option(help="logits or feature.")] = "logits",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in that folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")] = False,
) -> None:
    """Train TFT and deep supervision from the same start on the same facts and compare them, in under ten minutes."""
    from pivotune.errors import UsageError

    if signal not in ("logits", "feature"):
        raise UsageError(f"--signal: {signal!r} is not allowed; allowed: logits, feature")
    quiet_libraries()
    from pivotune.cli.training_display import TrainingProgress, describe_run
    from pivotune.demo.run import DemoSettings, run_demo
    from pivotune.report.report import render_report, report_sections
    from pivotune.report.runs import read_material
    from pivotune.text.languages import find_language

    screen = console(as_json)
    with ExitStack() as bars:
        results = run_demo(
            out,
            DemoSettings(language=language, rows=rows, signal=signal, seed=seed),
            overwrite=overwrite,
            progress=progress,
            callback=lambda title: bars.enter_context(TrainingProgress(title)),
            on_prepared=lambda prepared: describe_run(screen, prepared),
        )
    pictures = _draw(out, results)
    page, title = out / "report.html", f"Pivotune demo: {find_language(language).name}"
    write_out(page, render_report(report_sections(read_material([out])), title))
    if as_json:
        print_json(results)
        return
    _show(screen, results)
    print_lines(screen, f"runs, results and pictures: {', '.join(map(str, [out / 'results.json', *pictures]))}")
    print_lines(screen, f"talk to both: pivotune chat {out / 'deep-supervision'} --compare {out / 'tft'}")
    print_lines(screen, f"look at everything in a browser: {page}")


def _draw(folder: Path, results: dict[str, Any]) -> list[Path]:
    from pivotune.report.figures.base import save_figure
    from pivotune.report.figures.layers import entropy_comparison, layer_figure, supervised
    from pivotune.report.figures.scores import heldout_figure
    from pivotune.report.figures.training import training_figure
    from pivotune.results.files import read_metrics

    language, layers, models = results["settings"]["language"], results["layers"], results["models"]
    pictures = [folder / name for name in ("layers.png", "entropy.png", "heldout.png", "training.png")]
    profiles = {_NAMES[name]: measured["profile"] for name, measured in models.items()}
    marks: Any = supervised(layers)

    def by_language(key: str) -> dict[str, dict[str, float]]:
        sides = {language: "target", "en": "english"}
        return {_NAMES[name]: {code: one[side][key] for code, side in sides.items()} for name, one in models.items()}

    paired = {"differences": results["difference"], "difference": "deep supervision\nminus TFT"}
    metrics = read_metrics(folder / "deep-supervision" / "metrics.jsonl")
    figures = (
        layer_figure(layers),
        entropy_comparison(profiles, language=language, **marks),
        heldout_figure(by_language("nll"), errors=by_language("stderr"), **paired),
        training_figure({_NAMES["deep-supervision"]: metrics}),
    )
    for figure, picture in zip(figures, pictures, strict=True):
        save_figure(figure, picture)
    return pictures


def _show(screen: Console, results: dict[str, Any]) -> None:
    """Print the layers, the scores of all models, and their answers to a few held-out questions."""
    from rich.table import Table
    from rich.text import Text

    language, layers, models = results["settings"]["language"], results["layers"], results["models"]
    chosen = f"thinking {layers['thinking']} of {layers['num_layers']}"
    screen.print(f"\n[bold]layers[/]   {chosen}: {layers['reason']}")
    base = models["base"]["target"]
    title = f"{base['rows']} held-out rows scored (nats per token, ± standard error), {base['answered']} answered"
    columns = [f"answer NLL {language}", "answer NLL en", f"exact match {language}", "exact match en"]
    table = Table("held-out facts", *columns, title=title)
    for name, measured in models.items():
        sides = (measured["target"], measured["english"])
        nll = [f"{side['nll']:.3f} ± {side['stderr']:.3f}" for side in sides]
        table.add_row(_NAMES[name], *nll, *(f"{side['exact_match']:.0%}" for side in sides))
    found = [results["difference"][code] for code in (language, "en")]
    cells = [f"{one['value']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]" for one in found]
    label = "deep supervision minus TFT, 95 % interval over rows (training noise left out)"
    table.add_row(label, *cells, "", "", style="bold")
    screen.print(table)

    table = Table("question", "right answer", *(_NAMES[name] for name in models), show_lines=True)
    answers = [measured["target"]["answers"] for measured in models.values()]
    for index in range(0, len(answers[0]), max(len(answers[0]) // 5, 1)):
        first = answers[0][index]
        cells = [first["question"], first["gold"], *(group[index]["answer"] for group in answers)]
        table.add_row(*(Text(printable(cell)) for cell in cells))
    screen.print(table)
