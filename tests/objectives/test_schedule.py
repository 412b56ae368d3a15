from __future__ import annotations

from itertools import pairwise

import pytest

from pivotune.objectives.base import schedule_factor


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_from_one_through_the_middle_to_the_last_step(schedule, middle):
    assert schedule_factor(schedule, 0, 11) == 1.0
    assert schedule_factor(schedule, 5, 11) == pytest.approx(middle, abs=1e-15)
    # Exactly 0, so that the last step skips the inner passes.
    assert schedule_factor(schedule, 10, 11) == (1.0 if schedule == "constant" else 0.0)
    assert schedule_factor(schedule, 99, 11) == (1.0 if schedule == "constant" else 0.0)


def test_quarters():
    assert schedule_factor("linear", 1, 5) == 0.75
    assert schedule_factor("cosine", 1, 5) == pytest.approx(0.8535533905932737)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_never_rises(schedule):
    factors = [schedule_factor(schedule, step, 50) for step in range(50)]
    assert all(later < earlier for earlier, later in pairwise(factors))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_single_step_is_supervised_fully(schedule, num_steps):
    assert schedule_factor(schedule, 0, num_steps) == 1.0
