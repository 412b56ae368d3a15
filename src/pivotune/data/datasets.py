"""Which rows are for training and which for validation, and what each method trains on.

What is drawn at random depends on the seed and the number of rows, never on the method, so that methods with the same
seed are compared on the same rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from pivotune.data.examples import Example, Pair, Side
from pivotune.data.rows import Row
from pivotune.errors import UsageError

# Held-out rows that a share gives at most: enough for a standard error of a few hundredths of a nat, and scored in minutes.
LARGEST_SHARE = 500


def training_examples(
    pairs: Sequence[Pair], *, method: str, english_ratio: float = 0.0, seed: int = 0
) -> list[Example]:
    """What `method` trains on, in the order of `pairs`.

    `sft` uses the English side, `tft` the target side, `deep-supervision` the target side with its English parallel.
    English replay: `round(english_ratio * len(pairs))` rows, drawn by `seed` and the number of rows only, are trained on
    their English prompt and answer with L_TFT alone; the number of rows stays the same, so that budgets stay equal.
    """
    if method == "sft":
        return [Example(main=_needed(pair.english), english=True, number=pair.number) for pair in pairs]
    replay = replay_indices(len(pairs), english_ratio, seed)
    examples = []
    for index, pair in enumerate(pairs):
        if index in replay:
            examples.append(Example(main=_needed(pair.english), english=True, number=pair.number))
        else:
            parallel = _needed(pair.english) if method == "deep-supervision" else None
            examples.append(Example(main=_needed(pair.target), parallel=parallel, number=pair.number))
    return examples


def check_branch_lengths(examples: Sequence[Example], context: int | None) -> None:
    """Refuse rows whose English query does not fit behind the target prompt: the conversion branch reads both."""
    for example in examples:
        if context is None or example.parallel is None:
            continue
        needed = example.main.answer + example.parallel.num_query_tokens
        if needed > context:
            raise UsageError(
                f"a prompt and its English query take {needed} tokens together and the model reads {context}; lower "
                "data.max_prompt_tokens"
            )


def replay_indices(num_rows: int, english_ratio: float, seed: int) -> set[int]:
    """Which rows are replayed in English: the same ones for every method with this seed and number of rows."""
    count = round(english_ratio * num_rows)
    return set(random.Random(f"english-replay-{seed}").sample(range(num_rows), count))


def split_validation(rows: Sequence[Row], size: int | float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into (train, validation), both in their original order; deterministic in `seed`.

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
    chosen = set(random.Random(f"validation-{seed}").sample(range(len(rows)), count))
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [rows[index] for index in sorted(chosen)]


def _needed(side: Side | None) -> Side:
    if side is None:
        raise ValueError("a row lacks the side that the method trains on; load_rows checks this")
    return side
