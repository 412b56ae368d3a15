"""Memory by the number of rows: what is kept of a row is some tens of bytes, whatever its texts."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pivotune.config.registry import METHODS
from pivotune.data.check import check_rows
from pivotune.data.datasets import main_lengths, split_validation, training_examples
from pivotune.data.examples import Pair, Side
from pivotune.data.pair_store import store_pairs
from pivotune.data.sources import load_rows

TEXT = " neno" * 60  # 300 characters, four times a row


def write_rows(path: Path, count: int, text: str = TEXT) -> Path:
    rows = (
        {"prompt": f"{number}{text}?", "completion": text, "prompt_en": f"{number}{text}?", "completion_en": text}
        for number in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_list(path: Path, form: str) -> Path:
    """The same rows as a JSON list, in one line."""
    path.with_suffix(".json").write_text(form % ",".join(path.read_text().splitlines()))
    return path.with_suffix(".json")


def growth_per_row(work: Callable[[int], object], few: int, many: int) -> float:
    """Bytes by which the peak grows for each further row; what `work` gives back is alive at the peak."""
    work(few)  # imports, and fills caches
    peaks = []
    for count in (few, many):
        tracemalloc.start()
        kept = work(count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        del kept
    return (peaks[1] - peaks[0]) / (many - few)


@pytest.fixture(autouse=True)
def nothing_in_memory(monkeypatch):
    """Small files are kept in memory; here they stand for large ones."""
    monkeypatch.setattr("pivotune.data.lazy._BYTES_IN_MEMORY", 2**16)


def load_and_split(path: Path) -> object:
    rows = load_rows(path)
    train, held = split_validation(rows, 0.05, 0)
    assert sum(len(row.completion) for row in train) == len(TEXT) * (len(rows) - len(held))
    return rows, train, held


@pytest.mark.parametrize("form", ["lines", "[%s]", '{"data": [%s]}', '{"version": 1, "data": [%s], "more": 2}'])
def test_reading_and_splitting(tmp_path, form, monkeypatch):
    monkeypatch.setattr("pivotune.data.text_files._BYTES_PER_READ", 2**12)
    monkeypatch.setattr("pivotune.data.text_files._LONGEST_FIRST_LINE", 2**14)
    files = {count: write_rows(tmp_path / f"{count}.jsonl", count) for count in (100, 1000)}
    if form != "lines":
        files = {count: as_list(path, form) for count, path in files.items()}
    growth = growth_per_row(lambda count: load_and_split(files[count]), 100, 1000)
    assert growth < 100, growth


def pairs(count: int) -> Iterator[Pair]:
    for number in range(1, count + 1):
        yield Pair(*(Side(np.zeros(200, dtype=np.int32), (1, 2), 3, 4) for _ in range(2)), number)


def test_encoded_rows():
    def work(count: int) -> object:
        store = store_pairs(pairs(count))
        examples = training_examples(store, METHODS["deep-supervision"], english_ratio=0.25)
        assert main_lengths(examples).sum() == 200 * count
        assert sum(example.number for example in examples) == count * (count + 1) // 2
        return store, examples

    # 1600 bytes of tokens a row stay on disk. Drawing the replay rows takes more than what is kept.
    growth = growth_per_row(work, 1000, 4000)
    assert growth < 150, growth


def test_checking(tmp_path, monkeypatch):
    monkeypatch.setattr("pivotune.data.check.lexicon.LEXICON_COMPARED", 100)
    monkeypatch.setattr("pivotune.data.check.shifts.SHIFT_ROWS", 100)
    monkeypatch.setattr("pivotune.data.check.run._ROWS_PER_STEP", 32)
    # Too short for the language detector, which takes most of the time.
    files = {count: write_rows(tmp_path / f"{count}.jsonl", count, " neno") for count in (200, 800)}
    rows = {count: load_rows(path) for count, path in files.items()}
    growth = growth_per_row(lambda count: check_rows(rows[count], language="sw", examples=1), 200, 800)
    assert growth < 400, growth
