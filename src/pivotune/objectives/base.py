"""A loss term is a sum and a count, so that it can be normalised over any accumulation window and number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Term(NamedTuple):
    """`sum`: scalar tensor with gradient; `count`: what it is a sum over (tokens for logits, rows for features)."""

    sum: Tensor
    count: Tensor


def weighted_total(
    terms: Mapping[str, Term], weights: Mapping[str, float], counts: Mapping[str, Tensor | int]
) -> Tensor:
    """`sum_t weights[t] * terms[t].sum / counts[t]`, in float32.

    Args:
        terms: what this micro-batch adds.
        weights: weight of each term.
        counts: the counts of the whole accumulation window over all ranks. A term whose count is 0 adds nothing.
    """
    total = torch.zeros((), device=next(iter(terms.values())).sum.device)
    for name, term in terms.items():
        count = torch.as_tensor(counts[name], device=total.device)
        total = total + weights[name] * term.sum.float() / count.clamp(min=1)
    return total
