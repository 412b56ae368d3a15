"""Which rows are for training and which for validation, and what each method trains on.

What is drawn at random depends on the seed and the number of rows, never on the method, so that methods with the same
seed are compared on the same rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

from pivotune.data.examples import Example, Pair, Side
from pivotune.data.lazy import LazySequence, Selection
from pivotune.data.pair_store import pair_table
from pivotune.errors import UsageError

_T = TypeVar("_T")

# Held-out rows that a share gives at most: enough for a standard error of a few hundredths of a nat, and scored in minutes.
LARGEST_SHARE = 500


class PairExamples(LazySequence[Example]):
    """Examples made from pairs when they are asked for; memory holds a few bytes each.

    Args:
        pairs: in a list, or stored (`PairStore`).
        rows: the places of the pairs to use, in order.
        english: for each, whether the main side is the English one.
        parallel: whether an example with a target main side has the English side as its parallel.

    Attributes:
        main_lengths, main_answers: int32 (examples,), tokens of the main side, and its first answer token.
        query_lengths: int32 (examples,), English query tokens of the parallel side, 0 without one.
        has_parallel: bool (examples,).

    Raises:
        ValueError: a pair lacks a side that is asked for; `load_rows` checks this.
    """

    def __init__(self, pairs: Sequence[Pair], rows: np.ndarray, english: np.ndarray, *, parallel: bool) -> None:
        self._pairs, self._rows, self._english = pairs, rows, english
        table = pair_table(pairs)
        target, other = table["target"], table["english"]
        self.main_lengths = np.where(english, other["length"][rows], target["length"][rows])
        self.main_answers = np.where(english, other["answer"][rows], target["answer"][rows])
        self.has_parallel = ~english if parallel else np.zeros_like(english)
        queries = other["query_end"][rows] - other["query_start"][rows]
        self.query_lengths = np.where(self.has_parallel, queries, 0)
        if (self.main_lengths < 0).any() or (self.has_parallel & (other["length"][rows] < 0)).any():
            raise ValueError("a row lacks the side that the method trains on; load_rows checks this")

    def __len__(self) -> int:
        return len(self._rows)

    def _item(self, index: int) -> Example:
        pair = self._pairs[int(self._rows[index])]
        english = bool(self._english[index])
        main = pair.english if english else pair.target
        assert main is not None
        parallel = pair.english if self.has_parallel[index] else None
        return Example(main=main, parallel=parallel, english=english, number=pair.number)


class ParallelSides(LazySequence[Side]):
    """The English parallels of those examples that have one, in order."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self._places = np.flatnonzero(has_parallel(examples))

    def __len__(self) -> int:
        return len(self._places)

    def _item(self, index: int) -> Side:
        side = self._examples[int(self._places[index])].parallel
        assert side is not None
        return side


def main_lengths(examples: Sequence[Example]) -> np.ndarray:
    """Tokens of every example's main side, int32 (examples,), without making the examples where they are lazy."""
    if isinstance(examples, PairExamples):
        return examples.main_lengths
    return np.array([len(example.main.ids) for example in examples], dtype=np.int32)


def has_parallel(examples: Sequence[Example]) -> np.ndarray:
    """Which examples have an English parallel, bool (examples,)."""
    if isinstance(examples, PairExamples):
        return examples.has_parallel
    return np.array([example.parallel is not None for example in examples], dtype=bool)


def training_examples(pairs: Sequence[Pair], *, method: str, english_ratio: float = 0.0, seed: int = 0) -> PairExamples:
    """What `method` trains on, in the order of `pairs`.

    `sft` uses the English side, `tft` the target side, `deep-supervision` the target side with its English parallel.
    English replay: `round(english_ratio * len(pairs))` rows, drawn by `seed` and the number of rows only, are trained on
    their English prompt and answer with L_TFT alone; the number of rows stays the same, so that budgets stay equal.
    """
    english = np.full(len(pairs), method == "sft")
    if method != "sft":
        english[list(replay_indices(len(pairs), english_ratio, seed))] = True
    return PairExamples(pairs, np.arange(len(pairs)), english, parallel=method == "deep-supervision")


def side_examples(pairs: Sequence[Pair], side: Literal["target", "english"]) -> PairExamples:
    """The rows that have a side, with that side alone."""
    rows = np.flatnonzero(pair_table(pairs)[side]["length"] >= 0)
    return PairExamples(pairs, rows, np.full(len(rows), side == "english"), parallel=False)


def check_branch_lengths(examples: PairExamples, context: int | None) -> None:
    """Refuse rows whose English query does not fit behind the target prompt: the conversion branch reads both."""
    if context is None:
        return
    needed = (examples.main_answers + examples.query_lengths)[examples.has_parallel]
    too_long = needed[needed > context]
    if len(too_long):
        raise UsageError(
            f"a prompt and its English query take {too_long[0]} tokens together and the model reads {context}; lower "
            "data.max_prompt_tokens"
        )


def replay_indices(num_rows: int, english_ratio: float, seed: int) -> set[int]:
    """Which rows are replayed in English: the same ones for every method with this seed and number of rows."""
    count = round(english_ratio * num_rows)
    return set(random.Random(f"english-replay-{seed}").sample(range(num_rows), count))


def split_validation(rows: Sequence[_T], size: int | float, seed: int) -> tuple[Sequence[_T], Sequence[_T]]:
    """Split rows, without reading them, into (train, validation), both in their original order; deterministic in `seed`.

    Args:
        size: number of rows, or a share below 1, which is at least one row and at most `LARGEST_SHARE` rows.

    Raises:
        UsageError: no row would be left for training.
    """
    count = min(max(1, round(size * len(rows))), LARGEST_SHARE) if 0 < size < 1 else int(size)
    if count >= len(rows):
        raise UsageError(
            f"data.validation: {count} rows asked for, the data has {len(rows)}; at least one must be left for training"
        )
    held = np.zeros(len(rows), dtype=bool)
    held[random.Random(f"validation-{seed}").sample(range(len(rows)), count)] = True
    return Selection(rows, np.flatnonzero(~held)), Selection(rows, np.flatnonzero(held))
