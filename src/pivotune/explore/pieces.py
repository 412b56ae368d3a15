"""Texts of tokens. A byte-level piece alone is no text: pieces are joined to the characters that they form."""

from __future__ import annotations

import codecs
import re
import unicodedata
from itertools import accumulate
from typing import Any, NamedTuple

from pivotune.report.page import shown

_BYTE = re.compile("<0x([0-9A-F]{2})>")
# Joiners and marks that shape the letters beside them, and that nobody sees alone.
_SHAPING = "\u200c\u200d\u200e\u200f\u061c"


class Column(NamedTuple):
    """A run of `span` tokens that together form `text`."""

    text: str
    span: int


class Pieces:
    """The bytes of every token of a tokenizer: byte-level BPE, SentencePiece with byte fallback, or whole characters."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer
        self._added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
        # The stand-in of the blank in byte-level vocabularies.
        is_byte_level = tokenizer.convert_tokens_to_string(["\u0120a"]) == " a"
        self._bytes = {character: byte for byte, character in bytes_to_unicode().items()} if is_byte_level else None

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token adds to the text; none for an id without a token."""
        text = self._added.get(token) or self._tokenizer.convert_ids_to_tokens(token) or ""
        if token in self._added:
            return text.encode()
        if self._bytes is not None:
            return bytes(self._bytes[character] for character in text if character in self._bytes)
        if match := _BYTE.fullmatch(text):
            return bytes([int(match[1], 16)])
        return text.replace("\u2581", " ").encode()

    def pending(self, ids: list[int]) -> list[bytes]:
        """Return for each place the bytes of a character that is begun and not complete after this token."""
        return list(accumulate(map(self.bytes_of, ids), lambda before, new: _unfinished(before + new), initial=b""))[1:]

    def columns(self, ids: list[int]) -> list[Column]:
        """Split tokens into the shortest runs that end with a whole character."""
        columns, start = [], 0
        for place, unfinished in enumerate(self.pending(ids)):
            if not unfinished or place == len(ids) - 1:
                content = b"".join(map(self.bytes_of, ids[start : place + 1]))
                columns.append(Column(visible(content), place + 1 - start))
                start = place + 1
        return columns

    def formed(self, pending: bytes, token: int) -> str:
        """Return the text that a predicted token forms behind the `pending` bytes of its context."""
        new = self.bytes_of(token)
        if not new:
            # Models often have more output rows than the tokenizer has tokens.
            return f"⟨token {token}⟩"
        try:
            (pending + new[:4]).decode()
        except UnicodeDecodeError as error:
            if error.start < len(pending) and error.reason != "unexpected end of data":
                # It does not go on with this character.
                pending = b""
        return visible(pending + new)


def _unfinished(content: bytes) -> bytes:
    """Return the bytes at the end that begin a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(content)
    return decoder.getstate()[0]


def visible(content: bytes) -> str:
    r"""Return bytes as text in which every character is seen: `\xe1` for a part of one, `⟨U+202E⟩` for controls."""
    text = shown(content.decode(errors="backslashreplace")).replace("\ufffd", "⟨U+FFFD⟩")
    if not text.strip(_SHAPING):
        return "".join(f"⟨U+{ord(character):04X}⟩" for character in text)
    # A combining mark alone would be drawn over the text before it.
    return f"\u25cc{text}" if unicodedata.category(text[0])[0] == "M" else text
