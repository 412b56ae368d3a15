"""Rows through a translation: forms, resuming after a kill, refused files, and the rows left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import tiny_rows

import pivotune.translate.run as run
from pivotune.data.sources import load_rows
from pivotune.errors import UsageError
from pivotune.translate.run import (
    is_translation_of,
    read_english,
    translate_rows,
    translated_rows,
    write_result,
)
from pivotune.translate.steps import StepFile

SETTINGS = {"source": "rows.jsonl", "model": "m", "language": "swh_Latn"}
# English line -> Swahili line of the tiny rows.
SWAHILI = {row[f"{key}_en"]: row[key] for row in tiny_rows(40) for key in ("prompt", "completion")}


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def english_rows(count: int) -> list[dict]:
    return [
        {"id": row["id"], "prompt": row["prompt_en"], "completion": row["completion_en"]} for row in tiny_rows(count)
    ]


def swahili(lines):
    return [SWAHILI.get(line, f"Tafsiri ya {line}") for line in lines]


def steps_of(out: Path, **settings: str) -> StepFile:
    return StepFile(out, "translated", SETTINGS | settings)


def translated_path(out: Path) -> Path:
    return steps_of(out).path


def count_done(out: Path, rows, **settings: str) -> int:
    return steps_of(out, **settings).count_done(rows, is_translation_of)


def translate(out: Path, rows, translator=swahili, rows_per_step=4) -> list[int]:
    """Go on with a translation; return the progress."""
    shown: list[int] = []
    done = count_done(out, rows)
    steps_of(out).begin(overwrite=False)
    translate_rows(steps_of(out), rows, done, translator, rows_per_step, shown.append)
    return shown


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_every_form_keeps_its_english_byte_for_byte(tmp_path):
    rows = [
        {"id": 7, "instruction": "Say  it.\r\n- `x`", "input": " Hello\u2028you \n", "output": "Yes.", "category": "a"},
        {"instruction": "Say it.", "input": "", "output": "Ye\u0301s.\n\n1. No"},
        {"id": "c", "messages": [
            {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "Goodbye"}]},
        {"system": "Be short.", "instruction": "Add", "input": "1 and 2", "output": "3"},
        {"prompt": "Question", "completion": " "},
    ]  # fmt: skip
    out, source = tmp_path / "pairs.jsonl", read_english(write(tmp_path / "rows.jsonl", rows), None)
    assert source.skipped == {"`completion` is empty": 1}
    assert translate(out, source, lambda lines: [f"<{line}" for line in lines]) == [0, 4]
    alpaca, plain, chat, system = records(translated_path(out))
    assert {key: alpaca[f"{key}_en"] for key in ("instruction", "input", "output")} == {
        key: rows[0][key] for key in ("instruction", "input", "output")
    }
    assert alpaca["instruction"] == "<Say  it.\r\n- `x`"
    assert alpaca["input"] == " <Hello\u2028<you \n"
    assert (alpaca["id"], alpaca["output"]) == ("7", "<Yes.")
    assert plain == {"prompt": "<Say it.", "completion": "<Ye\u0301s.\n\n1. <No", "prompt_en": "Say it.",
                     "completion_en": "Ye\u0301s.\n\n1. No"}  # fmt: skip
    assert chat["messages_en"] == rows[2]["messages"]
    assert [turn["content"] for turn in chat["messages"]] == ["<Be kind.", "<Hi", "<Hello", "<Bye", "<Goodbye"]
    assert [turn["content"] for turn in system["messages"]] == ["<Be short.", "<Add\n\n<1 and 2", "3"]
    # All forms are recognized as translated.
    assert count_done(out, source) == 4


def test_english_columns_win_over_the_other_language(tmp_path):
    rows = read_english(write(tmp_path / "rows.jsonl", tiny_rows(3)), 2)
    assert [(row.prompt, row.prompt_en) for row in rows] == [("", f"Which number is {n}?") for n in range(2)]


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("cut", [0, 1, 30])
def test_two_kills_lose_and_double_nothing(tmp_path, calls, cut):
    """The first kill comes after some steps, the second within a write."""
    out, rows = tmp_path / "pairs.jsonl", read_english(write(tmp_path / "rows.jsonl", english_rows(18)), None)
    whole = tmp_path / "whole.jsonl"
    translate(whole, rows)

    def killed(lines, steps=[]):  # noqa: B006 - counts the steps
        if lines:
            steps.append(lines)
        if len(steps) > calls:
            raise KeyboardInterrupt
        return swahili(lines)

    with pytest.raises(KeyboardInterrupt):
        translate(out, rows, killed)
    done = translated_path(out)
    assert len(records(done)) == 4 * calls
    if calls:
        content = done.read_bytes()
        done.write_bytes(content[: len(content) - cut])
    kept = 4 * calls - (cut > 0 and calls > 0)
    assert translate(out, rows)[0] == kept
    assert records(done) == records(translated_path(whole))
    assert translate(out, rows, None) == [18]  # nothing is left to do


def test_a_larger_limit_goes_on(tmp_path):
    out, source = tmp_path / "pairs.jsonl", write(tmp_path / "rows.jsonl", english_rows(10))
    translate(out, read_english(source, 6))
    assert translate(out, read_english(source, None)) == [6, 10]
    assert count_done(out, read_english(source, 3)) == 3


def test_repeated_lines_are_translated_once_over_all_steps(tmp_path):
    rows = [{**row, "prompt": "What is it?"} for row in english_rows(12)]
    seen: list[str] = []
    out, source = tmp_path / "pairs.jsonl", read_english(write(tmp_path / "rows.jsonl", rows), None)
    translate(out, source, lambda lines: seen.extend(lines) or swahili(lines))
    assert len(seen) == len(set(seen)) == 13


def test_remembered_lines_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_KNOWN_LINES", 4)
    rows = [{**row, "prompt": "What is it?"} for row in english_rows(12)]
    seen: list[str] = []
    source = read_english(write(tmp_path / "rows.jsonl", rows), None)
    translate(tmp_path / "pairs.jsonl", source, lambda lines: seen.extend(lines) or swahili(lines))
    assert seen.count("What is it?") == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model": "other"}, "was begun with model 'm', found 'other'"),
     ({"language": "vie_Latn"}, "was begun with language 'swh_Latn', found 'vie_Latn'"),
     ({"source": "b.jsonl"}, "was begun with source 'rows.jsonl', found 'b.jsonl'")],
)  # fmt: skip
def test_other_settings_are_refused(tmp_path, change, message):
    out, rows = tmp_path / "pairs.jsonl", read_english(write(tmp_path / "rows.jsonl", english_rows(4)), None)
    translate(out, rows)
    with pytest.raises(UsageError, match=message):
        count_done(out, rows, **change)


def test_changed_rows_and_foreign_files_are_refused(tmp_path):
    out, english = tmp_path / "pairs.jsonl", english_rows(4)
    out.write_text("mine")
    rows = read_english(write(tmp_path / "rows.jsonl", english), None)
    with pytest.raises(UsageError, match=r"pairs.jsonl exists and was not begun by this command"):
        count_done(out, rows)
    assert out.read_text() == "mine"
    steps_of(out).begin(overwrite=True)
    translate(out, rows)
    english[2]["completion"] += "!"
    with pytest.raises(UsageError, match=r"translated.jsonl, line 3 was not made from row 3 of the data"):
        count_done(out, read_english(write(tmp_path / "rows.jsonl", english), None))
    translated_path(out).with_suffix(".json").write_text("{")
    with pytest.raises(UsageError, match=r"pairs.translated.json: cannot be read"):
        count_done(out, rows)


def test_rows_with_defects_are_left_out_and_named_by_their_line(tmp_path):
    rows = [{"prompt": "", "completion": "x"}, *english_rows(30)]
    # Added tags are refused line by line: the line stays English.
    bad = {rows[5]["completion"]: "<p>Ni <b>nne</b>, namba ya 4.</p>", rows[9]["prompt"]: rows[9]["prompt"]}
    out, source = tmp_path / "pairs.jsonl", read_english(write(tmp_path / "rows.jsonl", rows), None)
    translate(out, source, lambda lines: [bad.get(line) or SWAHILI[line] for line in lines])
    found, written = write_result(out, translated_rows(steps_of(out), source), "sw", keep_all=False, examples=1)
    report = json.loads(out.with_suffix(".report.json").read_text())
    assert report["left_out"] == [
        {"number": 6, "id": "sw-4", "reasons": ["left_in_english"]},
        {"number": 10, "id": "sw-8", "reasons": ["untranslated"]},
    ]
    assert report["unusable"] == {"`prompt` is empty": 1}
    assert (written, found.total, len(load_rows(out))) == (28, 31, 28)
    assert len(records(translated_path(out))) == 30
    _, written = write_result(out, translated_rows(steps_of(out), source), "sw", keep_all=True, examples=1)
    report = json.loads(out.with_suffix(".report.json").read_text())
    assert (written, len(load_rows(out)), len(report["flagged"])) == (30, 30, 2)
    assert "left_out" not in report
