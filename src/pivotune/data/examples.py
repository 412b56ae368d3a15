"""From rows to token ids: spans of query and answer on both sides, truncation that keeps pairs aligned.

Both sides of a row are tokenized the same way whatever the method, so that methods trained on the same file see the same
tokens. What a method trains on is chosen afterwards, in `pivotune.data.datasets`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pivotune.data.formats import numbered_by
from pivotune.data.sources import Row
from pivotune.data.templates import Rendered, Template, Turn
from pivotune.errors import UsageError

# Rows tokenized in one call: enough for the tokenizer's own threads, little enough to show progress.
_ROWS_PER_CALL = 512
# A call ends early with the row that reaches this many characters: tokens with their offsets take about a hundred times
# the memory of the text.
_CHARACTERS_PER_CALL = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """Token limits of one side: `prompt` and `completion` each, and `context`, what the model reads at once."""

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
        characters: characters of the answer's text that the answer tokens stand for, without special tokens.
    """

    ids: np.ndarray
    query: tuple[int, int]
    answer: int
    characters: int

    @property
    def num_query_tokens(self) -> int:
        return self.query[1] - self.query[0]

    @property
    def num_answer_tokens(self) -> int:
        return len(self.ids) - self.answer


@dataclass(frozen=True, slots=True)
class Pair:
    """Both sides of a row; a side is None where the row has no text for it."""

    target: Side | None
    english: Side | None
    number: int = 0


@dataclass(frozen=True, slots=True)
class Example:
    """One training example.

    Attributes:
        main: the sequence of L_TFT.
        parallel: its English counterpart for the inner losses; None without them.
        english_prompt, english_answer: whether prompt and answer of `main` are English (replay, or English-only training).
        english_features: pooled English vectors (width,) float32 by loss term, where they were computed before training;
            zeros for rows without an English side.
        number: the row's 1-based place in its source.
    """

    main: Side
    parallel: Side | None = None
    english_prompt: bool = False
    english_answer: bool = False
    english_features: Mapping[str, np.ndarray] | None = None
    number: int = 0


class _UnfitRowError(UsageError):
    """A row that the limits leave nothing of; `reason` is the same for all rows with this problem, to count them by."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class EncodingReport:
    """What truncation and skipping did: `rows` encoded, `cut` counts by part, `skipped` counts by reason."""

    rows: int = 0
    cut: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "cut": dict(self.cut), "skipped": dict(self.skipped)}


class _RenderedSide(NamedTuple):
    turn: Turn
    rendered: Rendered


class _RenderedRow(NamedTuple):
    number: int
    target: _RenderedSide | None
    english: _RenderedSide | None


class Encoder:
    """Tokenizes rows with one template and one set of limits; counts what it cut in `report`."""

    def __init__(self, tokenizer: Any, template: Template, limits: Limits = Limits()) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.limits = limits
        self.report = EncodingReport()
        self._bos = begin_ids(tokenizer, template.adds_special_tokens)

    def encode(self, rows: Iterable[Row], *, on_bad_row: str = "error", source: str = "data") -> list[Pair]:
        """Encode all rows, in order; see `encode_lazily`."""
        return list(self.encode_lazily(rows, on_bad_row=on_bad_row, source=source))

    def encode_lazily(self, rows: Iterable[Row], *, on_bad_row: str = "error", source: str = "data") -> Iterator[Pair]:
        """Encode rows one after the other: memory holds the tokens of one call of the tokenizer.

        Raises:
            UsageError: a row whose template alone exceeds the limits, or whose answer is cut to nothing; with
                `on_bad_row="skip"` such rows are left out and counted instead.
        """
        for chunk in _chunks(rows):
            rendered: list[_RenderedRow] = []
            for row in chunk:
                with self._row_errors(row.number, on_bad_row, source):
                    rendered.append(self._render(row))
            for pair in self._tokenize_rows(rendered):
                with self._row_errors(pair.number, on_bad_row, source):
                    fitting = self._fit(pair)
                    self.report.rows += 1
                    yield fitting

    def encode_prompt(self, turn: Turn) -> list[int]:
        """Token ids of the prompt alone, as training laid it out: what generation continues."""
        return self._bos + self._ids([self.template.render(turn).prompt])[0][0]

    @contextmanager
    def _row_errors(self, number: int, on_bad_row: str, source: str) -> Iterator[None]:
        try:
            yield
        except UsageError as error:
            if on_bad_row != "skip":
                raise UsageError(f"{source}: {numbered_by(Path(source))} {number}: {error}") from error
            self.report.skipped[error.reason if isinstance(error, _UnfitRowError) else str(error)] += 1

    def _render(self, row: Row) -> _RenderedRow:
        target = Turn(row.prompt, row.completion, row.input, row.history)
        english = Turn(row.prompt_en, row.completion_en, row.input_en, row.history_en)
        return _RenderedRow(
            number=row.number,
            target=_RenderedSide(target, self.template.render(target)) if row.has_target else None,
            english=_RenderedSide(english, self.template.render(english)) if row.has_english else None,
        )

    def _tokenize_rows(self, rows: Sequence[_RenderedRow]) -> Iterator[Pair]:
        target = self._sides([row.target for row in rows])
        english = self._sides([row.english for row in rows])
        for row, one, other in zip(rows, target, english, strict=True):
            yield Pair(one, other, row.number)

    def _sides(self, rendered: Sequence[_RenderedSide | None]) -> list[Side | None]:
        sides = self._tokenize([item for item in rendered if item is not None])
        return [None if item is None else next(sides) for item in rendered]

    def _tokenize(self, rendered: Sequence[_RenderedSide]) -> Iterator[Side]:
        if not rendered:
            return
        prompts = self._ids([item.prompt for _, item in rendered])
        wholes = self._ids([item.prompt + item.completion for _, item in rendered])
        for (turn, item), (prompt, offsets), (whole, _) in zip(rendered, prompts, wholes, strict=True):
            # Where tokens merge across the border, the prompt stays as generation will see it.
            joint = whole[: len(prompt)] == prompt
            answer = whole[len(prompt) :] if joint else self._ids([item.completion])[0][0]
            start, end = _query_span(item, offsets)
            shift = len(self._bos)
            yield Side(
                ids=np.array(self._bos + prompt + answer, dtype=np.int32),
                query=(start + shift, end + shift),
                answer=shift + len(prompt),
                characters=len(turn.completion),
            )

    def _ids(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        if not self.tokenizer.is_fast:
            raise UsageError(
                f"{type(self.tokenizer).__name__} has no fast version, which is needed to find the query's tokens"
            )
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, truncation=False)
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def _fit(self, pair: Pair) -> Pair:
        sides = [side for side in (pair.target, pair.english) if side is not None]
        query_share = min((self._query_room(side) / side.num_query_tokens for side in sides), default=1.0)
        pair = _map_sides(pair, lambda side: _cut_query(side, query_share))
        share = min((room / side.num_answer_tokens for side, room in self._answer_rooms(pair)), default=1.0)
        # Counted last: a row refused on the way is skipped, not cut.
        self.report.cut.update(part for part, kept in (("prompts", query_share), ("answers", share)) if kept < 1)
        return _map_sides(pair, lambda side: self._cut_answer(side, share))

    def _query_room(self, side: Side) -> int:
        if side.num_query_tokens == 0:
            raise UsageError("the prompt has no tokens")
        frame = side.answer - side.num_query_tokens
        room = min(side.num_query_tokens, self.limits.prompt - frame)
        if room < 1:
            raise _UnfitRowError(
                f"the template alone takes {frame} tokens and data.max_prompt_tokens is {self.limits.prompt}; allow more",
                f"the template alone takes more than the {self.limits.prompt} tokens of data.max_prompt_tokens; allow more",
            )
        return room

    def _answer_rooms(self, pair: Pair) -> Iterator[tuple[Side, int]]:
        for side in (pair.target, pair.english):
            if side is None:
                continue
            room = self.limits.completion
            if self.limits.context is not None:
                # The English branch follows the target's prompt, so both prompts must leave room for both answers.
                prompt = max(other.answer for other in (pair.target, pair.english) if other is not None)
                room = min(room, self.limits.context - prompt)
                if room < 1:
                    raise _UnfitRowError(
                        f"the prompt takes {prompt} of the model's {self.limits.context} tokens and nothing is left for "
                        "the answer; lower data.max_prompt_tokens",
                        f"the prompt fills the model's {self.limits.context} tokens and nothing is left for the answer; "
                        "lower data.max_prompt_tokens",
                    )
            if side.num_answer_tokens == 0:
                raise UsageError("the answer has no tokens")
            yield side, min(room, side.num_answer_tokens)

    def _cut_answer(self, side: Side, share: float) -> Side:
        keep = _share_of(side.num_answer_tokens, share)
        if keep == side.num_answer_tokens:
            return side
        ids = side.ids[: side.answer + keep]
        text = self.tokenizer.decode(ids[side.answer :].tolist(), skip_special_tokens=True)
        return replace(side, ids=ids, characters=max(1, len(text)))


def _query_span(item: Rendered, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Token range that overlaps the query's characters; a token that also covers template text counts as query."""
    begin, stop = len(item.prefix), len(item.prefix) + len(item.query)
    inside = [index for index, (left, right) in enumerate(offsets) if right > begin and left < stop and right > left]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _cut_query(side: Side, share: float) -> Side:
    start, end = side.query
    keep = _share_of(side.num_query_tokens, share)
    dropped = side.num_query_tokens - keep
    if dropped == 0:
        return side
    ids = np.concatenate([side.ids[: start + keep], side.ids[end:]])
    return replace(side, ids=ids, query=(start, start + keep), answer=side.answer - dropped)


def _share_of(count: int, share: float) -> int:
    """At least one token; rounding down keeps every side within its limit, the epsilon undoes float division."""
    return max(1, math.floor(count * share + 1e-9))


def _map_sides(pair: Pair, change: Any) -> Pair:
    target = None if pair.target is None else change(pair.target)
    english = None if pair.english is None else change(pair.english)
    return replace(pair, target=target, english=english)


def begin_ids(tokenizer: Any, text_has_special_tokens: bool) -> list[int]:
    """The begin-of-text token where this tokenizer puts one and the text does not hold it already."""
    if text_has_special_tokens or tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += sum(map(len, (row.prompt, row.completion, row.input)))
        characters += sum(map(len, (row.prompt_en, row.completion_en, row.input_en)))
        if len(chunk) == _ROWS_PER_CALL or characters >= _CHARACTERS_PER_CALL:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
