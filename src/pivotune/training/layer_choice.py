"""Choose the layers of the inner losses: those that the settings name, and measured ones for `auto`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn

from pivotune.config.registry import METHODS
from pivotune.config.supervision import NO_SUPERVISION, KeepEnglishConfig, SupervisionConfig
from pivotune.data.datasets import set_apart
from pivotune.data.examples import Pair
from pivotune.errors import UsageError
from pivotune.layers.layers_json import LayerAnalysis, selection_from_json
from pivotune.layers.measure import analyze_layers, num_sequences
from pivotune.layers.selection import check_layer, resolve_layers
from pivotune.models.architecture import find_architecture
from pivotune.models.sharding import is_partitioned, placed
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.distributed import ranks
from pivotune.training.lens_fitting import FITTED_ON, fit_all_layers
from pivotune.training.progress import Progress, silent


def measure_layers(
    args: DeepSupervisionConfig,
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    model_name: str = "",
    progress: Progress = silent,
) -> LayerAnalysis:
    """Measure every layer (`supervision.layers`) on `supervision.profile_rows` rows spread over the data.

    The main process measures for all: rounding on other processes might choose other layers. It holds the whole model.

    Raises:
        UsageError: ZeRO-3 has partitioned the model already.
    """
    if is_partitioned(model):
        raise UsageError(
            "supervision: layers cannot be measured on a model that ZeRO-3 has partitioned already; name both layers "
            "(`pivotune analyze` finds them), or set zero3_init_flag: false"
        )
    reading = args.supervision.layers == "reading"
    rows, others = set_apart(pairs, args.supervision.profile_rows, FITTED_ON if reading else 0)

    def measure() -> LayerAnalysis:
        with placed(model, args.device):
            lens = fit_all_layers(model, others, args.supervision.tuned, progress, rows) if reading else None
            with progress("Measuring the layers", num_sequences(rows)) as advance:
                return analyze_layers(
                    model,
                    tokenizer,
                    rows,
                    lens=lens,
                    reading=reading,
                    model_name=model_name,
                    language=", ".join(args.data.languages) or None,
                    progress=advance,
                )

    return ranks.on_main(measure)


def choose_supervision(
    args: DeepSupervisionConfig,
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair] | None,
    layers: LayerAnalysis | None = None,
    progress: Progress = silent,
) -> tuple[SupervisionConfig, LayerAnalysis | None]:
    """Return the inner losses with their layers as numbers, and the analysis that chose them.

    Measures the layers if one is `auto` and `layers` is None.

    Raises:
        UsageError: a layer outside 1..L-1, or conversion not below thinking; as `measure_layers`.
    """
    # The loss on replayed rows applies to the baselines too.
    keep = {"keep_english": args.supervision.keep_english if METHODS[args.method].replay else KeepEnglishConfig()}
    if not METHODS[args.method].inner_losses:
        return NO_SUPERVISION.model_copy(update=keep), None
    num_layers = find_architecture(model).num_layers
    check_layers(args.supervision, num_layers)
    if layers is None and any(term.layer == "auto" for term in args.supervision.active().values()):
        if not pairs:
            raise UsageError("choosing layers needs training rows; give train_dataset, or the layers")
        layers = measure_layers(args, model, tokenizer, pairs, progress=progress)
    supervision, chosen = resolve_supervision(args.supervision, num_layers, layers)
    if layers is not None:
        layers = cast(LayerAnalysis, {**layers, **chosen.to_dict(), "supervised": list(supervision.active())})
    return supervision.model_copy(update=keep), layers


def assumed_supervision(args: DeepSupervisionConfig, num_layers: int) -> SupervisionConfig:
    """Return the inner losses before anything is measured: `auto` layers lie at the paper's relative depths.

    Without `keep_english`, whose few rows of logits an estimate need not count.

    Raises:
        UsageError: as `check_layers`.
    """
    if not METHODS[args.method].inner_losses:
        return NO_SUPERVISION
    check_layers(args.supervision, num_layers)
    supervision = args.supervision.model_copy(update={"keep_english": KeepEnglishConfig()})
    return resolve_supervision(supervision, num_layers, None)[0]


def resolve_supervision(
    supervision: SupervisionConfig, num_layers: int, layers: LayerAnalysis | None
) -> tuple[SupervisionConfig, Any]:
    """Return the supervision with its layers as numbers, and the selection with its reason."""
    active = supervision.active()
    selection = None if layers is None else selection_from_json(layers)
    if len(active) == 2:
        chosen = resolve_layers(supervision.conversion.layer, supervision.thinking.layer, num_layers, selection)
    else:
        # One term alone may sit at any layer.
        chosen = resolve_layers("auto", "auto", num_layers, selection)
        (name, term), *_ = active.items()
        chosen = replace(chosen, reason=chosen.reasons.get(name, chosen.reason), reasons={})
        if term.layer != "auto":
            reason = f"{name} layer {term.layer} was asked for"
            chosen = replace(chosen, **{name: term.layer}, method="explicit", reason=reason)
    terms = {name: term.model_copy(update={"layer": getattr(chosen, name)}) for name, term in active.items()}
    return supervision.model_copy(update=terms), chosen


def check_layers(supervision: SupervisionConfig, num_layers: int) -> None:
    """Refuse layers that a model with `num_layers` blocks does not have; needs no model."""
    active = supervision.active()
    if len(active) == 2:
        resolve_layers(supervision.conversion.layer, supervision.thinking.layer, num_layers)
    for name, term in active.items():
        check_layer(name, term.layer, num_layers)
