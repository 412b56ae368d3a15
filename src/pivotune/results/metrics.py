"""Metrics as data: how the numbers of single items make one figure.

Every metric is a function of the *sum* of its items' numbers, so one implementation gives the value, its standard error
and any bootstrap of it, for means as for corpus metrics; and a result file says how its figures were made without the
task that made them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["mean", "ratio", "chrf", "bleu"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of a task.

    Attributes:
        name: the field's name for it (`f1`, `accuracy`, `chrf++`, `nll_per_token`).
        form: `mean` of `fields[0]` over the items that have it; `ratio` of the sums of `fields[0]` and `fields[1]`; `chrf`
            and `bleu` of the summed sufficient statistics in `fields[0]` (a list of counts per item).
        fields: keys of an item's record.
        scale: 100 for percentages.
        higher_is_better: None where neither direction is (answer length).
    """

    name: str
    form: Form
    fields: tuple[str, ...]
    scale: float = 1.0
    higher_is_better: bool | None = True

    def to_dict(self) -> dict[str, Any]:
        """As written under `metrics` in `results.json`, beside `value` and `stderr`."""
        return {
            "form": self.form,
            "fields": list(self.fields),
            "scale": self.scale,
            "higher_is_better": self.higher_is_better,
        }
