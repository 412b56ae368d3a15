"""Parallel text in each publisher's layout and in a user's own files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pivotune.errors import UsageError
from pivotune.evaluation.parallel import Pair, read_parallel
from pivotune.evaluation.sources import MissingDataError, Source
from pivotune.evaluation.tasks import tables


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(set_name: str, source: Source, language: str = "de") -> str:
    with pytest.raises(UsageError) as error:
        read_parallel(set_name, f"{set_name}_{language}", source, language)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def flores(tmp_path):
    """German and English, two sentences of devtest and three of dev, deep in a folder."""
    folder = tmp_path / "any" / "flores200_dataset"
    write(folder / "devtest/deu_Latn.devtest", "Eins.\nZwei.\n")
    write(folder / "devtest/eng_Latn.devtest", "One.\nTwo.\n")
    write(folder / "dev/deu_Latn.dev", "A\nB\nC\n")
    write(folder / "dev/eng_Latn.dev", "a\nb\nc\n")
    return folder


def test_flores_reads_devtest(flores, tmp_path):
    text = read_parallel("flores", "flores_de", Source(tmp_path), "de")
    assert text.pairs == [Pair("devtest-1", "Eins.", "One."), Pair("devtest-2", "Zwei.", "Two.")]
    assert text.split == "devtest"
    below = "any/flores200_dataset/devtest"
    assert text.origin == [f"{below}/deu_Latn.devtest", f"{below}/eng_Latn.devtest"]
    assert text.left_out == {}


@pytest.mark.parametrize(("asked", "split"), [("dev", "dev"), ("validation", "dev"), ("test", "devtest")])
def test_flores_reads_the_split_asked_for(flores, tmp_path, asked, split):
    text = read_parallel("flores", "flores_de", Source(tmp_path, split=asked), "de")
    assert (text.split, len(text.pairs)) == (split, 3 if split == "dev" else 2)


def test_flores_falls_back_to_dev_only_where_no_split_was_asked_for(flores, tmp_path):
    (flores / "devtest/deu_Latn.devtest").unlink()
    assert read_parallel("flores", "flores_de", Source(tmp_path), "de").split == "dev"
    assert "no deu_Latn.devtest with eng_Latn.devtest below" in refusal("flores", Source(tmp_path, split="devtest"))


def test_flores_names_what_is_missing_and_where_to_get_it(flores, tmp_path):
    with pytest.raises(
        MissingDataError, match=r"flores_vi: no vie_Latn\.devtest .* below .*github\.com/facebookresearch"
    ):
        read_parallel("flores", "flores_vi", Source(tmp_path), "vi")
    (flores / "dev/eng_Latn.dev").unlink()
    (flores / "devtest/eng_Latn.devtest").unlink()
    assert "with eng_Latn.devtest or deu_Latn.dev with eng_Latn.dev below" in refusal("flores", Source(tmp_path))


def test_flores_has_no_other_split(flores, tmp_path):
    message = refusal("flores", Source(tmp_path, split="train"))
    assert "flores_de: has no split 'train'; allowed: devtest, dev" in message


def test_two_files_of_one_name_are_refused(flores, tmp_path):
    write(tmp_path / "copy/deu_Latn.devtest", "Eins.\nZwei.\n")
    assert "are both there" in refusal("flores", Source(tmp_path))


@pytest.mark.parametrize(
    ("language", "name"),
    [("de", "deu"), ("zh", "zho-CN"), ("zho_Hant", "zho-TW"), ("fa", "fas"), ("sw", "swa"), ("sr", "srp-Cyrl"),
     ("pt", "por-BR"), ("ar", "arb")],
)  # fmt: skip
def test_ntrex_finds_its_own_codes(tmp_path, language, name):
    write(tmp_path / f"NTREX-128/newstest2019-ref.{name}.txt", "x y\nz\n")
    write(tmp_path / "NTREX-128/newstest2019-src.eng.txt", "X Y\nZ\n")
    text = read_parallel("ntrex", "ntrex", Source(tmp_path), language)
    assert text.pairs == [Pair("test-1", "x y", "X Y"), Pair("test-2", "z", "Z")]


def test_ntrex_prefers_the_language_to_a_region(tmp_path):
    for name in ("por", "por-BR"):
        write(tmp_path / f"newstest2019-ref.{name}.txt", f"{name}\n")
    write(tmp_path / "newstest2019-src.eng.txt", "X\n")
    assert read_parallel("ntrex", "ntrex_pt", Source(tmp_path), "pt").pairs[0].target == "por"


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
    write(tmp_path / f"v1/tatoeba.{code}-eng.{code}", "x\n")
    write(tmp_path / f"v1/tatoeba.{code}-eng.eng", "X\n")
    assert read_parallel("tatoeba", "tatoeba", Source(tmp_path), language).pairs == [Pair("test-1", "x", "X")]


def test_tatoeba_names_what_is_missing(tmp_path):
    for _ in range(2):
        assert "no tatoeba.deu-eng.deu, with the .eng file beside it below" in refusal("tatoeba", Source(tmp_path))
        write(tmp_path / "tatoeba.deu-eng.deu", "x\n")


def test_a_second_script_has_no_tatoeba(tmp_path):
    assert "Tatoeba has no code for Arabic (Latin script)" in refusal("tatoeba", Source(tmp_path), "arb_Latn")


def own(tmp_path, target: str | bytes, english: str | bytes) -> Source:
    return Source(pairs=(write(tmp_path / "x.txt", target), write(tmp_path / "y.txt", english)))


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
    assert text.pairs == [Pair("all-1", "Eins.", "One."), Pair("all-2", "Zwei.", "Two.")]


def test_only_a_newline_ends_a_line(tmp_path):
    text = read_parallel("pairs", "pairs_de", own(tmp_path, "a\u2028b\x0cc\n", "d\x85e\n"), "de")
    assert text.pairs == [Pair("all-1", "a\u2028b\x0cc", "d\x85e")]


def test_lines_that_are_empty_on_both_sides_are_left_out_and_counted(tmp_path):
    text = read_parallel("pairs", "pairs_de", own(tmp_path, "Eins.\n\n \nZwei.\n", "One.\n\n\nTwo.\n"), "de")
    assert [pair.id for pair in text.pairs] == ["all-1", "all-4"]
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
        "pairs_de: needs the option --pairs FILE (and --english FILE, where the English side is apart)"
    )
    assert "x.txt: no such file" in refusal("pairs", Source(pairs=(tmp_path / "x.txt", tmp_path / "y.txt")))
    lonely = write(tmp_path / "x.txt", "Eins.\n")
    assert "holds one side only; give the other with --english FILE" in refusal("pairs", Source(pairs=(lonely, None)))


def rows(*numbers: int, suffix: str = "_en") -> list[dict[str, str]]:
    return [
        {"prompt": f"Frage {n}", "completion": "Ja.", f"prompt{suffix}": f"Question {n}", f"completion{suffix}": "Yes."}
        for n in numbers
    ]


def jsonl(path: Path, records: list[dict[str, str]]) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def test_own_pairs_from_training_data(tmp_path):
    path = jsonl(tmp_path / "pairs.jsonl.gz", rows(1, 2))
    text = read_parallel("pairs", "pairs_de", Source(pairs=(path, None)), "de")
    assert text.pairs == [Pair("1", "Frage 1", "Question 1"), Pair("2", "Frage 2", "Question 2")]
    assert text.origin == [str(path)]


def test_own_pairs_from_two_data_files_joined_by_id(tmp_path):
    target = jsonl(tmp_path / "de.jsonl", [{"id": i, "prompt": f"{i}\n x", "completion": "."} for i in "ab"])
    english = jsonl(tmp_path / "en.jsonl", [{"id": i, "prompt": i.upper(), "completion": "."} for i in "ba"])
    text = read_parallel("pairs", "pairs_de", Source(pairs=(target, english)), "de")
    assert text.pairs == [Pair("a", "a x", "A"), Pair("b", "b x", "B")]
    assert text.origin == [str(target), str(english)]


def test_own_rows_without_english_are_refused_without_naming_a_training_option(tmp_path):
    records = [*rows(1), {"prompt": "Frage 2", "completion": "Ja."}]
    message = refusal("pairs", Source(pairs=(jsonl(tmp_path / "p.jsonl", records), None)))
    assert "p.jsonl, line 2: `prompt_en` is missing" in message
    assert "on_bad_row" not in message


def test_two_files_of_different_form_are_refused(tmp_path):
    data, plain = jsonl(tmp_path / "p.jsonl", rows(1)), write(tmp_path / "y.txt", "One.\n")
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
    assert text.pairs[1] == Pair("devtest-2", "cmn_Hans 1", "eng_Latn 1")
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
    assert read_parallel("tatoeba", "tatoeba_de", Source(), "de").pairs == [Pair("test-1", "Eins.", "One.")]


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
    assert (len(chinese.pairs), chinese.split, chinese.left_out) == (1012, "devtest", {})
    assert chinese.pairs[0].english.startswith('"We now have 4-month-old mice')
    assert len(read_parallel("flores", "flores_zh", Source(shared_data / "eval", split="dev"), "zh").pairs) == 997
    for language in ("vi", "zh", "ar"):
        assert len(read_parallel("tatoeba", "tatoeba", source, language).pairs) == 1000
