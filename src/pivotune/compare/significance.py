"""Test whether two methods differ: 95 % intervals over items and over training seeds.

One run against one: a paired percentile bootstrap over items. It does not cover the noise between training runs.

With several seeds: Student's t. The noise in one run's answers to single items spreads the seeds' figures as well, so it
must count once. With the variances of the difference over seeds (V_S) and over items (V_I), and the part of V_S that is
noise of items (V_R), all of them of means,

    V = V_S + max(0, V_I - V_R),   with degrees of freedom by Satterthwaite (1946).

This is the test for crossed random effects (Clark 1973; for evaluations Miller 2024, arXiv 2411.00640). V_I and V_R come
from the jackknife over items, which serves means, ratios and corpus metrics. Runs of one seed are not paired: that would
halve the degrees of freedom, which pays at 3 seeds only where two methods' runs of one seed correlate by more than 0.6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pivotune.errors import UsageError
from pivotune.results.metrics import Array, Metric, bootstrap, item_vectors, jackknife, statistic

RESAMPLES = 10_000
CONFIDENCE = 95.0  # per cent
# Five items that all point one way do so by chance in 2 of 32 cases, above 5 %; six in 2 of 64.
FEWEST_ITEMS = 6
_ROUNDING = 1e-9  # relative; more than floating-point sums of equal numbers differ by
_ZERO = 5e-4  # of a metric in 0..100; smoothing leaves BLEU of nonsense at 0.0002

# Figures of runs, [runs], and influences of the items on them, [runs, items]; negative for the baseline.
Groups = Sequence[tuple[Array, Array]]
TestName = Literal["bootstrap", "two-sample", "one-sample", "paired"]


class Verdict(StrEnum):
    BETTER = "better"
    WORSE = "worse"
    UNDECIDED = "not told apart"


@dataclass(frozen=True, slots=True)
class Sample:
    """One run's numbers by item id; `seed` is None for a model that was not trained here."""

    items: Mapping[str, Mapping[str, Any]]
    seed: int | None = None


Samples = Sequence[Sample]


@dataclass(slots=True)
class Difference:
    """Run minus baseline, in the metric's unit.

    Attributes:
        low, high: 95 % interval; NaN for a single item.
        p: two-sided, of the same test as the interval; `adjusted_p` has Holm's correction over a table.
        n: items that both have (for seeds with items of their own: the smallest number).
        num_seeds: seeds that the interval covers; 0 where it does not cover the noise between training runs.
        test: `bootstrap` over items; or Student's t over seeds and items: `two-sample`, `one-sample` against a fixed model,
            `paired` where every seed has items of its own.
        degrees: of freedom of Student's t; None for `bootstrap`.
        verdict: None for metrics without a better direction.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    num_seeds: int = 0
    test: TestName = "bootstrap"
    degrees: float | None = None
    verdict: Verdict | None = None
    adjusted_p: float | None = None


def difference(
    metric: Metric,
    run: Samples,
    baseline: Samples,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    pair_seeds: bool = False,
) -> Difference:
    """Return the difference of two methods on one task, each with one run or with several that differ in seed only.

    Items are joined by id; those that only one side has are left out. For a metric that some items lack, each side's value
    is over the items that it has. `resamples` and `seed` are of the bootstrap, for one run against one. `pair_seeds`
    pairs the runs of one seed: decide it before the runs, where a seed gives both methods the same rows in the same order.
    """
    if any(len(side) > 1 and _has_seeds(side) for side in (run, baseline)):
        found = _over_seeds(metric, run, baseline, pair_seeds)
    else:
        found = _over_items(metric, run, baseline, resamples, seed)
    found.verdict = None if metric.higher_is_better is None else Verdict.UNDECIDED
    # Nats and cosines are differences of another size than per cents.
    zero = _ZERO if metric.scale == 100 or metric.form in ("chrf", "bleu") else _ZERO / 100
    if found.verdict and found.n >= FEWEST_ITEMS and (found.low > zero or found.high < -zero):
        found.verdict = Verdict.BETTER if (found.low > 0) == metric.higher_is_better else Verdict.WORSE
    return found


def shared_items(samples: Samples) -> list[str]:
    """Return the ids that all samples have, sorted, so that no result depends on the order of a file."""
    return sorted(set.intersection(*(set(sample.items) for sample in samples)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979).

    Rejecting those below 0.05 makes any error at all in at most 5 % of cases.
    """
    order, count = np.argsort(p_values, kind="stable"), len(p_values)
    adjusted = np.ones(count)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(count, 0, -1) * np.asarray(p_values)[order]))
    return adjusted.tolist()


def _over_items(metric: Metric, run: Samples, baseline: Samples, resamples: int, seed: int) -> Difference:
    """Resample the items; both sides share the resamples."""
    ids, vectors = _joined(metric, [*run, *baseline])
    values, draws = statistic(metric, vectors.sum(axis=1)), bootstrap(metric, vectors, resamples, seed)
    value, draws = (
        _minus(figures[: len(run)].mean(axis=0), figures[len(run) :].mean(axis=0)) for figures in (values, draws)
    )
    defined = draws[np.isfinite(draws)]
    low = high = p = math.nan
    if len(ids) > 1 and len(defined) >= 0.95 * len(draws):
        tail = (100 - CONFIDENCE) / 2
        low, high = map(float, np.percentile(defined, [tail, 100 - tail]))
        # Twice the smaller tail beyond zero, counting the observed difference itself among the resamples.
        beyond = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
        p = min(1.0, 2 * (beyond + 1) / (len(defined) + 1))
    return Difference(float(value), low, high, p, len(ids))


def _over_seeds(metric: Metric, run: Samples, baseline: Samples, pair_seeds: bool) -> Difference:
    """Test by Student's t over seeds and items."""
    seeds = {sample.seed for side in (run, baseline) if _has_seeds(side) for sample in side}
    if partners := _partners(run, baseline, wanted=pair_seeds):
        groups, n = _paired(metric, partners)
        return _students_t(groups, groups, n, len(seeds), "paired")
    ids, vectors = _joined(metric, [*run, *baseline])
    values, influences, ours = statistic(metric, vectors.sum(axis=1)), jackknife(metric, vectors), len(run)
    groups = [(values[:ours], influences[:ours]), (-values[ours:], -influences[ours:])]
    trained = [group for group, side in zip(groups, (run, baseline), strict=True) if _has_seeds(side)]
    return _students_t(groups, trained, len(ids), len(seeds), "two-sample" if len(trained) == 2 else "one-sample")


def _students_t(groups: Groups, trained: Groups, n: int, num_seeds: int, test: TestName) -> Difference:
    """Return the test of a sum of group means by the formula above.

    V_S and V_R pool the groups that were trained over seeds, since a group of one seed has no variance of its own.
    """
    from scipy.special import stdtr, stdtrit  # 0.1 s; scipy.stats would take 0.5 s

    means = [float(values.mean()) for values, _ in groups]
    value = 0.0 if abs(sum(means)) <= _ROUNDING * max(map(abs, means)) else sum(means)
    degrees = sum(len(values) - 1 for values, _ in trained)
    share = sum(1 / len(values) for values, _ in trained) / degrees
    over_seeds, item_noise = (
        share * sum(float(((part - part.mean(axis=0)) ** 2).sum()) for part in parts)
        for parts in zip(*trained, strict=True)
    )
    influence = np.sum([influences.mean(axis=0) for _, influences in groups], axis=0)
    over_items = float((influence**2).sum())
    # Few right answers may agree over all seeds by chance: then the spread over items is all there is.
    agree = over_seeds <= _ROUNDING * item_noise
    beyond_noise = over_items if agree else float(np.maximum(0.0, over_items - item_noise))
    variance = over_seeds + beyond_noise
    if n == 1 or math.isnan(variance):
        return Difference(value, math.nan, math.nan, math.nan, n, num_seeds, test)
    if not variance:
        return Difference(value, value, value, float(value == 0), n, num_seeds, test)
    degrees = variance**2 / (over_seeds**2 / degrees + beyond_noise**2 / (len(influence) - 1))
    error = math.sqrt(variance)
    half = float(stdtrit(degrees, 0.5 + CONFIDENCE / 200)) * error
    p = float(2 * stdtr(degrees, -abs(value) / error))
    return Difference(value, value - half, value + half, p, n, num_seeds, test, degrees)


def _has_seeds(samples: Samples) -> bool:
    return all(sample.seed is not None for sample in samples)


def _partners(run: Samples, baseline: Samples, *, wanted: bool) -> list[tuple[Sample, Sample]]:
    """Pair the runs by seed where it is wanted, or only runs of one seed share most of their items; else return nothing.

    Each seed holds out rows of its own where the validation rows are a part of the training file.
    """
    partners = {sample.seed: sample for sample in baseline}
    fewest = min(len(sample.items) for sample in (*run, *baseline))
    own_items = 2 * len(shared_items([*run, *baseline])) < fewest
    if {sample.seed for sample in run} != set(partners) or not (wanted or own_items):
        return []
    return [(sample, partners[sample.seed]) for sample in sorted(run, key=lambda sample: sample.seed or 0)]


def _paired(metric: Metric, pairs: Sequence[tuple[Sample, Sample]]) -> tuple[Groups, int]:
    """Return one group of differences by seed with their influences over all seeds' items, and the fewest items."""
    joined = [_joined(metric, pair) for pair in pairs]
    columns = {name: column for column, name in enumerate(dict.fromkeys(name for ids, _ in joined for name in ids))}
    influences = np.zeros((len(joined), len(columns)))
    for row, (ids, vectors) in zip(influences, joined, strict=True):
        row[[columns[name] for name in ids]] = np.subtract(*jackknife(metric, vectors))
    values = np.array([_minus(*statistic(metric, vectors.sum(axis=1))) for _, vectors in joined])
    return [(values, influences)], min(len(ids) for ids, _ in joined)


def _joined(metric: Metric, samples: Samples) -> tuple[list[str], Array]:
    """Return the shared items for which at least one sample has the metric, and their vectors [samples, n, k]."""
    ids = shared_items(samples)
    parts = [item_vectors(metric, [sample.items[name] for name in ids]) for sample in samples]
    if not ids or not all(present.any() for _, present in parts):
        raise UsageError(f"no shared item has {metric.name}")
    counted = np.any([present for _, present in parts], axis=0)
    vectors = np.stack([vectors[counted] for vectors, _ in parts])
    if not np.isfinite(vectors).all():
        raise UsageError(f"{metric.name} of an item is not a finite number")
    return [name for name, kept in zip(ids, counted, strict=True) if kept], vectors


def _minus(ours: NDArray[Any], theirs: NDArray[Any]) -> Any:
    """Return the difference, with rounding errors set to zero, so that equal runs do not differ."""
    result = np.asarray(ours - theirs)
    return np.where(np.abs(result) <= _ROUNDING * np.maximum(np.abs(ours), np.abs(theirs)), 0.0, result)
