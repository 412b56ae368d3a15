"""Every file type gives the same records; a broken file gives one line with its place."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pivotune.data.formats import read_file
from pivotune.data.sources import load_rows
from pivotune.errors import UsageError

RECORDS = [
    {"id": "am-1", "prompt": "ኢትዮጵያ የት ነው?", "completion": "ምስራቅ አፍሪካ፣\n“ቀንድ” ውስጥ።"},
    {"id": "sw-2", "prompt": "Jua ni nini?", "completion": 'Nyota, "kubwa"\tna\u2028moto; 🌞'},
]


def read(path: Path) -> list[tuple[int, object]]:
    return list(read_file(path))


def error_of(path: Path, content: bytes | str | None = None) -> str:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{path.parent}/", "")


NAMES = [f"rows.{kind}{end}" for kind in ("jsonl", "ndjson", "json", "csv", "tsv", "parquet") for end in ("", ".gz")]


@pytest.mark.parametrize("name", [*NAMES, "ROWS.V2.JSONL.GZ"])
def test_every_type_gives_the_same_records(tmp_path, write_file, name):
    path = write_file(tmp_path / name.lower(), RECORDS)
    path = path.rename(tmp_path / name)
    assert read(path) == [(1, RECORDS[0]), (2, RECORDS[1])]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv"])
def test_byte_order_mark_is_accepted(tmp_path, write_file, name):
    path = write_file(tmp_path / name, RECORDS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path) == [(1, RECORDS[0]), (2, RECORDS[1])]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_windows_line_ends_are_accepted(tmp_path, write_file, name):
    path = write_file(tmp_path / name, RECORDS[1:])
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert read(path) == [(1, RECORDS[1])]


def test_gzip_is_known_by_its_content(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n'))
    assert read(path) == [(1, {"prompt": "a"})]


def test_blank_lines_are_counted_but_not_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"prompt": "a"}\n \n{"prompt": "b"}')
    assert read(path) == [(2, {"prompt": "a"}), (4, {"prompt": "b"})]


def test_json_may_hold_the_rows_under_data(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, "data": RECORDS}))
    assert read(path) == [(1, RECORDS[0]), (2, RECORDS[1])]


def test_json_may_hold_one_object_a_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert read(path) == [(1, {"prompt": "a"}), (2, {"prompt": "b"})]


def test_short_csv_rows_lack_the_rest_and_blank_rows_are_passed_over(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt, completion\na\n\nb,c,\n")
    assert read(path) == [(1, {"prompt": "a", "completion": None}), (2, {"prompt": "b", "completion": "c"})]


def test_long_csv_cells_are_read_and_the_limit_is_put_back(tmp_path, write_file):
    limit = csv.field_size_limit()
    assert limit < 200_000
    path = write_file(tmp_path / "rows.csv", [{"prompt": "a" * 200_000}])
    assert read(path) == [(1, {"prompt": "a" * 200_000})]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", "", "a.jsonl: the file is empty"),
    ("a.parquet", "", "a.parquet: the file is empty"),
    ("a.jsonl", '{"prompt": "a"}\n\n{"prompt" "b"}\n',
     "a.jsonl, line 3, column 11: broken JSON: Expecting ':' delimiter"),
    ("a.jsonl", '{"n": 1}\n{"prompt": "b"', "a.jsonl, line 2, column 15: broken JSON: Expecting ',' delimiter"),
    ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe1"}\n',
     "a.jsonl, line 2: not UTF-8 (byte 0xe1); save the file as UTF-8"),
    ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"),
     "a.jsonl, line 1: not UTF-8 (this looks like UTF-16); save the file as UTF-8"),
    ("a.jsonl", '{"n": ' + "9" * 5000 + "}", "a.jsonl, line 1: unreadable JSON: Exceeds the limit (4300 digits)"),
    ("a.jsonl", '{"n": ' + "[" * 200_000, "a.jsonl, line 1: unreadable JSON: "),
    ("a.json", '[{"prompt": "a"},\n {"prompt" "b"}]',
     "a.json, line 2, column 12: broken JSON: Expecting ':' delimiter"),
    ("a.json", b'[{"prompt": "a"},\n\n {"prompt": "\xff"}]',
     "a.json, line 3: not UTF-8 (byte 0xff); save the file as UTF-8"),
    ("a.json", '{"prompt": "a"}\n{"prompt" "b"}', "a.json, line 2, column 11: broken JSON: Expecting ':' delimiter"),
    ("a.json", '{"rows": []}', 'a.json: holds no list of rows; allowed: [{...}, ...] or {"data": [{...}, ...]}'),
    ("a.json", '"text"', 'a.json: holds no list of rows; allowed: [{...}, ...] or {"data": [{...}, ...]}'),
    ("a.csv", "prompt,completion\na,b\nc,d,e\n", "a.csv, line 3: 3 cells, but the header names 2 columns"),
    ("a.csv", "prompt,completion,prompt\na,b,c\n",
     "a.csv, line 1: the header names the column 'prompt' more than once"),
    ("a.csv", 'prompt,completion\na,b\nc,"d\ne,f\n', "a.csv, line 3: broken CSV: a quote is left open"),
        ("a.csv", 'prompt,completion\na,"b\nb"\n\nc,"d\nd",e\n', "a.csv, line 5: 3 cells, but the header names 2 columns"),
    ("a.csv", b"prompt,completion\na,b\nc,\xe1\n", "a.csv, line 3: not UTF-8 (byte 0xe1); save the file as UTF-8"),
    # Without a time of writing, which would give the test another name in every process.
    ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 9, mtime=0)[:-9],
     "a.jsonl.gz: cannot be read: Compressed file ended"),
    ("a.jsonl.gz", b"\x1f\x8bnot gzip at all", "a.jsonl.gz: cannot be read: "),
    ("a.csv", "prompt;completion\na;b\n",
     "a.csv, line 1: the header has one column: the cells are separated by ';'; write commas or tabs"),
    ("a.csv", "prompt\tcompletion\na\tb\n",
     "a.csv, line 1: the header has one column: the cells are separated by tabs; name the file .tsv"),
    ("a.jsonl", '\n[{"prompt": "a"},\n {"prompt": "b"}]\n',
     "a.jsonl: holds a JSON list, not one object a line; name it .json"),
    ("a.jsonl", '[\n {"prompt": "a"}\n]\n', "a.jsonl: holds a JSON list, not one object a line; name it .json"),
    ("a.jsonl", '[{"prompt": "a"}]\n', "a.jsonl: holds a JSON list, not one object a line; name it .json"),
    ("a.jsonl", '{"prompt": "a"}\n'.encode("utf-16-le"),
     "a.jsonl: not UTF-8 (this looks like UTF-16); save the file as UTF-8"),
    ("a.parquet", "PAR1 not really", "a.parquet: not a readable Parquet file: "),
    ("a.xlsx", "x",
     "a.xlsx: unknown file type; allowed: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, each also with .gz"),
])  # fmt: skip
def test_broken_files(tmp_path, name, content, message):
    found = error_of(tmp_path / name, content)
    # Python and pyarrow word the end of some messages in their own way, release by release.
    assert found == message or (message.endswith((": ", "digits)", "ended")) and found.startswith(message))


@pytest.mark.parametrize("bad", ["[[[", '[{"prompt": "a"}]', "[1]"])
def test_a_first_line_that_begins_a_list_spoils_no_other(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{bad}\n{{"prompt": "a", "completion": "b", "prompt_en": "c", "completion_en": "d"}}\n')
    assert [row.prompt for row in load_rows(str(path), on_bad_row="skip")] == ["a"]


def test_parquet_with_broken_text(tmp_path):
    broken = pyarrow.array([b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": broken}), tmp_path / "a.parquet")
    assert error_of(tmp_path / "a.parquet").startswith("a.parquet: not a readable Parquet file: 'utf-8' codec")


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "pairs_vi.jsonl").touch()
    (tmp_path / "other.csv").touch()
    assert error_of(tmp_path / "pairs_v.jsonl") == "pairs_v.jsonl: no such file; did you mean pairs_vi.jsonl?"
    assert error_of(tmp_path / "zzz.parquet") == "zzz.parquet: no such file"


def test_missing_folder_is_named(tmp_path):
    path = tmp_path / "no" / "a.jsonl"
    with pytest.raises(UsageError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: no such file, and no folder {path.parent}"


def test_folder_names_a_file_in_it(tmp_path):
    folder = tmp_path / "rows.jsonl"
    folder.mkdir()
    assert error_of(folder) == "rows.jsonl: is a folder; give a data file; it holds none"
    (folder / "b.csv").touch()
    (folder / "README.md").touch()
    assert error_of(folder) == "rows.jsonl: is a folder; give one of its data files, such as b.csv"


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv", "rows.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, write_file, name):
    path = write_file(tmp_path / name, [{"prompt": f"{n} " + "a" * 1000} for n in range(20_000)])
    list(zip(range(3), read_file(path), strict=False))  # imports done
    tracemalloc.start()
    count = sum(1 for _ in read_file(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 6e6  # the file holds 20 MB of text


def test_quote_left_open_in_a_large_file_names_its_line(tmp_path, monkeypatch):
    """Before the rest of the file is in memory, 4 bytes a character."""
    monkeypatch.setattr("pivotune.data.formats._LONGEST_CELL", 1000)
    rows = ["prompt,completion", *["a,b"] * 3, 'a,"b', *["a,b"] * 2000]
    assert error_of(tmp_path / "a.csv", "\n".join(rows)) == (
        "a.csv, line 5: broken CSV: a cell has more than 1,000 characters; is a quote left open?"
    )
