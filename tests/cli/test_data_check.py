from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import build_tiny_model, build_tiny_tokenizer, tiny_rows

from pivotune.cli.main import main
from pivotune.data.sources import load_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    build_tiny_model().save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write(tmp_path):
    """A function that writes rows as JSON Lines and gives the path back."""

    def write_rows(rows, name="rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write_rows


ARABIC = {
    "id": "ar-1",
    "prompt": "ما هي عاصمة مصر؟",
    "completion": "عاصمة مصر هي القاهرة، وهي مدينة كبيرة على نهر النيل.",
    "prompt_en": "What is the capital of Egypt?",
    "completion_en": "The capital of Egypt is Cairo, a large city on the river Nile.",
}


def copied(row: dict) -> dict:
    return {**row, "prompt": row["prompt_en"], "completion": row["completion_en"]}


def test_good_rows(write, capsys):
    assert main(["data", "check", write(tiny_rows(12)), "--lang", "sw"]) == 0
    out = capsys.readouterr().out
    assert "12 rows, 12 usable" in out
    assert "length in characters" in out
    assert "no problems found" in out
    assert "verdict  12 of 12 rows look good" in out


def test_problems_are_shown_with_their_rows_and_do_not_fail(write, capsys):
    rows = tiny_rows(12)
    rows[4] = copied(rows[4])
    rows[7] = {**rows[7], "completion": " "}
    assert main(["data", "check", write(rows), "--lang", "sw"]) == 0
    out = capsys.readouterr().out
    assert "left out: 1 row: `completion` is empty (first: " in out
    assert "line 8)" in out
    assert "not translated: the prompt is the English one (1)" in out
    assert "row 5 sw-4: prompt and answer" in out
    assert "prompt:         Which number is 4?" in out
    assert "10 of 12 rows look good; 1 with a defect (untranslated 1)" in out
    assert "train with --set data.on_bad_row=skip" in out


def test_show_limits_the_rows_shown(write, capsys):
    rows = [copied(row) for row in tiny_rows(6)] + tiny_rows(12)[6:]
    for show, expected in (("0", 0), ("2", 2), ("9", 6)):
        assert main(["data", "check", write(rows), "--lang", "sw", "--show", show]) == 0
        assert capsys.readouterr().out.count(": prompt and answer") == expected


def test_tokens_cuts_and_the_decoded_example(write, model, capsys):
    limits = ["--max-prompt-tokens", "13", "--max-completion-tokens", "12"]
    assert main(["data", "check", write(tiny_rows(12)), "--lang", "sw", "--model", model, *limits, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["unit"] == "tokens"
    assert found["cut"]["max_prompt_tokens"] == 13
    assert 0 < found["cut"]["prompts"] < 12
    roles = [segment["role"] for segment in found["example"]]
    assert roles == ["template", "query", "template", "answer"]
    assert [segment["text"] for segment in found["example"] if segment["loss"]] == ["Ni moja, namba ya 0.<|end|>"]

    assert main(["data", "check", write(tiny_rows(12)), "--lang", "sw", "--model", model, *limits]) == 0
    out = capsys.readouterr().out
    assert "length in tokens" in out
    share = found["cut"]["prompts"] / 12
    assert f"prompts cut in {found['cut']['prompts']} rows ({share:.1%}) at data.max_prompt_tokens 13" in out
    assert "<|user|>\nNamba 0 ni ipi?<|end|>\n<|assistant|>\nNi moja, namba ya 0.<|end|>" in out


def test_json_names_all_rows_and_leaves_stdout_to_programs(write, capsys):
    rows = [copied(row) for row in tiny_rows(6)] + tiny_rows(12)[6:]
    assert main(["data", "check", write(rows), "--lang", "sw", "--show", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (problem,) = [problem for problem in found["problems"] if problem["name"] == "untranslated"]
    assert problem["numbers"] == [1, 2, 3, 4, 5, 6]
    assert [example["number"] for example in problem["examples"]] == [1]
    assert found["flagged"] == 6
    assert found["example"] is None


def test_an_aligned_english_file_and_a_limit(write, capsys):
    english = [{"prompt": row["prompt_en"], "completion": row["completion_en"]} for row in tiny_rows(12)]
    target = [{"prompt": row["prompt"], "completion": row["completion"]} for row in tiny_rows(12)]
    files = [write(target), "--english", write(english, "english.jsonl")]
    assert main(["data", "check", *files, "--lang", "sw", "--limit", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["usable"] == 5


def test_text_from_right_to_left_stands_on_lines_of_its_own(write, capsys):
    rows = [copied(ARABIC) if number == 2 else {**ARABIC, "id": f"ar-{number}"} for number in range(3)]
    assert main(["data", "check", write(rows), "--lang", "ar"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "    prompt:         ما هي عاصمة مصر؟" in lines
    assert "    English prompt: What is the capital of Egypt?" in lines


def test_data_cannot_drive_the_terminal(write, model, capsys):
    evil = "Which [red]number[/red] is \x1b[31m4\x1b]0;title\x07 \u202eback\x9b2J?"
    rows = [{**row, "prompt": evil, "prompt_en": evil, "id": "[b]\x1b[0m"} for row in tiny_rows(4)]
    assert main(["data", "check", write(rows), "--lang", "sw", "--model", model]) == 0
    out = capsys.readouterr().out
    assert not set("\x1b\x07\x9b\u202e") & set(out)
    assert "Which [red]number[/red] is ␛[31m4␛]0;title␇ �back�2J?" in out
    assert "[b]␛[0m" in out


def test_several_files_are_checked_as_one_and_rows_named_by_file(write, tmp_path, capsys):
    first, second = tiny_rows(12), [{**row, "id": f"b-{n}"} for n, row in enumerate(tiny_rows(30)[14:])]
    second[2], second[4] = first[3], copied(second[4])
    a, b, out = write(first, "a.jsonl"), write(second, "b.jsonl"), tmp_path / "clean.jsonl"
    options = ["--lang", "sw", "--write-clean", str(out)]
    assert main(["data", "check", a, b, *options]) == 0
    text = capsys.readouterr().out
    assert f"{a}, {b}: 28 rows, 28 usable" in text
    assert f"row {b}:3 sw-3: same as row {a}:4" in text
    assert f"row {b}:5 b-4: prompt and answer" in text
    report = json.loads((tmp_path / "clean.report.json").read_text())
    assert [(row["number"], row["reasons"]) for row in report["left_out"]] == [
        (f"{b}:3", ["duplicate_rows"]), (f"{b}:5", ["untranslated"]),
    ]  # fmt: skip
    assert len(load_rows(out)) == 26
    assert main(["data", "check", a, b, "--lang", "sw", "--json"]) == 0
    problems = {problem["name"]: problem["numbers"] for problem in json.loads(capsys.readouterr().out)["problems"]}
    assert problems == {"duplicate_rows": [f"{b}:3"], "untranslated": [f"{b}:5"]}


REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_system_turn_is_folded_as_in_training(write, tmp_path, capsys):
    build_tiny_model().save_pretrained(tmp_path)
    build_tiny_tokenizer(chat_template=REFUSES_SYSTEM).save_pretrained(tmp_path)
    rows = [{**row, "system": "jibu kwa kifupi", "system_en": "answer briefly"} for row in tiny_rows(4)]
    command = ["data", "check", write(rows), "--lang", "sw", "--model", str(tmp_path), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["too_long"].values()) == [4]
    assert "data.fold_system: true" in next(iter(found["too_long"]))
    assert main([*command, "--fold-system"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["too_long"] == {}
    assert found["example"][1]["text"] == "jibu kwa kifupi\n\nNamba 0 ni ipi?"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl", "--lang", "sw"], "nowhere.jsonl: no such file"),
        (["{rows}", "--lang", "vn"], "--lang: 'vn' is not a language code; Vietnamese is vi"),
        (["{rows}", "--lang", "en"], "--lang: en is English, the other side of every row; name the target language"),
        (["{rows}", "--lang", "sw", "--template", "chat"], "--template: needs --model"),
        (["{rows}", "--lang", "sw", "--model", "no/such/model"], "no/such/model: no such folder"),
        (
            ["{rows}", "--lang", "sw", "--model", "{plain}", "--template", "chat"],
            "--template chat needs a tokenizer with a",
        ),
        (["{rows}", "--lang", "sw", "--fold-system"], "--fold-system: needs --model"),
        (["{rows}", "{rows}", "--lang", "sw"], "rows.jsonl: is named twice"),
        (["{rows}", "{bad}", "--english", "{rows}", "--lang", "sw"], "--english: belongs to one data file, found 2"),
        (["{bad}", "--lang", "sw"], "all 2 rows are like this"),
    ],
)
def test_mistakes_are_one_line_with_code_2(write, tmp_path, capsys, arguments, message):
    files = {"rows": write(tiny_rows(3)), "bad": write([{"prompt": "a", "completion": "b"}] * 2, "bad.jsonl")}
    if "{plain}" in arguments:
        build_tiny_model().save_pretrained(tmp_path)
        build_tiny_tokenizer(chat_template=None).save_pretrained(tmp_path)
    files["plain"] = str(tmp_path)
    assert main(["data", "check", *(argument.format(**files) for argument in arguments)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pivotune: error: ")
    assert message in error


def test_clean_rows_are_written_with_a_report(write, tmp_path, capsys):
    rows = tiny_rows(12)
    rows[4] = copied(rows[4])
    rows[7] = {**rows[7], "completion": " "}
    rows[9]["completion"] += "<|im_end|>"
    alpaca = {f"{key}{end}": f"{key}{end} maji" for key in ("instruction", "input", "output") for end in ("", "_en")}
    turns = [{"role": "user", "content": "habari"}, {"role": "assistant", "content": "nzuri"}]
    chat = {f"messages{end}": [{"role": role, "content": f"{role}{end}"} for role in ("system", "user", "assistant")]
            for end in ("", "_en")}  # fmt: skip
    chat["messages"] = [*turns, *chat["messages"][1:]]
    source, out = write([*rows, alpaca, chat]), tmp_path / "clean.jsonl"
    assert main(["data", "check", source, "--lang", "sw", "--write-clean", str(out)]) == 0
    assert "11 rows in" in capsys.readouterr().out
    kept = [row for place, row in enumerate(load_rows(source, on_bad_row="skip")) if place not in (4, 8)]
    again = list(load_rows(out))
    assert [replace(row, number=0) for row in again] == [replace(row, number=0) for row in kept]
    report = json.loads((tmp_path / "clean.report.json").read_text())
    assert (report["written"], report["unusable"]) == (11, {"`completion` is empty": 1})
    assert [(row["number"], row["reasons"]) for row in report["left_out"]] == [
        (5, ["untranslated"]), (10, ["control_tokens"]),
    ]  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_no_row_without_a_defect(write, tmp_path, capsys, options):
    source, out = write([copied(row) for row in tiny_rows(4)]), tmp_path / "clean.jsonl"
    assert main(["data", "check", source, "--lang", "sw", "--write-clean", str(out), *options]) == 2
    printed = capsys.readouterr()
    assert f"every usable row has a defect; {tmp_path / 'clean.report.json'} says which" in printed.err
    assert "untranslated" in printed.out
    assert len(json.loads((tmp_path / "clean.report.json").read_text())["left_out"]) == 4


def test_places_for_clean_rows_that_are_refused(write, tmp_path, capsys):
    source = write(tiny_rows(4))
    for out, reason in (
        (source, "would replace the data that is read"),
        (str(tmp_path / "clean.csv"), "allowed: a file name that ends in .jsonl"),
        (str(tmp_path / "none" / "clean.jsonl"), "no folder"),
    ):
        assert main(["data", "check", source, "--lang", "sw", "--write-clean", out]) == 2
        assert reason in capsys.readouterr().err


# ---- pages ----


def test_the_result_as_a_page_and_as_json(write, tmp_path, capsys):
    rows = tiny_rows(12)
    rows[4] = copied(rows[4])
    data, page, plain = write(rows), tmp_path / "check.html", tmp_path / "check.json"
    for out in (page, plain):
        assert main(["data", "check", data, "--lang", "sw", "--out", str(out)]) == 0
    found = json.loads(plain.read_text(encoding="utf-8"))
    assert "untranslated" in [problem["name"] for problem in found["problems"]]
    content = page.read_text(encoding="utf-8")
    for problem in found["problems"]:
        assert problem["title"] in content
        assert all(f"<strong>Row {finding['number']}</strong>" in content for finding in problem["examples"])
    lengths = found["histograms"]["lengths"]
    assert all(sum(one["counts"]) == 12 and len(one["edges"]) == len(one["counts"]) + 1 for one in lengths.values())
    assert set(found["histograms"]["ratios"]) == {"prompt", "completion"}
    capsys.readouterr()
    assert main(["data", "check", data, "--lang", "sw", "--out", str(page)]) == 2
    assert f"--out: {page} exists; add --overwrite or name another file" in capsys.readouterr().err
