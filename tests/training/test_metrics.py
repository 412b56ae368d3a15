from __future__ import annotations

import json
import time

import pytest
import torch
from tiny_batches import make_batch

from pivotune.objectives.base import LossTerm
from pivotune.training.metrics import LogWindow, token_counts


def term(total: float, count: int) -> LossTerm:
    return LossTerm(torch.tensor(total, requires_grad=True), torch.tensor(count))


def window() -> LogWindow:
    return LogWindow(("tft", "thinking"), torch.device("cpu"))


def means(log: LogWindow) -> dict[str, float]:
    return {name: value for name, value in log.metrics(lambda values: values).items() if name.endswith("_loss")}


def test_a_step_that_is_taken_back_leaves_no_trace():
    log = window()
    log.add({"tft": term(6.0, 2)}, make_batch(2))
    log.mark()
    log.add({"tft": term(float("nan"), 2)}, make_batch(2))
    log.rollback()
    assert means(log) == {"tft_loss": 3.0}


def test_a_window_goes_on_from_a_checkpoint():
    """Through JSON, exactly; what it counts is on one rank alone."""
    whole, first = window(), window()
    for log in (whole, first):
        log.start()
        log.add({"tft": term(0.1, 3), "thinking": term(1 / 3, 7)}, make_batch(2))
    state = json.loads(json.dumps(first.state(lambda values: values)))
    second, other = window(), window()
    second.restore(state)
    other.restore(state, counts=False)
    for log in (whole, second):
        log.add({"tft": term(0.7, 1)}, make_batch(3))
    assert means(second) == means(whole)
    assert second._counts.tolist() == whole._counts.tolist()
    assert other._sums.tolist() == [0.0, 0.0]
    assert not other.empty
    # The time before the checkpoint counts, the time between the processes does not.
    second.restore({**state, "seconds": 100.0})
    second.start()
    assert second.metrics(lambda values: values)["target_tokens_per_second"] < 1


def test_means_are_over_items_not_over_batches():
    log = window()
    assert log.empty
    log.add({"tft": term(6.0, 2), "thinking": term(1.0, 1)}, make_batch(2))
    log.add({"tft": term(3.0, 4)}, make_batch(2))
    assert not log.empty
    assert means(log) == {"tft_loss": 1.5, "thinking_loss": 1.0}
    log.clear()
    assert log.empty
    log.add({"tft": term(2.0, 1)}, make_batch(2))
    assert means(log) == {"tft_loss": 2.0}


def test_tokens_of_both_sides_and_padding():
    """Rows of 12 and 8 tokens, with English sides of 12 and 8: 4 places of padding on each side."""
    assert [int(count) for count in token_counts(make_batch(2))] == [20, 20, 8]
    assert [int(count) for count in token_counts(make_batch(2, parallel=False))] == [20, 0, 4]


def test_speed_is_that_of_all_ranks(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    log = window()
    now = 110.0
    log.start()
    log.add({"tft": term(6.0, 2)}, make_batch(2))
    now = 111.0
    log.start()  # only the first step starts the clock
    log.add({"tft": term(6.0, 2)}, make_batch(2))
    now = 117.0
    log.pause(3.0)
    one = log.metrics(lambda values: values)
    two = log.metrics(lambda values: 2 * values)
    counts = {"trained_rows": 4, "trained_tokens": 40, "trained_answer_tokens": 4, "trained_english_tokens": 40}
    assert one == {"tft_loss": 3.0, "target_tokens_per_second": 10.0, "english_tokens_per_second": 10.0,
                   "padding_tokens_per_second": 4.0, "padding_share": pytest.approx(1 / 6), **counts}  # fmt: skip
    summed = ("second", "trained")
    assert two == {name: value * (2 if any(word in name for word in summed) else 1) for name, value in one.items()}
