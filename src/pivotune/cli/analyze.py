"""`pivotune analyze`: the entropy of every layer, and the layers for the inner losses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pivotune.cli.common import (
    check_inputs,
    check_out,
    console,
    own_options,
    print_json,
    print_lines,
    progress,
    quiet_libraries,
    safe,
)
from pivotune.cli.options import FoldSystem
from pivotune.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from pivotune.data.examples import Pair
    from pivotune.layers.layers_json import LayerAnalysis


def analyze(
    model: Annotated[str, typer.Option(help="Hub name, folder, run folder or bundled model.")],
    data: Annotated[str, typer.Option(help="Rows in the target language, with English where they have it.")],
    english: Annotated[str | None, typer.Option(help="Aligned English file beside the data.")] = None,
    language: Annotated[str | None, typer.Option("--lang", "--language", help="Code of the target language.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to measure, spread over the data.")] = 64,
    tokens_per_row: Annotated[int, typer.Option(min=0, help="Tokens counted in each text; 0 counts all.")] = 32,
    rule: Annotated[
        str, typer.Option("--layers", help="Chosen by: reading (through a tuned lens) or paper.")
    ] = "reading",
    template: Annotated[str | None, typer.Option(help="chat, alpaca or a Jinja file.")] = None,
    fold_system: FoldSystem = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Token limit of each prompt and each answer.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    out: Annotated[Path, typer.Option(help="Analysis file; the picture is written beside it.")] = Path("layers.json"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier analysis.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the analysis as JSON on stdout.")] = False,
) -> None:
    """Measure what every layer can say and how sure it is, and choose the conversion and the thinking layer."""
    picture = out.with_suffix(".png")
    if language is not None:
        from pivotune.text.languages import check_language

        check_language(language, "--lang")
    check_out(out, ".json", overwrite=overwrite)
    check_out(picture, ".png", overwrite=overwrite)
    if rule not in ("reading", "paper"):
        raise UsageError(f"--layers: {rule!r} is not allowed; allowed: reading, paper")
    check_inputs([model], [data, english])
    quiet_libraries()
    with own_options():
        pairs, others, tokenizer = _encode(model, data, english, rows, template, max_tokens, fold_system)
    from pivotune.config.supervision import TunedLensConfig
    from pivotune.layers.layers_json import write_layers_json
    from pivotune.layers.measure import analyze_layers, num_sequences
    from pivotune.models.loading import load_model
    from pivotune.report.figures.base import save_figure
    from pivotune.report.figures.layers import layer_figure
    from pivotune.training.lens_fitting import fit_all_layers

    loaded = load_model(model)
    reading = rule == "reading" and any(pair.target and pair.english for pair in pairs)
    lens = fit_all_layers(loaded, others, TunedLensConfig(), progress, pairs) if reading else None
    with progress("Measuring the layers", num_sequences(pairs)) as advance:
        options: Any = {"batch_size": batch_size, "tokens_per_row": tokens_per_row or None, "progress": advance}
        options |= {"lens": lens, "reading": reading}
        analysis = analyze_layers(loaded, tokenizer, pairs, model_name=model, language=language, **options)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_layers_json(out, analysis)
    save_figure(layer_figure(analysis), picture)
    if as_json:
        print_json(analysis)
    else:
        print_layers(console(as_json), analysis)
        print_lines(console(as_json), f"saved {out} and {picture}")


def _encode(
    model: str, data: str, english: str | None, rows: int, template: str | None, max_tokens: int, fold_system: bool
) -> tuple[list[Pair], list[Pair], Any]:
    """Check the model and encode rows before a weight is loaded; return those to measure, others, and the tokenizer."""
    from pivotune.models.loading import check_model, load_tokenizer, read_config

    check_model(model)
    from pivotune.data.datasets import set_apart
    from pivotune.data.examples import Encoder, Limits
    from pivotune.data.sources import load_rows
    from pivotune.data.templates import load_template
    from pivotune.layers.selection import check_depth
    from pivotune.models.architecture import check_architecture
    from pivotune.training.lens_fitting import FITTED_ON
    from pivotune.training.preparation import context_length

    config = read_config(model)
    check_architecture(config.model_type)
    check_depth(config.get_text_config().num_hidden_layers)
    chosen, others = set_apart(load_rows(data, english=english, need_english=english is not None), rows, FITTED_ON)
    tokenizer = load_tokenizer(model)
    limits = Limits(max_tokens, max_tokens, context_length(config))
    encoder = Encoder(tokenizer, load_template(template, tokenizer), limits, fold_system=fold_system)
    return encoder.encode(chosen, source=data), encoder.encode(others, on_bad_row="skip", source=data), tokenizer


def print_layers(out: Console, analysis: LayerAnalysis) -> None:
    """Print a table with a line per layer, and the choice with its reason."""
    from rich.table import Table

    target, reading = analysis["target"], analysis.get("reading")
    english = None if reading else analysis["english"]
    columns = ["layer", "entropy", "top-1"]
    columns += ["English entropy"] if english else []
    columns += ["English share"] if target["english_share"] else []
    columns += ["NLL x_en", "NLL y_en"] if reading else []
    caption = "entropy in nats; top-1: share of tokens whose likeliest is the output's"
    if reading:
        caption += "; NLL in nats per token: English query and answer after the target prompt, through a tuned lens"
    table = Table(*columns, "", caption=caption)
    marks = {analysis["conversion"]: "conversion", analysis["thinking"]: "thinking"}
    for layer in range(analysis["num_layers"] + 1):
        cells = [str(layer), f"{target['entropy'][layer]:.3f}", f"{target['agreement'][layer]:.0%}"]
        cells += [f"{english['entropy'][layer]:.3f}"] if english else []
        cells += [f"{target['english_share'][layer]:.1%}"] if target["english_share"] else []
        cells += [f"{reading[name][layer]:.2f}" for name in ("conversion", "thinking")] if reading else []
        table.add_row(*cells, marks.get(layer, ""), style="bold" if layer in marks else None)
    out.print(table)
    chosen = f"conversion at layer {analysis['conversion']}, thinking at layer {analysis['thinking']}"
    out.print(f"{chosen}: {safe(analysis['reason'])}")
