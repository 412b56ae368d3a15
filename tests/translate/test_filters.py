"""Filters of translated rows: scores of back-translations and of embeddings, kept over kills, and the rows left out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build_tiny_model, build_tiny_tokenizer
from sacrebleu.metrics.chrf import CHRF
from tiny_translators import save_tiny_translator
from transformers import AutoConfig, AutoModel, AutoTokenizer

import pivotune.translate.filters as filters
from pivotune.data.rows import Row
from pivotune.errors import UsageError
from pivotune.translate.filters import (
    RowFilter,
    back_translation_filter,
    back_translation_score,
    embed,
    similarity_filter,
)

ROWS = [Row(f"Câu {n}", f"Đáp {n}.", f"Question {n}", f"Answer {n}.", number=n + 1) for n in range(5)]


def counting(minimum: float = 3, model: str = "m") -> tuple[RowFilter, list[list[str]]]:
    """Return a filter whose score is the row's number, and the rows that it scores."""
    seen: list[list[str]] = []

    def score(rows):
        seen.append([row.prompt_en for row in rows])
        return [float(row.number) for row in rows]

    return RowFilter("back_translation", "chrF++", model, minimum, lambda: (score, 2)), seen


def test_scores_are_kept_by_model_and_texts(tmp_path):
    path = tmp_path / "pairs.scores.jsonl"
    one, seen = counting()
    shown: list[int] = []
    one.score(path, ROWS[:3], shown.append)
    assert (one.scores, shown) == ([1, 2, 3], [0, 2, 3])
    again, seen = counting()
    again.score(path, ROWS, shown.append)
    assert (again.scores, seen) == ([1, 2, 3, 4, 5], [["Question 3", "Question 4"]])
    other, seen = counting(model="other")
    other.score(path, ROWS[:1], shown.append)
    assert seen == [["Question 0"]]
    changed = [Row("Khác", ROWS[0].completion, ROWS[0].prompt_en, ROWS[0].completion_en)]
    third, seen = counting()
    third.score(path, changed, shown.append)
    assert seen == [["Question 0"]]
    none = RowFilter("back_translation", "chrF++", "m", 0, pytest.fail)  # no model is loaded
    none.score(path, ROWS, shown.append)
    assert none.scores == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("cut", [1, 20])
def test_a_kill_within_a_line_loses_that_line_alone(tmp_path, cut):
    path = tmp_path / "pairs.scores.jsonl"
    counting()[0].score(path, ROWS[:3], lambda done: None)
    path.write_bytes(path.read_bytes()[:-cut])
    again, seen = counting()
    again.score(path, ROWS, lambda done: None)
    assert again.scores == [1, 2, 3, 4, 5]
    assert [prompt for part in seen for prompt in part] == ["Question 2"] * (cut > 1) + ["Question 3", "Question 4"]
    none = RowFilter("back_translation", "chrF++", "m", 0, pytest.fail)
    none.score(path, ROWS, lambda done: None)


def test_rows_below_the_limit_and_rows_without_a_number():
    row_filter = counting()[0]
    row_filter.scores = [2.9, 3.0, float("nan"), 50]
    assert row_filter.low() == [0, 2]


# ---- back-translation ----


def test_the_score_is_sacrebleus():
    back = ["The three colours are red and blue.", "Yes, of course it is, my friend, it really is so."]
    english = ["The three colors are red and blue.", "Yes, of course it is my friend; it surely is true."]
    whole = CHRF(word_order=2).corpus_score(back, [english]).score
    longer = CHRF(word_order=2).corpus_score(back[1:], [english[1:]]).score
    assert longer < whole
    # The first text is short: it counts within the row alone.
    assert back_translation_score(back, english) == pytest.approx(longer, abs=0.01)
    assert back_translation_score([back[0], english[1]], english) > longer
    assert back_translation_score(["Yeah.", english[1]], ["Yes.", english[1]]) > 90
    assert back_translation_score([english[0], "Bread is baked of flour and water in the oven."], english) < 20


def test_the_texts_are_translated_back(monkeypatch):
    rows = [
        Row("Chào {name}", "Có.\n- Một", "Hello {name}", "Yes.\n- One"),
        Row("Một", "Một", "Quite another thing", "Nothing of that", history=[{"role": "user", "content": "Một"}],
            history_en=[{"role": "user", "content": "One"}]),
    ]  # fmt: skip
    words = {"Chào {name}": "Hello {name}", "Có.": "Yes.", "Một": "One"}

    class Translator(SimpleNamespace):
        def __call__(self, texts):
            return [words[text] for text in texts]

    row_filter = back_translation_filter("m", lambda: Translator(rows_per_step=7), 30)
    scorer, step = row_filter.load()
    good, bad = scorer(rows)
    assert (good, step) == (100, 7)
    assert bad < 30
    monkeypatch.setattr(filters, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--back-translation: chrF\+\+ needs sacrebleu: pip install"):
        back_translation_filter("m", pytest.fail, 30)


# ---- embeddings ----


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = build_tiny_tokenizer(model_max_length=64)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def mean_of_states(folder: Path, text: str) -> np.ndarray:
    """Embed one text without padding."""
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer([text], truncation=True, max_length=64, return_tensors="pt")
    with torch.inference_mode():
        mean = model(**inputs).last_hidden_state[0].mean(dim=0).numpy()
    return mean / np.linalg.norm(mean)


def test_embeddings_in_batches_equal_those_of_single_texts(encoder):
    texts = ["Hi", "Which number is three?", "long " * 90, "Đáp 1."]
    model, tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
    found = embed(model, tokenizer, texts)
    for text, vector in zip(texts, found, strict=True):
        np.testing.assert_allclose(vector, mean_of_states(encoder, text), atol=1e-5)


def test_a_row_has_the_lowest_similarity_of_its_texts(encoder):
    row_filter = similarity_filter(str(encoder), 0.7)
    scorer, _ = row_filter.load()
    rows = [Row("Hello", "Same", "Hello", "Same"), Row("Hello", "Ni moja, namba ya 1.", "Hello", "B")]
    expected = float(mean_of_states(encoder, "Ni moja, namba ya 1.") @ mean_of_states(encoder, "B"))
    assert expected < 0.95
    assert scorer(rows) == [1.0, pytest.approx(expected, abs=1e-3)]


def test_models_that_are_no_encoders(tmp_path, encoder):
    decoder, translator = tmp_path / "decoder", save_tiny_translator(tmp_path / "translator", "nllb")
    build_tiny_model().save_pretrained(decoder)
    build_tiny_tokenizer().save_pretrained(decoder)
    for folder in (decoder, translator):
        with pytest.raises(UsageError, match=f"--similarity: {folder} is no encoder; allowed: one such as"):
            similarity_filter(str(folder), 0.7)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((encoder / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="only safetensors are read and the weights are a pickle"):
        similarity_filter(str(pickled), 0.7)
    # Weights of another depth.
    config = json.loads((encoder / "config.json").read_text())
    (pickled / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (pickled / name).write_bytes((encoder / name).read_bytes())
    with pytest.raises(UsageError, match=r"pickled: 16 weights are not in the files, first encoder.layer.2"):
        similarity_filter(str(pickled), 0.7).load()
