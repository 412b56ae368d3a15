"""Damaged characters: wrong encodings, invisible and control characters, decomposed and compatibility forms.

Each function takes a text and its counterpart in the other language and returns the damage as a note, or ''.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from pivotune.data.check.language import LINK, Text

# A text of megabytes is damaged from its start: longer ones are cut for the searches that are not linear.
SEARCHED_CHARACTERS = 20_000
_RTL = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
# Always wrong in running text: control characters, line separators, soft hyphens, fillers, private and unassigned places.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u034f\u115f\u1160\u180e\u200b-\u200f\u061c\u2028-\u202e\u2060-\u206f\u3164"
    "\ufdd0-\ufdef\ufeff\uffa0\ufff9-\ufffc\ufffe\uffff\ue000-\uf8ff\U000e0000-\U000e007f\U000f0000-\U0010ffff]"
)
# Right where scripts need it: word breaks in South-East Asian scripts, joining in Arabic, Indic, Mongolian and emoji.
_BREAKING = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u1aaf\u1b00-\u1b7f\ua980-\ua9df\uaa60-\uaadf]")
_JOINING = re.compile(
    "[\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af\u1900-\u1c4f\ua840-\ua9ff\uaa00-\uabff\ufb50-\ufdff\ufe70-\ufefc"
    "\U00010a00-\U00011fff]"
)
_PICTURE = re.compile("[\u00a9\u00ae\u203c-\u3299\ufe0f\u20e3\U0001f000-\U0001faff]")
_DIRECTIONS = "\u202a\u202b\u2066\u2067\u2068"
# Bytes 0x80 to 0xbf as Windows-1252 shows them (Latin-1 where it has no character), and the leads of UTF-8 sequences.
_HIGH = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in range(0x80, 0xC0))
_TRAIL = f"[{re.escape(_HIGH)}\x80-\xbf]"
_SEQUENCE = re.compile(f"[\xc2-\xdf]{_TRAIL}|[\xe0-\xef]{_TRAIL}{{2}}|[\xf0-\xf4]{_TRAIL}{{3}}")
# These follow a letter in good text too: a closing quote, an ellipsis, a dash, a space, a degree sign.
_CLOSING = frozenset(
    "\u201c\u201d\u2018\u2019\u201a\u201e\u2039\u203a\u2026\u2013\u2014\xa0\xab\xbb\xb0\xb7\xb4\xae\u2122\xb2\xb3"
)
# UTF-8 bytes that were read with these come out as other letters: one byte a character, and two bytes.
_CODECS = (
    ("cp1251", "koi8-r", "cp1250", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "cp874", "mac_roman",
     "cp437", "cp850", "cp866"),
    ("gbk", "big5", "shift_jis", "euc_kr", "euc_jp"),
)  # fmt: skip
_ENCODED_RUN = re.compile("[^\x00-\x7f]+")
# Share of the other alphabets' characters that must turn back into UTF-8, and the fewest of them.
_DECODED_SHARE, _DECODED_CHARACTERS = 0.7, 6
# No language writes so many of its letters with Latin-1's upper half; Cyrillic or Chinese read as Latin-1 does.
_LATIN1_LETTER = re.compile("[\xaa\xb5\xba\xc0-\xd6\xd8-\xf6\xf8-\xff]")
_LATIN1_SHARE, _LATIN1_LETTERS = 0.5, 10
_QUESTION_IN_WORD = re.compile(r"(?<=[^\W\d_])\?+(?=[^\W\d_])|\?{4,}")
# Letters in a form of their own that text has only after a bad conversion: full and half width, ligatures, presentation
# forms, radicals. Full-width digits and signs are common in Chinese and Japanese.
_COMPATIBILITY = re.compile(
    "[\uff21-\uff3a\uff41-\uff5a\uff66-\uff9f\uffa1-\uffdc\ufb00-\ufb1c\ufb50-\ufdcf\ufe70-\ufefc\u2e80-\u2fd5"
    "\U0001d400-\U0001d7ff]"
)
# Full-width punctuation, and digits of East Asian width, in a text without East Asian letters.
_WIDE_SIGN = re.compile("[\u3000-\u3002\uff01-\uff20\uff3b-\uff40\uff5b-\uff65]")
_PROSE_LETTERS = 30
_EAST_ASIAN = re.compile("[\u1100-\u11ff\u3040-\u30ff\u3100-\u31ff\u3400-\u9fff\uac00-\ud7af]")
_MIXED_WORD = re.compile(
    "[A-Za-z]{2}[\u0400-\u04ff]|[\u0400-\u04ff]{2}[A-Za-z][\u0400-\u04ff]?|[\u0400-\u04ff][A-Za-z][\u0400-\u04ff]"
    "|[A-Za-z][\u0400-\u04ff][A-Za-z]"
)


def invisible_characters(text: Text, other: Text) -> str:
    """Find characters without a shape that the text's script does not need."""
    if not _INVISIBLE.search(text.text):
        return ""
    is_rtl = _RTL.search(text.text) is not None
    found = {f"U+{ord(text.text[place]):04X}" for place in _misplaced(text.text, is_rtl)}
    return " ".join(sorted(found)[:5])


def _misplaced(text: str, is_rtl: bool) -> Iterator[int]:
    balanced = sum(map(text.count, "\u202a\u202b")) == text.count("\u202c")
    balanced = balanced and sum(map(text.count, "\u2066\u2067\u2068")) == text.count("\u2069")
    for match in _INVISIBLE.finditer(text):
        place, character = match.start(), match.group()
        before, after = text[max(place - 1, 0) : place], text[place + 1 : place + 2]
        if character in "\u200e\u200f\u061c":
            is_right = is_rtl
        elif character in _DIRECTIONS or character in "\u202c\u2069":
            is_right = is_rtl and balanced
        elif character == "\u200b":
            is_right = bool(_BREAKING.match(before) or _BREAKING.match(after))
        elif character in "\u200c\u200d":
            is_picture = _PICTURE.match(before) and _PICTURE.match(after) and character == "\u200d"
            is_right = bool(_JOINING.match(before) or is_picture)
        else:
            # Flags of regions are spelled in tag characters after a black flag.
            is_right = character >= "\U000e0020" and "\U0001f3f4" in text[max(place - 8, 0) : place]
            is_right = is_right and character <= "\U000e007f"
        if not is_right:
            yield place


def decomposed_characters(text: Text, other: Text) -> str:
    """Find letters that are written as a base and a separate mark where one character (NFC) exists for both."""
    if unicodedata.is_normalized("NFC", text.text):
        return ""
    composed = unicodedata.normalize("NFC", text.text)
    # Scripts whose letters NFC itself takes apart (U+0958) only get longer.
    missing = len(text.text) - len(composed)
    return f"{missing} marks apart from their letters (NFD)" if missing > 0 else ""


def wrong_encoding(text: Text, other: Text) -> str:
    """Find text that was read or written with another encoding than its own."""
    if "\ufffd" in text.text:
        return "U+FFFD in place of characters"
    if not text.text.isascii():
        sample = text.text[:SEARCHED_CHARACTERS]
        sequences = _SEQUENCE.findall(sample)
        is_clear = any(not _CLOSING.issuperset(sequence[1:]) for sequence in sequences)
        if sequences and (is_clear or len(sequences) >= 3) and not _SEQUENCE.search(other.text):
            return f"UTF-8 read as Latin-1: {' '.join(dict.fromkeys(sequences[:4]))}"
        if codec := _misread_codec(sample):
            return f"UTF-8 read as {codec}"
        odd = len(_LATIN1_LETTER.findall(sample))
        if odd >= _LATIN1_LETTERS and odd >= _LATIN1_SHARE * sum(map(str.isalpha, sample)):
            return "another alphabet read as Latin-1"
    marks = len(_QUESTION_IN_WORD.findall(LINK.sub("", text.text[:SEARCHED_CHARACTERS]))) if "?" in text.text else 0
    if marks and not text.is_code() and not _QUESTION_IN_WORD.search(LINK.sub("", other.text)):
        is_many = text.text.count("?") >= 3 + 2 * other.text.count("?")
        return "question marks in place of letters" if marks >= 2 or is_many else ""
    return ""


def _misread_codec(text: str) -> str:
    """Return the encoding in which most runs of non-ASCII characters are UTF-8, or ''."""
    runs = _ENCODED_RUN.findall(text)[:40]
    most_wrong = (1 - _DECODED_SHARE) * (total := sum(map(len, runs)))
    is_wide = any(max(run) >= "\u3000" for run in runs)
    # A single character of one byte is never UTF-8; this settles most texts.
    wrong = 0 if is_wide else sum(len(run) == 1 for run in runs)
    if total < _DECODED_CHARACTERS or wrong > most_wrong:
        return ""
    return next((codec for codec in _CODECS[is_wide] if _undecoded(runs, codec, most_wrong) <= most_wrong), "")


def _undecoded(runs: list[str], codec: str, enough: float) -> int:
    """Return the number of characters in runs that are no UTF-8 in this encoding; counting stops above `enough`."""
    wrong = 0
    for run in runs:
        try:
            run.encode(codec).decode()
        except UnicodeError:
            wrong += len(run)
            if wrong > enough:
                break
    return wrong


def compatibility_characters(text: Text, other: Text) -> str:
    """Find letters in forms that no keyboard types (full width, ligatures, presentation forms) and mixed alphabets."""
    if text.text.isascii():
        return ""
    sample = text.text[:SEARCHED_CHARACTERS]
    found = [match for match in _COMPATIBILITY.findall(sample) if unicodedata.normalize("NFKC", match).isalpha()]
    # One of them may be meant: an honorific in Arabic, a single letter.
    if len(found) >= 2 and not _COMPATIBILITY.search(other.text):
        return f"letters in compatibility forms: {' '.join(dict.fromkeys(found[:6]))}"
    wide = _WIDE_SIGN.findall(sample)
    is_prose = sum(map(len, text.words)) >= _PROSE_LETTERS
    if len(wide) >= 2 and is_prose and not _EAST_ASIAN.search(sample) and not _WIDE_SIGN.search(other.text):
        return f"full-width signs: {' '.join(dict.fromkeys(wide[:6]))}"
    mixed = _MIXED_WORD.findall(sample)
    return f"words of two alphabets: {' '.join(mixed[:4])}" if len(mixed) >= 2 and not text.is_code() else ""
