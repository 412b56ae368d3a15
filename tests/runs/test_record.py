from __future__ import annotations

import json

import pytest
from tiny_training import make_pairs

from pivotune.errors import UsageError
from pivotune.runs.record import ROWS_FILE, check_rows_record, has_rows_record, write_rows_record

TORN = ["", "{", "[]", "{}", json.dumps({"rows": 3, "sha256": None}), "[" * 100_000]


def test_rows_are_held_to_the_record(tmp_path):
    rows = make_pairs(5)
    assert not has_rows_record(tmp_path)
    check_rows_record(tmp_path, rows, "rows.jsonl")
    write_rows_record(tmp_path, rows)
    assert has_rows_record(tmp_path)
    check_rows_record(tmp_path, rows, "rows.jsonl")
    with pytest.raises(UsageError, match=r"rows\.jsonl is not what the run .* \(4 training rows now, 5 then"):
        check_rows_record(tmp_path, rows[:4], "rows.jsonl")


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
