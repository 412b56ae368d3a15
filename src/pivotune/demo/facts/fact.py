"""One fact, stated by the same slots in two languages."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pivotune.demo.facts.cldr import Pair


@dataclass(frozen=True)
class Fact:
    """What one question and its answer are about, before it is put into words.

    `entity` is the subject, such as 'territory:JP'; `variant` tells apart facts of one kind about one entity.
    `target` and `english` hold the values of the template's slots.
    """

    kind: str
    entity: str
    variant: str
    target: dict[str, str]
    english: dict[str, str]

    @property
    def name(self) -> str:
        """Unique within a language; the end of a row's id."""
        return "-".join(part for part in (self.kind, self.entity.replace(":", "-"), self.variant) if part)

    @property
    def category(self) -> str:
        """The kind of thing the entity is: 'territory', 'currency'..."""
        return self.entity.split(":", 1)[0]


def make_fact(kind: str, entity: str, variant: str = "", **slots: str | Pair) -> Fact:
    """A fact from slots that are the same in both languages (text) or differ (a pair: target, English)."""
    pairs = {name: (value, value) if isinstance(value, str) else value for name, value in slots.items()}
    target = {name: pair[0] for name, pair in pairs.items()}
    english = {name: pair[1] for name, pair in pairs.items()}
    return Fact(kind, entity, variant, target, english)


def stable_rank(*parts: object) -> int:
    """A pseudo-random number in [0, 2**64), the same for the same parts on every machine and Python."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
