"""Metrics as data, and their values, standard errors and bootstrap resamples from the numbers of single items.

Every metric is a function of its items' *summed* numbers. An item is therefore a short vector, a resample is a vector of
counts, and a bootstrap is one matrix product, for means as for corpus metrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pivotune.results.corpus_metrics import BLEU_COUNTS, CHRF_COUNTS, bleu_from_statistics, chrf_from_statistics
from pivotune.text.files import finite

Array = NDArray[np.float64]
Form = Literal["mean", "ratio", "chrf", "bleu"]

# Numbers per item: mean (number, 1), ratio (two numbers), chrF++ and BLEU (their sufficient statistics).
WIDTHS: dict[Form, int] = {"mean": 2, "ratio": 2, "chrf": CHRF_COUNTS, "bleu": BLEU_COUNTS}
ERRORS_OF_95 = 1.96  # standard errors on either side of an interval of 95 %
CORPUS_RESAMPLES = 1000  # for the standard error of a corpus metric: within about 2 %
_CHUNK = 2**20  # counts drawn at a time: 8 MB of indices
_KEPT = 2**26  # most counts cached for the next metric over as many items: 64 MB


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of a task.

    Attributes:
        form: `mean` of `fields[0]` over the items that have it; `ratio` of the sums of `fields[0]` and `fields[1]`; `chrf`
            and `bleu` of the summed sufficient statistics in `fields[0]` (a list of counts per item).
        fields: keys of an item's record.
        scale: 100 for percentages.
        higher_is_better: None where neither direction is better (answer length).
    """

    name: str
    form: Form
    fields: tuple[str, ...]
    scale: float = 1.0
    higher_is_better: bool | None = True

    def to_dict(self) -> dict[str, Any]:
        """Return the definition as written under `metrics` in `results.json`, beside `value` and `stderr`."""
        definition = {**asdict(self), "fields": list(self.fields)}
        del definition["name"]
        return definition


@dataclass(frozen=True, slots=True)
class MetricResult:
    """A metric's value, its standard error over items, and the number of items; None where undefined."""

    definition: Metric
    value: float | None
    stderr: float | None
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Return the entry under `metrics` in `results.json`."""
        return {"value": self.value, "stderr": self.stderr, "n": self.n, **self.definition.to_dict()}


# Of the answers of held-out rows, as training writes their items.
HELDOUT_NLL = Metric("nll", "ratio", ("nll", "tokens"), higher_is_better=False)


def summarize(metric: Metric, records: Sequence[Mapping[str, Any]]) -> MetricResult:
    """Return value and standard error of one metric over the items that have it (key present and not None).

    The standard error of means and ratios is the linearised one of a ratio of sums (for a mean: sd / sqrt(n)); for corpus
    metrics it is the standard deviation over 1000 resamples of the items with a fixed seed.
    """
    vectors, present = item_vectors(metric, records)
    vectors = vectors[present]
    n = len(vectors)
    if n == 0:
        return MetricResult(metric, None, None, 0)
    value, error = float(statistic(metric, vectors.sum(axis=0))), math.nan
    if n > 1 and metric.form in ("mean", "ratio"):
        above, below = vectors.T
        if below.sum():
            residuals = above - above.sum() / below.sum() * below
            error = float(abs(metric.scale) * residuals.std(ddof=1) / (below.mean() * math.sqrt(n)))
    elif n > 1:
        error = float(bootstrap(metric, vectors[None], CORPUS_RESAMPLES, seed=0).std(ddof=1))
    return MetricResult(metric, finite(value), finite(error), n)


def item_vectors(metric: Metric, records: Sequence[Mapping[str, Any]]) -> tuple[Array, NDArray[np.bool_]]:
    """Return the items as vectors to sum, [n, k], and a mask of the items that have the metric, [n].

    Raises:
        ValueError: an item holds something other than the metric's numbers.
    """
    vectors = np.zeros((len(records), WIDTHS[metric.form]))
    present = np.zeros(len(records), dtype=bool)
    for index, record in enumerate(records):
        values = [record.get(name) for name in metric.fields]
        if any(value is None for value in values):
            continue
        numbers = {"mean": (values[0], 1.0), "ratio": values}.get(metric.form, values[0])
        try:
            vectors[index] = numbers
        except (TypeError, ValueError) as error:
            expected = "a number" if metric.form in ("mean", "ratio") else f"{WIDTHS[metric.form]} numbers"
            name = record.get("item", index)
            raise ValueError(f"item {name}: {metric.name} is made of {expected}, found {str(numbers)[:60]}") from error
        present[index] = True
    return vectors, present


def statistic(metric: Metric, sums: Array) -> Array:
    """Return the metric of summed item vectors [..., k] as [...]; NaN where it is undefined (nothing counted)."""
    if metric.form == "chrf":
        return metric.scale * chrf_from_statistics(sums)
    if metric.form == "bleu":
        return metric.scale * bleu_from_statistics(sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        return metric.scale * (sums[..., 0] / sums[..., 1])


def bootstrap(metric: Metric, vectors: Array, resamples: int, seed: int) -> Array:
    """Return the metric of several runs under the same random resamples of their items, [runs, resamples].

    Args:
        vectors: [runs, n, k]; all runs have the same items in the same order.
    """
    runs, n, width = vectors.shape
    flat = np.ascontiguousarray(vectors.transpose(1, 0, 2)).reshape(n, runs * width)
    draw = _cached_counts if n * resamples <= _KEPT else _draw_counts
    sums = [counts.astype(np.float64) @ flat for counts in draw(n, resamples, seed)]
    return statistic(metric, np.concatenate(sums).reshape(-1, runs, width)).T


def jackknife(metric: Metric, vectors: Array) -> Array:
    """Return each item's influence on the metric of several runs, [runs, n]; squares sum to the variance over items.

    One item at a time is left out (Efron and Stein 1981). For a mean the squares sum to sd^2 / n.

    Args:
        vectors: as for `bootstrap`.
    """
    n = vectors.shape[1]
    left_out = statistic(metric, vectors.sum(axis=1, keepdims=True) - vectors)
    return math.sqrt((n - 1) / n) * (left_out - left_out.mean(axis=1, keepdims=True))


def _draw_counts(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Yield how often each of n items is drawn, in chunks of [rows, n]."""
    random, rows = np.random.default_rng([seed, 0]), max(1, _CHUNK // n)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = random.integers(0, n, size=(count, n)) + n * np.arange(count)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=count * n)
        # uint8 is enough: the chance that an item is drawn 256 times is below 1e-500.
        yield counts.reshape(count, n).astype(np.uint8)


_cached_counts = lru_cache(maxsize=1)(lambda *arguments: list(_draw_counts(*arguments)))
