"""What is kept on disk, and what a kill may do to it."""

from __future__ import annotations

import pytest

from pivotune.errors import UsageError
from pivotune.evaluation.cache import AnswerCache
from pivotune.evaluation.requests import Generation, Likelihood, LogProbability, Measurement

ONE, TWO = Likelihood("a", " b"), Generation("a", 8, ("\n",))
ANSWERS = {ONE: LogProbability(-1.2345678901234567, 3), TWO: "câu\ntrả lời \u2028"}
IDENTITY = {"model": "x", "dtype": "auto"}


def test_answers_come_back_exactly(tmp_path):
    AnswerCache(tmp_path, IDENTITY).add(ANSWERS)
    again = AnswerCache(tmp_path, IDENTITY)
    assert again.get(ONE) == ANSWERS[ONE]
    assert again.get(TWO) == ANSWERS[TWO]
    assert again.get(Likelihood("a", " c")) is None
    # A generation, a likelihood and a measurement of the same text are different questions.
    assert again.get(Measurement("a", " b")) is None


def test_another_model_has_other_answers(tmp_path):
    AnswerCache(tmp_path, IDENTITY).add(ANSWERS)
    assert AnswerCache(tmp_path, {**IDENTITY, "model": "y"}).get(ONE) is None


def test_a_line_cut_short_loses_itself_only(tmp_path):
    cache = AnswerCache(tmp_path, IDENTITY)
    cache.add({ONE: ANSWERS[ONE]})
    cache.add({TWO: ANSWERS[TWO]})
    cache.path.write_bytes(cache.path.read_bytes()[:-10])
    again = AnswerCache(tmp_path, IDENTITY)
    assert again.get(ONE) == ANSWERS[ONE]
    assert again.get(TWO) is None
    again.add({TWO: ANSWERS[TWO]})
    assert AnswerCache(tmp_path, IDENTITY).get(TWO) == ANSWERS[TWO]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = AnswerCache(None, IDENTITY)
    cache.add(ANSWERS)
    assert cache.get(ONE) == ANSWERS[ONE]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--cache"):
        AnswerCache(tmp_path / "file" / "cache", IDENTITY)


def test_an_answer_to_another_kind_of_question_is_asked_anew(tmp_path):
    cache = AnswerCache(tmp_path, IDENTITY)
    cache.add(ANSWERS)
    lines = cache.path.read_text(encoding="utf-8").splitlines()
    damaged = [line.replace("[-1.2345678901234567, 3]", '"text"') for line in lines]
    cache.path.write_text("\n".join(damaged) + "\n", encoding="utf-8")
    again = AnswerCache(tmp_path, IDENTITY)
    assert again.get(ONE) is None
    assert again.get(TWO) == ANSWERS[TWO]
