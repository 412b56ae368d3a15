from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from pivotune.compare.significance import Sample, Verdict, difference, holm
from pivotune.errors import UsageError
from pivotune.results.metrics import Metric

F1 = Metric("f1", "mean", ("f1",))
NLL = Metric("nll", "ratio", ("nll", "tokens"), higher_is_better=False)
LENGTH = Metric("length", "mean", ("f1",), higher_is_better=None)


def sample(values, seed: int | None = 0, key: str = "f1", first: int = 0) -> Sample:
    return Sample({f"q{first + index}": {key: float(value)} for index, value in enumerate(values)}, seed)


# ---- over items ----


def test_interval_agrees_with_the_normal_approximation():
    random = np.random.default_rng(0)
    base = random.random(2000)
    gain = 0.02 + 0.3 * random.standard_normal(2000)
    found = difference(F1, [sample(base + gain)], [sample(base)])
    error = gain.std(ddof=1) / math.sqrt(2000)
    assert found.value == pytest.approx(gain.mean())
    assert found.low == pytest.approx(gain.mean() - 1.96 * error, abs=0.08 * error)
    assert found.high == pytest.approx(gain.mean() + 1.96 * error, abs=0.08 * error)
    assert (found.n, found.num_seeds, found.test, found.degrees) == (2000, 0, "bootstrap", None)
    # The resampled p agrees with the normal one.
    assert found.p == pytest.approx(math.erfc(found.value / error / math.sqrt(2)), rel=0.5)


def test_ratio_resamples_numerator_and_denominator_together():
    random = np.random.default_rng(1)
    tokens = random.integers(1, 40, 500)
    ours, theirs = (random.gamma(tokens * shape) for shape in (1.9, 2.0))
    found = difference(
        NLL,
        *(
            [
                Sample(
                    {str(i): {"nll": a, "tokens": int(t)} for i, (a, t) in enumerate(zip(nll, tokens, strict=True))}, 0
                )
            ]
            for nll in (ours, theirs)
        ),
    )
    picks = random.integers(0, 500, (4000, 500))
    naive = [(ours[p].sum() - theirs[p].sum()) / tokens[p].sum() for p in picks]
    low, high = np.percentile(naive, [2.5, 97.5])
    assert found.value == pytest.approx((ours.sum() - theirs.sum()) / tokens.sum())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(2)
    hits = 0
    for _ in range(400):
        base = random.random(60)
        found = difference(F1, [sample(base + 0.1 + 0.5 * random.standard_normal(60))], [sample(base)], resamples=1000)
        hits += found.low <= 0.1 <= found.high
    assert 0.91 <= hits / 400 <= 0.98


def test_pairing_narrows_the_interval():
    random = np.random.default_rng(3)
    base = random.random(300)
    near = base + 0.02 * random.standard_normal(300) + 0.01
    paired = difference(F1, [sample(near)], [sample(base)])
    mixed = difference(F1, [sample(random.permutation(near))], [sample(base)])
    assert paired.high - paired.low < 0.2 * (mixed.high - mixed.low)


@pytest.mark.parametrize("metric", [F1, Metric("percent", "mean", ("f1",), 100.0), NLL])
def test_identical_runs_do_not_differ(metric):
    random = np.random.default_rng(4)
    items = {str(i): {"f1": v, "nll": 7 * v, "tokens": 3} for i, v in enumerate(random.random(997))}
    found = difference(metric, [Sample(items, 0)], [Sample(dict(items), 0)])
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert found.verdict is Verdict.UNDECIDED


def test_order_of_items_does_not_matter():
    random = np.random.default_rng(5)
    base, ours = random.random(200), random.random(200)
    straight = difference(F1, [sample(ours)], [sample(base)])
    mixed = dict(random.permutation(list(sample(ours).items.items())).tolist())
    assert difference(F1, [Sample(mixed, 0)], [sample(base)]) == straight


def test_items_that_only_one_has_are_left_out():
    ours, theirs = sample(np.linspace(0, 1, 50)), sample(np.linspace(0.5, 1, 30), first=20)
    shared = [np.linspace(0, 1, 50)[20:], np.linspace(0.5, 1, 30)]
    found = difference(F1, [ours], [theirs])
    assert found.n == 30
    assert found.value == pytest.approx(shared[0].mean() - shared[1].mean())
    with pytest.raises(UsageError, match="no shared item has f1"):
        difference(F1, [sample([1, 2])], [sample([1, 2], first=5)])


def test_items_without_the_metric_count_for_neither():
    ours = Sample({"a": {"f1": 1.0}, "b": {"f1": None}, "c": {"f1": 0.5}}, 0)
    theirs = Sample({"a": {"f1": 0.0}, "b": {"f1": None}, "c": {"f1": 0.0}}, 0)
    found = difference(F1, [ours], [theirs])
    assert (found.n, found.value) == (2, 0.75)


def test_numbers_that_are_none_are_refused():
    with pytest.raises(UsageError, match="f1 of an item is not a finite number"):
        difference(F1, [sample([1.0, math.nan])], [sample([1.0, 2.0])])


# ---- what may be said ----


def test_direction_of_the_metric():
    random = np.random.default_rng(6)
    base = random.random(100)
    up, down = sample(base + 0.5), sample(base - 0.5)
    lower = Metric("nll", "mean", ("f1",), higher_is_better=False)
    assert difference(F1, [up], [sample(base)]).verdict is Verdict.BETTER
    assert difference(F1, [down], [sample(base)]).verdict is Verdict.WORSE
    assert difference(lower, [up], [sample(base)]).verdict is Verdict.WORSE
    assert difference(lower, [down], [sample(base)]).verdict is Verdict.BETTER
    assert difference(LENGTH, [up], [sample(base)]).verdict is None


@pytest.mark.parametrize("seed", range(40))
def test_an_interval_that_holds_zero_is_never_called_better(seed):
    random = np.random.default_rng(seed)
    base = random.random(30)
    found = difference(F1, [sample(base + 0.04 + 0.1 * random.standard_normal(30))], [sample(base)], resamples=1000)
    holds_zero = found.low <= 0 <= found.high
    assert (found.verdict is Verdict.UNDECIDED) == holds_zero
    if not holds_zero:
        assert found.verdict is (Verdict.BETTER if found.value > 0 else Verdict.WORSE)


@pytest.mark.parametrize(("count", "verdict"), [(2, Verdict.UNDECIDED), (5, Verdict.UNDECIDED), (6, Verdict.BETTER)])
def test_few_items_give_no_verdict(count, verdict):
    found = difference(F1, [sample([1.0] * count)], [sample([0.0] * count)])
    assert (found.value, found.low, found.high) == (1, 1, 1)
    assert found.verdict is verdict


def test_one_item_has_no_interval():
    found = difference(F1, [sample([1.0])], [sample([0.0])])
    assert found.value == 1
    assert math.isnan(found.low)
    assert math.isnan(found.p)
    assert found.verdict is Verdict.UNDECIDED


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


# ---- over seeds ----


def groups(random, *, effect: float, seed_noise: float, item_noise: float, seeds: int = 3, n: int = 100):
    """Return runs of two methods over the same items; every run has an offset of its own."""
    base = random.random(n)

    def runs(shift: float) -> list[Sample]:
        return [
            sample(base + shift + seed_noise * random.standard_normal() + item_noise * random.standard_normal(n), seed)
            for seed in range(seeds)
        ]

    return runs(effect), runs(0.0)


def test_without_item_noise_seeds_are_students_two_sample_test():
    values = np.linspace(0, 1, 40)
    ours = [sample(values + shift, seed) for seed, shift in enumerate((0.3, 0.1, 0.2))]
    theirs = [sample(values + shift, seed) for seed, shift in enumerate((0.05, 0.0, 0.1))]
    found = difference(F1, ours, list(reversed(theirs)))
    test = scipy.stats.ttest_ind([0.3, 0.1, 0.2], [0.05, 0.0, 0.1])
    interval = test.confidence_interval()
    assert (found.test, found.num_seeds, found.n) == ("two-sample", 3, 40)
    assert found.degrees == pytest.approx(4)
    assert (found.value, found.low, found.high) == pytest.approx((0.15, *interval))
    assert found.p == pytest.approx(test.pvalue)
    assert found.verdict is Verdict.UNDECIDED


def two_way_analysis(scores):
    """Return value, standard error and degrees of freedom from scores [trials, 2 methods, seeds, n], by mean squares."""
    *_, seeds, n = scores.shape
    by_run, by_item = scores.mean(axis=3), scores.mean(axis=2)
    value = by_run[:, 0].mean(axis=1) - by_run[:, 1].mean(axis=1)
    residual = scores - by_run[..., None] - by_item[:, :, None] + by_run.mean(axis=2)[..., None, None]
    over_seeds = by_run.var(axis=2, ddof=1).sum(axis=1) / seeds
    over_items = (by_item[:, 0] - by_item[:, 1]).var(axis=1, ddof=1) / n
    answers = (residual**2).sum(axis=(1, 2, 3)) / (seeds * (seeds - 1) * n * (n - 1))
    beyond = np.maximum(0, over_items - answers)
    degrees = (over_seeds + beyond) ** 2 / (over_seeds**2 / (2 * seeds - 2) + beyond**2 / (n - 1))
    return value, np.sqrt(over_seeds + beyond), degrees


def simulate(seeds, n, over_seeds, over_items, answers, trials=10_000):
    """Return scores [trials, 2 methods, seeds, n] of equal methods, and the true standard error of a difference.

    Noise in points: of training runs, of a method on single items (or clusters of them), of a run's single answers.
    """
    normal = np.random.default_rng(1).standard_normal
    scores = answers * normal((trials, 2, seeds, n)) + over_items * normal((trials, 2, 1, n))
    scores += over_seeds * normal((trials, 2, seeds, 1))
    return scores, math.sqrt(2 * (over_seeds**2 / seeds + over_items**2 / n + answers**2 / (n * seeds)))


SETTINGS = [(3, 100, 0, 0, 40), (3, 100, 2, 0, 40), (3, 100, 2, 15, 40), (3, 20, 1, 15, 20), (5, 100, 2, 15, 40)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_seeds_and_items_are_the_two_way_analysis_of_variance(setting):
    scores, _ = simulate(*setting, trials=10)
    for trial, value, error, degrees in zip(scores, *two_way_analysis(scores), strict=True):
        found = difference(F1, *([sample(run, seed) for seed, run in enumerate(side)] for side in trial))
        half = scipy.stats.t.ppf(0.975, degrees) * error
        assert (found.low, found.high) == pytest.approx((value - half, value + half))
        assert found.degrees == pytest.approx(degrees)
        assert found.p == pytest.approx(2 * scipy.stats.t.sf(abs(value) / error, degrees))


@pytest.mark.parametrize("setting", SETTINGS)
def test_size_and_power_over_seeds(setting):
    """False claims in 4 to 6 % of comparisons, and no less power than a two-sample test over seeds alone has."""
    scores, true_error = simulate(*setting)
    value, error, degrees = two_way_analysis(scores)
    critical = scipy.stats.t.ppf(0.975, degrees)
    size, power = (np.mean(np.abs(value + effect) > critical * error) for effect in (0, 3.6 * true_error))
    student = 2 * setting[0] - 2
    assert 0.04 <= size <= 0.06
    assert power >= scipy.stats.nct.sf(scipy.stats.t.ppf(0.975, student), student, 3.6) - 0.02


@pytest.mark.parametrize(
    ("seeds", "seed_noise", "item_noise"), [(2, 0.1, 0.1), (3, 0.1, 0.0), (3, 0.05, 0.5), (5, 0.1, 0.3)]
)
def test_interval_over_seeds_covers_the_truth(seeds, seed_noise, item_noise):
    random = np.random.default_rng(7)
    hits = naive_hits = 0
    for _ in range(300):
        ours, theirs = groups(random, effect=0.2, seed_noise=seed_noise, item_noise=item_noise, seeds=seeds)
        found = difference(F1, ours, theirs, resamples=1000)
        hits += found.low <= 0.2 <= found.high
        # Resampling the seeds themselves, as over items, stays between the lowest and the highest.
        gains = [
            np.mean([item["f1"] for item in a.items.values()]) - np.mean([item["f1"] for item in b.items.values()])
            for a, b in zip(ours, theirs, strict=True)
        ]
        naive_hits += min(gains) <= 0.2 <= max(gains)
    assert hits / 300 >= 0.92
    if seeds <= 3 and item_noise == 0:
        assert naive_hits / 300 < 0.85


def test_equal_methods_are_seldom_told_apart_over_seeds():
    random = np.random.default_rng(8)
    told = sum(
        difference(F1, *groups(random, effect=0, seed_noise=0.1, item_noise=0.1), resamples=1000).verdict
        is not Verdict.UNDECIDED
        for _ in range(300)
    )
    assert told / 300 <= 0.08


def test_a_clear_effect_is_found_over_seeds():
    random = np.random.default_rng(9)
    found = difference(F1, *groups(random, effect=0.5, seed_noise=0.01, item_noise=0.1))
    assert found.verdict is Verdict.BETTER


def test_seeds_with_items_of_their_own():
    """Each seed holds out its own rows, so only runs of the same seed may be paired."""
    random = np.random.default_rng(10)
    ours, theirs = [], []
    for seed in range(3):
        base = random.random(50)
        theirs.append(sample(base, seed, first=100 * seed))
        ours.append(sample(base + 0.1 + 0.02 * random.standard_normal(50), seed, first=100 * seed))
    found = difference(F1, ours, theirs)
    assert found.n == 50
    assert found.value == pytest.approx(0.1, abs=0.01)
    assert found.high - found.low < 0.05
    gains = [
        np.mean([a.items[name]["f1"] - b.items[name]["f1"] for name in b.items])
        for a, b in zip(ours, theirs, strict=True)
    ]
    interval = scipy.stats.ttest_1samp(gains, 0).confidence_interval()
    # Items of one seed are noise of that seed: Student's test over seeds is the whole of it.
    assert (found.test, found.low, found.high) == ("paired", *map(pytest.approx, interval))
    with pytest.raises(UsageError, match="no shared item"):
        difference(F1, ours, theirs[:2])


def test_other_seeds_are_compared_without_pairing():
    values = np.linspace(0, 1, 40)
    ours = [sample(values + shift, seed) for seed, shift in ((0, 0.3), (1, 0.1), (2, 0.2))]
    theirs = [sample(values + shift, seed) for seed, shift in ((7, 0.0), (8, 0.1))]
    found = difference(F1, ours, theirs)
    variance = (2 * np.var([0.3, 0.1, 0.2], ddof=1) + np.var([0.0, 0.1], ddof=1)) / 3
    assert found.value == pytest.approx(0.15)
    assert (found.test, found.degrees, found.num_seeds) == ("two-sample", pytest.approx(3), 5)
    error = math.sqrt(variance * (1 / 3 + 1 / 2))
    assert found.high == pytest.approx(0.15 + scipy.stats.t.ppf(0.975, 3) * error)


def test_a_fixed_model_has_no_spread_over_seeds():
    values = np.linspace(0, 1, 40)
    ours = [sample(values + shift, seed) for seed, shift in ((0, 0.3), (1, 0.1), (2, 0.2))]
    found = difference(F1, ours, [sample(values, None)])
    assert (found.test, found.degrees, found.num_seeds) == ("one-sample", pytest.approx(2), 3)
    assert found.high == pytest.approx(0.2 + scipy.stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3))


def test_seeds_that_all_agree_leave_the_items_interval():
    random = np.random.default_rng(11)
    base = random.random(80)
    gain = base + 0.05 + 0.1 * random.standard_normal(80)
    one = difference(F1, [sample(gain)], [sample(base)])
    three = difference(F1, [sample(gain, seed) for seed in range(3)], [sample(base, seed) for seed in range(3)])
    student = scipy.stats.ttest_rel(gain, base).confidence_interval()
    assert (three.low, three.high) == pytest.approx((student.low, student.high))
    assert (three.low, three.high) == pytest.approx((one.low, one.high), abs=0.1 * (one.high - one.low))


def test_seeds_that_agree_by_chance_leave_the_items_interval():
    """Three runs with as many right answers, each to other questions: their spread of zero is chance."""
    ours = [sample([float((i + seed) % 2) for i in range(40)], seed) for seed in range(3)]
    theirs = [sample([float((i + 3 * seed) % 4 == 0) for i in range(40)], seed) for seed in range(3)]
    found = difference(F1, ours, theirs)
    assert found.value == pytest.approx(0.25)
    assert found.low < 0.25 < found.high


def test_the_same_seed_gives_the_same_interval():
    random = np.random.default_rng(12)
    ours, theirs = (side[:1] for side in groups(random, effect=0.1, seed_noise=0.1, item_noise=0.1))
    assert difference(F1, ours, theirs) == difference(F1, ours, theirs)
    assert difference(F1, ours, theirs, seed=1).low != difference(F1, ours, theirs).low


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_bound_at_zero_tells_nothing_apart(scale):
    """Smoothing leaves BLEU of nonsense at 0.0002 of 100; a nat a character is another unit."""
    base, metric = np.linspace(0, 1, 50), replace(F1, scale=scale)
    assert difference(metric, [sample(base + 2e-6)], [sample(base)]).verdict is Verdict.UNDECIDED
    assert difference(metric, [sample(base + 2e-5)], [sample(base)]).verdict is Verdict.BETTER
    assert difference(metric, [sample(base - 2e-5)], [sample(base)]).verdict is Verdict.WORSE
