"""Rows of a run: their lengths, the largest micro-batch, and the number of optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from pivotune.config.registry import METHODS
from pivotune.config.settings import RunConfig
from pivotune.data.datasets import spread, training_examples
from pivotune.data.examples import Example, Pair, Side
from pivotune.errors import UsageError
from pivotune.estimate.memory import read_model_config
from pivotune.models.loading import load_tokenizer
from pivotune.training.arguments import DeepSupervisionConfig, build_arguments
from pivotune.training.batching import length_grouped_order
from pivotune.training.preparation import build_encoder, load_run_rows

# Rows that are tokenized, enough to know their lengths, and rows that are put in order: more change the longest
# micro-batch little.
SAMPLE_ROWS, _ROWS_ORDERED = 512, 20_000
# Mean tokens of query and answer of translated Alpaca rows (docs/performance.md).
TYPICAL_TOKENS = {"target": (105, 165), "english": (70, 110)}


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """Training examples of a run, or a sample of them, and the number of its rows, None where it is unknown.

    `assumed` is True where the lengths are typical ones, not those of real rows.
    """

    examples: Sequence[Example]
    rows: int | None
    assumed: bool = False

    @property
    def mean_tokens(self) -> float:
        """Tokens of a row, both sides."""
        return fmean(map(num_tokens, self.examples))


def read_rows(config: RunConfig, *, rows: int | None = None) -> RunRows:
    """Count the rows of local files (read only the sample if `rows` gives their number) and tokenize a sample of them.

    Raises:
        UsageError: an unusable local file.
    """
    args = build_arguments(config, here=False)
    try:
        tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code, revision=config.revision)
    except UsageError:  # a folder that holds nothing but a config.json
        tokenizer = None
    if tokenizer is None or not all(Path(source.path).is_file() for source in config.data.sources):
        return rows_of(assumed_pairs(args), args, rows=rows, assumed=True)
    if rows is not None:
        # A sample need not hold rows of every language.
        sample = {"limit": 2 * SAMPLE_ROWS, "language": None, "language_temperature": 1.0}
        data = config.data.model_copy(update=sample)
        config = config.model_copy(update={"data": data})
    loaded = load_run_rows(config)
    encoder = build_encoder(args, tokenizer, read_model_config(config))
    pairs = encoder.encode(spread(loaded.train, SAMPLE_ROWS), on_bad_row="skip")
    if not pairs:
        raise UsageError(f"{', '.join(loaded.sources)}: no row is left to train on")
    return rows_of(pairs, args, rows=rows or len(loaded.train))


def rows_of(pairs: Sequence[Pair], args: DeepSupervisionConfig, *, rows: int | None, assumed: bool = False) -> RunRows:
    """Return the rows of a run from its encoded rows, or from a sample of them."""
    ratio = args.data.english_ratio
    examples = training_examples(pairs, METHODS[args.method], english_ratio=ratio, seed=args.seed)
    if args.data.token_budget is not None:
        fitting = max(1, int(args.data.token_budget / examples.main_lengths.mean()))
        rows = fitting if rows is None else min(rows, fitting)
    return RunRows(examples=examples, rows=rows, assumed=assumed)


def assumed_pairs(args: DeepSupervisionConfig) -> list[Pair]:
    """Return rows of typical length, and one row at the token limits, for runs without data or tokenizer."""
    limits = args.limits(None)
    longest = (limits.prompt, limits.completion)

    def side(query: int, answer: int) -> Side:
        query, answer = min(query, limits.prompt), min(answer, limits.completion)
        return Side(ids=np.ones(query + answer, dtype=np.int32), query=(0, query), answer=query, characters=answer)

    (query, answer), english = TYPICAL_TOKENS["target"], TYPICAL_TOKENS["english"]
    if METHODS[args.method].pivot_marker is not None:
        answer += english[1]
    typical = Pair(target=side(query, answer), english=side(*english))
    # One in a hundred reaches the limits.
    return [Pair(target=side(*longest), english=side(*longest)), *[typical] * 99]


def num_tokens(example: Example) -> int:
    """Return the tokens of a row, both sides."""
    parallel = example.parallel
    return len(example.main.ids) + (parallel.num_query_tokens + parallel.num_answer_tokens if parallel else 0)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Rows of an epoch, of a step (all micro-batches and processes) and of all epochs; optimizer steps of the run."""

    rows: int
    rows_per_step: int
    steps: int
    rows_seen: float


def training_schedule(args: DeepSupervisionConfig, rows: int, processes: int) -> Schedule:
    """Count steps and rows as `Trainer` and accelerate do.

    Every process gets as many batches as the one with the most; with `dataloader_drop_last` as the one with the fewest.
    """
    size, window = args.per_device_train_batch_size, args.gradient_accumulation_steps
    down = args.dataloader_drop_last
    batches = rows // size if down else -(-rows // size)
    of_one = batches // processes if down else -(-batches // processes)
    steps_per_epoch = max(-(-of_one // window), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    seen = rows * steps / steps_per_epoch
    return Schedule(rows=rows, rows_per_step=size * window * processes, steps=steps, rows_seen=seen)


def largest_batch(
    examples: Sequence[Example], args: DeepSupervisionConfig, *, rows: int, processes: int
) -> list[Example]:
    """Return the micro-batch with the most tokens of an epoch of `rows` rows; `examples` may be a sample of them."""
    count = max(min(rows, _ROWS_ORDERED), len(examples))
    indices = [row % len(examples) for row in range(count)]
    lengths = [len(examples[index].main.ids) for index in indices]
    generator = torch.Generator().manual_seed(args.seed)
    size = args.per_device_train_batch_size
    if args.train_sampling_strategy == "group_by_length":
        order = length_grouped_order(lengths, size * processes, args.gradient_accumulation_steps, generator)
    else:
        order = torch.randperm(count, generator=generator).tolist()
    batches = [[examples[indices[row]] for row in order[start : start + size]] for start in range(0, count, size)]
    return max(batches, key=lambda batch: sum(map(num_tokens, batch)))
