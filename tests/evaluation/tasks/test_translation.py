"""Parallel text in each publisher's layout and in a user's own files; translation and alignment tasks on it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from benchmark_files import write_file

from pivotune.errors import UsageError
from pivotune.evaluation.tasks import tables, translation
from pivotune.evaluation.tasks.tables import MissingDataError, Source
from pivotune.evaluation.tasks.translation import (
    FLORES,
    NTREX,
    PAIRS,
    TATOEBA,
    SentencePair,
    alignment_task,
    read_parallel,
)
from pivotune.results.corpus_metrics import bleu_from_statistics, chrf_from_statistics

pytest.importorskip("sacrebleu", reason="the extra eval is not installed")


def refusal(set_name: str, source: Source, language: str = "de") -> str:
    with pytest.raises(UsageError) as error:
        read_parallel(set_name, f"{set_name}_{language}", source, language)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def flores(tmp_path):
    """German and English, two sentences of devtest and three of dev, deep in a folder."""
    folder = tmp_path / "any" / "flores200_dataset"
    write_file(folder / "devtest/deu_Latn.devtest", "Eins.\nZwei.\n")
    write_file(folder / "devtest/eng_Latn.devtest", "One.\nTwo.\n")
    write_file(folder / "dev/deu_Latn.dev", "A\nB\nC\n")
    write_file(folder / "dev/eng_Latn.dev", "a\nb\nc\n")
    return folder


def test_flores_reads_devtest(flores, tmp_path):
    text = read_parallel("flores", "flores_de", Source(tmp_path), "de")
    assert text.items == [SentencePair("devtest-1", "Eins.", "One."), SentencePair("devtest-2", "Zwei.", "Two.")]
    assert text.split == "devtest"
    below = "any/flores200_dataset/devtest"
    assert text.origin == [f"{below}/deu_Latn.devtest", f"{below}/eng_Latn.devtest"]
    assert text.left_out == {}


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_flores_plus_is_read_from_its_files(tmp_path, gz):
    """It has a folder a split, and renamed codes of four languages."""
    for code, texts in (("cmn_Hans", ("一。", "二。")), ("eng_Latn", ("One.", "Two."))):
        lines = "".join(json.dumps({"id": place, "text": text}) + "\n" for place, text in enumerate(texts))
        path = tmp_path / "devtest" / f"{code}.jsonl{gz}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(lines.encode()) if gz else lines.encode())
    text = read_parallel("flores", "flores_zh", Source(tmp_path), "zh")
    assert text.items == [SentencePair("devtest-1", "一。", "One."), SentencePair("devtest-2", "二。", "Two.")]
    assert text.origin == [f"devtest/cmn_Hans.jsonl{gz}", f"devtest/eng_Latn.jsonl{gz}"]


@pytest.mark.parametrize(("asked", "split"), [("dev", "dev"), ("validation", "dev"), ("test", "devtest")])
def test_flores_reads_the_split_asked_for(flores, tmp_path, asked, split):
    text = read_parallel("flores", "flores_de", Source(tmp_path, split=asked), "de")
    assert (text.split, len(text.items)) == (split, 3 if split == "dev" else 2)


def test_flores_falls_back_to_dev_only_where_no_split_was_asked_for(flores, tmp_path):
    (flores / "devtest/deu_Latn.devtest").unlink()
    assert read_parallel("flores", "flores_de", Source(tmp_path), "de").split == "dev"
    assert "no deu_Latn.devtest with eng_Latn.devtest (FLORES+: devtest/deu_Latn.jsonl " in refusal(
        "flores", Source(tmp_path, split="devtest")
    )


def test_flores_names_what_is_missing_and_where_to_get_it(flores, tmp_path):
    with pytest.raises(
        MissingDataError, match=r"flores_vi: no vie_Latn\.devtest .* below .*github\.com/facebookresearch"
    ):
        read_parallel("flores", "flores_vi", Source(tmp_path), "vi")
    (flores / "dev/eng_Latn.dev").unlink()
    (flores / "devtest/eng_Latn.devtest").unlink()
    assert "or deu_Latn.dev with eng_Latn.dev (FLORES+: dev/deu_Latn.jsonl " in refusal("flores", Source(tmp_path))


def test_flores_has_no_other_split(flores, tmp_path):
    message = refusal("flores", Source(tmp_path, split="train"))
    assert "flores_de: has no split 'train'; allowed: devtest, dev" in message


def test_two_files_of_one_name_are_refused(flores, tmp_path):
    write_file(tmp_path / "copy/deu_Latn.devtest", "Eins.\nZwei.\n")
    assert "are both there" in refusal("flores", Source(tmp_path))


@pytest.mark.parametrize(
    ("language", "name"),
    [("de", "deu"), ("zh", "zho-CN"), ("zho_Hant", "zho-TW"), ("fa", "fas"), ("sw", "swa"), ("sr", "srp-Cyrl"),
     ("pt", "por-BR"), ("ar", "arb")],
)  # fmt: skip
def test_ntrex_finds_its_own_codes(tmp_path, language, name):
    write_file(tmp_path / f"NTREX-128/newstest2019-ref.{name}.txt", "x y\nz\n")
    write_file(tmp_path / "NTREX-128/newstest2019-src.eng.txt", "X Y\nZ\n")
    text = read_parallel("ntrex", "ntrex", Source(tmp_path), language)
    assert text.items == [SentencePair("test-1", "x y", "X Y"), SentencePair("test-2", "z", "Z")]


def test_ntrex_prefers_the_language_to_a_region(tmp_path):
    for name in ("por", "por-BR"):
        write_file(tmp_path / f"newstest2019-ref.{name}.txt", f"{name}\n")
    write_file(tmp_path / "newstest2019-src.eng.txt", "X\n")
    assert read_parallel("ntrex", "ntrex_pt", Source(tmp_path), "pt").items[0].target == "por"


def test_ntrex_is_never_looked_for_on_the_hub(tmp_path):
    for source in (Source(), Source(tmp_path)):
        with pytest.raises(MissingDataError) as error:
            read_parallel("ntrex", "ntrex_de", source, "de")
        assert "github.com/MicrosoftTranslator/NTREX and give its folder as --data-dir" in str(error.value)
        assert "leave out --data-dir" not in str(error.value)


@pytest.mark.parametrize(
    ("language", "code"), [("vi", "vie"), ("zh", "cmn"), ("ar", "ara"), ("fa", "pes"), ("br", "bre")]
)
def test_tatoeba_finds_its_own_codes(tmp_path, language, code):
    write_file(tmp_path / f"v1/tatoeba.{code}-eng.{code}", "x\n")
    write_file(tmp_path / f"v1/tatoeba.{code}-eng.eng", "X\n")
    assert read_parallel("tatoeba", "tatoeba", Source(tmp_path), language).items == [SentencePair("test-1", "x", "X")]


def test_tatoeba_names_what_is_missing(tmp_path):
    for _ in range(2):
        assert "no tatoeba.deu-eng.deu, with the .eng file beside it below" in refusal("tatoeba", Source(tmp_path))
        write_file(tmp_path / "tatoeba.deu-eng.deu", "x\n")


def test_a_second_script_has_no_tatoeba(tmp_path):
    assert "Tatoeba has no code for Arabic (Latin script)" in refusal("tatoeba", Source(tmp_path), "arb_Latn")


def own(tmp_path, target: str | bytes, english: str | bytes) -> Source:
    return Source(pairs=(write_file(tmp_path / "x.txt", target), write_file(tmp_path / "y.txt", english)))


@pytest.mark.parametrize(
    "target",
    [
        "Eins.\nZwei.\n",
        "Eins.\nZwei.",
        "\ufeffEins.\r\nZwei.\r\n",
        gzip.compress(b"Eins.\nZwei.\n", mtime=0),
        "  Eins. \t\nZwei.\n",
    ],
    ids=["plain", "no end", "BOM, CRLF", "gzip", "spaces"],
)
def test_text_files_as_different_programs_write_them(tmp_path, target):
    text = read_parallel("pairs", "pairs_de", own(tmp_path, target, "One.\nTwo.\n"), "de")
    assert text.items == [SentencePair("all-1", "Eins.", "One."), SentencePair("all-2", "Zwei.", "Two.")]


def test_only_a_newline_ends_a_line(tmp_path):
    text = read_parallel("pairs", "pairs_de", own(tmp_path, "a\u2028b\x0cc\n", "d\x85e\n"), "de")
    assert text.items == [SentencePair("all-1", "a\u2028b\x0cc", "d\x85e")]


def test_lines_that_are_empty_on_both_sides_are_left_out_and_counted(tmp_path):
    text = read_parallel("pairs", "pairs_de", own(tmp_path, "Eins.\n\n \nZwei.\n", "One.\n\n\nTwo.\n"), "de")
    assert [pair.id for pair in text.items] == ["all-1", "all-4"]
    assert text.left_out == {"both sides are empty": 2}


@pytest.mark.parametrize(
    ("target", "english", "empty", "other"),
    [("Eins.\n\nDrei.\n", "One.\nTwo.\nThree.\n", "x", "y"), ("Eins.\nZwei.\n", "One.\n \n", "y", "x")],
)
def test_a_line_that_is_empty_on_one_side_is_refused_with_its_number(tmp_path, target, english, empty, other):
    message = refusal("pairs", own(tmp_path, target, english))
    assert message.startswith(f"{tmp_path / empty}.txt, line 2: is empty, but {tmp_path / other}.txt has a sentence")


def test_different_numbers_of_lines_are_refused(tmp_path):
    message = refusal("pairs", own(tmp_path, "Eins.\nZwei.\n", "One.\n"))
    assert f"{tmp_path / 'x.txt'} has 2 lines, {tmp_path / 'y.txt'} has 1" in message


@pytest.mark.parametrize(
    ("target", "part"),
    [
        (b"Eins.\nZ\xff\n", "x.txt, line 2: not UTF-8 (byte 0xff)"),
        ("\n\n", "holds no sentence"),
        (b"", "the file is empty"),
        (gzip.compress(b"Eins.\nZwei.\n", mtime=0)[:-9], "cannot be read"),
    ],
    ids=["not UTF-8", "blank", "empty", "cut gzip"],
)
def test_a_broken_text_file_is_refused_in_one_line(tmp_path, target, part):
    assert part in refusal("pairs", own(tmp_path, target, "\n\n"))


def test_own_pairs_that_are_not_there(tmp_path):
    assert refusal("pairs", Source()) == (
        "pairs_de: needs the option --pairs FILE (and --english FILE for a separate English side)"
    )
    assert "x.txt: no such file" in refusal("pairs", Source(pairs=(tmp_path / "x.txt", tmp_path / "y.txt")))
    lonely = write_file(tmp_path / "x.txt", "Eins.\n")
    assert "holds one side only; give the other with --english FILE" in refusal("pairs", Source(pairs=(lonely, None)))


def rows(*numbers: int, suffix: str = "_en") -> list[dict[str, str]]:
    return [
        {"prompt": f"Frage {n}", "completion": "Ja.", f"prompt{suffix}": f"Question {n}", f"completion{suffix}": "Yes."}
        for n in numbers
    ]


def jsonl(path: Path, records: list[dict[str, str]]) -> Path:
    return write_file(path, "".join(json.dumps(record) + "\n" for record in records))


def test_own_pairs_from_training_data(tmp_path):
    path = jsonl(tmp_path / "pairs.jsonl.gz", rows(1, 2))
    text = read_parallel("pairs", "pairs_de", Source(pairs=(path, None)), "de")
    assert text.items == [SentencePair("1", "Frage 1", "Question 1"), SentencePair("2", "Frage 2", "Question 2")]
    assert text.origin == [str(path)]


def test_own_pairs_from_two_data_files_joined_by_id(tmp_path):
    target = jsonl(tmp_path / "de.jsonl", [{"id": i, "prompt": f"{i}\n x", "completion": "."} for i in "ab"])
    english = jsonl(tmp_path / "en.jsonl", [{"id": i, "prompt": i.upper(), "completion": "."} for i in "ba"])
    text = read_parallel("pairs", "pairs_de", Source(pairs=(target, english)), "de")
    assert text.items == [SentencePair("a", "a x", "A"), SentencePair("b", "b x", "B")]
    assert text.origin == [str(target), str(english)]


def test_own_rows_without_english_are_refused_without_naming_a_training_option(tmp_path):
    records = [*rows(1), {"prompt": "Frage 2", "completion": "Ja."}]
    message = refusal("pairs", Source(pairs=(jsonl(tmp_path / "p.jsonl", records), None)))
    assert "p.jsonl, line 2: `prompt_en` is missing" in message
    assert "on_bad_row" not in message


def test_two_files_of_different_form_are_refused(tmp_path):
    data, plain = jsonl(tmp_path / "p.jsonl", rows(1)), write_file(tmp_path / "y.txt", "One.\n")
    assert f"{plain} is plain text and {data} is not" in refusal("pairs", Source(pairs=(data, plain)))
    assert f"{plain} is plain text and {data} is not" in refusal("pairs", Source(pairs=(plain, data)))


def test_flores_plus_on_the_hub(monkeypatch):
    asked = []

    def records(task, path, config, split):
        asked.append((path, config, split))
        return enumerate([{"text": f"{config} {n}"} for n in range(2)], start=1)

    monkeypatch.setattr(tables, "read_hub_records", records)
    text = read_parallel("flores", "flores_zh", Source(), "zh")
    hub = "openlanguagedata/flores_plus"
    assert asked == [(hub, "cmn_Hans", "devtest"), (hub, "eng_Latn", "devtest")]
    assert text.items[1] == SentencePair("devtest-2", "cmn_Hans 1", "eng_Latn 1")
    assert text.origin == [f"{hub}/cmn_Hans", f"{hub}/eng_Latn"]


@pytest.mark.parametrize("is_turned", [False, True])
def test_tatoeba_on_the_hub_is_turned_so_that_english_comes_second(monkeypatch, is_turned):
    sides = [("de", "Eins."), ("eng", "One.")]
    (source_lang, source), (target_lang, target) = reversed(sides) if is_turned else sides
    record = {
        "source_lang": source_lang,
        "source_sentence": source,
        "target_lang": target_lang,
        "target_sentence": target,
    }
    monkeypatch.setattr(tables, "read_hub_records", lambda *names: enumerate([record], start=1))
    assert read_parallel("tatoeba", "tatoeba_de", Source(), "de").items == [SentencePair("test-1", "Eins.", "One.")]


def test_tatoeba_on_the_hub_has_36_languages():
    with pytest.raises(MissingDataError, match=r"the Hub has this set in af, ar, .*; another language needs its files"):
        read_parallel("tatoeba", "tatoeba_br", Source(), "br")


def test_hub_records_without_text_are_refused(monkeypatch):
    monkeypatch.setattr(tables, "read_hub_records", lambda *names: enumerate([{"text": " "}], start=1))
    assert "flores_plus/deu_Latn, row 1: 'text' is empty" in refusal("flores", Source())


def test_an_unknown_language_is_refused():
    assert "language 'vn' is unknown; Vietnamese is vi" in refusal("flores", Source(), "vn")


def test_real_files(shared_data):
    source = Source(shared_data / "eval")
    chinese = read_parallel("flores", "flores_zh", source, "zh")
    assert (len(chinese.items), chinese.split, chinese.left_out) == (1012, "devtest", {})
    assert chinese.items[0].english.startswith('"We now have 4-month-old mice')
    assert len(read_parallel("flores", "flores_zh", Source(shared_data / "eval", split="dev"), "zh").items) == 997
    for language in ("vi", "zh", "ar"):
        assert len(read_parallel("tatoeba", "tatoeba", source, language).items) == 1000


@pytest.fixture
def source(tmp_path):
    for code, text in (("zho_Hans", "猫坐在垫子上。\n好。\n"), ("eng_Latn", "The cat sits on the mat.\nGood.\n")):
        (tmp_path / f"{code}.devtest").write_text(text, encoding="utf-8")
    return Source(tmp_path)


@pytest.mark.parametrize("benchmark", [FLORES, NTREX, TATOEBA, PAIRS], ids=lambda benchmark: benchmark.name)
def test_a_language_has_two_tasks(benchmark):
    into, out_of = benchmark.tasks("vie_Latn")
    assert (into.name, out_of.name) == (f"{benchmark.name}_en-vi", f"{benchmark.name}_vi-en")
    assert (into.language, out_of.language) == ("vi", "vi")
    assert (into.answer_language, out_of.answer_language) == ("vi", "en")
    assert (into.kind, into.benchmark, into.stop) == ("translation", benchmark.name, ("\n",))
    assert [metric.name for metric in into.metrics] == ["chrf++", "bleu"]
    assert benchmark.open_ended


def test_languages_of_the_sets():
    assert {"vi", "ar", "zh", "de", "ace_Latn"} < set(FLORES.languages)
    assert len(set(TATOEBA.languages)) == 36
    assert {"vi", "ar", "zh", "fa", "sw", "et"} < set(TATOEBA.languages)


@pytest.mark.parametrize(("code", "part"), [("en", "English is one side already"), ("vn", "Vietnamese is vi")])
def test_a_language_that_cannot_be_is_refused(code, part):
    with pytest.raises(UsageError, match=part):
        FLORES.tasks(code)
    with pytest.raises(UsageError, match=part):
        alignment_task(None, code)


def test_prompts_and_references(source):
    into, out_of = (task.read(source) for task in FLORES.tasks("zh"))
    item = into.items[0]
    assert item.query == "Translate the following sentence from English into Chinese.\nThe cat sits on the mat."
    assert (item.references, item.details["source"]) == (("猫坐在垫子上。",), "The cat sits on the mat.")
    item = out_of.items[0]
    assert item.query == "Translate the following sentence from Chinese into English.\n猫坐在垫子上。"
    assert (item.references, item.details["source"]) == (("The cat sits on the mat.",), "猫坐在垫子上。")
    assert [item.id for item in into.items] == [item.id for item in out_of.items] == ["devtest-1", "devtest-2"]
    assert into.split == "devtest"


def corpus(task, data, answers):
    scores = [task.score(answer, item) for answer, item in zip(answers, data.items, strict=True)]
    chrf = chrf_from_statistics(np.sum([score["chrf_stats"] for score in scores], axis=0))
    bleu = bleu_from_statistics(np.sum([score["bleu_stats"] for score in scores], axis=0))
    return float(chrf), float(bleu), scores


def test_a_copy_of_the_reference_scores_100_an_empty_or_foreign_answer_0(source):
    for task in FLORES.tasks("zh"):
        data = task.read(source)
        copies = [f" {item.gold_answer}\n" for item in data.items]
        assert corpus(task, data, copies)[:2] == pytest.approx((100, 100))
        assert corpus(task, data, copies)[2][0]["chrf"] == pytest.approx(100)
        for answers in (["", ""], ["ŵŵŵŵ ŵŵŵŵ", "ŵŵŵŵ"]):
            assert corpus(task, data, answers)[:2] == (0, 0)


def test_each_direction_is_tokenized_as_its_output(source):
    into, out_of = FLORES.tasks("zh")
    assert into.score("猫坐在垫子上", into.read(source).items[0])["bleu_stats"][:2] == [6, 7]
    assert out_of.score("A cat sits.", out_of.read(source).items[0])["bleu_stats"][:2] == [4, 7]


def test_without_sacrebleu_a_line_says_so_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(translation, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"flores_en-vi: .* need sacrebleu; .* pip install .pivotune\[eval\]"):
        FLORES.tasks("vi")[0].read(Source(tmp_path))


def test_pairs_left_out_are_counted(tmp_path):
    (tmp_path / "x.txt").write_text("Eins.\n\n", encoding="utf-8")
    (tmp_path / "y.txt").write_text("One.\n\n", encoding="utf-8")
    data = PAIRS.tasks("de")[0].read(Source(pairs=(tmp_path / "x.txt", tmp_path / "y.txt")))
    assert (len(data.items), data.left_out) == (1, {"both sides are empty": 1})


@pytest.mark.parametrize(
    ("set_name", "name"), [(None, "alignment_vi"), ("flores", "alignment_flores_vi"), ("pairs", "alignment_pairs_vi")]
)
def test_names_of_tasks(set_name, name):
    task = alignment_task(set_name, "vie_Latn")
    assert (task.name, task.language, task.benchmark) == (name, "vi", "alignment")
    assert [metric.name for metric in task.metrics] == ["retrieval_accuracy", "centered_retrieval_accuracy", "cosine"]


def write_sides(folder: Path, target: str, english: str, text: str) -> None:
    for name in (target, english):
        write_file(folder / name, f"{text}\n")


def test_the_first_set_that_is_there_is_read(tmp_path):
    task = alignment_task(None, "de")
    tatoeba_task = alignment_task("tatoeba", "de")
    with pytest.raises(MissingDataError, match=r"no parallel text in German \(FLORES-200, NTREX-128, Tatoeba\)"):
        task.read(Source(tmp_path))
    sets = [
        ("tatoeba.deu-eng.deu", "tatoeba.deu-eng.eng", "tatoeba"),
        ("newstest2019-ref.deu.txt", "newstest2019-src.eng.txt", "ntrex"),
        ("deu_Latn.dev", "eng_Latn.dev", "flores"),
    ]
    for target, english, text in sets:
        write_sides(tmp_path, target, english, text)
        assert task.read(Source(tmp_path)).items[0].target == text
        assert tatoeba_task.read(Source(tmp_path)).items[0].target == "tatoeba"


def test_a_malformed_set_is_refused_and_not_passed_over(tmp_path):
    write_sides(tmp_path, "tatoeba.deu-eng.deu", "tatoeba.deu-eng.eng", "tatoeba")
    write_sides(tmp_path, "deu_Latn.devtest", "eng_Latn.devtest", "flores")
    (tmp_path / "deu_Latn.devtest").write_text("a\nb\n")
    with pytest.raises(UsageError, match="has 2 lines"):
        alignment_task(None, "de").read(Source(tmp_path))


def test_own_pairs_come_first(tmp_path):
    write_sides(tmp_path, "deu_Latn.devtest", "eng_Latn.devtest", "flores")
    write_sides(tmp_path, "x.txt", "y.txt", "own")
    source = Source(tmp_path, pairs=(tmp_path / "x.txt", tmp_path / "y.txt"))
    assert alignment_task(None, "de").read(source).items[0].target == "own"
    assert alignment_task("flores", "de").read(source).items[0].target == "flores"
    with pytest.raises(UsageError, match="alignment_pairs_de: needs the option --pairs FILE"):
        alignment_task("pairs", "de").read(Source(tmp_path))
