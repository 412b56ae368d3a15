from __future__ import annotations

import pytest
from accelerate.data_loader import BatchSamplerShard
from tiny_training import arguments, make_pairs, tiny_trainer
from torch.utils.data import BatchSampler, SequentialSampler

from pivotune.config.registry import METHODS
from pivotune.data.collator import ExampleDataset
from pivotune.data.datasets import training_examples
from pivotune.estimate.rows import assumed_pairs, largest_batch, num_tokens, rows_of, training_schedule
from pivotune.training.batching import order_of, train_sampler


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_train_epochs": 2.5, "gradient_accumulation_steps": 3},
        {"max_steps": 7},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 3},
    ],
)
def test_steps_are_those_of_the_trainer(tmp_path, changes):
    trainer = tiny_trainer(tmp_path, rows=make_pairs(17), **changes)
    *_, expected = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    assert training_schedule(trainer.args, 17, 1).steps == expected


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("rows", [16, 17, 31])
def test_every_process_gets_the_batches_that_accelerate_gives_it(tmp_path, rows, drop_last):
    args = arguments(tmp_path, dataloader_drop_last=drop_last)
    batches = BatchSampler(SequentialSampler(range(rows)), 4, drop_last)
    expected = len(BatchSamplerShard(batches, num_processes=3, process_index=0))
    assert training_schedule(args, rows, 3).steps == max(expected, 1)


def test_rows_seen_are_epochs_times_rows(tmp_path):
    schedule = training_schedule(arguments(tmp_path, num_train_epochs=3), 16, 2)
    assert (schedule.rows_per_step, schedule.steps, schedule.rows_seen) == (8, 6, 48)


def test_the_largest_batch_is_that_of_the_sampler(tmp_path):
    args = arguments(tmp_path)
    examples = training_examples(make_pairs(48), METHODS["tft"])
    order = list(train_sampler(ExampleDataset(examples), args, order_of(args, 4), lambda: 0))
    batches = [[examples[row] for row in order[start : start + 4]] for start in range(0, 48, 4)]
    batch = largest_batch(examples, args, rows=48, processes=1)
    assert sum(map(num_tokens, batch)) == max(sum(map(num_tokens, item)) for item in batches)


def test_a_token_budget_is_counted_in_rows(tmp_path):
    pairs = make_pairs(40)
    args = arguments(tmp_path, method="tft", english_ratio=0.0, token_budget=120)
    mean = training_examples(pairs, METHODS["tft"]).main_lengths.mean()
    assert rows_of(pairs, args, rows=None).rows == rows_of(pairs, args, rows=40).rows == int(120 / mean) < 40
    assert rows_of(pairs, args, rows=3).rows == 3


def test_assumed_rows_keep_the_limits(tmp_path):
    args = arguments(tmp_path, max_prompt_tokens=50, max_completion_tokens=60)
    for pair in assumed_pairs(args):
        assert pair.target is not None
        assert pair.target.answer <= 50
        assert pair.target.num_answer_tokens <= 60
