"""Sequences whose items are made when they are asked for: what is large stays on disk."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeVar, overload

import numpy as np

T_co = TypeVar("T_co", covariant=True)


class LazySequence(Sequence[T_co]):
    """A sequence that makes an item anew for everyone who asks; slices are lists. Equal to a sequence of equal items."""

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    @abstractmethod
    def _item(self, index: int) -> T_co:
        """The item at a place that exists."""

    @overload
    def __getitem__(self, index: int) -> T_co: ...
    @overload
    def __getitem__(self, index: slice) -> list[T_co]: ...
    def __getitem__(self, index: int | slice) -> T_co | list[T_co]:
        if isinstance(index, slice):
            return [self._item(place) for place in range(*index.indices(len(self)))]
        place = operator.index(index)
        place += len(self) if place < 0 else 0
        if not 0 <= place < len(self):
            raise IndexError(f"{index} of {len(self)} items")
        return self._item(place)

    def __iter__(self) -> Iterator[T_co]:
        return map(self._item, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))


class Selection(LazySequence[T_co]):
    """Some items of another sequence, by their places (integers), in the order of the places."""

    def __init__(self, items: Sequence[T_co], places: np.ndarray) -> None:
        self._items = items
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def _item(self, index: int) -> T_co:
        return self._items[int(self._places[index])]
