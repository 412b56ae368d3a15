"""Control tokens spelled out in the text of a row are encoded as text; those of the template stay control tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pivotune.data.templates import Turn

# The first of the private characters that stand for control tokens while a row is rendered: one for each token.
_FIRST_STAND_IN = 0x100000


class ControlTokens:
    """The special tokens of a fast tokenizer, and a copy of the tokenizer in which they have other names.

    `hide` puts stand-ins into the texts of a row before it is rendered. `encode` then swaps names: the stand-ins become
    the words of the row again, which the copy reads as text, and the template's own control tokens become the names that
    they have in the copy. A stand-in is as long as its token, so that places in the text stay the same. Rows without a
    control token never come here: their ids are those of the tokenizer itself.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values() if tokenizer.is_fast else ()
        names = sorted({token.content for token in added if token.special} - {""})
        self._stand_ins = {name: chr(_FIRST_STAND_IN + place) * len(name) for place, name in enumerate(names)}
        self._hidden = {stand_in: name for name, stand_in in self._stand_ins.items()}
        self._name, self._any = (_one_of(table) for table in (self._stand_ins, self._hidden))
        self._swaps = {**self._stand_ins, **self._hidden}
        self._swapped = _one_of(self._swaps)

    def hide(self, turn: Turn) -> Turn:
        """Return the turn with stand-ins for the control tokens that its texts spell out."""
        if not any(map(self._name.search, turn.texts)):
            return turn
        return turn.with_texts([self._name.sub(lambda match: self._stand_ins[match[0]], text) for text in turn.texts])

    def are_hidden(self, text: str) -> bool:
        """Return True for rendered text with stand-ins."""
        return self._any.search(text) is not None

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids and offsets of rendered text with stand-ins."""
        swapped = self._swapped.sub(lambda match: self._swaps[match[0]], text)
        encoding = self._renamed.encode(swapped, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    @cached_property
    def _renamed(self) -> Any:
        """The tokenizer with a stand-in as the name of each special token."""
        from tokenizers import Tokenizer

        fields = json.loads(self._tokenizer.backend_tokenizer.to_str())
        fields.update(padding=None, truncation=None)
        for token in fields["added_tokens"]:
            token["content"] = self._stand_ins.get(token["content"], token["content"])
        model = fields["model"]
        if isinstance(model["vocab"], Mapping):
            model["vocab"] = {self._stand_ins.get(name, name): number for name, number in model["vocab"].items()}
        else:
            model["vocab"] = [[self._stand_ins.get(name, name), score] for name, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = self._stand_ins.get(model["unk_token"], model["unk_token"])
        return Tokenizer.from_str(json.dumps(fields))


def _one_of(table: Mapping[str, str]) -> re.Pattern[str]:
    """Return a pattern for any of the names, the longest first; without names it matches nothing."""
    names = sorted(table, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) if names else r"(?!)")
