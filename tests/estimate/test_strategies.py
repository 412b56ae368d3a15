from __future__ import annotations

import numpy as np
import pytest

from pivotune.estimate.allocations import Timeline
from pivotune.estimate.model_size import ModelSize
from pivotune.estimate.strategies import memory_of

SIZE = ModelSize(
    total=1000, trained=1000, frozen_bytes=0, trained_bytes=4000, optimizer_bytes=8000, block=100, outside=200,
    num_layers=8,
)  # fmt: skip
# 500 bytes of activations and 2000 of weight copies, then 4000 of gradients while those go.
TIMELINE = Timeline(
    [("forward", np.array([[500.0, 0, 0], [0, 0, 2000]])), ("backward", np.array([[-500.0, 4000, 0], [0, 0, -2000]]))]
)


def memory(strategy, processes=1, **changes):
    options = {"compute_bytes": 2, "accumulated": False, "foreach_copies": False, **changes}
    return memory_of(SIZE, TIMELINE, strategy, processes=processes, **options)


def test_one_device():
    one = memory("single")
    assert (one.weights, one.gradients, one.optimizer, one.activations) == (4000, 4000, 8000, 2500)
    # Gradients grow while activations go: 4000 + 2000 at the worst, not the sum of all.
    assert one.peak == 4000 + 8000 + 6000


def test_gradients_are_there_from_the_start_under_accumulation():
    assert memory("single", accumulated=True).peak == 4000 + 8000 + 4000 + 2500


def test_ddp_copies_gradients_into_buckets():
    assert memory("ddp", 2).peak == memory("single").peak + 4000


def test_fsdp2_shares_everything_but_activations():
    """And needs no copies of weights for autocast: they come gathered in bfloat16."""
    four = memory("fsdp2", 4)
    assert (four.weights, four.gradients, four.optimizer, four.activations) == (1000, 1000, 2000, 500)
    assert four.communication == 2 * (2 * 200 + 3 * 100) + 4 * 200
    assert four.peak == 1000 + 2000 + 1000 + four.communication


def test_zero_2_shares_gradients_and_optimizer_with_float32_masters():
    two = memory("zero2", 4)
    assert (two.weights, two.gradients, two.optimizer) == (2000, 500, 2000 + 1000)
    assert memory("zero3", 4).weights == 500


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_more_processes_never_need_more(strategy):
    peaks = [memory(strategy, count).peak for count in (1, 2, 8, 64)]
    assert peaks == sorted(peaks, reverse=True)


def test_a_loop_over_tensors_needs_a_copy_in_the_optimizer_step():
    assert memory("single", foreach_copies=True).peak == 4000 + 8000 + 8000


def test_repeated_parts():
    assert TIMELINE.repeated({"forward": 3}).peak(gradients=0) == 3 * 2500
