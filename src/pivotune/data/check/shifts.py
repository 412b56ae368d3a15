"""Neighbouring rows: stretches whose English side has slipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from pivotune.data.check.result import Shift
from pivotune.data.check.traces import RATIO_CHARACTERS, TraceTable

# An English side that has slipped further than this is found as misaligned rows only.
SHIFTS = (-2, -1, 0, 1, 2)
# Evidence in nats to believe that a shift begins or ends at a row: one in a million for each row of a long file.
SHIFT_SWITCH = 14.0
# One row says at most this much, so that a few odd rows cannot prove a shift.
SHIFT_ROW_LIMIT = 3.0
# Rows looked at together; some hundred bytes each are needed meanwhile.
SHIFT_ROWS = 100_000


def find_shifts(traces: TraceTable) -> list[Shift]:
    """Stretches of rows whose English stands some rows away, by lengths and by numbers, links and code that agree.

    For each row and shift: how much likelier these lengths and numbers are for a pair than for strangers. The most likely
    course of shifts through the file is found by dynamic programming (Viterbi), where each change costs `SHIFT_SWITCH`.
    Long files are cut into equal parts of at most `SHIFT_ROWS` rows, and stretches that meet at a cut are one.
    """
    found: list[Shift] = []
    bounds = np.linspace(0, len(traces), math.ceil(len(traces) / SHIFT_ROWS) + 1).astype(int).tolist()
    for first, stop in pairwise(bounds):
        for shift in _find_shifts_within(traces, range(first, stop)):
            before = found[-1] if found else None
            if before and (before.by, before.last + 1) == (shift.by, shift.first):
                shift = replace(before, last=shift.last, rows=before.rows + shift.rows)
                found.pop()
            found.append(shift)
    return found


def _find_shifts_within(traces: TraceTable, rows: range) -> list[Shift]:
    if len(rows) < 2 * max(SHIFTS) + 2:
        return []
    evidence = np.zeros((len(rows), len(SHIFTS)))
    logarithms = np.log(traces.characters(slice(rows.start, rows.stop)) + RATIO_CHARACTERS)
    for part in range(2):
        evidence += _length_evidence(logarithms[:, 0, part], logarithms[:, 1, part])
    evidence += _anchor_evidence(*traces.anchors(rows))
    return [
        replace(shift, first=shift.first + rows.start, last=shift.last + rows.start)
        for shift in _stretches(_likeliest_course(np.clip(evidence, -SHIFT_ROW_LIMIT, SHIFT_ROW_LIMIT)))
    ]


def _length_evidence(target: np.ndarray, english: np.ndarray) -> np.ndarray:
    """Log-likelihood ratio of pairs against strangers (Laplace distributions of the log ratio), shape (rows, shifts)."""
    usual = np.median(target) - np.median(english)
    distances = np.stack([np.abs(target - np.roll(english, -by) - usual) for by in SHIFTS], axis=1)
    strangers = np.abs(target - np.roll(english, len(english) // 2) - usual)
    # The closest quarter belongs to true pairs even where most of the file has slipped.
    scale = max(float(np.quantile(distances, 0.25, axis=0).min()) / math.log(4 / 3), 0.02)
    scale_strangers = max(float(np.median(strangers)) / math.log(2), scale)
    return distances / scale_strangers - distances / scale + math.log(scale_strangers / scale)


def _anchor_evidence(target: Sequence[frozenset], english: Sequence[frozenset]) -> np.ndarray:
    """Log-likelihood ratio from having a number, link or code span in common, where both sides have any."""
    count = len(target)
    shared = np.stack([_shared(target, english, by) for by in (*SHIFTS, count // 2)], axis=1)
    known = shared >= 0
    rates = ((shared == 1).sum(axis=0) + 1) / (known.sum(axis=0) + 2)
    pair, stranger = float(rates[:-1].max()), float(rates[-1])
    agree, differ = math.log(pair / stranger), math.log((1 - pair) / (1 - stranger))
    evidence = np.where(shared == 1, agree, differ) * known
    return evidence[:, :-1] if agree > 0 else np.zeros((count, len(SHIFTS)))


def _shared(target: Sequence[frozenset], english: Sequence[frozenset], by: int) -> np.ndarray:
    """For each row: 1 if it has an anchor in common with the English `by` rows further, 0 if not, -1 if it has none."""
    count = len(target)
    others = (english[(index + by) % count] for index in range(count))
    return np.array(
        [
            -1 if not (one and other) else int(not one.isdisjoint(other))
            for one, other in zip(target, others, strict=True)
        ]
    )


def _likeliest_course(evidence: np.ndarray) -> np.ndarray:
    """For each row the shift on the most likely path; a path starts unshifted."""
    total = np.full(len(SHIFTS), -SHIFT_SWITCH)
    total[SHIFTS.index(0)] = 0.0
    came_from = np.zeros(evidence.shape, dtype=np.int8)
    for index, gain in enumerate(evidence):
        best = int(total.argmax())
        # On a tie the later switch: the row before a slip fits both courses.
        switch = total[best] - SHIFT_SWITCH >= total - 1e-9
        came_from[index] = np.where(switch, best, np.arange(len(SHIFTS)))
        total = np.where(switch, total[best] - SHIFT_SWITCH, total) + gain
    state = int(total.argmax())
    course = np.zeros(len(evidence), dtype=int)
    for index in range(len(evidence) - 1, -1, -1):
        course[index] = SHIFTS[state]
        state = int(came_from[index, state])
    return course


def _stretches(course: np.ndarray) -> list[Shift]:
    borders = [0, *(np.flatnonzero(np.diff(course)) + 1).tolist(), len(course)]
    return [
        Shift(first, stop - 1, int(course[first]), stop - first) for first, stop in pairwise(borders) if course[first]
    ]
