from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from pivotune.compare.significance import Difference, Sample, Verdict, difference, holm
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
    assert (found.n, found.num_seeds, found.seed_test) == (2000, 0, None)
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


def test_three_seeds_equal_the_paired_t_test():
    ours = [sample(np.linspace(0, 1, 40) + shift, seed) for seed, shift in enumerate((0.3, 0.1, 0.2))]
    theirs = [sample(np.linspace(0, 1, 40) + shift, seed) for seed, shift in enumerate((0.05, 0.0, 0.1))]
    found = difference(F1, ours, list(reversed(theirs)))
    gains = [0.25, 0.1, 0.1]
    error = np.std(gains, ddof=1) / math.sqrt(3)
    assert found.value == pytest.approx(0.15)
    assert found.num_seeds == 3
    assert found.seed_test is not None
    assert (found.seed_test.kind, found.seed_test.degrees) == ("paired", 2)
    assert found.seed_test.t == pytest.approx(0.15 / error)
    assert found.seed_test.p == pytest.approx(scipy.stats.ttest_1samp(gains, 0).pvalue)
    # Without any noise between items the interval is Student's.
    assert (found.low, found.high) == pytest.approx((0.15 - 4.303 * error, 0.15 + 4.303 * error), rel=0.1, abs=0.02)
    assert found.verdict is Verdict.UNDECIDED


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
    with pytest.raises(UsageError, match="no shared item"):
        difference(F1, ours, theirs[:2])


def test_other_seeds_are_compared_without_pairing():
    values = np.linspace(0, 1, 40)
    ours = [sample(values + shift, seed) for seed, shift in ((0, 0.3), (1, 0.1), (2, 0.2))]
    theirs = [sample(values + shift, seed) for seed, shift in ((7, 0.0), (8, 0.1))]
    found = difference(F1, ours, theirs)
    variance = (2 * np.var([0.3, 0.1, 0.2], ddof=1) + np.var([0.0, 0.1], ddof=1)) / 3
    assert found.value == pytest.approx(0.15)
    assert found.seed_test is not None
    assert (found.seed_test.kind, found.seed_test.degrees, found.num_seeds) == ("two-sample", 3, 5)
    assert found.seed_test.t == pytest.approx(0.15 / math.sqrt(variance * (1 / 3 + 1 / 2)))


def test_a_fixed_model_has_no_spread_over_seeds():
    values = np.linspace(0, 1, 40)
    ours = [sample(values + shift, seed) for seed, shift in ((0, 0.3), (1, 0.1), (2, 0.2))]
    found = difference(F1, ours, [sample(values, None)])
    assert found.seed_test is not None
    assert (found.seed_test.kind, found.seed_test.degrees, found.num_seeds) == ("one-sample", 2, 3)
    assert found.seed_test.t == pytest.approx(0.2 / (0.1 / math.sqrt(3)))


def test_seeds_that_all_agree_leave_the_items_interval():
    random = np.random.default_rng(11)
    base = random.random(80)
    gain = base + 0.05 + 0.1 * random.standard_normal(80)
    one = difference(F1, [sample(gain)], [sample(base)])
    three = difference(F1, [sample(gain, seed) for seed in range(3)], [sample(base, seed) for seed in range(3)])
    assert three.seed_test is None
    assert (three.low, three.high) == pytest.approx((one.low, one.high))


def test_the_same_seed_gives_the_same_interval():
    random = np.random.default_rng(12)
    pair = groups(random, effect=0.1, seed_noise=0.1, item_noise=0.1)
    assert difference(F1, *pair) == difference(F1, *pair)
    assert isinstance(difference(F1, *pair, seed=1), Difference)
    assert difference(F1, *pair, seed=1).low != difference(F1, *pair).low


def test_a_bound_that_prints_as_zero_is_told_apart_by_nobody():
    """Smoothing leaves BLEU of nonsense at 0.0002: a table would show [0.000, 0.001] and an arrow."""
    base = np.linspace(0, 1, 50)
    assert difference(F1, [sample(base + 2e-4)], [sample(base)]).verdict is Verdict.UNDECIDED
    assert difference(F1, [sample(base + 2e-3)], [sample(base)]).verdict is Verdict.BETTER
    assert difference(F1, [sample(base - 2e-3)], [sample(base)]).verdict is Verdict.WORSE
