"""Which rows a run trains on, how long they are, its largest micro-batch, and how many steps it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pivotune.data.examples import Example, Pair, Side
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.batching import length_grouped_order

# More rows than these change the longest micro-batch little.
_ROWS_ORDERED = 20_000
# Mean tokens of translated Alpaca rows (docs/performance.md): query and answer, and of the English ones.
TYPICAL_TOKENS = {"query": 105, "answer": 165, "english_query": 70, "english_answer": 110}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What `Trainer` does with the rows.

    Attributes:
        rows: trained on in an epoch.
        rows_per_step: over all micro-batches and processes.
        steps: optimizer steps of the whole run.
        rows_seen: over all epochs.
    """

    rows: int
    rows_per_step: int
    steps: int
    rows_seen: float


def training_schedule(args: DeepSupervisionConfig, rows: int, processes: int) -> Schedule:
    """Steps and rows as `Trainer` and accelerate count them.

    Every process gets as many batches as the one with the most; with `dataloader_drop_last` as the one with the fewest.
    """
    size, window = args.per_device_train_batch_size, args.gradient_accumulation_steps
    down = args.dataloader_drop_last
    batches = rows // size if down else -(-rows // size)
    of_one = batches // processes if down else -(-batches // processes)
    steps_per_epoch = max(-(-of_one // window), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    return Schedule(
        rows=rows,
        rows_per_step=size * window * processes,
        steps=steps,
        rows_seen=rows * steps / steps_per_epoch,
    )


def largest_batch(
    examples: Sequence[Example], args: DeepSupervisionConfig, *, rows: int, processes: int
) -> list[Example]:
    """The micro-batch with the most tokens of an epoch, in the order of `group_by_length` or at random.

    Args:
        examples: all rows, or a sample of them.
        rows: how many there are.
    """
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


def num_tokens(example: Example) -> int:
    """Tokens of a row, both sides."""
    parallel = example.parallel
    return len(example.main.ids) + (parallel.num_query_tokens + parallel.num_answer_tokens if parallel else 0)


def assumed_pairs(args: DeepSupervisionConfig) -> list[Pair]:
    """Rows of typical length and of the longest that the limits allow, where no data or tokenizer is at hand."""
    typical, most = TYPICAL_TOKENS, (args.data.max_prompt_tokens, args.data.max_completion_tokens)

    def pair(query: int, answer: int, english_query: int, english_answer: int) -> Pair:
        return Pair(target=_side(query, answer, most), english=_side(english_query, english_answer, most))

    longest = pair(*most, *most)
    usual = pair(typical["query"], typical["answer"], typical["english_query"], typical["english_answer"])
    # One in a hundred reaches the limits.
    return [longest, *[usual] * 99]


def _side(query: int, answer: int, most: tuple[int, int]) -> Side:
    query, answer = min(query, most[0]), min(answer, most[1])
    return Side(ids=np.ones(query + answer, dtype=np.int32), query=(0, query), answer=query, characters=answer)
