"""Tables with and without a header, objects and the Hub's rows as records; splits; every malformation with its line."""

from __future__ import annotations

import gzip

import pytest
from benchmark_files import write_file

from pivotune.errors import UsageError
from pivotune.evaluation.tasks import tables
from pivotune.evaluation.tasks.tables import (
    MissingDataError,
    Source,
    Split,
    by_id,
    choose_split,
    only_file,
    origin_of,
    read_hub,
    read_objects,
    read_table,
)

COLUMNS = {"asked": ("Question", "instruction"), "given": ("Answer",)}


def fields(records) -> list[tuple[int, str, str]]:
    return [(record.number, record.text("asked"), record.text("given")) for record in records]


@pytest.mark.parametrize(
    "text",
    [
        "was?\tdas\nwer?\tder\n",
        "Question\tAnswer\nwas?\tdas\nwer?\tder\n",
        "answer\textra\tINSTRUCTION\r\ndas\tx\twas?\r\n\r\nder\ty\twer?",
        "\ufeffwas?\tdas\n\nwer?\tder",
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_tab_separated_with_and_without_header(text, packed, tmp_path):
    path = write_file(tmp_path / "a.tsv", gzip.compress(text.encode()) if packed else text)
    assert [row[1:] for row in fields(read_table(path, COLUMNS))] == [("was?", "das"), ("wer?", "der")]


def test_quotes_belong_to_the_text_of_tab_separated_files(tmp_path):
    path = write_file(tmp_path / "a.tsv", '"was?\tdas"\n""\t"a ""b"""\n')
    assert fields(read_table(path, COLUMNS)) == [(1, '"was?', 'das"'), (2, '""', '"a ""b"""')]


def test_unquoting_leaves_quotations_alone(tmp_path):
    path = write_file(tmp_path / "a.tsv", '"a ""b"""\t"Hallo", sagte er, "na".\n')
    assert fields(read_table(path, COLUMNS, unquote=True)) == [(1, 'a "b"', '"Hallo", sagte er, "na".')]


def test_csv_cells_may_hold_commas_quotes_and_lines(tmp_path):
    path = write_file(tmp_path / "a.csv", 'Question,Answer\n"a,\n""b""",c\nd,e\n')
    assert fields(read_table(path, COLUMNS, delimiter=",")) == [(2, 'a,\n"b"', "c"), (4, "d", "e")]


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        ("a\tb\nc\n", {}, "line 2: 1 columns; expected 2 (Question, Answer)"),
        ("a\tb\nc\td\te\n", {}, "line 2: 3 columns; expected 2"),
        ("Question\tAnswer\n \tb\n", {}, "line 2: 'asked' is empty"),
        ("Question\tReply\n", {"header": True}, "line 1: no 'Answer'; found: Question, Reply"),
        ("Reply\tAnswer\n", {"header": True}, "line 1: no 'Question' or 'instruction'; found: Reply, Answer"),
        ("Question\tAnswer\tx\tx\n", {}, "line 1: the header names the column 'x' more than once"),
        ('Question,Answer\na,b\n"c,d\n', {"delimiter": ","}, "line 3: broken CSV"),
        ("", {}, "the file is empty"),
        ("\n\n", {}, "no rows in it"),
        (b"a\tb\nc\t\xff\n", {}, "line 2: not UTF-8"),
        ("a\tb".encode("utf-16"), {}, "this looks like UTF-16"),
        (gzip.compress(b"a\tb\n" * 99, mtime=0)[:-12], {}, "cannot be read"),
    ],
)
def test_malformed_tables_are_named_with_their_line(text, options, problem, tmp_path):
    path = write_file(tmp_path / "bad.tsv", text)
    with pytest.raises(UsageError) as caught:
        fields(read_table(path, COLUMNS, **options))
    assert str(caught.value).startswith(str(path))
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.jsonl", '{"question": "a", "answer": "b"}\n{"question": "a"}', "line 2: no 'Answer'; found: question"),
        ("a.jsonl", "\n5", "line 2: int 5; allowed: an object"),
        ("a.jsonl", '{"question": 3, "answer": "b"}', "line 1: 'asked' is a number; text is needed"),
        ("a.jsonl", '{"question": "a", "answer": "b"}\n{"question"', "line 2, column 12: broken JSON"),
        ("a.json", '[{"question": "a", "answer": null}]', "row 1: 'given' is null; text is needed"),
        ("a.json", '{"rows": 1}', "holds no list of rows"),
    ],
)
def test_malformed_objects_are_named_with_their_line(name, text, problem, tmp_path):
    path = write_file(tmp_path / name, text)
    with pytest.raises(UsageError) as caught:
        fields(read_objects(path, COLUMNS))
    assert str(caught.value).startswith(f"{path}")
    assert problem in str(caught.value)


def test_the_first_name_wins_where_an_object_has_several(tmp_path):
    path = write_file(tmp_path / "a.json", '[{"instruction": "b", "question": "a", "answer": "c"}]')
    assert fields(read_objects(path, COLUMNS)) == [(1, "a", "c")]


def test_labels_in_any_case_or_as_numbers(tmp_path):
    path = write_file(tmp_path / "a.tsv", "a\tYes \nb\t1\nc\tmaybe\n")
    yes, one, maybe = read_table(path, COLUMNS)
    assert (yes.label("given", {"yes": 5}), one.label("given", {"1": 6})) == (5, 6)
    with pytest.raises(UsageError, match="line 3: given is 'maybe'; allowed: yes, no"):
        maybe.label("given", {"yes": 0, "no": 1})


def test_hub_rows_are_named_by_dataset_and_number(monkeypatch):
    rows = [(1, {"question": "a", "answer": "b"}), (2, {"question": "a"})]
    monkeypatch.setattr(tables, "read_hub_records", lambda *_: iter(rows))
    records = read_hub("x_vi", ("owner/x", "vi"), "test", COLUMNS)
    assert next(records).text("given") == "b"
    with pytest.raises(UsageError, match="owner/x/vi, row 2: no 'Answer'"):
        next(records)


def test_split_that_was_asked_for_or_the_first_there(tmp_path):
    write_file(tmp_path / "deep/down/val.vi.tsv", "x")
    splits = [Split("test", ["test.vi.tsv"]), Split("validation", ["val.vi.tsv"], ("dev",), files="val.LANGUAGE.tsv")]

    def chosen(source: Source) -> tuple[str, list[str]]:
        split, files = choose_split("x_vi", source, splits, "HOME")
        return split.name, origin_of(source, files)

    assert chosen(Source(tmp_path)) == ("validation", ["deep/down/val.vi.tsv"])
    assert chosen(Source(tmp_path, "dev")) == ("validation", ["deep/down/val.vi.tsv"])
    assert chosen(Source(None)) == ("test", [])
    assert chosen(Source(None, "validation")) == ("validation", [])
    with pytest.raises(UsageError, match=r"x_vi: no test\.vi\.tsv below .*HOME"):
        chosen(Source(tmp_path, "test"))
    with pytest.raises(UsageError, match="x_vi: has no split 'train'; allowed: test, validation"):
        chosen(Source(tmp_path, "train"))
    with pytest.raises(UsageError, match=r"no test\.vi\.tsv or val\.LANGUAGE\.tsv below"):
        chosen(Source(tmp_path / "deep/other"))


def test_files_that_only_look_right_are_passed_over(tmp_path):
    for folder in ("data-gmt", "data"):
        write_file(tmp_path / folder / "a.tsv", "x")
    split = Split("test", ["a.tsv"])
    _, files = choose_split("x", Source(tmp_path), [split], "HOME", lambda path: path.parent.name != "data-gmt")
    assert files == [tmp_path / "data/a.tsv"]


def test_two_files_of_a_name_are_no_choice_of_ours(tmp_path):
    with pytest.raises(UsageError, match=r"x_vi: .*a/x\.tsv and .*b/x\.tsv are both there"):
        only_file("x_vi", [tmp_path / "a/x.tsv", tmp_path / "b/x.tsv"])


def test_ids_are_distinct_and_there_is_something():
    rows = [("1", "a.tsv, line 1", 5), ("2", "a.tsv, line 2", 6)]
    assert by_id("x", ["a.tsv"], rows) == {"1": 5, "2": 6}
    with pytest.raises(UsageError, match=r"^a\.tsv, line 2: the id '1' is that of a\.tsv, line 1 too"):
        by_id("x", ["a.tsv"], [rows[0], ("1", "a.tsv, line 2", 6)])
    with pytest.raises(UsageError, match=r"x: no questions in a\.tsv"):
        by_id("x", ["a.tsv"], [])


def test_a_set_out_of_reach_names_the_local_ways(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    ways = r"owner/set cannot be loaded \(no route to host\); --data-dir reads local files, HF_HUB_OFFLINE=1 the cache"
    with pytest.raises(MissingDataError, match=ways):
        list(tables.read_hub_records("xquad_vi", "owner/set", None, "test"))
