from __future__ import annotations

import json

import pytest

from pivotune.errors import UsageError
from pivotune.training.data_order import DATA_ORDER_FILE, DataOrder, resumed_order, save_order

TWO = DataOrder(batch_rows=8, num_batches=1, num_processes=2)


def test_another_number_of_processes_keeps_the_order_that_was_begun(tmp_path):
    save_order(TWO, tmp_path)
    one = DataOrder(batch_rows=4, num_batches=2, num_processes=1)
    assert one.step_rows == TWO.step_rows == 8
    assert resumed_order(tmp_path, one) == TWO


@pytest.mark.parametrize(
    ("now", "remedy"),
    [
        (DataOrder(batch_rows=4, num_batches=1, num_processes=1), "set training.gradient_accumulation_steps=2"),
        (DataOrder(batch_rows=16, num_batches=1, num_processes=4), "choose per_device_train_batch_size"),
        (DataOrder(batch_rows=3, num_batches=2, num_processes=1), "choose per_device_train_batch_size"),
    ],
)
def test_steps_of_other_rows_are_refused(tmp_path, now, remedy):
    save_order(TWO, tmp_path)
    with pytest.raises(UsageError) as error:
        resumed_order(tmp_path, now)
    assert str(tmp_path) in str(error.value)
    assert "8 rows a step (4 x 1 accumulated x 2 processes)" in str(error.value)
    assert remedy in str(error.value)


def test_a_checkpoint_of_an_earlier_version_is_read_in_the_order_of_now(tmp_path):
    assert resumed_order(tmp_path, TWO) == TWO


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"batch_rows": 4})])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / DATA_ORDER_FILE).write_text(text)
    with pytest.raises(UsageError, match=DATA_ORDER_FILE):
        resumed_order(tmp_path, TWO)
