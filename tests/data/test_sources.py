"""Rows from every kind of source, two aligned files, bad rows, and the real training files."""

from __future__ import annotations

import json
import time
from pathlib import Path

import datasets
import numpy as np
import pytest

from pivotune.data.formats import read_file, row_name, source_of
from pivotune.data.sources import Row, concatenate, load_rows
from pivotune.errors import UsageError

FORMS = {
    "plain": ("prompt", "completion", None),
    "alpaca": ("instruction", "output", "input"),
    "chat": ("messages",),
    "sharegpt": ("conversations",),
}
TEXTS = [  # Amharic and Swahili, with what CSV and JSON must escape
    ("የኢትዮጵያ ዋና ከተማ ማን ናት?", "አዲስ አበባ፣\nበ“ሸዋ”።", "What is the capital of Ethiopia?", "Addis Ababa."),
    ('"Jua" ni nini, kweli?', "Nyota 🌞\tkubwa", "What is the sun, really?", 'A "star".'),
]


def make_side(form: str, query: str, answer: str, suffix: str) -> dict:
    """The keys of one side in a form; Alpaca's input is the query in capitals."""
    if form == "chat":
        turns = [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
        return {f"messages{suffix}": turns}
    if form == "sharegpt":
        return {f"conversations{suffix}": [{"from": "human", "value": query}, {"from": "gpt", "value": answer}]}
    query_key, answer_key, input_key = FORMS[form]
    side = {f"{query_key}{suffix}": query, f"{answer_key}{suffix}": answer}
    return {**side, f"{input_key}{suffix}": query.upper()} if input_key else side


def make_records(form: str) -> list[dict]:
    return [
        {"id": str(n), **make_side(form, x, y, ""), **make_side(form, x_en, y_en, "_en"), "topic": "?"}
        for n, (x, y, x_en, y_en) in enumerate(TEXTS)
    ]


def expected_rows(form: str) -> list[Row]:
    has_input = form == "alpaca"
    return [
        Row(*texts, texts[0].upper() * has_input, texts[2].upper() * has_input, id=str(n), number=n + 1)
        for n, texts in enumerate(TEXTS)
    ]


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pairs(count: int, **changes) -> list[dict]:
    """Good rows; `changes` maps r3='completion_en' (row 3 loses that key) or r3={...} (row 3 is updated)."""
    records = [
        {
            "prompt": f"Swali {n}",
            "completion": f"Jibu {n}",
            "prompt_en": f"Question {n}",
            "completion_en": f"Answer {n}",
        }
        for n in range(1, count + 1)
    ]
    for name, change in changes.items():
        record = records[int(name[1:]) - 1]
        record.pop(change) if isinstance(change, str) else record.update(change)
    return records


def error_of(source, **options) -> str:
    with pytest.raises(UsageError) as caught:
        load_rows(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestForms:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.json.gz",
                                      "a.csv.gz", "a.tsv.gz", "a.parquet.gz"])  # fmt: skip
    @pytest.mark.parametrize("form", FORMS)
    def test_every_form_in_every_file_type(self, tmp_path, write_file, form, name):
        path = write_file(tmp_path / name, make_records(form))
        rows = load_rows(str(path))
        assert list(rows) == expected_rows(form)
        assert (rows.source, rows.total, rows.skipped) == (str(path), 2, {})

    @pytest.mark.parametrize("wrap", [list, iter, tuple, datasets.Dataset.from_list])
    @pytest.mark.parametrize("form", FORMS)
    def test_every_form_from_python(self, form, wrap):
        rows = load_rows(wrap(make_records(form)))
        assert list(rows) == expected_rows(form)
        assert rows.source == "the given rows"

    def test_rows_of_different_forms_in_one_file(self, tmp_path):
        records = [make_records("alpaca")[0], make_records("sharegpt")[1]]
        rows = load_rows(write_jsonl(tmp_path / "mixed.jsonl", records))
        assert list(rows) == [expected_rows("alpaca")[0], expected_rows("sharegpt")[1]]

    def test_rows_are_a_sequence(self):
        rows = load_rows(pairs(5))
        assert len(rows) == 5
        assert rows[-1].prompt == "Swali 5"
        assert [row.number for row in rows[1:3]] == [2, 3]

    def test_home_folder_in_a_path(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        write_jsonl(tmp_path / "a.jsonl", pairs(1))
        assert load_rows("~/a.jsonl").source == str(tmp_path / "a.jsonl")


class TestRecords:
    @pytest.mark.parametrize(("name", "content"), [
        ("a.json", "[]"), ("a.json", '{"data": []}'), ("a.json", "\n"), ("a.jsonl", "\n \n"),
        ("a.csv", "prompt,completion\n"),
    ])  # fmt: skip
    def test_no_rows(self, tmp_path, name, content):
        path = tmp_path / name
        path.write_text(content)
        assert error_of(path) == f"{path}: holds no rows"

    def test_no_rows_from_python(self):
        assert error_of([]) == "the given rows: holds no rows"

    @pytest.mark.parametrize(("source", "message"), [
        ({"train": [], "test": []},
         "data: found one mapping with the keys train, test; give one of its splits, or rows "
         "(a file, a Hub dataset name, a datasets.Dataset or a list of dicts)"),
        (None, "data: found NoneType; allowed: a file, a Hub dataset name, a datasets.Dataset or a list of dicts"),
    ])  # fmt: skip
    def test_wrong_objects(self, source, message):
        assert error_of(source) == message

    def test_missing_file(self, tmp_path):
        (tmp_path / "pairs.jsonl").touch()
        path = tmp_path / "pair.jsonl"
        assert error_of(path) == f"{path}: no such file; did you mean {tmp_path / 'pairs.jsonl'}?"


class TestSeveralSources:
    def test_rows_are_numbered_on_and_keep_their_place(self, tmp_path):
        first = write_jsonl(tmp_path / "a.jsonl", [{**row, "topic": 1} for row in pairs(4, r2="prompt")])
        second = write_jsonl(tmp_path / "b.jsonl", [{**row, "id": "x", "topic": 1} for row in pairs(3, r1="prompt")])
        csv = tmp_path / "c.csv"
        csv.write_text("prompt,completion,prompt_en,completion_en\na,b,c,d\n")
        parts = [load_rows(path, on_bad_row="skip") for path in (first, second, csv)]
        rows = concatenate(parts)
        assert [row.prompt for row in rows] == ["Swali 1", "Swali 3", "Swali 4", "Swali 2", "Swali 3", "a"]
        assert rows[-1].prompt == "a"
        numbers = [row.number for row in rows]
        assert len(set(numbers)) == len(rows) == 6
        assert [source_of(number, rows.sources) for number in numbers] == [
            (str(path), number)
            for path, number in [(first, 1), (first, 3), (first, 4), (second, 2), (second, 3), (csv, 1)]
        ]
        assert row_name(numbers[3], rows.sources) == f"{second}:2"
        assert row_name(numbers[0], parts[0].sources) == 1
        assert (rows.total, rows.skipped) == (8, {"`prompt` is missing": 2})
        assert rows.notes == ["columns that are not used: 'topic' (in 7 rows)"]
        assert rows.source == f"{first}, {second}, {csv}"
        assert concatenate(parts[:1]) is parts[0]


def test_columns_of_arrays():
    """As pandas reads lists from Parquet: an array has no truth value."""
    row = {**pairs(1)[0], "scores": np.array([0, 1]), "nothing": np.array([])}
    assert load_rows([row]).unused == {"scores": 1}
    chat = np.array([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], dtype=object)
    with pytest.raises(UsageError, match="has `messages_en` already"):
        load_rows([{"messages": chat, "messages_en": chat}], english=[{"messages": chat}])


class TestBadRows:
    def test_error_names_line_key_need_and_count(self, tmp_path):
        records = pairs(6, r3="completion_en", r5="completion_en")
        path = write_jsonl(tmp_path / "pairs.jsonl", records)
        assert error_of(path, needed_by="method deep-supervision") == (
            f"{path}, line 3: `completion_en` is missing, needed by method deep-supervision; "
            "2 of 6 rows are like this (use data.on_bad_row: skip to leave them out)"
        )

    def test_error_counts_other_problems_apart(self):
        records = pairs(6, r2={"prompt": 5}, r4="completion_en", r6="prompt_en")
        assert error_of(records, needed_by="method tft") == (
            "the given rows, row 2: `prompt` is a number, not text; 1 of 6 rows is like this, "
            "2 more cannot be used for other reasons (use data.on_bad_row: skip to leave them out)"
        )

    @pytest.mark.parametrize("on_bad_row", ["error", "skip"])
    def test_all_rows_bad_is_an_error_under_both_policies(self, on_bad_row):
        records = [{"question": "Swali", "answer": "Jibu"}] * 3
        assert error_of(records, on_bad_row=on_bad_row) == (
            "the given rows, row 1: `prompt` is missing (the row has `question`, `answer`); all 3 rows are like this"
        )

    def test_the_only_row_is_bad(self):
        message = error_of(pairs(1, r1={"completion": " "}), on_bad_row="skip")
        assert message == "the given rows, row 1: `completion` is empty; it is the only row"

    def test_no_row_can_be_used_for_several_reasons(self):
        records = pairs(3, r1="prompt", r2="prompt", r3={"completion": ""})
        assert error_of(records, on_bad_row="skip") == (
            "the given rows, row 1: `prompt` is missing; 2 of 3 rows are like this, "
            "1 more cannot be used for other reasons"
        )

    def test_skip_counts_by_reason(self):
        records = [*pairs(6, r2={"completion": "\n"}, r3="prompt_en", r5="prompt_en"), "text"]
        rows = load_rows(records, on_bad_row="skip")
        assert [row.number for row in rows] == [1, 4, 6]
        assert rows.total == 7
        assert rows.skipped == {
            "`completion` is empty": 1,
            "`prompt_en` is missing": 2,
            "the row is text, not an object with named texts": 1,
        }

    def test_what_is_not_needed_may_be_bad(self):
        rows = load_rows(pairs(2, r1="prompt_en", r2={"completion_en": 3}), need_english=False)
        assert [tuple(turn.is_whole for turn in row.sides) for row in rows] == [(True, False)] * 2
        rows = load_rows(pairs(1, r1="completion"), need_target=False)
        assert [tuple(turn.is_whole for turn in row.sides) for row in rows] == [(False, True)]

    LINES = (
        json.dumps({"prompt": "Swali", "completion": "Jibu", "prompt_en": "Q", "completion_en": "A"}).encode(),
        b"{]",
        b'{"prompt": "caf\xe9"}',
        b'{"prompt": 1, "prompt": 2}',
        b"[" * 100_000,
        b'{"prompt": "\\ud800", "completion": "Jibu", "prompt_en": "Q", "completion_en": "A"}',
        b'{"id": "\\ud800", "prompt": "a", "completion": "b", "prompt_en": "Q", "completion_en": "A"}',
    )

    def test_lines_that_cannot_be_read_are_skipped_and_counted(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b"\n".join([*self.LINES, self.LINES[0]]))
        rows = load_rows(path, on_bad_row="skip")
        assert [row.number for row in rows] == [1, 8]
        assert rows.total == 8
        assert rows.skipped == {
            "the row is not valid JSON": 1,
            "the row is not UTF-8": 1,
            "the row names a key more than once": 1,
            "the row is JSON that cannot be read": 1,
            "`prompt` holds half of a surrogate pair, which is no character": 1,
            "`id` holds half of a surrogate pair, which is no character": 1,
        }

    @pytest.mark.parametrize(("line", "message"), [
        (1, "line 2, column 2: broken JSON: Expecting property name"),
        (2, "line 2: not UTF-8 (byte 0xe9); save the file as UTF-8"),
        (3, "line 2: an object names the key 'prompt' more than once"),
        (4, "line 2: unreadable JSON: lists or objects stand within each other too deeply"),
    ])  # fmt: skip
    def test_lines_that_cannot_be_read_are_an_error_otherwise(self, tmp_path, line, message):
        path = tmp_path / "a.jsonl"
        path.write_bytes(self.LINES[0] + b"\n" + self.LINES[line])
        assert error_of(path).startswith(f"{path}, {message}")

    def test_no_line_can_be_read(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"prompt": "a"}\n', encoding="utf-16")
        assert error_of(path, on_bad_row="skip") == (
            f"{path}, line 1: the row is not UTF-8 (this looks like UTF-16); save the file as UTF-8; "
            "1 of 2 rows is like this, 1 more cannot be used for other reasons"
        )

    @pytest.mark.parametrize(("name", "content", "message"), [
        ("a.csv", "prompt,completion,prompt_en,completion_en\na,b,c,d\na,b,c,d,e\n", "has more cells than the header"),
        ("a.json", '[{"prompt": "a", "completion": "b", "prompt_en": "c", "completion_en": "d"},'
                   ' {"prompt": "a", "x": [{"y": 1, "y": 2}]}]', "names a key more than once"),
    ])  # fmt: skip
    def test_rows_of_other_files_that_cannot_be_read(self, tmp_path, name, content, message):
        path = tmp_path / name
        path.write_text(content)
        rows = load_rows(path, on_bad_row="skip")
        assert (len(rows), rows.skipped) == (1, {f"the row {message}": 1})
        with pytest.raises(
            UsageError, match="line 3: 5 cells" if name == "a.csv" else "row 2: an object names the key 'y'"
        ):
            load_rows(path)

    def test_reasons_without_end_are_counted_together(self):
        chats = [{"messages": [{"role": f"role {n}", "content": "x"}]} for n in range(80)]
        rows = load_rows([*pairs(1), *chats], on_bad_row="skip")
        assert len(rows.skipped) == 51
        assert rows.skipped["other reasons"] == 30
        assert sum(rows.skipped.values()) == 80

    def test_limit_keeps_the_first_usable_rows_and_reads_no_further(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [*pairs(4, r1="prompt"), "text"])
        path.write_text(path.read_text() + "broken\n")
        rows = load_rows(path, on_bad_row="skip", limit=2)
        assert [row.number for row in rows] == [2, 3]
        assert (rows.total, rows.skipped) == (3, {"`prompt` is missing": 1})


class TestTwoFiles:
    @pytest.fixture
    def write(self, tmp_path, monkeypatch):
        """Write sw.jsonl and en.jsonl from (id, query, answer) and give their names, relative as users write them."""
        monkeypatch.chdir(tmp_path)

        def write_both(target: list[tuple], english: list[tuple]) -> dict:
            for name, side in (("sw.jsonl", target), ("en.jsonl", english)):
                records = [{"id": number, "prompt": query, "completion": answer} for number, query, answer in side]
                write_jsonl(tmp_path / name, records)
            return {"source": "sw.jsonl", "english": "en.jsonl"}

        return write_both

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("english_form", FORMS)
    def test_both_in_any_form(self, tmp_path, form, english_form):
        target = [make_side(form, x, y, "") for x, y, _, _ in TEXTS]
        english = [make_side(english_form, x, y, "") for _, _, x, y in TEXTS]
        rows = load_rows(write_jsonl(tmp_path / "sw.jsonl", target), english=iter(english))
        for row, own, other in zip(rows, expected_rows(form), expected_rows(english_form), strict=True):
            assert (row.prompt, row.completion, row.input) == (own.prompt, own.completion, own.input)
            assert (row.prompt_en, row.completion_en, row.input_en) == (
                other.prompt_en,
                other.completion_en,
                other.input_en,
            )

    def test_english_history_is_kept(self):
        turns = [{"role": "system", "content": "Be brief."}, *make_side("chat", "Why?", "So.", "")["messages"]]
        rows = load_rows([{"prompt": "Kwa nini?", "completion": "Basi."}], english=[{"messages": turns}])
        assert rows[0].history == ()
        assert rows[0].history_en == ({"role": "system", "content": "Be brief."},)

    def test_unique_ids_join_whatever_the_order(self, write):
        files = write([(1, "moja", "1"), (2, "mbili", "2")], [("2", "two", "2 en"), ("1", "one", "1 en")])
        rows = load_rows(**files)
        assert [(row.id, row.prompt, row.prompt_en, row.completion_en) for row in rows] == [
            ("1", "moja", "one", "1 en"),
            ("2", "mbili", "two", "2 en"),
        ]
        assert [row.number for row in rows] == [1, 2]

    @pytest.mark.parametrize("target_ids", [(1, None), (7, 7), (None, None)])
    def test_without_unique_ids_rows_are_joined_in_order(self, write, target_ids):
        first, second = target_ids
        files = write([(first, "moja", "1"), (second, "mbili", "2")], [(2, "one", "1 en"), (1, "two", "2 en")])
        assert [(row.prompt, row.prompt_en) for row in load_rows(**files)] == [("moja", "one"), ("mbili", "two")]

    def test_unequal_lengths_without_ids(self, write):
        files = write([(None, "moja", "1")] * 3, [(1, "one", "1"), (2, "two", "2")])
        assert error_of(**files) == (
            "sw.jsonl has 3 rows, en.jsonl has 2: without a unique `id` on every row of both they are joined "
            "row by row and must be equally long"
        )

    def test_ids_missing_on_the_english_side(self, write):
        target = [(f"sw-{n}", f"swali {n}", "jibu") for n in range(6)]
        files = write(target, [("sw-5", "question 5", "answer")])
        assert error_of(**files) == (
            "sw.jsonl: 5 of 6 ids are not in en.jsonl: sw-0, sw-1, sw-2, ... "
            "(use data.on_bad_row: skip to leave them out)"
        )
        rows = load_rows(**files, on_bad_row="skip")
        assert [(row.id, row.number, row.prompt_en) for row in rows] == [("sw-5", 6, "question 5")]
        assert (rows.total, rows.skipped) == (6, {"`id` is not in en.jsonl": 5})

    def test_ids_missing_on_the_target_side(self, write):
        files = write([(1, "moja", "1")], [(1, "one", "1"), (2, "two", "2")])
        assert error_of(**files) == (
            "en.jsonl: 1 of 2 ids are not in sw.jsonl: 2 (use data.on_bad_row: skip to leave them out)"
        )
        rows = load_rows(**files, on_bad_row="skip")
        assert (len(rows), rows.total, rows.skipped) == (1, 2, {"`id` is not in sw.jsonl": 1})

    @pytest.mark.parametrize("on_bad_row", ["error", "skip"])
    def test_no_id_in_common(self, write, on_bad_row):
        files = write([("sw-1", "moja", "1")], [("en-1", "one", "1")])
        assert error_of(**files, on_bad_row=on_bad_row) == (
            "sw.jsonl: 1 of 1 ids are not in en.jsonl: sw-1 (without the column `id` they are joined row by row)"
        )

    def test_target_file_with_english_of_its_own(self, tmp_path):
        target = write_jsonl(tmp_path / "sw.jsonl", [{"prompt": "a", "completion": "b"}, *pairs(1)])
        assert error_of(target, english=pairs(2)) == (
            f"{target}, line 2: has `prompt_en` already, but the English side is to come from the given rows; "
            "keep one of the two"
        )

    def test_blank_lines_at_different_places_are_refused(self, tmp_path, monkeypatch):
        """As many rows on both sides, and still not the same pairs."""
        monkeypatch.chdir(tmp_path)
        lines = [json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}) for n in range(1, 6)]

        def load(target: list[str], english: list[str], on_bad_row: str = "skip"):
            Path("sw.jsonl").write_text("\n".join(target))
            Path("en.jsonl").write_text("\n".join(english))
            return load_rows("sw.jsonl", english="en.jsonl", on_bad_row=on_bad_row)

        for on_bad_row in ("error", "skip"):
            with pytest.raises(
                UsageError, match=r"sw.jsonl, line 3: comes together with en.jsonl, line 2: .* blank lines"
            ):
                load([lines[0], "", *lines[2:]], [*lines[:3], "", lines[4]], on_bad_row)
        rows = load([lines[0], "", *lines[2:]], [lines[0], " ", *lines[2:]])
        assert [row.prompt == row.prompt_en for row in rows] == [True] * 4
        # A line that cannot be read keeps its number.
        rows = load([lines[0], "{", *lines[2:]], lines)
        assert [(row.prompt, row.prompt_en) for row in rows] == [(f"p{n}", f"p{n}") for n in (1, 3, 4, 5)]
        assert sum(rows.skipped.values()) == 1

    def test_bad_english_row_names_the_english_file(self, write):
        files = write([(1, "moja", "1"), (2, "mbili", "2")], [(1, "one", "1"), (2, "two", " ")])
        assert error_of(**files, needed_by="method deep-supervision") == (
            "en.jsonl, line 2: `completion` is empty, needed by method deep-supervision; 1 of 2 rows is like this "
            "(use data.on_bad_row: skip to leave them out)"
        )
        rows = load_rows(**files, on_bad_row="skip")
        assert (len(rows), rows.skipped) == (1, {"`completion` is empty in en.jsonl": 1})

    def test_bad_target_row_names_the_target_file(self, write):
        files = write([(1, "moja", ""), (2, "mbili", "2")], [(1, "one", ""), (2, "two", "2")])
        assert error_of(**files).startswith("sw.jsonl, line 1: `completion` is empty; 1 of 2 rows is like this (")

    def test_bad_english_row_is_no_problem_where_english_is_not_needed(self, write):
        files = write([(1, "moja", "1"), (2, "mbili", "2")], [(1, "one", "1"), (2, "two", " ")])
        rows = load_rows(**files, need_english=False)
        assert [(row.prompt, row.prompt_en, row.completion_en) for row in rows] == [
            ("moja", "one", "1"),
            ("mbili", "", ""),
        ]

    def test_a_line_that_cannot_be_read_does_not_change_how_rows_are_joined(self, write, tmp_path):
        files = write([(1, "moja", "1"), (2, "mbili", "2"), (3, "tatu", "3")], [(3, "three", "3"), (1, "one", "1")])
        with (tmp_path / "en.jsonl").open("a") as file:
            file.write("{broken\n")
        rows = load_rows(**files, on_bad_row="skip")
        assert [(row.prompt, row.prompt_en) for row in rows] == [("moja", "one"), ("tatu", "three")]
        assert rows.skipped == {"`id` is not in en.jsonl": 1, "the row is not valid JSON": 1}

    def test_limit(self, write):
        side = [(None, f"swali {n}", "jibu") for n in range(4)]
        assert [row.number for row in load_rows(**write(side, side), limit=2)] == [1, 2]


class TestRealFiles:
    @pytest.mark.parametrize(("language", "count"), [("vi", 30_000), ("zh", 12_620)])
    def test_every_row_is_read_whole(self, shared_data, language, count):
        start = time.process_time()
        rows = load_rows(shared_data / "train" / f"{language}.jsonl.gz")
        seconds = time.process_time() - start
        assert (len(rows), rows.total, rows.skipped) == (count, count, {})
        assert len({row.id for row in rows}) == count
        assert all(all(turn.is_whole for turn in row.sides) and not row.input and not row.input_en for row in rows)
        assert seconds < 10  # about 0.5 on an idle core; a bound that only a slow design breaks

    def test_prompt_wins_over_the_alpaca_keys_beside_it(self, shared_data):
        path = shared_data / "train" / "zh.jsonl.gz"
        record = next(record for _, record in read_file(path) if record["input"])
        row = next(row for row in load_rows(path, limit=100) if row.id == record["id"])
        assert row.prompt == record["prompt"] == f"{record['instruction']}\n{record['input']}"
        assert row.prompt_en == record["prompt_en"]
