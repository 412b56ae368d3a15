from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from cli_runs import write_jsonl
from conftest import SHARED

from pivotune.cli.main import main
from pivotune.data.sources import load_rows

EVAL = SHARED / "data" / "eval"
TMX = """<?xml version="1.0" encoding="{0}"?>
<!DOCTYPE tmx SYSTEM "tmx14.dtd">
<tmx version="1.4"><header srclang="en"/><body>
<tu tuid="1"><tuv xml:lang="EN-US">
<seg>Click <bpt i="1">&lt;b&gt;</bpt>the <hi>button</hi><ept i="1">&lt;/b&gt;</ept>, &amp; wait.</seg></tuv>
<tuv xml:lang="fr"><seg>Attendez.</seg></tuv><tuv xml:lang="vi"><seg>Bấm vào nút, &amp; chờ.</seg></tuv></tu>
<tu><tuv xml:lang="en"><seg>No partner here.</seg></tuv></tu>
</body></tmx>
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*options: str, out: str = "rows.jsonl", lang: str = "vi") -> int:
    return main(["data", "prepare", *options, "--lang", lang, "--out", out])


def prepared(*options: str, lang: str = "vi") -> list[dict]:
    """The rows that the command writes."""
    assert run(*options, "--overwrite", lang=lang) == 0
    return [json.loads(line) for line in Path("rows.jsonl").read_text(encoding="utf-8").splitlines()]


def report() -> dict:
    return json.loads(Path("rows.report.json").read_text(encoding="utf-8"))


def sides(row: dict) -> tuple[str, str]:
    """The sentence that a row was cut from, and its English."""
    return f"{row['prompt']} {row['completion']}", f"{row['prompt_en']} {row['completion_en']}"


def test_alpaca_bactrian_and_x_llm_forms(folder):
    english = [
        {"id": f"alpaca-{place}", "instruction": f"Question {place}?", "input": "a, b" if place else ""}
        | {"output": f"Answer {place}."}
        for place in range(3)
    ]  # fmt: skip
    vietnamese = [
        {key: text.replace("Question", "Câu hỏi").replace("Answer", "Đáp án") for key, text in row.items()}
        for row in english
    ]  # fmt: skip
    write_jsonl(folder / "vi.jsonl", vietnamese[::-1])
    write_jsonl(folder / "en.jsonl", english)
    # Bactrian-X: joined by id, whatever the order.
    by_id = prepared("vi.jsonl", "--english", "en.jsonl", "--near-duplicates", "0")
    assert [row["id"] for row in by_id] == ["alpaca-2", "alpaca-1", "alpaca-0"]
    assert by_id[0] == {
        "id": "alpaca-2", "instruction": "Câu hỏi 2?", "input": "a, b", "output": "Đáp án 2.",
        "instruction_en": "Question 2?", "input_en": "a, b", "output_en": "Answer 2.", "language": "vi",
    }  # fmt: skip
    assert (by_id[2]["prompt"], by_id[2]["completion_en"]) == ("Câu hỏi 0?", "Answer 0.")
    # Stanford Alpaca and x-LLM: JSON lists without ids, joined in order.
    for name, rows in (("vi.json", vietnamese), ("en.json", english)):
        plain = [{key: value for key, value in row.items() if key != "id"} for row in rows]
        Path(name).write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")
    in_order = prepared("vi.json", "--english", "en.json", "--near-duplicates", "0")
    assert [row.get("id") for row in in_order] == [None] * 3
    assert [row["completion_en"] for row in in_order[:1]] == ["Answer 0."]
    # English alone, to be translated.
    alone, *_ = prepared("en.json", "--near-duplicates", "0", lang="en")
    assert alone == {"prompt": "Question 0?", "completion": "Answer 0.", "language": "en"}


def test_aya_rows_of_other_languages_are_left_out(folder, capsys):
    rows = [
        {
            "inputs": "Xin chào bạn?",
            "targets": "Chào.",
            "language": "Vietnamese",
            "language_code": "vie",
            "user_id": "u",
        },
        {"inputs": "¿Hola?", "targets": "Sí.", "language": "Spanish", "language_code": "spa", "user_id": "u"},
        {
            "inputs": "Mấy giờ?",
            "targets": "Chín giờ.",
            "language": "Vietnamese",
            "language_code": "vie",
            "user_id": "u",
        },
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "aya.parquet")
    assert prepared("aya.parquet") == [
        {"prompt": "Xin chào bạn?", "completion": "Chào.", "language": "vi"},
        {"prompt": "Mấy giờ?", "completion": "Chín giờ.", "language": "vi"},
    ]
    assert report()["unusable"] == {"`language_code` is another language than vi": 1}
    printed = capsys.readouterr().out
    assert "columns that are not used: 'user_id' (in 2 rows)" in printed
    assert "no English side" in printed
    # A programming language is none of the row.
    write_jsonl(folder / "code.jsonl", [{"question": "Viết mã", "answer": "x = 1", "language": "python"}])
    assert prepared("code.jsonl")[0]["prompt"] == "Viết mã"


@pytest.mark.parametrize("encoding", ["UTF-8", "UTF-16"])
def test_tmx(folder, encoding):
    data = TMX.format(encoding).encode(encoding)
    Path("a.tmx.gz").write_bytes(gzip.compress(data))
    (row,) = prepared("a.tmx.gz")
    assert row == {
        "prompt": "Bấm vào nút,", "completion": "& chờ.", "prompt_en": "Click the button,", "completion_en": "& wait.",
        "language": "vi",
    }  # fmt: skip
    assert report()["unusable"] == {"`vi` is empty": 1}


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ('<!DOCTYPE tmx [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><tmx>&b;</tmx>', "declares the XML entity 'a'"),
        ('<!DOCTYPE tmx [<!ENTITY a SYSTEM "file:///etc/passwd">]><tmx>&a;</tmx>', "declares the XML entity 'a'"),
        ('<!DOCTYPE tmx [<!ENTITY % a SYSTEM "http://x/">%a;]><tmx></tmx>', "declares the XML entity 'a'"),
        ("<tmx><body><tu>", "line 1: broken XML: no element found"),
        ('<?xml version="1.0" encoding="nothing"?><tmx></tmx>', "broken XML: unknown encoding"),
        ("<tmx></tmx>", "holds no rows"),
    ],
)
def test_hostile_and_broken_tmx(folder, capsys, document, problem):
    Path("a.tmx").write_text(document, encoding="utf-8")
    assert run("a.tmx") == 2
    error = capsys.readouterr().err
    assert error.startswith("pivotune: error: a.tmx")
    assert problem in error
    assert sorted(path.name for path in folder.iterdir()) == ["a.tmx"]


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("h.tsv", "id\tEnglish\tVietnamese\n7\tThe \"house\" is big.\tNgôi \"nhà\" lớn.\n", ()),
        ("n.tsv", "7\tNgôi \"nhà\" lớn.\t9\tThe \"house\" is big.\n", ()),
        ("s.tsv", "Source\tTarget\nThe \"house\" is big.\tNgôi \"nhà\" lớn.\n", ()),
        ("vie.txt", "The \"house\" is big.\tNgôi \"nhà\" lớn.\tCC-BY 2.0 Attribution: tatoeba.org #3 (CK)\n", ()),
        ("o.tsv", "a\tsource\ttarget\nz\tNgôi \"nhà\" lớn.\tThe \"house\" is big.\n", ("--columns", "source,target")),
        ("c.csv", "target,source\n\"Ngôi \"\"nhà\"\" lớn.\",\"The \"\"house\"\" is big.\"\n", ()),
    ],
)  # fmt: skip
def test_tables_with_and_without_header(folder, name, text, options):
    Path(name).write_text(text, encoding="utf-8")
    (row,) = prepared(name, *options)
    assert sides(row) == ('Ngôi "nhà" lớn.', 'The "house" is big.')


def test_parallel_sets_of_the_hub_and_flores_plus(folder):
    pairs = [{"translation": {"en": "We can go home.", "vi": "Chúng ta về nhà.", "id": "Kita pulang."}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pairs), "opus.parquet")
    assert sides(prepared("opus.parquet")[0]) == ("Chúng ta về nhà.", "We can go home.")
    assert sides(prepared("opus.parquet", lang="id")[0]) == ("Kita pulang.", "We can go home.")
    for name, texts in (("vie_Latn", ["Về nhà.", "Đi chợ."]), ("eng_Latn", ["Go shopping.", "Go home."])):
        ids = ["1", "2"] if name == "vie_Latn" else ["2", "1"]
        write_jsonl(folder / f"{name}.jsonl", [{"id": id, "text": text} for id, text in zip(ids, texts, strict=True)])
    joined = prepared("vie_Latn.jsonl", "--english", "eng_Latn.jsonl")
    assert [sides(row) for row in joined] == [("Về nhà.", "Go home."), ("Đi chợ.", "Go shopping.")]


def test_a_sentence_that_ends_in_a_language_is_no_header(folder):
    Path("a.tsv").write_text("1\tTôi học tiếng Anh\n2\tTôi đi chợ\n", encoding="utf-8")
    Path("b.tsv").write_text("1\tI am learning English\n2\tI go shopping\n", encoding="utf-8")
    joined = prepared("a.tsv", "--english", "b.tsv", "--columns", "2,2")
    assert [sides(row)[1] for row in joined] == ["I am learning English", "I go shopping"]


def test_moses_lines(folder, capsys):
    Path("a.vi").write_text("Tôi về nhà.\n\nĐi.\nTôi đi chợ.\n", encoding="utf-8")
    Path("a.en").write_text("I go home.\nAn extra.\nGo.\nI go shopping.\n", encoding="utf-8")
    rows = prepared("a.vi", "--english", "a.en")
    assert [sides(row) for row in rows] == [("Tôi về nhà.", "I go home."), ("Tôi đi chợ.", "I go shopping.")]
    assert report()["unusable"] == {"the row is a blank line": 1}
    assert report()["left_out"] == [{"number": 3, "id": "", "reasons": ["too_short"]}]
    translate = prepared("a.vi", "--english", "a.en", "--task", "translate")
    assert translate[1] == {
        "prompt": "Translate the following sentence from English into Vietnamese.\nGo.", "completion": "Đi.",
        "prompt_en": "Translate the following sentence from Vietnamese into English.\nĐi.", "completion_en": "Go.",
        "language": "vi",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("a.vi", "--english", "b.en"), "a.vi has 2 rows, b.en has 1"),
        (("bad.vi", "--english", "a.vi"), "bad.vi, line 2: not UTF-8 (byte 0xe9)"),
        (("a.vi",), "a.vi: holds sentences (column text) without English; give --english FILE"),
        (
            ("none.tmx",),
            "(allowed: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .tmx, each also with .gz; or a Hub dataset",
        ),
        (("none.tmx", "--against", "xquad_vi", "--eval-data", "."), "none.tmx: no such file"),
        (("a.jsonl", "--english", "a.vi"), "a.vi: holds sentences, but a.jsonl holds rows"),
        (("a.vi", "--english", "a.vi", "--task", "x"), "--task: 'x' found; allowed: continue, translate"),
        (("a.vi", "--english", "a.vi", "--columns", "x,y"), "--columns: a.vi has no column 'x'; it has 'text'"),
        (("a.jsonl", "--columns", "x"), "--columns: 'x' found; allowed: two names, TARGET,ENGLISH"),
        (("a.jsonl", "--validation", "1"), "--validation: 1 found; allowed: fewer than the rows that are kept, 1"),
        (("a.jsonl", "--remove-overlap"), "--remove-overlap: needs --against"),
        (("a.jsonl", "--against", "xquad_vi", "--eval-data", "none"), "--eval-data: none is not a folder"),
        (("a.jsonl", "--against", "xquad_vi", "--eval-data", "."), "or leave out --eval-data to use the Hub"),
        (("a.jsonl", "--against", "xquat_vi", "--eval-data", "."), "--against: no task 'xquat_vi'; near: xquad_vi"),
        (("rows.jsonl",), "--out: rows.jsonl would replace the data that is read"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(folder, capsys, options, problem):
    Path("a.vi").write_text("Tôi về nhà.\nTôi đi chợ.\n", encoding="utf-8")
    Path("b.en").write_text("I go home.\n", encoding="utf-8")
    Path("bad.vi").write_bytes(b"Go home.\ncaf\xe9 open\n")
    write_jsonl(folder / "a.jsonl", [{"prompt": "Ai?", "completion": "Tôi."}])
    before = sorted(folder.iterdir())
    assert run(*options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert problem in error
    assert sorted(folder.iterdir()) == before


def test_nothing_is_replaced_unasked(folder, capsys):
    write_jsonl(folder / "a.jsonl", [{"prompt": f"Ai {n}{n}{n}{n}?", "completion": f"{n}{n} tôi."} for n in range(4)])
    assert run("a.jsonl", "--validation", "1") == 0
    written = {path: path.read_bytes() for path in folder.iterdir()}
    assert run("a.jsonl", out="rows.jsonl") == 2
    assert "--out: rows.jsonl exists; add --overwrite" in capsys.readouterr().err
    Path("rows.jsonl").unlink()
    assert run("a.jsonl") == 2  # the card and the report are there
    assert {path: path.read_bytes() for path in folder.iterdir()}.items() <= written.items()
    # Held-out rows of an earlier command would be trained on.
    prepared("a.jsonl")
    assert not Path("rows.validation.jsonl").exists()


def test_near_duplicates_split_and_card(folder):
    words = [f"từ{place}" for place in range(400)]
    rows = [
        {"id": str(place), "prompt": " ".join(words[place * 12 : place * 12 + 12]), "completion": f"Đáp án {place}"}
        | {"prompt_en": f"English prompt {place}", "completion_en": f"Answer {place}"}
        for place in range(30)
    ]
    copy = {**rows[3], "id": "copy", "completion": "Đáp án 3!"}
    other_answer = {
        **rows[4],
        "id": "other",
        "completion": "Một câu trả lời hoàn toàn khác, dài hơn và không giống chút nào cả",
    }
    write_jsonl(folder / "a.jsonl", [*rows, copy, other_answer])
    license = "cc-by-4.0\n[x](y)"
    training = prepared("a.jsonl", "--validation", "10", "--license", license)
    held_out = [json.loads(line) for line in Path("rows.validation.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (len(training), len(held_out)) == (21, 10)
    assert report()["left_out"] == [
        {"number": 31, "id": "copy", "reasons": ["near_duplicate"], "duplicate_of": 4}
    ]  # fmt: skip
    everything = {row["id"] for row in [*training, *held_out]}
    assert everything == {row["id"] for row in rows} | {"other"}
    # With or without near-duplicates, rows of one prompt are on one side; the same seed gives the same split.
    for seed in range(8):
        for threshold in ("0", "0.8"):
            options = ("a.jsonl", "--validation", "10", "--seed", str(seed), "--near-duplicates", threshold)
            ids = {row["id"] for row in prepared(*options)}
            sides = [len(ids & group) for group in ({"4", "other"}, {"3", "copy"} if threshold == "0" else set())]
            assert all(side in (0, 2) for side in sides)
            assert {row["id"] for row in prepared(*options)} == ids
    prepared("a.jsonl", "--validation", "10", "--license", license)
    card = Path("rows.README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["language"] == ["vi", "en"]
    assert metadata["license"] == license
    assert metadata["size_categories"] == ["n<1K"]
    for line in ("| read | 32 |", "| is a near-duplicate of an earlier row | 1 |", "| written | 21 |"):
        assert line in card
    assert [row.id for row in load_rows("rows.jsonl")] == [row["id"] for row in training]


def test_overlap_is_reported_and_removed(folder, capsys):
    passage = "một hai ba bốn năm sáu bảy tám chín mười trăm nghìn vạn triệu"
    question = {"id": "q", "question": "Ai?", "answers": [{"text": "một"}]}
    article = {"paragraphs": [{"context": passage, "qas": [question]}]}
    Path("xquad.vi.json").write_text(json.dumps({"data": [article]}), encoding="utf-8")
    english = {"prompt_en": "Count, please", "completion_en": "Of course I do"}
    write_jsonl(
        folder / "a.jsonl",
        [
            {"prompt": "Đếm", "completion": f"Vâng: {passage}.", **english},
            {"prompt": "Ai?", "completion": "Tôi", **english},
        ],
    )
    options = ("--against", "xquad", "--eval-data", ".")
    assert len(prepared("a.jsonl", *options)) == 2
    assert report()["overlap"] == {"xquad_vi": {"items": 1, "compared": 1, "overlapping": 1, "rows": [1]}}
    assert [row["prompt"] for row in prepared("a.jsonl", *options, "--remove-overlap")] == ["Ai?"]
    assert report()["left_out"] == [{"number": 1, "id": "", "reasons": ["overlap"]}]
    assert "| xquad\\_vi | 1 | 1 | 1 |" in Path("rows.README.md").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["data", "check", "a.jsonl", "--lang", "vi", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overlap"]["xquad_vi"]["rows"] == [1]


@pytest.mark.skipif(not EVAL.is_dir(), reason="needs shared/data/eval")
def test_real_tatoeba_and_flores(folder, capsys):
    tatoeba, flores = EVAL / "tatoeba" / "tatoeba.vie-eng", EVAL / "flores200" / "dev"
    rows = prepared(
        f"{tatoeba}.vie", "--english", f"{tatoeba}.eng", "--against", "tatoeba_vi-en", "--eval-data", str(EVAL)
    )
    assert len(rows) == 1000
    assert report()["overlap"]["tatoeba_vi-en"]["overlapping"] == 616  # those of eight words in one of the languages
    assert sides(rows[0]) == ("Lẽ ra anh ấy phải thận trọng hơn.", "He should have been more careful.")
    rows = prepared(str(flores / "zho_Hans.dev"), "--english", str(flores / "eng_Latn.dev"), lang="zh")
    lines = (flores / "zho_Hans.dev").read_text(encoding="utf-8").splitlines()
    assert len(rows) == len(lines) == 997
    assert all(
        (row["prompt"] + row["completion"]).replace(" ", "") == line.replace(" ", "")
        for row, line in zip(rows, lines, strict=True)
    )


@pytest.mark.skipif(not EVAL.is_dir(), reason="needs shared/data/train")
def test_real_rows(folder):
    source = SHARED / "data" / "train" / "vi.jsonl.gz"
    lines = gzip.decompress(source.read_bytes()).splitlines(keepends=True)
    Path("a.jsonl").write_bytes(b"".join([*lines[1592:1792], *lines[4851:4852]]))
    rows = prepared("a.jsonl", "--validation", "20")
    assert len(rows) == 180
    # "Mona Lisa của Leonardo da Vinci", and the same without the last o.
    assert report()["left_out"] == [{"number": 201, "id": "vi-7859", "reasons": ["near_duplicate"], "duplicate_of": 1}]
