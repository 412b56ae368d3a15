"""`pivotune explore`: the lens of a prompt and its answer, layer by token, as a page or on a local server."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pivotune.cli.common import (
    check_inputs,
    check_out,
    print_lines,
    progress,
    quiet_libraries,
    safe,
    stderr,
    stdout,
    write_out,
)
from pivotune.errors import UsageError

if TYPE_CHECKING:
    from pivotune.data.examples import Encoder
    from pivotune.data.rows import Row
    from pivotune.explore.reader import LensReader


def explore(
    run_or_model: Annotated[str, typer.Argument(help="Run folder, model folder, Hub name or bundled model.")],
    against: Annotated[str | None, typer.Option(help="Another of the same shape: show the difference too.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to read; the model answers it. Repeatable.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows to read and to fit the tuned lens on.")] = None,
    rows: Annotated[int, typer.Option(min=1, max=20, help="Rows to read, spread over the data.")] = 3,
    lens: Annotated[str, typer.Option(help="both (tuned where one can be had), or logit.")] = "both",
    template: Annotated[str | None, typer.Option(help="chat, alpaca, Jinja file, none; default: the run's.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=512, help="Token limit of each prompt.")] = 96,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=512, help="Token limit of each answer.")] = 32,
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("lens.html"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier page.")] = False,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write every grid as PNG, SVG and PDF.")
    ] = None,
    colour: Annotated[str, typer.Option(help="Of the figures' cells: probability or entropy.")] = "probability",
    serve: Annotated[bool, typer.Option("--serve", help="Open a local page on which prompts are typed.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --serve; 0: a free one.")] = 0,
) -> None:
    """Show the next token that each layer predicts, with probability, entropy and language, layer by token."""
    prompts, names = prompt or [], [run_or_model] if against is None else [run_or_model, against]
    if len(set(names)) < len(names):
        raise UsageError(f"--against: {against} is the model itself; name another one")
    if any(not text.strip() for text in prompts):
        raise UsageError("--prompt: is empty")
    if lens not in ("both", "logit"):
        raise UsageError(f"--lens: {lens!r} is not allowed; allowed: both, logit")
    if colour not in ("probability", "entropy"):
        raise UsageError(f"--colour: {colour!r} is not allowed; allowed: probability, entropy")
    if figures is not None and figures.exists() and not figures.is_dir():
        raise UsageError(f"--figures: {figures} is a file; name a folder")
    if serve:
        if figures is not None:
            raise UsageError("--figures: goes with a page, not with --serve")
        from pivotune.explore.server import check_port

        check_port(port)
    else:
        if not prompts and data is None:
            raise UsageError("there is nothing to read; give --prompt or --data, or type prompts with --serve")
        check_out(out, ".html", overwrite=overwrite)
    check_inputs(names, [data])
    quiet_libraries()
    if against is not None:
        _check_comparable(run_or_model, against)
    encoder = _encoder(run_or_model, template, max_new_tokens)
    shown, others = _rows(prompts, data, rows)
    reader, about = _load_reader(names, encoder, others, data or "", lens)
    reader.max_tokens, reader.max_new_tokens = max_tokens, max_new_tokens
    lenses = (1 if reader.lens is None else 2) * sum(1 + bool(row.prompt_en) for row, _ in shown)
    items, done = [], itertools.count(1)
    if shown:
        with progress("Reading texts through each lens", lenses) as advance:
            reader.on_lens = lambda: advance(next(done))
            items = [reader.read(row, source=source) for row, source in shown]
        reader.on_lens = lambda: None

    from pivotune.explore.page import explorer_page

    page = explorer_page(names, about, items, served=serve)
    if serve:
        _serve(page, reader, port)
    else:
        write_out(out, page)
        print_lines(stdout, *about, f"saved {out} ({len(page) / 1e6:.1f} MB)")
        if figures is not None:
            from pivotune.report.figures.base import save_formats
            from pivotune.report.figures.lens import lens_figures

            written: list[Path] = []
            with stderr.status("Writing the figures"):
                for number, item in enumerate(items, start=1):
                    for name, chart in lens_figures(names, item, colour):
                        written += save_formats(chart, figures / f"{number}-{name}")
            print_lines(stdout, f"saved {len(written)} files in {figures}")


def _check_comparable(name: str, against: str) -> None:
    """Refuse two models whose distributions cannot be compared layer by layer and token by token."""
    from pivotune.models.loading import load_tokenizer, read_config

    configs = [read_config(each).get_text_config() for each in (name, against)]
    for key in ("num_hidden_layers", "hidden_size", "vocab_size"):
        mine, other = (getattr(config, key) for config in configs)
        if mine != other:
            raise UsageError(f"--against: {key} of {against} is {other}, and {mine} of {name}; allowed: the same shape")
    if load_tokenizer(name).get_vocab() != load_tokenizer(against).get_vocab():
        raise UsageError(f"--against: {against} has other tokens than {name}; allowed: the same tokenizer")


def _encoder(name: str, template: str | None, max_new_tokens: int) -> Encoder:
    """Check a model and read its tokenizer and template before any weight is loaded."""
    from pivotune.models.loading import read_config

    config = read_config(name)
    from pivotune.cli.chat import prepare_encoder
    from pivotune.data.examples import Encoder, Limits
    from pivotune.explore.reader import PlainText
    from pivotune.models.architecture import check_architecture
    from pivotune.training.preparation import context_length

    check_architecture(config.model_type)
    encoder = prepare_encoder(name, None if template == "none" else template, None)
    # `LensReader` cuts prompts itself: the template's words, which are not shown, count for the model's context alone.
    context = context_length(config)
    limits = Limits(context or sys.maxsize, max_new_tokens, context)
    kind: Any = PlainText() if template == "none" else encoder.template
    return Encoder(encoder.tokenizer, kind, limits, fold_system=encoder.fold_system)


def _rows(prompts: list[str], data: str | None, count: int) -> tuple[list[tuple[Row, str]], list[Row]]:
    """Return the rows to read with the names of their sources, and other rows to fit a lens on."""
    from pivotune.data.datasets import set_apart, spread
    from pivotune.data.rows import Row
    from pivotune.data.sources import load_rows
    from pivotune.training.lens_fitting import FITTED_ON

    typed = [(Row(text, "", "", "", number=number), "--prompt") for number, text in enumerate(prompts, start=1)]
    if data is None:
        return typed, []
    found = load_rows(data, need_english=False)
    if typed:
        return typed, spread(found, FITTED_ON)
    chosen, others = set_apart(found, count, FITTED_ON)
    # A lens that was fitted on the very tokens it reads repeats them.
    return [(row, data) for row in chosen], [row for row in others if row not in chosen]


def _load_reader(
    names: list[str], encoder: Encoder, others: list[Row], data: str, lens: str
) -> tuple[LensReader, list[str]]:
    """Load the models and find a lens; also return lines for the page about both."""
    from pivotune.data.examples import Encoder, Limits
    from pivotune.explore.reader import LensReader, ReadModel, find_lens
    from pivotune.models.loading import load_on_device

    with stderr.status(f"Loading {' and '.join(map(safe, names))}"):
        models = [ReadModel(name, load_on_device(name)) for name in names]
    template = f"Template: {encoder.template.name}. Prompt and answer have the tokens of {names[0]}."
    about = [f"Model: {' against '.join(names)}.", template]
    tuned = None
    if lens == "logit":
        about.append("Logit lens only, as --lens asks.")
    else:
        limits = Limits(context=encoder.limits.context)
        fitting = Encoder(encoder.tokenizer, encoder.template, limits, fold_system=encoder.fold_system)
        pairs = fitting.encode(others, on_bad_row="skip", source=data)
        # Of the starting model, where two are compared: one lens for both, so that only the models differ.
        tuned, sentence = find_lens(models[-1], Path(names[0]), pairs, data, progress)
        about.append(sentence if tuned is None or len(names) == 1 else f"{sentence} Both models are read through it.")
    return LensReader(models, encoder, tuned), about


def _serve(page: str, reader: LensReader, port: int) -> None:
    """Answer prompts until Ctrl-C."""
    from pivotune.data.rows import Row
    from pivotune.explore.server import ExplorerServer

    def read(prompt: str, english: str, model: int) -> dict:
        return reader.read(Row(prompt, "", english, "", number=1), answered_by=model)

    with ExplorerServer(page, read, num_models=len(reader.models), port=port) as server:
        print_lines(stdout, f"open {server.address}", "Ctrl-C ends")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print_lines(stdout, "ended")
