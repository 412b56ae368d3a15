"""Test whether two methods differ: intervals over items and training seeds.

Over items the interval is a paired percentile bootstrap. Training seeds are too few for that: the resampled mean of three
seeds falls between the lowest and the highest of them and covers the truth in three cases of four, not in 95 %. Their part
is therefore drawn from Student's t with the seeds' own spread, which covers 95 % from two seeds on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pivotune.errors import UsageError
from pivotune.results.metrics import Array, Metric, bootstrap, item_vectors, statistic

RESAMPLES = 10_000
CONFIDENCE = 95.0  # per cent
# Five items that all point one way do so by chance in 2 of 32 cases, above 5 %; six in 2 of 64.
FEWEST_ITEMS = 6
_ROUNDING = 1e-9  # relative; more than floating-point sums of equal numbers differ by
_PRINTED_ZERO = 5e-4


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


@dataclass(frozen=True, slots=True)
class SeedTest:
    """Student's t-test over training seeds: `paired` by seed, `two-sample`, or `one-sample` against a fixed model."""

    kind: str
    t: float
    degrees: int
    p: float


@dataclass(slots=True)
class Difference:
    """Run minus baseline, in the metric's unit.

    Attributes:
        low, high: 95 % interval; NaN for a single item.
        p: two-sided, from the same resamples as the interval; `adjusted_p` has Holm's correction over a table.
        n: items that both have (for seeds with items of their own: the smallest number).
        num_seeds: seeds that the interval covers; 0 where it covers items only.
        seed_test: None with fewer than two seeds or without any spread over them.
        verdict: None for metrics without a better direction.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    num_seeds: int
    seed_test: SeedTest | None
    verdict: Verdict | None
    adjusted_p: float | None = None


@dataclass(frozen=True, slots=True)
class _Resampled:
    """A difference, its resampled values [resamples], and the seeds' standard error with its degrees of freedom."""

    value: float
    draws: Array
    n: int
    num_seeds: int = 0
    seed_error: float = 0.0
    degrees: int = 0
    kind: str = ""


def difference(
    metric: Metric, run: Samples, baseline: Samples, *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Return the difference of two methods on one task, each with one run or with several that differ in seed only.

    Items are joined by id; those that only one side has are left out. Runs are paired by seed if both methods have the
    same seeds. For a metric that some items lack, each side's value is over the items that it has.
    """
    seeds = [sample.seed for sample in run]
    paired = None not in seeds and sorted(map(str, seeds)) == sorted(str(sample.seed) for sample in baseline)
    resample = _paired if paired or len(run) == len(baseline) == 1 else _unpaired
    found = resample(metric, run, baseline, resamples, seed)
    draws, seed_test = found.draws, None
    if found.seed_error:
        from scipy.special import stdtr  # 0.1 s; scipy.stats would take 0.5 s

        t = found.value / found.seed_error
        seed_test = SeedTest(found.kind, t, found.degrees, float(2 * stdtr(found.degrees, -abs(t))))
        random = np.random.default_rng([seed, 2**32 - 1])
        draws = draws + found.seed_error * random.standard_t(found.degrees, len(draws))
    draws = draws[np.isfinite(draws)]
    low = high = p = math.nan
    if found.n > 1 and len(draws) >= 0.95 * len(found.draws):
        tail = (100 - CONFIDENCE) / 2
        low, high = map(float, np.percentile(draws, [tail, 100 - tail]))
        # Twice the smaller tail beyond zero, counting the observed difference itself among the resamples.
        beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
        p = min(1.0, 2 * (beyond + 1) / (len(draws) + 1))
    verdict = None if metric.higher_is_better is None else Verdict.UNDECIDED
    # A bound that is printed as zero counts as zero (smoothing leaves BLEU of nonsense at 0.0002).
    if verdict and found.n >= FEWEST_ITEMS and (low > _PRINTED_ZERO or high < -_PRINTED_ZERO):
        verdict = Verdict.BETTER if (low > 0) == metric.higher_is_better else Verdict.WORSE
    return Difference(found.value, low, high, p, found.n, found.num_seeds, seed_test, verdict)


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


def _paired(metric: Metric, run: Samples, baseline: Samples, resamples: int, seed: int) -> _Resampled:
    """Subtract seed by seed; seeds with the same items share their resamples, others have resamples of their own."""
    partners = {sample.seed: sample for sample in baseline} if len(run) > 1 else {run[0].seed: baseline[0]}
    streams: dict[tuple[str, ...], int] = {}
    values, draws, counts = [], [], []
    for sample in sorted(run, key=lambda sample: sample.seed or 0):
        ids, vectors = _joined(metric, [sample, partners[sample.seed]])
        stream = streams.setdefault(tuple(ids), len(streams))
        values.append(_minus(*statistic(metric, vectors.sum(axis=1))))
        draws.append(_minus(*bootstrap(metric, vectors, resamples, seed, stream)))
        counts.append(len(ids))
    mean = float(np.mean(values))
    if len(values) == 1:
        return _Resampled(mean, draws[0], counts[0])
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return _Resampled(mean, np.mean(draws, axis=0), min(counts), len(values), error, len(values) - 1, "paired")


def _unpaired(metric: Metric, run: Samples, baseline: Samples, resamples: int, seed: int) -> _Resampled:
    """Subtract the means over seeds, all on the items that every run has."""
    ids, vectors = _joined(metric, [*run, *baseline])
    ours = len(run)
    values = statistic(metric, vectors.sum(axis=1))
    draws = bootstrap(metric, vectors, resamples, seed)
    value = float(_minus(values[:ours].mean(), values[ours:].mean()))
    drawn = _minus(draws[:ours].mean(axis=0), draws[ours:].mean(axis=0))
    sides = ((run, values[:ours]), (baseline, values[ours:]))
    trained = [group for samples, group in sides if all(sample.seed is not None for sample in samples)]
    degrees = sum(len(group) - 1 for group in trained)
    if degrees == 0:
        return _Resampled(value, drawn, len(ids))
    # One pooled variance: a group of one seed has none of its own.
    variance = sum(float(((group - group.mean()) ** 2).sum()) for group in trained) / degrees
    error = math.sqrt(variance * sum(1 / len(group) for group in trained))
    kind = "two-sample" if len(trained) == 2 else "one-sample"
    return _Resampled(value, drawn, len(ids), sum(map(len, trained)), error, degrees, kind)


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
