"""Prepare a run, from the command line and in the trainer: rows, encoding and held-out sets."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from torch import nn
from transformers import IntervalStrategy

from pivotune.config.registry import METHODS
from pivotune.config.settings import EncodingConfig, RunConfig
from pivotune.data.collator import ExampleDataset
from pivotune.data.datasets import (
    PairExamples,
    balanced_places,
    check_branch_lengths,
    predicted_english_tokens,
    side_examples,
    split_validation,
    training_examples,
    weighted_places,
)
from pivotune.data.examples import Encoder, Pair
from pivotune.data.languages import assign_languages
from pivotune.data.lazy import Mapped, Spool, Subset
from pivotune.data.pair_store import PairStore, pair_languages, store_pairs
from pivotune.data.rows import answered_turns
from pivotune.data.sources import Row, Rows, concatenate, load_rows
from pivotune.data.templates import Template, Turn, load_template
from pivotune.errors import UsageError
from pivotune.methods.base import required_sides
from pivotune.models.architecture import find_architecture
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.distributed.strategies import strategy_of
from pivotune.training.heldout import end_token_ids

logger = logging.getLogger(__name__)
_Item = TypeVar("_Item")


# ---- rows ----


class LoadedRows(NamedTuple):
    """Rows to train on, in as many copies as an epoch has, and rows held out.

    Attributes:
        sources, heldout_sources: the sources that the rows' numbers are of, as in `Rows.sources`.
        skipped, heldout_skipped: counts of rows that were left out, by reason.
        notes: lines about weights and languages, and about columns and turns that are not used.
        config: the run's configuration, with all languages of the rows in `data.language`.
    """

    train: Sequence[Row]
    sources: Mapping[str, int]
    heldout: Sequence[Row]
    heldout_sources: Mapping[str, int]
    skipped: Counter[str]
    heldout_skipped: Counter[str]
    notes: list[str]
    config: RunConfig


def load_run_rows(config: RunConfig) -> LoadedRows:
    """Return the rows of a run; rows left out of a file before it is split count for training."""
    data, method, seed = config.data, config.method, config.seed
    parts = [read_rows(source.path, method, data, english=source.english, limit=data.limit) for source in data.sources]
    if isinstance(data.validation, str):
        parts.append(read_rows(data.validation, method, data, english=data.validation_english, heldout=True))
    of_sources = [source.language for source in data.sources]
    found = assign_languages(parts, of_sources, data)
    parts = found.parts[: len(of_sources)]
    rows = concatenate(parts)
    languages = np.concatenate(found.codes[: len(of_sources)]) if found.codes else None
    lengths, heldout_sources, heldout_skipped = [len(part) for part in parts], rows.sources, Counter()
    if isinstance(data.validation, str):
        kept, held = rows, found.parts[-1]
        heldout_sources, heldout_skipped = held.sources, Counter(held.skipped)
    else:
        # Before conversations are taken apart and rows are repeated: no part or copy of a row is on both sides.
        kept, held = split_validation(rows, data.validation, seed, languages)
        languages = None if languages is None else languages[kept.indices]
        lengths = np.diff(np.searchsorted(kept.indices, np.cumsum([0, *lengths]))).tolist()
    weights = [source.weight for source in data.sources]
    notes = [*rows.notes, *found.notes]
    if len(parts) > 1 or weights != [1] or languages is not None:
        places, language_notes = np.concatenate(weighted_places(lengths, weights, seed)), []
        if languages is not None:
            balanced, language_notes = _balance_languages(languages[places], data, seed)
            places = places[balanced]
        kept = Subset(kept, places)
        if len(parts) > 1 or weights != [1]:
            counts = np.bincount(np.searchsorted(np.cumsum(lengths), places, side="right"), minlength=len(parts))
            for part, length, weight, of_epoch in zip(parts, lengths, weights, counts, strict=True):
                notes.append(f"{part.source}: {of_epoch} rows an epoch ({length} rows, weight {weight:g})")
        notes += language_notes
    train, turn_notes = train_turns(kept, data)
    notes += turn_notes
    config = config.model_copy(update={"data": data.model_copy(update={"language": found.language})})
    train, held = rewritten(train, config), rewritten(held, config, heldout=True)
    skipped = Counter(rows.skipped)
    return LoadedRows(train, rows.sources, held, heldout_sources, skipped, heldout_skipped, notes, config)


def _balance_languages(languages: np.ndarray, data: EncodingConfig, seed: int) -> tuple[np.ndarray, list[str]]:
    """Return the places of the rows of an epoch, in order, and a line about each language."""
    before, temperature = Counter(languages.tolist()), data.language_temperature
    by_language = balanced_places(languages, temperature, seed)
    end = "" if temperature == 1 else " ({} without data.language_temperature {:g})"
    notes = [
        f"{code}: {len(by_language[code])} rows an epoch" + end.format(before[code], temperature) for code in before
    ]
    return np.sort(np.concatenate(list(by_language.values()))), notes


def rewritten(
    rows: Sequence[Row], settings: RunConfig | DeepSupervisionConfig, *, heldout: bool = False
) -> Sequence[Row]:
    """Return the rows that the method makes of those to train on; of held-out rows only answers of two parts."""
    if heldout and METHODS[settings.method].pivot_marker is None:
        return rows
    rewrite = METHODS[settings.method].rewriter(rows, settings)
    return rows if rewrite is None else Mapped(rows, rewrite)


def train_turns(rows: Sequence[Row], data: EncodingConfig) -> tuple[Sequence[Row], list[str]]:
    """Return a row for every answer that is trained (`data.turns`), and a line about the others.

    Of held-out conversations the last answers are scored.
    """
    if not any(row.history or row.history_en for row in rows):
        return rows, []
    conversations = answers = whole = 0
    trained: Spool[Row] = Spool()
    for row in rows:
        num_answers = sum(turn["role"] == "assistant" for turn in max(row.history, row.history_en, key=len))
        turns = answered_turns(row) if num_answers and data.turns == "all" else [row]
        conversations, answers = conversations + bool(num_answers), answers + num_answers + 1
        whole += len(turns)
        for turn in turns:
            trained.append(turn)
    if not conversations:
        return rows, []
    note = f"{conversations} rows have earlier turns: {whole} of {answers} answers are trained"
    if data.turns == "last":
        note += " (data.turns: last)"
    elif whole < answers:
        note += "; the others' English has other turns"
    return trained, [note]


def read_rows(
    source: Any,
    method: str,
    data: EncodingConfig,
    *,
    english: str | None = None,
    limit: int | None = None,
    heldout: bool = False,
) -> Rows:
    """Return rows with the sides that the method needs.

    Raises:
        UsageError: a row lacks a side, and `data.on_bad_row` is `error`.
    """
    sides = required_sides(METHODS[method], data.english_ratio, heldout=heldout)
    return load_rows(
        source,
        english=english,
        need_target=sides.target,
        need_english=sides.english,
        on_bad_row=data.on_bad_row,
        needed_by=sides.needed_by,
        limit=limit,
    )


def build_encoder(args: DeepSupervisionConfig, tokenizer: Any, model_config: Any) -> Encoder:
    """Return the encoder for these arguments and the model's context length."""
    template, limits = load_template(args.data.template, tokenizer), args.limits(context_length(model_config))
    return Encoder(tokenizer, template, limits, fold_system=args.data.fold_system)


def context_length(model_config: Any) -> int | None:
    """Return the number of tokens that the model reads at once; None where its configuration has none."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def encode_rows(rows: Sequence[Row], encoder: Encoder, *, on_bad_row: str, sources: Mapping[str, int]) -> PairStore:
    """Encode rows of some sources (`Rows.sources`) and keep them outside memory."""
    return store_pairs(encoder.encode_lazily(rows, on_bad_row=on_bad_row, source=sources), sources)


def encode_dataset(
    dataset: Any, args: DeepSupervisionConfig, tokenizer: Any, model_config: Any, *, heldout: bool = False
) -> Sequence[Pair] | None:
    """Encode rows in any form of the data contract; encoded pairs and None are returned as they are.

    Raises:
        UsageError: rows that lack a side the method needs, or do not fit the limits.
    """
    is_list_of_pairs = isinstance(dataset, list) and bool(dataset) and isinstance(dataset[0], Pair)
    if dataset is None or is_list_of_pairs or isinstance(dataset, PairStore):
        return dataset
    found = assign_languages([read_rows(dataset, args.method, args.data, heldout=heldout)], [None][heldout:], args.data)
    rows = trained = found.parts[0]
    notes = [*rows.notes, *found.notes]
    if not heldout:
        if found.codes and args.data.language_temperature != 1:
            places, language_notes = _balance_languages(found.codes[0], args.data, cast(int, args.seed))
            trained, notes = Subset(rows, places), [*notes, *language_notes]
        trained, turn_notes = train_turns(trained, args.data)
        notes += turn_notes
    encoder = build_encoder(args, tokenizer, model_config)
    for note in notes:
        logger.warning("%s: %s", rows.source, note)
    trained = rewritten(trained, args, heldout=heldout)
    return encode_rows(trained, encoder, on_bad_row=args.data.on_bad_row, sources=rows.sources)


# ---- datasets ----


def build_train_dataset(
    pairs: Sequence[Pair] | None, args: DeepSupervisionConfig, model_config: Any
) -> ExampleDataset | None:
    """Return the training examples of the method.

    Raises:
        UsageError: a row whose English branch does not fit into the model's context, or `supervision.keep_english` without
            a replayed row, under ZeRO-3, or with more tokens than the vocabulary.
    """
    if pairs is None:
        return None
    examples = run_examples(pairs, args)
    check_branch_lengths(examples, context_length(model_config))
    keep, vocab_size = args.supervision.keep_english, model_config.get_text_config().vocab_size
    if METHODS[args.method].replay and keep.kl:
        if not predicted_english_tokens(examples).any():
            raise UsageError(
                f"supervision.keep_english.kl: {keep.kl:g} trains on rows replayed in English, and data.english_ratio: "
                f"{args.data.english_ratio:g} gives none of {len(examples)}; raise it"
            )
        if keep.top >= vocab_size:
            raise UsageError(
                f"supervision.keep_english.top: {keep.top} is not below the vocabulary of {vocab_size} tokens"
            )
        if strategy_of(args) == "zero3":
            # It gathers the head for every chunk of rows, and ranks have unequally many.
            raise UsageError("supervision.keep_english: ZeRO-3 cannot share out this loss; train with FSDP2 or ZeRO-2")
    return ExampleDataset(examples)


def run_examples(pairs: Sequence[Pair], args: DeepSupervisionConfig) -> PairExamples:
    """Return the training examples of an epoch; raise as `training_examples`."""
    options: Any = {"english_ratio": args.data.english_ratio, "token_budget": args.data.token_budget}
    return training_examples(pairs, METHODS[args.method], seed=cast(int, args.seed), **options)


def heldout_examples(pairs: Sequence[Pair], *, by_language: bool = False) -> dict[str, PairExamples]:
    """Return `target` and `english` rows for evaluation; a language that no row has is left out.

    Args:
        by_language: in place of `target` return the rows of each target language by its code where they have several.
    """
    sides = {"target": side_examples(pairs, "target")}
    if by_language and len(codes := dict.fromkeys(pair_languages(pairs).tolist())) > 1:
        sides = {code: side_examples(pairs, "target", code) for code in codes}
    sides["english"] = side_examples(pairs, "english")
    return {name: examples for name, examples in sides.items() if examples}


def build_heldout_datasets(
    dataset: Any, args: DeepSupervisionConfig, tokenizer: Any, model_config: Any
) -> dict[str, ExampleDataset] | None:
    """Return held-out rows as the dictionary of datasets that `Trainer.evaluate` takes."""
    if dataset is None:
        return None
    pairs = encode_dataset(dataset, args, tokenizer, model_config, heldout=True)
    sides = heldout_examples(pairs or [], by_language=True)
    return {name: ExampleDataset(examples) for name, examples in sides.items()}


# What an evaluation measures of every language.
_METRICS = ("loss", "nll", "nll_per_character")


def check_evaluation(args: DeepSupervisionConfig, sides: Collection[str], found: str) -> None:
    """Refuse evaluations without held-out rows, and a metric that they do not measure.

    Args:
        sides: names of the held-out sets (`heldout_examples`).
        found: ends the message where there are none.

    Raises:
        UsageError: names the setting.
    """
    strategy = IntervalStrategy(args.eval_strategy).value
    asked = f"eval_strategy: {strategy}" if strategy != "no" else "eval_on_start: true" if args.eval_on_start else None
    if asked is not None and not sides:
        raise UsageError(f"training.{asked} needs held-out rows and {found}")
    metric = args.metric_for_best_model
    target = ["target"] if set(sides) - {"english"} else []
    measured = [f"eval_{side}_{name}" for side in dict.fromkeys([*target, *sides]) for name in _METRICS]
    if asked is not None and metric is not None and f"eval_{metric.removeprefix('eval_')}" not in measured:
        raise UsageError(f"training.metric_for_best_model: {metric} is not measured; allowed: {', '.join(measured)}")


# ---- model and tokenizer ----


def freeze_unused_parameters(model: nn.Module) -> None:
    """Freeze the parameters that text never passes through (a vision tower), so that DDP does not wait for them."""
    architecture = find_architecture(model)
    used = {id(p) for module in (architecture.decoder, architecture.lm_head) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)


def adopt_template(model: Any, tokenizer: Any, template: Template) -> None:
    """Make plain `apply_chat_template` and `generate` do what training does: write template and end tokens into both."""
    tokenizer.chat_template = template.chat_template
    ends = end_token_ids(model, tokenizer, template)
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    question = Turn("question")
    plain = tokenizer.apply_chat_template(
        [{"role": "user", "content": question.prompt}], add_generation_prompt=True, return_dict=False
    )
    if plain != Encoder(tokenizer, template).encode_prompt(question):
        logger.warning(
            "data.template: %s: `apply_chat_template` of the saved tokenizer gives other tokens than training; "
            "use `pivotune chat`, or tokenize the prompt without special tokens",
            template.name,
        )


def pad_token_of(tokenizer: Any) -> int:
    """Return the padding token; masks mark the padding, so the end token serves a tokenizer without one."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
