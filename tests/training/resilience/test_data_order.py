from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tiny_training import arguments

from pivotune.errors import UsageError
from pivotune.training.resilience.data_order import DATA_ORDER_FILE, DataOrder, order_of, resumed_order, save_order

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


SEEDED = {"train_sampling_strategy": "group_by_length", "data_seed": 3, "dataloader_drop_last": False}


@pytest.mark.parametrize(
    ("name", "now"), [("train_sampling_strategy", "random"), ("data_seed", 4), ("dataloader_drop_last", True)]
)
def test_rows_in_another_order_are_refused_by_name(tmp_path, name, now):
    before = replace(TWO, **SEEDED)
    save_order(before, tmp_path)
    assert resumed_order(tmp_path, before) == before
    with pytest.raises(UsageError, match=f"begun with {name} {SEEDED[name]} .* has {now}; set training.{name}="):
        resumed_order(tmp_path, replace(before, **{name: now}))


def test_what_an_earlier_version_has_not_kept_passes(tmp_path):
    (tmp_path / DATA_ORDER_FILE).write_text(json.dumps({"batch_rows": 8, "num_batches": 1, "num_processes": 2}))
    now = replace(TWO, **SEEDED)
    assert resumed_order(tmp_path, now) == now


def test_batches_of_another_size_are_refused_where_short_ones_are_dropped(tmp_path):
    """13 rows: 3 batches of 4 in two steps, but one batch of 8 in one."""
    dropped = replace(TWO, dataloader_drop_last=True)
    save_order(dropped, tmp_path)
    assert resumed_order(tmp_path, dropped) == dropped
    with pytest.raises(UsageError, match=r"dataloader_drop_last.*per_device_train_batch_size x processes at 8"):
        resumed_order(tmp_path, replace(dropped, batch_rows=4, num_batches=2, num_processes=1))


def test_the_order_of_a_run_is_that_of_its_arguments(tmp_path):
    order = order_of(arguments(tmp_path, seed=7, gradient_accumulation_steps=2), 4)
    assert (order.batch_rows, order.num_batches, order.num_processes) == (4, 2, 1)
    assert (order.train_sampling_strategy, order.data_seed, order.dataloader_drop_last) == ("group_by_length", 7, False)


def test_a_checkpoint_of_an_earlier_version_is_read_in_the_order_of_now(tmp_path):
    assert resumed_order(tmp_path, TWO) == TWO


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"batch_rows": 4})])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / DATA_ORDER_FILE).write_text(text)
    with pytest.raises(UsageError, match=DATA_ORDER_FILE):
        resumed_order(tmp_path, TWO)
