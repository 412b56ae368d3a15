"""Figures from the numbers of single items: value, standard error, and resampled values of any metric.

Every metric is a function of its items' summed numbers (`pivotune.results.metrics`), so an item is a short vector, a
resample is a vector of counts, and a bootstrap is one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pivotune.results.metrics import Form, Metric

Array = NDArray[np.float64]
Records = Sequence[Mapping[str, Any]]

# Numbers per item: mean (number, 1), ratio (two numbers), chrF++ and BLEU (their sufficient statistics).
WIDTHS: dict[Form, int] = {"mean": 2, "ratio": 2, "chrf": 24, "bleu": 10}
CORPUS_RESAMPLES = 1000  # for the standard error of a corpus metric: right to about 2 %
_CHUNK = 2**20  # counts drawn at a time: 8 MB of indices
_KEPT = 2**26  # most counts kept for the next metric over as many items: 64 MB


@dataclass(frozen=True, slots=True)
class Figure:
    """A metric's value, its standard error over items (NaN where undefined), and how many items counted."""

    value: float
    stderr: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """As in `results.json`; what is undefined is null."""
        return {"value": finite(self.value), "stderr": finite(self.stderr), "n": self.n}


def finite(number: float) -> float | None:
    """None for NaN and infinity, which JSON lacks."""
    return number if math.isfinite(number) else None


def summarize(metric: Metric, records: Records) -> Figure:
    """Value and standard error of one metric over items; items that lack it (None or no such key) do not count.

    The standard error of means and ratios is the linearised one of a ratio of sums (for a mean: sd / sqrt(n)), that of
    corpus metrics is the standard deviation of 1000 resamples of the items with a fixed seed.

    Raises:
        ValueError: an item holds something that is not the metric's numbers.
    """
    vectors, present = item_vectors(metric, records)
    vectors = vectors[present]
    if not len(vectors):
        return Figure(math.nan, math.nan, 0)
    value = float(statistic(metric, vectors.sum(axis=0)))
    return Figure(value, _standard_error(metric, vectors), len(vectors))


def item_vectors(metric: Metric, records: Records) -> tuple[Array, NDArray[np.bool_]]:
    """The items as vectors that may be summed, and which of them have the metric.

    Returns:
        ([n, k] with rows of zeros for items without the metric, [n]).
    """
    vectors = np.zeros((len(records), WIDTHS[metric.form]))
    present = np.zeros(len(records), dtype=bool)
    for index, record in enumerate(records):
        numbers = _numbers(metric, record)
        if numbers is None:
            continue
        try:
            vectors[index] = numbers
        except (TypeError, ValueError) as error:
            expected = "a number" if metric.form in ("mean", "ratio") else f"{WIDTHS[metric.form]} numbers"
            name = record.get("item", index)
            raise ValueError(f"item {name}: {metric.name} is made of {expected}, found {str(numbers)[:60]}") from error
        present[index] = True
    return vectors, present


def _numbers(metric: Metric, record: Mapping[str, Any]) -> Any:
    values = [record.get(name) for name in metric.fields]
    if any(value is None for value in values):
        return None
    if metric.form == "mean":
        return (values[0], 1.0)
    return tuple(values) if metric.form == "ratio" else values[0]


def statistic(metric: Metric, sums: Array) -> Array:
    """The metric of summed item vectors.

    Args:
        sums: [..., k].

    Returns:
        [...], NaN where it is undefined (nothing counted).
    """
    if metric.form in ("mean", "ratio"):
        with np.errstate(divide="ignore", invalid="ignore"):
            return metric.scale * (sums[..., 0] / sums[..., 1])
    from pivotune.results import corpus_metrics

    of_sums = corpus_metrics.chrf_from_statistics if metric.form == "chrf" else corpus_metrics.bleu_from_statistics
    return metric.scale * of_sums(sums)


def bootstrap(metric: Metric, vectors: Array, resamples: int, seed: int, stream: int = 0) -> Array:
    """The metric of several runs under the same random resamples of their items.

    Args:
        vectors: [runs, n, k]; all runs have the same items in the same order.
        stream: another number gives resamples that are independent of this one's.

    Returns:
        [runs, resamples].
    """
    runs, n, width = vectors.shape
    flat = np.ascontiguousarray(vectors.transpose(1, 0, 2)).reshape(n, runs * width)
    parts = [
        statistic(metric, (counts.astype(np.float64) @ flat).reshape(-1, runs, width))
        for counts in _resamples(n, resamples, seed, stream)
    ]
    return np.concatenate(parts).T


def _standard_error(metric: Metric, vectors: Array) -> float:
    n = len(vectors)
    if n < 2:
        return math.nan
    if metric.form in ("mean", "ratio"):
        above, below = vectors.T
        if not below.sum():
            return math.nan
        residuals = above - above.sum() / below.sum() * below
        return float(abs(metric.scale) * residuals.std(ddof=1) / (below.mean() * math.sqrt(n)))
    return float(bootstrap(metric, vectors[None], CORPUS_RESAMPLES, seed=0).std(ddof=1))


def _resamples(n: int, resamples: int, seed: int, stream: int) -> Iterator[NDArray[np.uint8]]:
    """How often each of n items is drawn, [rows, n] a chunk; kept for the next call where that is small."""
    if n * resamples <= _KEPT:
        yield from _kept_resamples(n, resamples, seed, stream)
    else:
        yield from _draw(n, resamples, seed, stream)


@lru_cache(maxsize=1)
def _kept_resamples(n: int, resamples: int, seed: int, stream: int) -> list[NDArray[np.uint8]]:
    return list(_draw(n, resamples, seed, stream))


def _draw(n: int, resamples: int, seed: int, stream: int) -> Iterator[NDArray[np.uint8]]:
    random = np.random.default_rng([seed, stream])
    rows = max(1, _CHUNK // n)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = random.integers(0, n, size=(count, n)) + n * np.arange(count)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=count * n)
        # No item is drawn 256 times: the chance of it is below 1e-500.
        yield counts.reshape(count, n).astype(np.uint8)
