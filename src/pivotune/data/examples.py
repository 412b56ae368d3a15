"""From rows to token ids: spans of query and answer on both sides, truncation that keeps pairs aligned.

Rows are tokenized the same way for every method; `pivotune.data.datasets` chooses the sides that a method trains on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pivotune.data.control_tokens import ControlTokens
from pivotune.data.formats import numbered_by, source_of
from pivotune.data.rows import Row
from pivotune.data.templates import Rendered, Template, Turn, begin_ids
from pivotune.errors import UsageError

# Rows tokenized in one call: enough for the tokenizer's own threads, few enough to show progress.
_ROWS_PER_CALL = 512
# A call ends early at this many characters: tokens with their offsets take about a hundred times the memory of the text.
_CHARACTERS_PER_CALL = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """Token limits of one side: `prompt`, `completion`, and `context` for the model's maximum length."""

    prompt: int = 256
    completion: int = 256
    context: int | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """One language of one row, as token ids.

    Attributes:
        ids: int32 (tokens,), prompt then answer.
        query: (start, end) of the user's text in the prompt.
        answer: index of the first answer token; the answer runs to the end.
        characters: number of characters of the answer's text in the answer tokens, without special tokens.
        tail: int32, the template's tokens behind the query by themselves, where the query's last token holds some of their
            text and a cut would lose it; not kept.
    """

    ids: np.ndarray
    query: tuple[int, int]
    answer: int
    characters: int
    tail: np.ndarray | None = None

    @property
    def num_query_tokens(self) -> int:
        return self.query[1] - self.query[0]

    @property
    def num_answer_tokens(self) -> int:
        return len(self.ids) - self.answer


@dataclass(frozen=True, slots=True)
class Pair:
    """Both sides of a row; a side is None where the row has no text for it.

    `language` is the code of the target language in a run with several, else ''.
    """

    target: Side | None
    english: Side | None
    number: int = 0
    language: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One training example.

    Attributes:
        main: the sequence of L_TFT.
        parallel: its English counterpart for the inner losses; None without them.
        english_prompt, english_answer: whether prompt and answer of `main` are English (replay, or English-only training).
        english_features: pooled English vectors (width,) float32 by loss term, where they were computed before training;
            zeros for rows without an English side.
        start_predictions: the starting model's K likeliest tokens (N, K) int32 at the N answer tokens of a replayed row,
            where they were computed before training, and their log-probabilities (N, K + 1) float16, that of all other
            tokens last; N is 0 for other rows.
        number: the row's 1-based place in its source.
    """

    main: Side
    parallel: Side | None = None
    english_prompt: bool = False
    english_answer: bool = False
    english_features: Mapping[str, np.ndarray] | None = None
    start_predictions: tuple[np.ndarray, np.ndarray] | None = None
    number: int = 0


class _UnfitRowError(UsageError):
    """A row that the limits cut to nothing; `reason` is the same for all rows with this problem, to count them by."""

    def __init__(self, reason: str, tokens: int) -> None:
        super().__init__(f"{reason} (it takes {tokens})")
        self.reason = reason


@dataclass
class EncodingReport:
    """Counts of rows that were cut, by part, and skipped, by reason."""

    cut: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)


class PreviewPart(NamedTuple):
    """A run of tokens with one role: `template`, `query` or `answer`. Only `answer` tokens carry loss."""

    role: str
    text: str
    num_tokens: int


def preview(tokenizer: Any, side: Side) -> list[PreviewPart]:
    """Decode a sequence from its token ids, in order, special tokens included, split by role."""
    bounds = (0, *side.query, side.answer, len(side.ids))
    return [
        PreviewPart(role, tokenizer.decode(side.ids[left:right].tolist(), skip_special_tokens=False), right - left)
        for role, (left, right) in zip(("template", "query", "template", "answer"), pairwise(bounds), strict=True)
        if right > left
    ]


class Encoder:
    """Tokenizes rows with one template and one set of limits; counts truncated and skipped rows in `report`.

    With `fold_system` a system message becomes the beginning of the first user text.
    """

    def __init__(
        self, tokenizer: Any, template: Template, limits: Limits = Limits(), *, fold_system: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.limits = limits
        self.fold_system = fold_system
        self.report = EncodingReport()
        self._bos = begin_ids(tokenizer, template.adds_special_tokens)
        self._control_tokens = ControlTokens(tokenizer)

    def encode(
        self, rows: Iterable[Row], *, on_bad_row: str = "error", source: str | Mapping[str, int] = "data"
    ) -> list[Pair]:
        """Encode all rows, in order; see `encode_lazily`."""
        return list(self.encode_lazily(rows, on_bad_row=on_bad_row, source=source))

    def encode_lazily(
        self, rows: Iterable[Row], *, on_bad_row: str = "error", source: str | Mapping[str, int] = "data"
    ) -> Iterator[Pair]:
        """Encode rows one after the other: memory holds the tokens of one call of the tokenizer.

        Args:
            source: names the rows in messages; of several sources as in `Rows.sources`.

        Raises:
            UsageError: a row whose template alone exceeds the limits, or whose answer is cut to nothing; with
                `on_bad_row="skip"` such rows are left out and counted instead.
        """
        for chunk in _chunks(rows):
            rendered: list[tuple[Row, list[tuple[Turn, Rendered] | None]]] = []
            for row in chunk:
                with self._row_errors(row.number, on_bad_row, source):
                    sides = [(turn, self.render(turn)) if turn.is_whole else None for turn in row.sides]
                    rendered.append((row, sides))
            tokenized = [list(self._tokenize([sides[place] for _, sides in rendered])) for place in (0, 1)]
            for (row, _), target, english in zip(rendered, *tokenized, strict=True):
                with self._row_errors(row.number, on_bad_row, source):
                    yield self._fit(Pair(target, english, row.number, row.language))

    def encode_prompt(self, turn: Turn) -> list[int]:
        """Return the token ids of the prompt alone, as in training: generation continues them."""
        return self._bos + self._ids([self.render(turn).prompt])[0][0]

    def render(self, turn: Turn) -> Rendered:
        """Render a turn whose text is text: control tokens in it are hidden until `_ids`."""
        turn = turn.with_system_folded() if self.fold_system else turn
        return self.template.render(self._control_tokens.hide(turn))

    @contextmanager
    def _row_errors(self, number: int, on_bad_row: str, source: str | Mapping[str, int]) -> Iterator[None]:
        try:
            yield
        except UsageError as error:
            if on_bad_row != "skip":
                name, number = source_of(number, {source: 0} if isinstance(source, str) else source)
                raise UsageError(f"{name}: {numbered_by(Path(name))} {number}: {error}") from error
            self.report.skipped[error.reason if isinstance(error, _UnfitRowError) else str(error)] += 1

    def _tokenize(self, rendered: Sequence[tuple[Turn, Rendered] | None]) -> Iterator[Side | None]:
        """Tokenize one side of several rows; None for a row without it."""
        prompts = iter(self._ids([item[1].prompt for item in rendered if item]))
        wholes = iter(self._ids([item[1].prompt + item[1].completion for item in rendered if item]))
        for pair in rendered:
            if pair is None:
                yield None
                continue
            turn, item = pair
            (prompt, offsets), (whole, _) = next(prompts), next(wholes)
            # Where tokens merge across the border, the prompt keeps the tokens that generation will see.
            joint = whole[: len(prompt)] == prompt
            answer = whole[len(prompt) :] if joint else self._ids([item.completion])[0][0]
            # A token that covers both query and template text belongs to the query.
            begin, stop = len(item.prefix), len(item.prefix) + len(item.query)
            inside = [i for i, (left, right) in enumerate(offsets) if right > begin and left < stop and right > left]
            shift = len(self._bos)
            merged = bool(inside) and offsets[inside[-1]][1] > stop
            yield Side(
                ids=np.array(self._bos + prompt + answer, dtype=np.int32),
                query=(shift + inside[0], shift + inside[-1] + 1) if inside else (shift, shift),
                answer=shift + len(prompt),
                characters=len(turn.completion),
                tail=np.array(self._ids([item.suffix])[0][0], dtype=np.int32) if merged else None,
            )

    def _ids(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        if not texts:
            return []
        if not self.tokenizer.is_fast:
            raise UsageError(
                f"{type(self.tokenizer).__name__} has no fast version, which is needed to find the query's tokens"
            )
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, truncation=False)
        plain = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        hidden = self._control_tokens
        return [hidden.encode(text) if hidden.are_hidden(text) else ids for text, ids in zip(texts, plain, strict=True)]

    def _fit(self, pair: Pair) -> Pair:
        """Cut both sides to the limits; each keeps the same share of its query, and of its answer."""
        sides = [side for side in (pair.target, pair.english) if side is not None]
        query_share = min((self._query_room(side) / side.num_query_tokens for side in sides), default=1.0)
        sides = [self._cut_query(side, query_share) for side in sides]
        # The English branch follows the target's prompt, so both prompts must leave room for both answers.
        longest_prompt = max((side.answer for side in sides), default=0)
        share = min((self._answer_room(side, longest_prompt) / side.num_answer_tokens for side in sides), default=1.0)
        # Counted last: a row refused on the way is skipped, not cut.
        self.report.cut.update(part for part, kept in (("prompts", query_share), ("answers", share)) if kept < 1)
        cut = iter([self._cut_answer(side, share) for side in sides])
        return replace(pair, target=pair.target and next(cut), english=pair.english and next(cut))

    def _query_room(self, side: Side) -> int:
        if side.num_query_tokens == 0:
            raise UsageError("the prompt has no tokens")
        if side.answer <= self.limits.prompt:
            return side.num_query_tokens
        frame = side.query[0] + len(_behind_query(side))
        room = min(side.num_query_tokens, self.limits.prompt - frame)
        if room < 1:
            limit = f"the {self.limits.prompt} tokens of data.max_prompt_tokens"
            raise _UnfitRowError(f"the template alone takes more than {limit}; allow more", frame)
        return room

    def _answer_room(self, side: Side, longest_prompt: int) -> int:
        room = self.limits.completion
        context = self.limits.context
        if context is not None:
            room = min(room, context - longest_prompt)
            if room < 1:
                problem = f"the prompt fills the model's {context} tokens and nothing is left for the answer"
                raise _UnfitRowError(f"{problem}; lower data.max_prompt_tokens", longest_prompt)
        if side.num_answer_tokens == 0:
            raise UsageError("the answer has no tokens")
        return min(room, side.num_answer_tokens)

    def _cut_query(self, side: Side, share: float) -> Side:
        start, behind = side.query[0], _behind_query(side)
        keep = _share_of(side.num_query_tokens, share)
        if keep == side.num_query_tokens:
            return side
        keep = max(1, min(keep, self.limits.prompt - start - len(behind)))
        ids = np.concatenate([side.ids[: start + keep], behind, side.ids[side.answer :]])
        return replace(side, ids=ids, query=(start, start + keep), answer=start + keep + len(behind))

    def _cut_answer(self, side: Side, share: float) -> Side:
        keep = _share_of(side.num_answer_tokens, share)
        if keep == side.num_answer_tokens:
            return side
        ids = side.ids[: side.answer + keep]
        text = self.tokenizer.decode(ids[side.answer :].tolist(), skip_special_tokens=True)
        return replace(side, ids=ids, characters=max(1, len(text)))


def _behind_query(side: Side) -> np.ndarray:
    """Return the tokens between a cut query and the answer."""
    return side.ids[side.query[1] : side.answer] if side.tail is None else side.tail


def _share_of(count: int, share: float) -> int:
    """Return at least one token; rounding down keeps every side within its limit, the epsilon undoes float division."""
    return max(1, math.floor(count * share + 1e-9))


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += sum(len(turn.user_text) + len(turn.completion) for turn in row.sides)
        if len(chunk) == _ROWS_PER_CALL or characters >= _CHARACTERS_PER_CALL:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
