"""Rows of a JSON list, read in pieces of any size, are those of the whole text; so are mistakes and their places."""

from __future__ import annotations

import gzip
import json
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pivotune.data import text_files
from pivotune.data.rows import RowError
from pivotune.data.text_files import read_json
from pivotune.errors import UsageError

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(VALUES, max_size=5)
INDENTS = st.sampled_from([None, 0, 2])
PIECES = st.integers(1, 9)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("json") / "rows.json"


def read(path, text: str, piece: int) -> list:
    path.write_bytes(text.encode("utf-8"))
    with mock.patch.object(text_files, "_BYTES_PER_READ", piece):
        return [row for _, row in read_json(path)]


@given(rows=ROWS, indent=INDENTS, ascii_only=st.booleans(), mark=st.booleans(), piece=PIECES)
def test_rows_of_a_list(path, rows, indent, ascii_only, mark, piece):
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    assert read(path, ("\ufeff" if mark else "") + text + "\n", piece) == rows


@given(
    before=st.dictionaries(TEXTS.filter(lambda key: key != "data"), VALUES, max_size=2), rows=ROWS, indent=INDENTS,
    last=st.booleans(), piece=PIECES,
)  # fmt: skip
def test_rows_of_a_list_in_an_object(path, before, rows, indent, last, piece):
    whole = {**before, "data": rows} if last else {"data": rows, **before}
    assert read(path, json.dumps(whole, indent=indent), piece) == rows


@given(rows=ROWS, in_object=st.booleans(), indent=INDENTS, place=st.integers(0, 200), other=st.sampled_from(',:[]{}"x0 \n'),
       keep=st.booleans(), piece=PIECES)  # fmt: skip
def test_mistakes_are_named_where_the_whole_text_has_them(path, rows, in_object, indent, place, other, keep, piece):
    text = json.dumps({"data": rows} if in_object else rows, indent=indent)
    place %= len(text)
    text = text[:place] + other + text[place + (0 if keep else 1) :]
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        expected = f"{path}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}"
    else:
        return
    with pytest.raises(UsageError) as raised:
        read(path, text, piece)
    if "trailing comma" not in expected:  # a word that Python 3.13 has and earlier ones have not
        assert str(raised.value) == expected


@pytest.mark.parametrize("piece", [1, 5, 1000])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'[{"a": 1},\n {"a": "\xff"}]', "line 2: not UTF-8 (byte 0xff); save the file as UTF-8"),
        ('[{"a": 1}]'.encode("utf-16"), "line 1: not UTF-8"),
        (b'[1,\n[[' + b"9" * 5000 + b"]]]", "line 2: unreadable JSON: Exceeds the limit (4300 digits)"),
        (b'{"data": [1], "data": [2]}', "the object that holds the rows names the key 'data' more than once"),
        (b'{"data": {"a": 1}}', "holds no list of rows"),
        (b"{}", "holds no list of rows"),
        (b"12", "holds no list of rows"),
        (b'{"data": [1],}', "line 1, column 14: broken JSON: Expecting property name enclosed in double quotes"),
        (b"[1]\n\n [2]", "line 3, column 2: broken JSON: Extra data"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path, text, words, piece, monkeypatch):
    monkeypatch.setattr(text_files, "_BYTES_PER_READ", piece)
    (tmp_path / "rows.json").write_bytes(text)
    with pytest.raises(UsageError) as raised:
        list(read_json(tmp_path / "rows.json"))
    assert words in str(raised.value)


def test_repeated_keys_of_a_row_are_marked(path):
    first, second = read(path, '[{"a": 1, "a": 2}, {"a": 1}]', 3)
    assert (type(first), second) == (RowError, {"a": 1})


def test_gzip(tmp_path):
    (tmp_path / "rows.json").write_bytes(gzip.compress(b'[{"a": 1}, 2]'))
    assert list(read_json(tmp_path / "rows.json")) == [(1, {"a": 1}), (2, 2)]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('{"a": 1}\n{"a": 2}', True),
        ('\n {"a": 1} \n\n{"a": 2}\n', True),
        ('{"a": 1, "a": 2}\n{"a": 2}', True),
        ('{"a": 1}\n', False),
        ('{"data":\n[]}', False),
        ('{"a": 1} {"a": 2}\n3', False),
        ('[{"a": 1}]\n[]', False),
        ("", False),
    ],
)
def test_json_lines_under_another_name(tmp_path, text, lines):
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    assert text_files._holds_json_lines(tmp_path / "rows.json") == lines
