"""Compare scores of summed counts with sacrebleu's Python interface and command line."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivotune.results import corpus_metrics
from pivotune.results.corpus_metrics import (
    bleu_from_statistics,
    bleu_statistics,
    bleu_tokenizer,
    chrf_from_statistics,
    chrf_statistics,
)

sacrebleu = pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
from sacrebleu.metrics import BLEU, CHRF  # noqa: E402

CORPORA = {
    "vi": (
        ["Anh ấy nên cẩn thận hơn .", "Tôi muốn ở bên em, và (có lẽ) mãi mãi.", "", "mèo"],
        ["Lẽ ra anh ấy phải thận trọng hơn.", "Em vẫn muốn ở bên anh, (có lẽ) mãi mãi.", "Chó sủa.", "con mèo"],
    ),
    "zh": (
        ["我们试试看！", "我现在该去睡觉了。", "GPU有2个核心", "好"],
        ["我們試試看！", "我该去睡觉了。", "这个 GPU 有 2 个核心。", "你在干什么啊？"],
    ),
    "en": (
        ["The cat sat on the mat, didn't it?", "It's 3.14 (about).", "a"],
        ["A cat sat on a mat, didn't it?", "It is about 3.14.", "a"],
    ),
    "ja": (["今日は天気がいい。", "猫"], ["今日は良い天気です。", "犬と猫"]),
}
TEXT = st.text(alphabet="ab c.,(é猫ก'-\n", max_size=24)
REFERENCE = TEXT.filter(str.strip)


def sums(hypotheses, references, language):
    pairs = list(zip(hypotheses, references, strict=True))
    chrf = np.sum([chrf_statistics(*pair) for pair in pairs], axis=0)
    bleu = np.sum([bleu_statistics(*pair, language) for pair in pairs], axis=0)
    return chrf, bleu


def command_line(tmp_path, hypotheses, references, tokenizer):
    """Return chrF++ and BLEU of `python -m sacrebleu`, to ten digits."""
    (tmp_path / "ref").write_text("\n".join(references) + "\n", encoding="utf-8")
    (tmp_path / "hyp").write_text("\n".join(hypotheses) + "\n", encoding="utf-8")
    options = ["-m", "chrf", "bleu", "--chrf-word-order", "2", "-tok", tokenizer, "-w", "10", "-f", "json"]
    command = [sys.executable, "-m", "sacrebleu", str(tmp_path / "ref"), "-i", str(tmp_path / "hyp"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return {score["name"]: score["score"] for score in found}


@pytest.mark.parametrize("language", CORPORA)
def test_corpus_scores_equal_sacrebleus_command_line(language, tmp_path):
    hypotheses, references = CORPORA[language]
    tokenizer = bleu_tokenizer(language)
    expected = command_line(tmp_path, hypotheses, references, tokenizer)
    chrf, bleu = sums(hypotheses, references, language)
    assert chrf_from_statistics(chrf) == pytest.approx(expected["chrF2++"], abs=1e-9)
    assert bleu_from_statistics(bleu) == pytest.approx(expected["BLEU"], abs=1e-9)
    assert 0 < expected["chrF2++"] < 100


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(TEXT, REFERENCE), min_size=1, max_size=5), st.sampled_from(["en", "zh", "th"]))
def test_random_texts_score_as_sacrebleu_says(pairs, language):
    hypotheses, references = map(list, zip(*pairs, strict=True))
    chrf, bleu = sums(hypotheses, references, language)
    expected = CHRF(word_order=2).corpus_score(hypotheses, [references]).score
    assert chrf_from_statistics(chrf) == pytest.approx(expected, abs=1e-9)
    expected = BLEU(tokenize=bleu_tokenizer(language)).corpus_score(hypotheses, [references]).score
    assert bleu_from_statistics(bleu) == pytest.approx(expected, abs=1e-9)


COUNTS = st.lists(st.integers(0, 6), min_size=8, max_size=8)


@settings(max_examples=300, deadline=None)
@given(COUNTS, COUNTS, COUNTS)
def test_chrf_of_any_counts_equals_sacrebleus(hypothesis, reference, matches):
    rows = zip(hypothesis, reference, matches, strict=True)
    counts = [count for h, r, m in rows for count in (h if r else 0, r, min(h, r, m))]
    # This private function computes the public corpus score from counts; no text gives such counts.
    assert chrf_from_statistics(counts) == pytest.approx(CHRF(word_order=2)._compute_f_score(counts), abs=1e-9)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=4, max_size=4), st.integers(0, 9), st.integers(0, 9))
def test_bleu_of_any_counts_equals_sacrebleus(matches, hypothesis, reference):
    totals = [max(0, hypothesis - order) for order in range(4)]
    matches = [min(match, total) for match, total in zip(matches, totals, strict=True)]
    expected = BLEU.compute_bleu(matches.copy(), totals.copy(), hypothesis, reference, smooth_method="exp").score
    found = bleu_from_statistics([hypothesis, reference, *matches, *totals])
    assert found == pytest.approx(expected, abs=1e-9)


def test_worked_example_of_chrf():
    """Hypothesis 'ab', reference 'abc': orders 1, 2 of characters and 1 of words count on both sides."""
    counts = chrf_statistics("ab", "abc")
    assert counts[:6] == [2, 3, 2, 1, 2, 1]
    assert counts[6:9] == [0, 1, 0]
    assert counts[18:] == [1, 1, 0, 0, 0, 0]
    precision, recall = (1 + 1 + 0) / 3, (2 / 3 + 1 / 2 + 0) / 3
    assert chrf_from_statistics(counts) == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))


def test_worked_example_of_bleu():
    """Six of seven words right, in two runs: precisions 6/7, 4/6, 2/5 and, for no 4-gram, 1/2 of 1/4."""
    counts = bleu_statistics("the cat sat on the red mat", "the cat sat by the red mat today", "en")
    assert counts == [7, 8, 6, 4, 2, 0, 7, 6, 5, 4]
    expected = 100 * np.exp(1 - 8 / 7) * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 8) ** 0.25
    assert bleu_from_statistics(counts) == pytest.approx(expected)


def test_a_copy_scores_100_and_an_empty_translation_0():
    for hypothesis, expected in (("The cat sat on the mat.", 100.0), ("", 0.0)):
        chrf, bleu = sums([hypothesis], ["The cat sat on the mat."], "en")
        assert chrf_from_statistics(chrf) == pytest.approx(expected)
        assert bleu_from_statistics(bleu) == pytest.approx(expected)


def test_leading_dimensions_are_kept():
    generator = np.random.default_rng(0)
    chrf, bleu = generator.integers(0, 9, (2, 3, 24)), generator.integers(0, 9, (2, 3, 10))
    assert chrf_from_statistics(chrf).shape == bleu_from_statistics(bleu).shape == (2, 3)
    for row in np.ndindex(2, 3):
        assert chrf_from_statistics(chrf)[row] == chrf_from_statistics(chrf[row])
        assert bleu_from_statistics(bleu)[row] == bleu_from_statistics(bleu[row])


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [("vi", "13a"), ("zh", "zh"), ("zho_Hant", "zh"), ("th", "char"), ("km", "char"), ("lo", "char"), ("my", "char"),
     ("en", "13a"), ("ar", "13a")],
)  # fmt: skip
def test_tokenizer_by_language(language, tokenizer):
    assert bleu_tokenizer(language) == tokenizer


@pytest.mark.parametrize("language", ["ja", "ko"])
@pytest.mark.parametrize("is_installed", [True, False])
def test_mecab_is_used_where_it_is_installed(language, is_installed, monkeypatch):
    monkeypatch.setattr(corpus_metrics, "find_spec", lambda name: object() if is_installed else None)
    bleu_tokenizer.cache_clear()
    try:
        assert bleu_tokenizer(language) == (f"{language}-mecab" if is_installed else "char")
    finally:
        bleu_tokenizer.cache_clear()


def test_without_sacrebleu_counts_are_still_scored_and_the_check_says_what_to_install(monkeypatch):
    monkeypatch.setattr(corpus_metrics, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert chrf_from_statistics([5, 5, 5] * 8) == pytest.approx(100)
    assert bleu_from_statistics([9, 9, 9, 8, 7, 6, 9, 8, 7, 6]) == pytest.approx(100)
