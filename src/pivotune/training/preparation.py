"""What a trainer needs before it starts: encoded rows, held-out sets in both languages, and the layers to supervise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

from torch import nn

from pivotune.config.settings import RunConfig, SignalConfig, SupervisionConfig, needed_by
from pivotune.data.collator import ExampleDataset
from pivotune.data.datasets import (
    PairExamples,
    check_branch_lengths,
    side_examples,
    split_validation,
    training_examples,
)
from pivotune.data.examples import Encoder, Pair
from pivotune.data.pair_store import PairStore, store_pairs
from pivotune.data.sources import Row, Rows, load_rows
from pivotune.data.templates import load_template
from pivotune.errors import UsageError
from pivotune.layers.analysis import LayerAnalysis, selection_from_json
from pivotune.layers.measure import analyze_layers, num_sequences
from pivotune.layers.selection import Term, check_layer, resolve_layers
from pivotune.models.architecture import find_architecture
from pivotune.models.placement import placed
from pivotune.models.sharding import is_partitioned
from pivotune.objectives.deep_supervision import Signal, Supervision
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.distributed import ranks
from pivotune.training.progress import Progress, silent

_Item = TypeVar("_Item")


def build_encoder(args: DeepSupervisionConfig, tokenizer: Any, model_config: Any) -> Encoder:
    """The encoder that these arguments ask for."""
    template = load_template(args.template, tokenizer)
    return Encoder(tokenizer, template, args.limits(context_length(model_config)))


def context_length(model_config: Any) -> int | None:
    """How many tokens the model reads at once; None where its configuration does not say."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def encode_dataset(
    dataset: Any, args: DeepSupervisionConfig, tokenizer: Any, model: nn.Module, *, heldout: bool = False
) -> Sequence[Pair] | None:
    """Rows in any form of the data contract as encoded pairs, outside memory; pairs pass through, None stays None.

    Held-out rows need the trained side only: they are evaluated in the languages that they have.

    Raises:
        UsageError: rows that lack a side the method needs, or do not fit the limits.
    """
    if dataset is None or _is_encoded(dataset):
        return dataset
    rows = load_rows(
        dataset,
        need_target=args.method != "sft",
        need_english=needs_english(args, heldout=heldout),
        on_bad_row=cast(Any, args.on_bad_row),
        needed_by=needed_by(args.method, args.english_ratio),
    )
    encoder = build_encoder(args, tokenizer, model.config)
    return store_pairs(encoder.encode_lazily(rows, on_bad_row=args.on_bad_row, source=rows.source))


def needs_english(args: DeepSupervisionConfig, *, heldout: bool = False) -> bool:
    """Whether every row must have an English side."""
    if args.method == "sft":
        return True
    return not heldout and (args.method == "deep-supervision" or args.english_ratio > 0)


def build_train_dataset(pairs: Sequence[Pair] | None, args: DeepSupervisionConfig, model_config: Any) -> Any:
    """What the method trains on, as a map-style dataset.

    Raises:
        UsageError: a row whose English branch does not fit into the model's context.
    """
    if pairs is None:
        return None
    ratio = 0.0 if args.method == "sft" else args.english_ratio
    examples = training_examples(pairs, method=args.method, english_ratio=ratio, seed=args.seed)
    check_branch_lengths(examples, context_length(model_config))
    return ExampleDataset(examples)


def heldout_examples(pairs: Sequence[Pair]) -> dict[str, PairExamples]:
    """`target` and `english` rows for evaluation; a language that no row has is left out."""
    sides = {"target": side_examples(pairs, "target"), "english": side_examples(pairs, "english")}
    return {name: examples for name, examples in sides.items() if examples}


def build_heldout_datasets(dataset: Any, args: DeepSupervisionConfig, tokenizer: Any, model: nn.Module) -> Any:
    """Held-out rows as the dictionary of datasets that `Trainer.evaluate` knows."""
    if dataset is None:
        return None
    pairs = encode_dataset(dataset, args, tokenizer, model, heldout=True)
    return {name: ExampleDataset(examples) for name, examples in heldout_examples(pairs or []).items()}


def measure_layers(
    args: DeepSupervisionConfig,
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    model_name: str = "",
    progress: Progress = silent,
) -> LayerAnalysis:
    """The entropy of every layer on `args.profile_rows` rows spread over the data, on the run's device.

    One process measures for all (on others rounding might choose other layers), and holds the whole model meanwhile.

    Raises:
        UsageError: ZeRO-3 has partitioned the model already.
    """
    if is_partitioned(model):
        raise UsageError(
            "supervision: layers cannot be measured on a model that ZeRO-3 has partitioned already; name both layers "
            "(`pivotune analyze` finds them), or set zero3_init_flag: false"
        )
    rows = spread(pairs, args.profile_rows)

    def measure() -> LayerAnalysis:
        with placed(model, args.device), progress("Measuring the layers", num_sequences(rows)) as advance:
            return analyze_layers(
                model, tokenizer, rows, model_name=model_name, language=args.language, progress=advance
            )

    return ranks.on_main(measure)


def choose_supervision(
    args: DeepSupervisionConfig,
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair] | None,
    layers: LayerAnalysis | None = None,
    progress: Progress = silent,
) -> tuple[Supervision, LayerAnalysis | None]:
    """The inner losses with their layers, and the analysis that chose them (with what was chosen in the end).

    Measures the layers on `args.profile_rows` rows spread over the data if one is to be chosen and `layers` is None.

    Raises:
        UsageError: a layer outside 1..L-1, or conversion not below thinking; as `measure_layers`.
    """
    settings = args.supervision()
    if args.method != "deep-supervision":
        return Supervision(), None
    active = _active(settings)
    num_layers = find_architecture(model).num_layers
    check_layers(settings, num_layers)
    wanted = {name: signal.layer for name, signal in active.items()}
    if layers is None and "auto" in wanted.values():
        if not pairs:
            raise UsageError("choosing layers needs training rows; give train_dataset, or the layers")
        layers = measure_layers(args, model, tokenizer, pairs, progress=progress)
    chosen = _resolve(wanted, num_layers, layers)
    if layers is not None:
        layers = cast(LayerAnalysis, {**layers, **chosen.to_dict()})
    signals = {name: Signal(kind=active[name].signal, layer=getattr(chosen, name)) for name in active}
    return _supervision(settings, signals), layers


def assumed_supervision(args: DeepSupervisionConfig, num_layers: int) -> Supervision:
    """The inner losses before anything is measured: layers that are to be chosen lie at the paper's relative depths.

    Raises:
        UsageError: as `check_layers`.
    """
    settings = args.supervision()
    if args.method != "deep-supervision":
        return Supervision()
    check_layers(settings, num_layers)
    active = _active(settings)
    chosen = _resolve({name: signal.layer for name, signal in active.items()}, num_layers, None)
    signals = {name: Signal(kind=active[name].signal, layer=getattr(chosen, name)) for name in active}
    return _supervision(settings, signals)


def spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """`count` items at even distances: files are often sorted by topic."""
    step = max(len(items) / count, 1.0)
    return [items[int(index * step)] for index in range(min(count, len(items)))]


def check_layers(settings: SupervisionConfig, num_layers: int) -> None:
    """Refuse layers that a model with `num_layers` blocks does not have, or no inner loss at all; needs no model."""
    active = _active(settings)
    if not active:
        raise UsageError("supervision: both signals are none; that is method: tft")
    if len(active) == 2:
        resolve_layers(active["conversion"].layer, active["thinking"].layer, num_layers)
    for name, signal in active.items():
        check_layer(name, signal.layer, num_layers)


def freeze_unread(model: nn.Module) -> None:
    """What text never passes through (a vision tower) is not trained, and DDP does not wait for it."""
    architecture = find_architecture(model)
    read = {id(p) for module in (architecture.decoder, architecture.lm_head) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in read:
            parameter.requires_grad_(False)


def pad_token_of(tokenizer: Any) -> int:
    """Masks say what is padding, so any token will do where the tokenizer has none for it."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _resolve(wanted: dict[str, Any], num_layers: int, layers: LayerAnalysis | None) -> Any:
    selection = None if layers is None else selection_from_json(layers)
    if len(wanted) == 2:
        return resolve_layers(wanted["conversion"], wanted["thinking"], num_layers, selection)
    # One term alone may sit anywhere: the other's layer is not used.
    chosen = resolve_layers("auto", "auto", num_layers, selection)
    (name, layer), *_ = wanted.items()
    if layer == "auto":
        return chosen
    return replace(chosen, **{name: layer}, method="explicit", reason=f"{name} layer {layer} was asked for")


def _active(settings: SupervisionConfig) -> dict[Term, SignalConfig]:
    signals: dict[Term, SignalConfig] = {"conversion": settings.conversion, "thinking": settings.thinking}
    return {name: signal for name, signal in signals.items() if signal.signal != "none"}


def _supervision(settings: SupervisionConfig, signals: dict[str, Signal]) -> Supervision:
    return Supervision(
        **signals,
        logits_mode=settings.logits.mode,
        logits_norm=settings.logits.norm,
        pooling=settings.feature.pooling,
        span=settings.feature.span,
        english=settings.feature.english,
        english_norm=settings.feature.english_norm,
    )


def _is_encoded(dataset: Any) -> bool:
    is_list_of_pairs = isinstance(dataset, list) and bool(dataset) and isinstance(dataset[0], Pair)
    return is_list_of_pairs or isinstance(dataset, PairStore)


class LoadedData(NamedTuple):
    """Rows to train on and rows held out, and how many were left out of each file, by reason."""

    train: Sequence[Row]
    heldout: Sequence[Row]
    skipped: Counter[str]
    heldout_skipped: Counter[str]


def load_data(config: RunConfig) -> LoadedData:
    """The rows of `data`; what is left out of a file before it is split counts for training."""
    rows = _load(config, config.data.train, config.data.english, heldout=False)
    validation = config.data.validation
    if isinstance(validation, str):
        heldout = _load(config, validation, config.data.validation_english, heldout=True)
        return LoadedData(rows, heldout, Counter(rows.skipped), Counter(heldout.skipped))
    train, held = split_validation(rows, validation, config.seed)
    return LoadedData(train, held, Counter(rows.skipped), Counter())


def _load(config: RunConfig, source: str, english: str | None, *, heldout: bool) -> Rows:
    return load_rows(
        source,
        english=english,
        need_target=config.method != "sft",
        need_english=config.method == "sft" or (config.needs_english and not heldout),
        on_bad_row=config.data.on_bad_row,
        needed_by=needed_by(config.method, config.data.english_ratio),
        limit=None if heldout else config.data.limit,
    )
