from __future__ import annotations

import pytest
import torch

from pivotune.objectives.base import LossTerm, weighted_total


def term(value: float, count: int) -> LossTerm:
    return LossTerm(torch.tensor(value, requires_grad=True), torch.tensor(count))


def test_total_divides_by_the_counts_of_the_window_not_of_the_batch():
    terms = {"tft": term(6.0, 3), "thinking": term(10.0, 5)}
    total = weighted_total(terms, {"tft": 1.0, "thinking": 0.3}, {"tft": torch.tensor(12), "thinking": 20})
    assert total.item() == pytest.approx(6 / 12 + 0.3 * 10 / 20)
    assert total.dtype == torch.float32
    total.backward()
    assert terms["tft"].sum.grad.item() == pytest.approx(1 / 12)
    assert terms["thinking"].sum.grad.item() == pytest.approx(0.3 / 20)


def test_term_without_items_adds_nothing():
    total = weighted_total({"tft": term(4.0, 2), "thinking": term(0.0, 0)}, {"tft": 1, "thinking": 1},
                           {"tft": 2, "thinking": 0})  # fmt: skip
    assert total.item() == 2.0


def test_half_precision_sums_are_added_in_float32():
    terms = {"tft": LossTerm(torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(3))}
    assert weighted_total(terms, {"tft": 1.0}, {"tft": 3}).item() == pytest.approx(1 / 3, rel=1e-6)


def test_weight_or_count_that_is_missing_is_an_error():
    terms = {"tft": term(1.0, 1)}
    with pytest.raises(KeyError):
        weighted_total(terms, {}, {"tft": 1})
    with pytest.raises(KeyError):
        weighted_total(terms, {"tft": 1.0}, {})
