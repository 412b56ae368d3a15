"""Who runs when, and how memory is counted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import measuring
from benchmarks.measuring import measure, memory_method, peak_memory, ratio
from pivotune.errors import UsageError

MIB = 2**20
needs_linux = pytest.mark.skipif(not measuring._CLEAR_REFS.exists(), reason="resident memory is measured on Linux only")


@pytest.fixture
def _no_garbage(monkeypatch):
    """Collecting what a whole test run has made takes longer than what is tested here."""
    monkeypatch.setattr(measuring.gc, "collect", lambda: 0)


@pytest.mark.usefixtures("_no_garbage")
def test_contenders_run_in_turn_in_alternating_order_and_warm_up_first():
    calls: list[str] = []
    seconds = measure({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warmup=2)
    assert "".join(calls) == "abc" + "cba" + "abc" + "cba" + "abc"
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.mark.usefixtures("_no_garbage")
def test_seconds_are_those_of_the_contender(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])

    def advance(by):
        clock[0] += by

    seconds = measure({"slow": lambda: advance(3.0), "fast": lambda: advance(1.5)}, rounds=2)
    assert seconds == {"slow": [3.0, 3.0], "fast": [1.5, 1.5]}
    assert ratio(seconds["slow"], seconds["fast"]) == (2.0, (2.0, 2.0))


def test_rounds_of_both_sides_must_match():
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0, 2.0], [1.0])


@needs_linux
def test_peak_counts_what_was_freed_again_and_not_what_was_there_before():
    """In a process of its own: freed memory that a heap keeps may be used again, or other memory be taken."""
    script = """if True:
        import torch
        from benchmarks.measuring import peak_memory

        before = torch.ones(48 * 2**20 // 4)

        def two_after_the_other():
            for _ in range(2):
                first = torch.ones(40 * 2**20 // 4)
                second = first * 2
                del first, second

        print(peak_memory(two_after_the_other), peak_memory(lambda: before.sum()))
    """
    root = Path(measuring.__file__).resolve().parents[1]
    printed = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    both, none = map(int, printed.split())
    assert both == pytest.approx(80 * MIB, abs=16 * MIB)
    assert none < 16 * MIB


def test_memory_of_a_cpu_elsewhere_than_on_linux_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(measuring, "_CLEAR_REFS", tmp_path / "none")
    with pytest.raises(UsageError, match="on Linux only"):
        peak_memory(lambda: None)


@pytest.mark.parametrize(("device", "word"), [("cpu", "VmHWM"), ("cuda", "max_memory_allocated")])
def test_method_is_named(device, word):
    assert word in memory_method(device)
