"""Answers that end before their English does: ends, lengths, lines, list items and brackets, weighed against each other.

Each sign is a log-likelihood ratio of "cut" against "whole". How often whole answers show it is counted in the file
itself, so that a script without full stops or a loose translation needs stronger signs.
"""

from __future__ import annotations

import math
import re
from array import array

import numpy as np

# Characters of an answer below which an end or a length proves nothing.
CUT_CHARACTERS = 20
# Fewer rows do not show how whole answers look.
CUT_ROWS = 20
# Nats needed: 100 to 1, for cut answers are one in some tens or hundreds.
CUT_EVIDENCE = 4.6
# Rows of similar length whose usual ratio is compared.
CUT_LEAST_ROWS, CUT_MOST_ROWS = 40, 500
# A cut leaves any share of the answer up to this one; a part in `CUT_LATE` is cut later.
CUT_KEPT, CUT_LATE = 0.95, 0.05
# Signs, and how often a cut answer shows them.
CUT_SIGNS = {
    "no end": 0.7, "fewer lines or items": 0.8, "fewer sentences": 0.8, "open bracket, list item or comma": 0.3,
}  # fmt: skip
# A sign that no whole answer of the file shows is counted as this often among whole ones: it decides nothing alone.
WHOLE_RATE = 0.003
# Spread of the log length ratio of loose translations.
TAIL_SCALE = 0.35
# Added to both lengths.
_FEW = 5
_TERMINATORS = ".!?…。！？．｡؟۔؛।॥។៕។៖။၏፧።᙮᠃᠉꘎꓿՜։:：;；~～|$>%°"  # also signs that end tables, formulas and code
_CLOSERS = "\"'”’»›「」『』】）)]}》*_`\u200b\u200e\u200f \n\t"
_ABBREVIATION = re.compile(r"\b(?:etc|Jr|Sr|Inc|Ltd|Co|Corp|[A-Z]|[ap]\.m)\.\W*$")
# A list marker without its item, or a number that was cut at its point.
_OPEN_ITEM = re.compile(r"(?:^|\s)\d{1,3}[.)、．]\Z|^\s*[A-Za-z][.)]\Z", re.MULTILINE)
_JOINING = tuple(",，、،؍-–—/(（[「『“‘«&+=:：")
_BRACKETS = (("(（", ")）"), ("[［", "]］"), ("“「『《", "”」』》"))
_SENTENCE_END = re.compile(r"(?<![.\d])[.!?…؟۔।॥។။።]+(?=\W*\s)|[。！？．｡]+")
_EAST_ASIAN = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")
_LINE = re.compile(r"\S[^\n]*")
_ITEM = re.compile("[,，、،;；؛]")
# An English answer with so many lines or items is a list.
_LEAST_LINES, _LEAST_ITEMS = 3, 4


class CutTable:
    """The signs and lengths of all rows, 12 bytes a row.

    A sign is 1, or 0 for an answer like its English, -1 if the row gives no measure.
    """

    def __init__(self) -> None:
        self._signs = {name: array("b") for name in CUT_SIGNS}
        # Lengths of each row's answer and of its English.
        self._lengths = array("i")

    def append(self, answer: str, english: str) -> None:
        """Add the answers of the next row."""
        is_measure = _is_closed(english) and not _ABBREVIATION.search(english[-20:])
        sentences = _sentences(english)
        values = (
            int(not _is_closed(answer)) if is_measure else -1,
            _fewer_parts(answer, english),
            int(_sentences(answer) < sentences) if is_measure and sentences >= 2 else -1,
            int(_is_dangling(answer) and not _is_dangling(english)),
        )
        for sign, value in zip(self._signs.values(), values, strict=True):
            sign.append(value)
        self._lengths.extend((_length(answer), _length(english)))

    def cut_answers(self, left_out: np.ndarray) -> dict[int, str]:
        """Return the rows whose answers are cut -> the signs; rows in `left_out`, bool (rows,), are damaged otherwise."""
        lengths = np.frombuffer(self._lengths, dtype=np.int32).reshape(-1, 2)
        judged = np.flatnonzero(~left_out & (lengths[:, 1] >= CUT_CHARACTERS))
        if len(judged) < CUT_ROWS:
            return {}
        target, english = np.log(lengths[judged] + _FEW).T
        distance, length = _length_evidence(target - english, english)
        # Count rows of the usual length as whole: the rates then do not depend on the share of cut rows.
        usual = distance > -0.1
        evidence = length
        signs = {}
        for name, rate in CUT_SIGNS.items():
            sign = np.frombuffer(self._signs[name], dtype=np.int8)[judged]
            whole = ((sign[usual] == 1).sum() + 1) / ((sign[usual] >= 0).sum() + CUT_ROWS)
            whole = min(max(whole, WHOLE_RATE), 0.9)
            rate = max(rate, whole)
            gain = np.where(sign == 1, math.log(rate / whole), math.log((1 - rate) / (1 - whole)))
            evidence = evidence + np.where(sign >= 0, gain, 0.0)
            signs[name] = sign == 1
        found = {}
        # A longer answer than usual has another fault.
        for place in np.flatnonzero((evidence >= CUT_EVIDENCE) & (distance < 0.1)).tolist():
            reasons = [name for name, sign in signs.items() if sign[place]]
            share = f"{math.exp(distance[place]):.0%} of the usual length"
            found[int(judged[place])] = ", ".join([*reasons, share])
        return found


def _length_evidence(ratio: np.ndarray, english: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance of each log length ratio from that of rows of similar length, and its evidence for a cut."""
    distance, scale = np.zeros((2, len(ratio)))
    size = min(max(len(ratio) // 8, CUT_LEAST_ROWS), CUT_MOST_ROWS)
    for part in np.array_split(np.argsort(english, kind="stable"), max(1, len(ratio) // size)):
        distance[part] = ratio[part] - np.median(ratio[part])
        # Cuts widen the lower half only.
        above = distance[part][distance[part] >= 0]
        # 1.4826 makes the median absolute deviation the standard deviation of a normal distribution.
        scale[part] = max(1.4826 * float(np.median(above)), 0.06)
    # Loose translations are too long as often as they are too short: that gives the weight of the wide tail.
    tail = max(2 * float((distance > np.maximum(4 * scale, 0.4)).mean()), 0.01)
    core = np.exp(-0.5 * (distance / scale) ** 2) / (math.sqrt(2 * math.pi) * scale)
    whole = (1 - tail) * core + tail * np.exp(-np.abs(distance) / TAIL_SCALE) / (2 * TAIL_SCALE)
    late = CUT_LATE * np.exp(-np.maximum(distance, 0) / scale)
    kept = np.where(distance < math.log(CUT_KEPT), np.exp(distance) / CUT_KEPT, late)
    return distance, np.log(kept / whole)


def _length(text: str) -> int:
    """Return the length in letters of an alphabet, as which an East Asian character counts three.

    A Chinese answer that keeps English names is then not longer than one that translates them.
    """
    return len(text) + 2 * len(_EAST_ASIAN.findall(text))


def _is_closed(text: str) -> bool:
    end = text.rstrip(_CLOSERS)
    if not end or end[-1] in _TERMINATORS or len(end) < len(text.rstrip()) - 2:
        return bool(end)
    # An emoji or another picture can end a text.
    return "\u2190" <= end[-1] <= "\u2bff" or end[-1] >= "\U0001f000"


def _is_dangling(text: str) -> bool:
    text = text.rstrip()
    return bool(text.endswith(_JOINING) or _OPEN_ITEM.search(text[-8:])) or any(
        sum(map(text.count, opening)) > sum(map(text.count, closing)) for opening, closing in _BRACKETS
    )


def _sentences(text: str) -> int:
    return len(_SENTENCE_END.findall(text.rstrip(_CLOSERS) + " "))


def _fewer_parts(answer: str, english: str) -> int:
    lines = len(_LINE.findall(english))
    if lines >= _LEAST_LINES:
        return int(len(_LINE.findall(answer)) < lines)
    items = len(_ITEM.findall(english))
    # English has one comma more before the last item.
    return (
        int(len(_ITEM.findall(answer)) < 0.8 * items - 1) if items >= _LEAST_ITEMS and not _is_closed(english) else -1
    )
