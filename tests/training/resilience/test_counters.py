from __future__ import annotations

import math

import pytest
import torch

from pivotune.objectives.base import LossTerm
from pivotune.training.resilience.counters import StepRecord


def record(*batches: tuple[dict[str, float], float, list[int]]) -> StepRecord:
    step = StepRecord()
    for terms, loss, rows in batches:
        found = {name: LossTerm(torch.tensor(value), torch.tensor(1)) for name, value in terms.items()}
        step.add_terms(found, {"row_numbers": torch.tensor(rows, dtype=torch.long)})
        step.add_loss(torch.tensor(loss))
    return step


def test_terms_and_rows_of_the_bad_micro_batches_alone():
    step = record(
        ({"tft": 1.0, "thinking": 2.0}, 3.0, [9, 8]),
        ({"tft": 1.0, "thinking": math.inf}, math.inf, [7, 3]),
        ({"tft": math.nan, "thinking": 1.0}, math.nan, [5, 0]),
    )
    assert step.bad_losses().item() == 2
    assert step.describe(4, math.nan, in_loss=True).startswith("the loss is not a finite number at step 4 (tft nan")
    assert step.describe(4, math.nan, in_loss=True).endswith("; rows 3, 5, 7)")


def test_a_gradient_alone_names_all_rows():
    step = record(({"tft": 1.0}, 1.0, list(range(20, 0, -1))))
    assert step.bad_losses().item() == 0
    assert step.describe(2, math.inf, in_loss=False) == (
        "the gradient is not a finite number at step 2 (norm inf; rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, "
        "16 and 4 more)"
    )


def test_rows_of_several_files_are_named_with_their_file_and_copies_once():
    step = StepRecord({"a.jsonl": 0, "b.jsonl": 10, "c.jsonl": 15})
    step.add_terms({}, {"row_numbers": torch.tensor([11, 3, 15, 11, 16])})
    step.add_loss(torch.tensor(math.nan))
    assert step.describe(1, 1.0, in_loss=True).endswith("; rows a.jsonl:3, b.jsonl:1, b.jsonl:5, c.jsonl:1)")


@pytest.mark.parametrize("rows", [[], [0, 0]])
def test_rows_without_numbers(rows):
    assert "rows without numbers" in record(({"tft": math.nan}, math.nan, rows)).describe(1, 1.0, in_loss=True)


def test_another_rank_has_the_rows():
    step = record(({"tft": 1.0}, 1.0, [1]))
    assert step.describe(1, 1.0, in_loss=True).endswith("(in rows of another process)")


def test_a_new_step_begins_without_the_last():
    step = record(({"tft": math.nan}, math.nan, [1]))
    step.clear()
    step.add_loss(torch.tensor(1.0))
    assert step.bad_losses().item() == 0
