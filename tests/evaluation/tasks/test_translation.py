"""Translation tasks: two directions, what is asked, and what is counted."""

from __future__ import annotations

import numpy as np
import pytest

from pivotune.errors import UsageError
from pivotune.evaluation.sources import Source
from pivotune.evaluation.tasks.translation import FLORES, NTREX, PAIRS, TATOEBA
from pivotune.results import corpus_metrics
from pivotune.results.corpus_metrics import bleu_from_statistics, chrf_from_statistics

pytest.importorskip("sacrebleu", reason="the extra eval is not installed")


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


def test_what_is_asked(source):
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
    monkeypatch.setattr(corpus_metrics, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"flores_en-vi: .* need sacrebleu"):
        FLORES.tasks("vi")[0].read(Source(tmp_path))


def test_pairs_left_out_are_counted(tmp_path):
    (tmp_path / "x.txt").write_text("Eins.\n\n", encoding="utf-8")
    (tmp_path / "y.txt").write_text("One.\n\n", encoding="utf-8")
    data = PAIRS.tasks("de")[0].read(Source(pairs=(tmp_path / "x.txt", tmp_path / "y.txt")))
    assert (len(data.items), data.left_out) == (1, {"both sides are empty": 1})
