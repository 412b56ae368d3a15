"""Broken data of every kind: one clear line, or rows that are read or counted as left out. Nothing else, ever."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pivotune.cli.main import main
from pivotune.data.check import check_rows
from pivotune.data.sources import Rows, load_rows
from pivotune.errors import UsageError
from pivotune.text.words import counted

KEYS = ("prompt", "completion", "prompt_en", "completion_en")
GOOD = dict(zip(KEYS, ("Swali ni nini?", "Jibu.", "What is it?", "It."), strict=True))
NAMES = [f"rows.{kind}{end}" for kind in ("jsonl", "json", "csv", "tsv", "parquet") for end in ("", ".gz")]
FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# What a field of a row may hold instead of a text.
TEXTS = st.one_of(
    st.text(max_size=20),
    st.text(st.sampled_from("\x00\x07\x1b\r\n\t\u2028\u202e\ufeff\U0001f1fb\u0301\ud800\udc00\"',;[]{}"), max_size=8),
)
VALUES = st.one_of(
    TEXTS,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=6,
    ),
)
ROLES = st.sampled_from(["user", "assistant", "system", "gpt", "human", "tool", "", None, 3])
MESSAGES = st.lists(st.fixed_dictionaries({}, optional={"role": ROLES, "content": VALUES, "value": TEXTS}), max_size=3)
COLUMNS = (*KEYS, "instruction", "input", "output", "id", "messages", "messages_en", "\x1b[2J", "\ud800")
RECORDS = st.one_of(
    st.just(GOOD),
    st.dictionaries(st.sampled_from(COLUMNS), VALUES | MESSAGES, max_size=6),
    st.builds(lambda key, value: {**GOOD, key: value}, st.sampled_from(COLUMNS), VALUES | MESSAGES),
)
BROKEN_LINES = (
    b"{]",
    b"[" * 20_000,
    b'{"a":' * 20_000,
    b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": {"x": 1, "x": 2}}',
    b'{"n": ' + b"9" * 5000 + b"}",
    b'{"prompt": "caf\xe9"}',
    b"\xff\xfe{\x00}\x00",
    b"\x00",
    b'{"prompt": "a\x00b"}',
    b'{"prompt": "open',
    b"NaN",
    b'"text"',
    b"null",
    b"[]",
    b"\xef\xbb\xbf{}",
    b'{"prompt": "\\ud800"}',
    json.dumps(GOOD).encode() + b"\r",
    json.dumps(GOOD).encode() + b"\r" + json.dumps(GOOD).encode(),
    json.dumps(GOOD).encode("utf-16-le").replace(b"\n", b""),
    json.dumps({**GOOD, "prompt": "neno " * 2_000}).encode(),
)

LINES = st.sampled_from(BROKEN_LINES) | RECORDS.map(lambda record: json.dumps(record).encode())


def assert_clear(error: BaseException, path: Path | None = None) -> None:
    """One printable line of bounded length that names the file."""
    message = str(error)
    assert not CONTROL.search(message)
    assert len(message) <= 4100
    assert path is None or str(path) in message


def read(path: Path, on_bad_row: str) -> Rows | None:
    """The rows of a file, all of them accounted for; None where it is refused in one clear line."""
    try:
        rows = load_rows(path, on_bad_row=on_bad_row)
    except UsageError as error:
        assert_clear(error, path)
        return None
    assert len(rows) + sum(rows.skipped.values()) == rows.total
    assert rows.skipped == {} or on_bad_row == "skip"
    for row in rows:
        assert all(getattr(row, key).strip() for key in KEYS)
        f"{row}".encode()  # no half of a surrogate pair is left anywhere
    return rows


def read_both(path: Path, content: bytes, records: int | None = None) -> None:
    """Read under both policies; with `skip`, all `records` are read or counted, or none can be used."""
    path.write_bytes(gzip.compress(content, compresslevel=1) if path.suffix == ".gz" else content)
    strict, lenient = read(path, "error"), read(path, "skip")
    if strict is not None:
        assert lenient is not None
        assert list(strict) == list(lenient)
    if lenient is not None and records is not None:
        assert lenient.total == records
    # Lines are read one by one: whatever the others hold, one that is good is kept.
    if ".jsonl" in path.name and json.dumps(GOOD).encode() in content.split(b"\n"):
        assert lenient is not None


def valid_file(name: str, records: list[dict[str, str]]) -> bytes:
    """Records in the type that the name asks for, without the gzip."""
    kind = name.removesuffix(".gz").rsplit(".", 1)[-1]
    if kind == "parquet":
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink)
        return sink.getvalue()
    if kind in ("csv", "tsv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, KEYS, delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue().encode()
    lines = [json.dumps(record) for record in records]
    return (f"[{', '.join(lines)}]" if kind == "json" else "\n".join(lines)).encode()


@FUZZ
@given(name=st.sampled_from(NAMES), content=st.binary(max_size=200))
def test_any_bytes(tmp_path, name, content):
    read_both(tmp_path / name, content)


@FUZZ
@given(
    name=st.sampled_from(NAMES),
    place=st.floats(0, 1),
    length=st.integers(0, 40),
    inserted=st.binary(max_size=12) | st.sampled_from([b'"', b"\n", b"\r", b",", b"\t", b"\xff", b"\x00", b"{", b"\\"]),
)
def test_files_with_a_part_replaced(tmp_path, name, place, length, inserted):
    content = valid_file(name, [{**GOOD, "prompt": f"Swali {n}?"} for n in range(6)])
    start = int(place * len(content))
    read_both(tmp_path / name, content[:start] + inserted + content[start + length :])


@FUZZ
@given(name=st.sampled_from(NAMES), size=st.floats(0, 1))
def test_cut_files(tmp_path, name, size):
    path = tmp_path / name
    whole = valid_file(name, [GOOD] * 20)
    content = gzip.compress(whole) if path.suffix == ".gz" else whole
    path.write_bytes(content[: int(size * len(content))])
    for on_bad_row in ("error", "skip"):
        read(path, on_bad_row)


@FUZZ
@given(encoding=st.sampled_from(["utf-16", "utf-16-le", "utf-16-be", "latin-1", "cp1258", "utf-8-sig", "utf-32"]),
       name=st.sampled_from([name for name in NAMES if "parquet" not in name]))  # fmt: skip
def test_other_encodings(tmp_path, encoding, name):
    texts = valid_file(name, [{**GOOD, "prompt": "Où est l\u2019été ?".replace("\u2019", "'")}] * 3).decode()
    read_both(tmp_path / name, texts.replace("\\u00f9", "ù").encode(encoding, errors="replace"))


@FUZZ
@given(lines=st.lists(LINES, min_size=1, max_size=6),
       end=st.sampled_from([b"\n", b"\r\n", b"\n\n"]), name=st.sampled_from(["rows.jsonl", "rows.jsonl.gz"]))  # fmt: skip
def test_every_line_is_read_or_counted(tmp_path, lines, end, name):
    read_both(tmp_path / name, end.join(lines) + end, len(lines))


@FUZZ
@given(records=st.lists(RECORDS | VALUES, min_size=1, max_size=5), wrapped=st.booleans())
def test_every_row_of_a_json_list_is_read_or_counted(tmp_path, records, wrapped):
    read_both(tmp_path / "rows.json", json.dumps({"data": records} if wrapped else records).encode(), len(records))


@FUZZ
@given(records=st.lists(RECORDS | VALUES, min_size=1, max_size=5))
def test_every_python_object_is_read_or_counted(records):
    for on_bad_row in ("error", "skip"):
        try:
            rows = load_rows(records, on_bad_row=on_bad_row)
        except UsageError as error:
            assert_clear(error)
        else:
            assert len(rows) + sum(rows.skipped.values()) == rows.total == len(records)


CELLS = st.text(st.characters(exclude_categories=("Cs",)), max_size=8) | st.sampled_from(
    ["", "a", '"', "\x00", "a\nb", "\r"]
)


@FUZZ
@given(rows=st.lists(st.lists(CELLS, min_size=2, max_size=6), min_size=1, max_size=5), kind=st.sampled_from([",", "\t"]),
       quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))  # fmt: skip
def test_every_row_of_a_table_is_read_or_counted(tmp_path, rows, kind, quoting):
    text = io.StringIO()
    csv.writer(text, delimiter=kind, quoting=quoting).writerows([KEYS, *rows])
    read_both(tmp_path / ("rows.csv" if kind == "," else "rows.tsv"), text.getvalue().encode(), len(rows))


COLUMN_VALUES = st.sampled_from(
    [["a", None, "\x1b"], [1, 2, None], [1.5, float("nan"), 0.0], [True, None, False], [b"\xff", b"a", None],
     [["a"], [], None], [[{"role": "user", "content": "x"}], [], None], [{"a": "b"}, {"a": None}, None]]
)  # fmt: skip


@FUZZ
@given(columns=st.dictionaries(st.sampled_from(COLUMNS[:-1]), COLUMN_VALUES, min_size=1, max_size=5))
def test_every_row_of_a_parquet_file_is_read_or_counted(tmp_path, columns):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    read_both(tmp_path / "rows.parquet", sink.getvalue(), 3)


def test_parquet_columns_of_one_name(tmp_path):
    table = pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UsageError, match="the schema names the column 'prompt' more than once"):
        load_rows(tmp_path / "rows.parquet")


def test_rows_of_megabytes(tmp_path):
    texts = ("neno" * 1_250_000, "\n" * 1_000_000 + "a", "12 " * 100_000, "```" + "<" * 1_000_000)
    read_both(tmp_path / "rows.jsonl", json.dumps(dict(zip(KEYS, texts, strict=True))).encode(), 1)
    row = load_rows(tmp_path / "rows.jsonl")[0]
    assert (row.prompt, row.completion, row.prompt_en, row.completion_en) == texts


def test_checking_texts_of_megabytes():
    """What looks for links and lists must not compare every place with every other one."""
    texts = ("neno" * 250_000, "\n" * 500_000 + "a", "12 " * 50_000, "```" + "<" * 500_000)
    assert check_rows(load_rows([dict(zip(KEYS, texts, strict=True))]), language="sw").usable == 1


def test_a_file_without_line_ends_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("pivotune.data.text_files._LONGEST_LINE", 2**19)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + "x" * 2**20)
    for on_bad_row in ("error", "skip"):
        with pytest.raises(UsageError, match=r"rows.jsonl, line 2: longer than 0.5 MiB; does the file have the type"):
            load_rows(path, on_bad_row=on_bad_row)


ODD_TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30),
    st.sampled_from(
        ["\x1b[31m", "[red]", "a" * 3000, "1. " * 500, "\u202e" * 40, "\n" * 500 + "x", "```", "<" * 50, "٣٤", "²"]
    ),
)


@settings(FUZZ, max_examples=12)
@given(rows=st.lists(st.fixed_dictionaries(dict.fromkeys(KEYS, ODD_TEXTS)), min_size=1, max_size=8))
def test_checking_any_texts(rows):
    loaded = [row for row in rows if all(text.strip() for text in row.values())]
    if loaded:
        check = check_rows(load_rows(loaded), language="sw")
        assert check.usable == check.total == len(loaded)
        json.dumps(check.to_dict()).encode()


@settings(FUZZ, max_examples=12)
@given(lines=st.lists(LINES, min_size=1, max_size=5),
       as_json=st.booleans())  # fmt: skip
def test_the_command_reports_every_line(tmp_path, capsys, lines, as_json):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    capsys.readouterr()
    code = main(["data", "check", str(path), "--lang", "sw", *(["--json"] if as_json else [])])
    out, err = capsys.readouterr()
    assert code in (0, 2)
    if code == 2:
        assert out == ""
        assert err.startswith("pivotune: error: ")
        assert_clear(ValueError(err.removesuffix("\n")), path)
    elif as_json:
        found = json.loads(out)
        assert found["usable"] + sum(found["skipped"].values()) == found["total"] == len(lines)
    else:
        assert f"{counted(len(lines))}, " in out
        assert not CONTROL.search(out.replace("\n", ""))
