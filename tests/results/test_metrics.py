from __future__ import annotations

import math
from statistics import fmean, stdev

import numpy as np
import pytest

from pivotune.results import metrics
from pivotune.results.corpus_metrics import bleu_from_statistics, chrf_from_statistics
from pivotune.results.metrics import Metric, bootstrap, item_vectors, jackknife, statistic, summarize

F1 = Metric("f1", "mean", ("f1",), 100.0)
NLL = Metric("nll", "ratio", ("nll", "tokens"), higher_is_better=False)
CHRF = Metric("chrf++", "chrf", ("counts",))
BLEU = Metric("bleu", "bleu", ("counts",))


def corpus_records(count: int, width: int) -> list[dict]:
    """Return possible counts of sentences: no more matches than n-grams in hypothesis or reference."""
    random = np.random.default_rng(0)
    records = []
    for _ in range(count):
        if width == 24:
            totals = random.integers(5, 40, size=(8, 2))
            matches = [int(random.integers(0, min(pair) + 1)) for pair in totals]
            counts = [n for pair, same in zip(totals, matches, strict=True) for n in (*map(int, pair), same)]
        else:
            totals = [int(n) for n in random.integers(10, 30, size=4)]
            matches = [int(random.integers(0, n + 1)) for n in totals]
            counts = [totals[0], int(random.integers(10, 30)), *matches, *totals]
        records.append({"counts": counts})
    return records


def test_mean_and_its_standard_error():
    values = [0.0, 1.0, 0.5, 0.25, 1.0]
    figure = summarize(F1, [{"f1": value} for value in values])
    assert figure.value == pytest.approx(100 * fmean(values))
    assert figure.stderr == pytest.approx(100 * stdev(values) / math.sqrt(5))
    assert figure.n == 5


def test_items_without_the_metric_do_not_count():
    with_gaps = [{"f1": 1.0}, {"f1": None}, {}, {"f1": 0.0}, {"f1": 1}]
    assert summarize(F1, with_gaps) == summarize(F1, [{"f1": 1.0}, {"f1": 0.0}, {"f1": True}])
    assert summarize(F1, [{}, {"f1": None}]).to_dict() == {"value": None, "stderr": None, "n": 0, **F1.to_dict()}


def test_one_item_and_equal_items():
    one = summarize(F1, [{"f1": 0.5}])
    assert (one.value, one.stderr, one.n) == (50.0, None, 1)
    assert summarize(F1, [{"f1": 0.1}] * 10).stderr == pytest.approx(0, abs=1e-12)
    assert summarize(CHRF, corpus_records(1, 24)).stderr is None


def test_ratio_equals_the_naive_one():
    random = np.random.default_rng(1)
    tokens = random.integers(1, 50, 300)
    nll = 2.0 * tokens + random.standard_normal(300) * np.sqrt(tokens)
    figure = summarize(NLL, [{"nll": float(a), "tokens": int(b)} for a, b in zip(nll, tokens, strict=True)])
    assert figure.value == pytest.approx(nll.sum() / tokens.sum())
    # The value is not the mean of ratios, and the error agrees with resampling whole items.
    resampled = [nll[pick].sum() / tokens[pick].sum() for pick in random.integers(0, 300, (4000, 300))]
    assert figure.stderr == pytest.approx(np.std(resampled), rel=0.06)
    assert abs(figure.value - np.mean(nll / tokens)) > 1e-3


def test_ratio_without_anything_below_is_undefined():
    figure = summarize(NLL, [{"nll": 0.0, "tokens": 0}, {"nll": 0.0, "tokens": 0}])
    assert (figure.value, figure.stderr, figure.n) == (None, None, 2)


@pytest.mark.parametrize(
    ("metric", "width", "naive"), [(CHRF, 24, chrf_from_statistics), (BLEU, 10, bleu_from_statistics)]
)
def test_corpus_metrics_are_of_the_summed_counts(metric, width, naive):
    records = corpus_records(60, width)
    counts = np.array([record["counts"] for record in records])
    figure = summarize(metric, records)
    assert figure.value == pytest.approx(float(naive(counts.sum(axis=0))))
    random = np.random.default_rng(3)
    resampled = [float(naive(counts[pick].sum(axis=0))) for pick in random.integers(0, 60, (2000, 60))]
    assert figure.stderr == pytest.approx(np.std(resampled), rel=0.1)
    assert summarize(metric, records) == figure


def test_what_is_no_number_is_named():
    with pytest.raises(ValueError, match=r"item q7: f1 is made of a number, found .*good"):
        summarize(F1, [{"item": "q7", "f1": "good"}])
    with pytest.raises(ValueError, match=r"item 1: chrf\+\+ is made of 24 numbers, found \[1, 2\]"):
        summarize(CHRF, [*corpus_records(1, 24), {"counts": [1, 2]}])


@pytest.mark.parametrize(("metric", "width"), [(F1, 2), (NLL, 2), (CHRF, 24), (BLEU, 10)])
def test_bootstrap_equals_gathering_items_one_resample_at_a_time(metric, width):
    random = np.random.default_rng(5)
    vectors = random.integers(1, 9, size=(3, 7, width)).astype(float)
    fast = bootstrap(metric, vectors, 50, seed=2)
    assert fast.shape == (3, 50)
    picks = np.random.default_rng([2, 0]).integers(0, 7, size=(50, 7))
    for run in range(3):
        naive = [float(statistic(metric, vectors[run][pick].sum(axis=0))) for pick in picks]
        np.testing.assert_allclose(fast[run], naive, rtol=1e-12)


def test_bootstrap_in_small_chunks_without_keeping(monkeypatch):
    vectors = np.random.default_rng(0).random((2, 11, 2)) + 1
    whole = bootstrap(F1, vectors, 40, seed=0)
    monkeypatch.setattr(metrics, "_KEPT", 0)
    np.testing.assert_array_equal(bootstrap(F1, vectors, 40, seed=0), whole)
    monkeypatch.setattr(metrics, "_CHUNK", 30)
    pieces = bootstrap(F1, vectors, 40, seed=0)
    assert pieces.shape == (2, 40)
    assert np.isfinite(pieces).all()


def test_seeds_are_independent():
    vectors = np.stack([np.random.default_rng(0).random(200), np.ones(200)], axis=-1)[None]
    first, seeded = (bootstrap(F1, vectors, 2000, seed)[0] for seed in (0, 1))
    assert abs(np.corrcoef(first, seeded)[0, 1]) < 0.1
    np.testing.assert_array_equal(first, bootstrap(F1, vectors, 2000, 0)[0])


def test_jackknife_of_a_mean_is_its_deviations():
    vectors = np.ones((2, 30, 2))
    vectors[..., 0] = np.random.default_rng(0).random((2, 30))
    influences = jackknife(F1, vectors)
    deviations = vectors[..., 0].mean(axis=1, keepdims=True) - vectors[..., 0]
    np.testing.assert_allclose(influences, 100 * deviations / math.sqrt(30 * 29), atol=1e-12)
    np.testing.assert_allclose((influences**2).sum(axis=1), vectors[..., 0].var(axis=1, ddof=1) * 100**2 / 30)


# BLEU's brevity penalty has a kink where answers are as long as references, as here.
@pytest.mark.parametrize(("metric", "width", "tolerance"), [(CHRF, 24, 0.05), (BLEU, 10, 0.25)])
def test_jackknife_of_a_corpus_metric_has_the_variance_of_resamples(metric, width, tolerance):
    vectors, _ = item_vectors(metric, corpus_records(150, width))
    resampled = bootstrap(metric, vectors[None], 4000, seed=0)
    assert (jackknife(metric, vectors[None]) ** 2).sum() == pytest.approx(resampled.var(), rel=tolerance)


def test_vectors_of_missing_items_are_zero():
    vectors, present = item_vectors(NLL, [{"nll": 3.0, "tokens": 2}, {"nll": None, "tokens": 2}, {"nll": 1.0}])
    assert vectors.tolist() == [[3.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert present.tolist() == [True, False, False]
