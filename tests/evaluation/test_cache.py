"""Answers on disk before and after a kill, and the fingerprint of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_training import save_tiny_model

from pivotune.errors import UsageError
from pivotune.evaluation import cache as cache_module
from pivotune.evaluation.cache import (
    AnswerCache,
    Generation,
    Likelihood,
    LogProbability,
    Measurement,
    model_fingerprint,
)
from pivotune.models.locating import ModelFiles

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


def test_results_beside_the_weights_change_nothing(tmp_path):
    """`--out` may be the model's own folder: its cached answers must stay good."""
    name = save_tiny_model(tmp_path)
    before = model_fingerprint(name)
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "README.md").write_text("a card")
    assert model_fingerprint(name) == before


def test_other_weights_and_other_tokenizers_change_it(tmp_path):
    name = save_tiny_model(tmp_path / "a")
    before = model_fingerprint(name)
    assert model_fingerprint(save_tiny_model(tmp_path / "same")) == before
    assert model_fingerprint(save_tiny_model(tmp_path / "b", seed=1)) != before
    settings = tmp_path / "a" / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps({**content, "clean_up_tokenization_spaces": True, "extra": 1}))
    assert model_fingerprint(name) != before


@pytest.mark.parametrize("filename", ["config.json", "adapter_config.json"])
def test_a_hub_model_is_its_commit(monkeypatch, filename):
    """An adapter's repository has no `config.json`; its base counts too."""
    asked = []

    def locate(name, revision):
        is_adapter = filename.startswith("adapter") and name == "me/model"
        return ModelFiles(name, frozenset([filename if is_adapter else "config.json"]), {})

    def download(location, file, **arguments):
        asked.append((location, file))
        return str(Path("/cache") / location / commits[location] / file)

    commits = {"me/model": "abc", "me/base": "def"}
    monkeypatch.setattr(cache_module, "locate", locate)
    monkeypatch.setattr(cache_module, "base_of", lambda name, files: ("me/base", None))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    first = model_fingerprint("me/model")
    assert ("me/model", filename) in asked
    for name in {location for location, _ in asked}:
        commits[name] += "x"
        changed = model_fingerprint("me/model")
        assert changed != first
        first = changed
