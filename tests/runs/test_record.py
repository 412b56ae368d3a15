from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_training import make_pairs

from pivotune.config.settings import DataConfig
from pivotune.errors import UsageError
from pivotune.runs.record import ROWS_FILE, changed_data_file, check_rows_record, has_rows_record, write_rows_record

TORN = ["", "{", "[]", "{}", json.dumps({"rows": 3, "sha256": None}), "[" * 100_000]


def test_rows_are_held_to_the_record(tmp_path):
    rows = make_pairs(5)
    assert not has_rows_record(tmp_path)
    check_rows_record(tmp_path, rows, "rows.jsonl")
    write_rows_record(tmp_path, rows, DataConfig(train="rows.jsonl"))
    assert has_rows_record(tmp_path)
    check_rows_record(tmp_path, rows, "rows.jsonl")
    with pytest.raises(UsageError, match=r"rows\.jsonl is not what the run .* \(4 training rows now, 5 then"):
        check_rows_record(tmp_path, rows[:4], "rows.jsonl")


def test_a_data_file_that_has_changed_is_named(tmp_path):
    train, heldout = tmp_path / "rows.jsonl", tmp_path / "heldout.jsonl"
    train.write_text("1")
    heldout.write_text("2")
    data = DataConfig(train=str(train), validation=str(heldout), english="owner/on-the-hub")
    assert changed_data_file(tmp_path, data) is None  # of an earlier version
    write_rows_record(tmp_path, make_pairs(2), data)
    assert changed_data_file(tmp_path, data) is None
    heldout.write_text("3")
    assert changed_data_file(tmp_path, data) == ("validation", data.validation)
    heldout.unlink()
    assert changed_data_file(tmp_path, data) == ("validation", data.validation)


def test_a_changed_file_among_several_is_named(tmp_path):
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "en.jsonl")]
    for path in paths:
        path.write_text(path.name)
    a, b, english = map(str, paths)
    data = DataConfig(train=[a, {"path": b, "english": english, "weight": 2}, "owner/on-the-hub"])
    write_rows_record(tmp_path, make_pairs(2), data)
    assert changed_data_file(tmp_path, data) is None
    for path, key in ((english, "train.1.english"), (b, "train.1.path")):
        Path(path).write_text("other")
        assert changed_data_file(tmp_path, data) == (key, path)


@pytest.mark.parametrize("text", TORN)
def test_a_torn_record_is_written_anew_as_long_as_nothing_was_trained(tmp_path, caplog, text):
    (tmp_path / ROWS_FILE).write_text(text)
    check_rows_record(tmp_path, make_pairs(5), "rows.jsonl")
    assert "cannot be read and is written anew" in caplog.text
    assert not has_rows_record(tmp_path)


@pytest.mark.parametrize("text", TORN)
def test_a_torn_record_beside_a_checkpoint_is_refused(tmp_path, text):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / ROWS_FILE).write_text(text)
    with pytest.raises(UsageError, match=r"rows\.json cannot be read, so the rows cannot be compared .* remove it if"):
        check_rows_record(tmp_path, make_pairs(5), "rows.jsonl")
    (tmp_path / ROWS_FILE).unlink()
    check_rows_record(tmp_path, make_pairs(5), "rows.jsonl")
