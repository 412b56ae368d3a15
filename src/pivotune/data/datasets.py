"""Split rows into training and validation, and make the training examples of a method.

Random draws depend on the seed and the number of rows, never on the method.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields
from itertools import accumulate
from typing import TypeVar

import numpy as np

from pivotune.data.examples import Example, Pair, Side
from pivotune.data.lazy import LazySequence, Subset
from pivotune.data.pair_store import pair_languages, pair_table
from pivotune.errors import UsageError
from pivotune.methods.base import ExamplePlan, Language, Method

_T = TypeVar("_T")

# Held-out rows that a share gives at most: enough for a standard error of a few hundredths of a nat, and scored in minutes.
LARGEST_SHARE = 500


class PairExamples(LazySequence[Example]):
    """Examples made from pairs on access; memory holds a few bytes for each.

    Args:
        pairs: in a list, or stored (`PairStore`).
        plan: the pair of each example, the language of its prompt and answer, and whether it has a parallel side.

    Attributes:
        main_lengths, main_answers: int32 (examples,), tokens of the main side, and its first answer token.
        query_lengths: int32 (examples,), English query tokens of the parallel side, 0 without one.
        has_parallel, english_answer: bool (examples,).

    Raises:
        ValueError: a pair lacks a side that the plan needs; `load_rows` checks this.
    """

    def __init__(self, pairs: Sequence[Pair], plan: ExamplePlan) -> None:
        self._pairs, self._plan = pairs, plan
        table = pair_table(pairs)[plan.rows]
        target, english = table["target"], table["english"]
        self.main_answers = np.where(plan.english_prompt, english["answer"], target["answer"])
        answers = [side["length"] - side["answer"] for side in (english, target)]
        self.main_lengths = self.main_answers + np.where(plan.english_answer, *answers)
        self.has_parallel, self.english_answer = plan.parallel, plan.english_answer
        self.query_lengths = np.where(plan.parallel, english["query_end"] - english["query_start"], 0)
        needs_english = plan.english_prompt | plan.english_answer | plan.parallel
        needs_target = ~(plan.english_prompt & plan.english_answer)
        if (needs_english & (english["length"] < 0)).any() or (needs_target & (target["length"] < 0)).any():
            raise ValueError("a row lacks the side that the method trains on; load_rows checks this")

    def __len__(self) -> int:
        return len(self._plan.rows)

    def _item(self, index: int) -> Example:
        plan, pair = self._plan, self._pairs[int(self._plan.rows[index])]
        english_prompt, english_answer = bool(plan.english_prompt[index]), bool(plan.english_answer[index])
        prompt, answer = (pair.english if english else pair.target for english in (english_prompt, english_answer))
        assert prompt is not None
        assert answer is not None
        main = prompt
        if prompt is not answer:
            ids = np.concatenate([prompt.ids[: prompt.answer], answer.ids[answer.answer :]])
            main = Side(ids, prompt.query, prompt.answer, answer.characters)
        return Example(
            main=main,
            parallel=pair.english if plan.parallel[index] else None,
            english_prompt=english_prompt,
            english_answer=english_answer,
            number=pair.number,
        )


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
    """Return the tokens of every example's main side, int32 (examples,); lazy examples are not made."""
    if isinstance(examples, PairExamples):
        return examples.main_lengths
    return np.array([len(example.main.ids) for example in examples], dtype=np.int32)


def has_parallel(examples: Sequence[Example]) -> np.ndarray:
    """Return True for examples with an English parallel, bool (examples,)."""
    if isinstance(examples, PairExamples):
        return examples.has_parallel
    return np.array([example.parallel is not None for example in examples], dtype=bool)


def predicted_english_tokens(examples: Sequence[Example]) -> np.ndarray:
    """Return the answer tokens that a token before predicts in every example replayed in English; 0 for others.

    A replayed example has an English answer and no English parallel. int (examples,); lazy examples are not made.
    """
    if isinstance(examples, PairExamples):
        answers, english = examples.main_answers, examples.english_answer
    else:
        answers = np.array([example.main.answer for example in examples])
        english = np.array([example.english_answer for example in examples], dtype=bool)
    return np.where(english & ~has_parallel(examples), main_lengths(examples) - np.maximum(answers, 1), 0)


def training_examples(
    pairs: Sequence[Pair], method: Method, *, english_ratio: float = 0.0, seed: int = 0, token_budget: int | None = None
) -> PairExamples:
    """Return the training examples of a method, in the order of `pairs`.

    English replay: `round(english_ratio * len(pairs))` rows, drawn by `seed` and the number of rows only, are trained on
    their English prompt and answer with L_TFT alone; the number of rows stays the same, so that budgets stay equal.

    With a `token_budget` the examples are taken in an order drawn by `seed`, the same for every method, as long as their
    tokens (`main_lengths`) fit into it.

    Raises:
        UsageError: the budget is smaller than the first example, or larger than all.
    """
    replayed = np.zeros(len(pairs), dtype=bool)
    if method.replay:
        replayed[list(replay_indices(len(pairs), english_ratio, seed))] = True
    plan = method.plan(replayed)
    examples = PairExamples(pairs, plan)
    if token_budget is None:
        return examples
    order = random.Random(f"token-budget-{seed}").sample(range(len(examples)), len(examples))
    tokens = np.cumsum(examples.main_lengths[order], dtype=np.int64)
    if not tokens[0] <= token_budget <= tokens[-1]:
        allowed = f"{tokens[0]} (the first row drawn) to {tokens[-1]} (all {len(tokens)} rows)"
        raise UsageError(f"data.token_budget: {token_budget} tokens an epoch; allowed: {allowed}")
    kept = sorted(order[: np.searchsorted(tokens, token_budget, side="right")])
    return PairExamples(pairs, ExamplePlan(**{field.name: getattr(plan, field.name)[kept] for field in fields(plan)}))


def side_examples(pairs: Sequence[Pair], side: Language, language: str | None = None) -> PairExamples:
    """Return the rows that have a side, with that side alone; of one target language if it is given."""
    chosen = pair_table(pairs)[side]["length"] >= 0
    rows = np.flatnonzero(chosen if language is None else chosen & (pair_languages(pairs) == language))
    english = np.full(len(rows), side == "english")
    plan = ExamplePlan(rows=rows, english_prompt=english, english_answer=english, parallel=np.zeros_like(english))
    return PairExamples(pairs, plan)


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
    """Draw the rows that are replayed in English: the same for every method with this seed and number of rows."""
    count = round(english_ratio * num_rows)
    return set(random.Random(f"english-replay-{seed}").sample(range(num_rows), count))


def split_validation(
    rows: Sequence[_T], size: int | float, seed: int, languages: np.ndarray | None = None
) -> tuple[Subset[_T], Subset[_T]]:
    """Split rows into (train, validation), both in their original order, without reading them; deterministic in `seed`.

    Args:
        size: number of rows, or a share below 1, which is at least one row and at most `LARGEST_SHARE` rows.
        languages: the language of each row, texts (rows,): each gets its share of the held-out rows. None for one language.

    Raises:
        UsageError: no row would be left for training.
    """
    count = min(max(1, round(size * len(rows))), LARGEST_SHARE) if 0 < size < 1 else int(size)
    if count >= len(rows):
        raise UsageError(
            f"data.validation: {count} rows asked for, the data has {len(rows)}; at least one must be left for training"
        )
    held = np.zeros(len(rows), dtype=bool)
    if languages is None:
        held[random.Random(f"validation-{seed}").sample(range(len(rows)), count)] = True
    else:
        groups = _places_of(languages)
        parts = shared_out(count, [len(places) for places in groups.values()])
        for (code, places), part in zip(groups.items(), parts.tolist(), strict=True):
            # A language keeps a row to train on.
            drawn = random.Random(f"validation-{code}-{seed}").sample(range(len(places)), min(part, len(places) - 1))
            held[places[drawn]] = True
    return Subset(rows, np.flatnonzero(~held)), Subset(rows, np.flatnonzero(held))


def weighted_places(lengths: Sequence[int], weights: Sequence[float], seed: int) -> list[np.ndarray]:
    """Return the places of the rows of an epoch, int64, for each of several sources that stand one after the other.

    A weight of 2.5 gives every row twice and a half of them, drawn by `seed`, once more.

    Args:
        lengths: number of rows of each source. Of a source with rows at least one is taken.
    """
    places = []
    for source, (start, length, weight) in enumerate(
        zip(accumulate(lengths, initial=0), lengths, weights, strict=False)
    ):
        whole, share = divmod(weight, 1)
        count = min(max(round(share * length), whole == 0), length)
        drawn = sorted(random.Random(f"weight-{source}-{seed}").sample(range(length), count))
        places.append(start + np.concatenate([np.tile(np.arange(length), int(whole)), np.array(drawn, dtype=np.int64)]))
    return places


def balanced_places(languages: np.ndarray, temperature: float, seed: int) -> dict[str, np.ndarray]:
    """Return the places of the rows of an epoch, int64, for each language; as many rows as there are.

    The share of a language is proportional to rows^(1/temperature) (Arivazhagan et al., arXiv 1907.05019). All rows of a
    language are taken equally often, except for a remainder that `seed` draws.

    Args:
        languages: the language of each row, texts (rows,).
    """
    groups = _places_of(languages)
    lengths = np.array([len(places) for places in groups.values()])
    counts = shared_out(len(languages), lengths ** (1 / temperature))
    order = np.concatenate(list(groups.values()))
    chosen = weighted_places(lengths.tolist(), (counts / lengths).tolist(), seed)
    return {code: order[places] for code, places in zip(groups, chosen, strict=True)}


def _places_of(languages: np.ndarray) -> dict[str, np.ndarray]:
    return {code: np.flatnonzero(languages == code) for code in dict.fromkeys(languages.tolist())}


def shared_out(total: int, sizes: Sequence[float] | np.ndarray) -> np.ndarray:
    """Share out `total` rows in proportion to `sizes` by largest remainders, int64 (sizes,); none gets 0 if possible."""
    exact = total * np.asarray(sizes) / np.sum(sizes)
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    while total >= len(counts) and not counts.all():
        counts[counts.argmin()] += 1
        counts[counts.argmax()] -= 1
    return counts


def set_apart(rows: Sequence[_T], count: int, others: int) -> tuple[list[_T], list[_T]]:
    """Return `count` rows spread over the data and up to `others` different ones; the same where there are no others."""
    chosen = spread(range(len(rows)), count)
    rest = sorted(set(spread(range(len(rows)), count + others)) - set(chosen))
    first = [rows[index] for index in chosen]
    return first, [rows[index] for index in rest] or first


def spread(items: Sequence[_T], count: int) -> list[_T]:
    """Return `count` items at even distances: files are often sorted by topic."""
    step = max(len(items) / count, 1.0)
    return [items[int(index * step)] for index in range(min(count, len(items)))]
