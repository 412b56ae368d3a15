from __future__ import annotations

import json
import pickle
import statistics
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, SkipBatchSampler
from tiny_batches import make_examples
from tiny_training import arguments, make_pairs, step_logs, tiny_trainer
from torch.utils.data import BatchSampler, SequentialSampler

from pivotune.data.collator import DeepSupervisionCollator, ExampleDataset
from pivotune.errors import UsageError
from pivotune.training.batching import (
    BLANK,
    DATA_ORDER_FILE,
    DataOrder,
    LengthGroupedSampler,
    RankOrder,
    WithBlankRows,
    blank_like,
    length_grouped_order,
    order_of,
    resumed_order,
    save_order,
    train_sampler,
)

LENGTHS = np.random.default_rng(0).integers(1, 500, 1000).tolist()


def order(lengths=LENGTHS, batch_size=8, num_batches=4, seed=0) -> list[int]:
    return length_grouped_order(lengths, batch_size, num_batches, torch.Generator().manual_seed(seed))


def chunks(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def padding(batches: list[list[int]], lengths=LENGTHS) -> float:
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1 - sum(lengths[row] for batch in batches for row in batch) / padded


@pytest.mark.parametrize("rows", [0, 1, 7, 31, 32, 33, 127, 128, 500, 1000])
@pytest.mark.parametrize(("batch_size", "num_batches"), [(8, 4), (4, 1), (1, 8), (8, 100)])
def test_every_row_once(rows, batch_size, num_batches):
    assert sorted(order(LENGTHS[:rows], batch_size, num_batches)) == list(range(rows))


@pytest.mark.parametrize("num_batches", [1, 4, 16])
def test_little_is_padding(num_batches):
    grouped = padding(chunks(order(num_batches=num_batches), 8))
    shuffled = padding(chunks(torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist(), 8))
    assert shuffled > 0.4
    assert grouped < 0.1


def test_a_step_of_several_batches_holds_all_lengths():
    """Its number of tokens varies no more than that of random steps; steps of equal rows alone would vary by half."""

    def variation(rows: list[int], size: int = 32) -> float:
        tokens = [sum(LENGTHS[row] for row in step) for step in chunks(rows, size) if len(step) == size]
        return statistics.stdev(tokens) / statistics.mean(tokens)

    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(1)).tolist()
    assert variation(order()) <= 1.1 * variation(shuffled) < 0.15
    assert variation(order(batch_size=32, num_batches=1)) > 0.4


@pytest.mark.parametrize("num_batches", [1, 4])
def test_longest_row_comes_first_and_the_remainder_last(num_batches):
    lengths = LENGTHS[:333]
    rows = order(lengths, 8, num_batches)
    assert lengths[rows[0]] == max(lengths)
    # Every step but the last holds whole batches: the rows that fill none are not spread over others.
    # The last 5 rows fill no batch and are drawn at random.
    rest = rows[333 // (8 * num_batches) * 8 * num_batches : -5]
    assert [lengths[row] for row in rest] == sorted((lengths[row] for row in rest), reverse=True)


def test_with_drop_last_other_rows_are_left_out_in_every_epoch():
    """Also where the rows do not fill one optimizer step."""
    lengths = LENGTHS[:18]
    left_out = set()
    for number in range(40):
        sampler = LengthGroupedSampler(lengths, batch_size=4, num_batches=8, seed=0, epoch=lambda number=number: number)
        left_out |= set(list(sampler)[16:])
    assert left_out == set(range(18))


def test_steps_do_not_fall_in_length():
    """Not sorted over the epoch: the learning rate would end on short rows."""
    tokens = [sum(LENGTHS[row] for row in step) for step in chunks(order(batch_size=8, num_batches=1), 8)][1:-1]
    assert abs(np.corrcoef(range(len(tokens)), tokens)[0, 1]) < 0.3
    falls = sum(one > other for one, other in pairwise(tokens)) / (len(tokens) - 1)
    assert 0.3 < falls < 0.7


def test_batches_differ_between_epochs_and_seeds():
    epoch = 0
    options = {"batch_size": 8, "num_batches": 2, "epoch": lambda: epoch}
    sampler = LengthGroupedSampler(LENGTHS, seed=3, **options)
    first = list(sampler)
    assert first == list(sampler) == list(LengthGroupedSampler(LENGTHS, seed=3, **options))
    assert len(sampler) == len(LENGTHS)
    epoch = 1
    batches, others = ({frozenset(batch) for batch in chunks(rows, 8)} for rows in (first, list(sampler)))
    assert len(batches & others) < 5
    epoch = 0
    assert list(LengthGroupedSampler(LENGTHS, seed=4, **options)) != first


# ---- in the trainer ----


@pytest.mark.parametrize("method", ["sft", "tft", "deep-supervision"])
def test_grouped_by_default_for_every_method(tmp_path, method):
    """What is logged is the padding of the batches as collated, both sides together."""
    rows = make_pairs(64)

    def share(**changes) -> float:
        trainer = tiny_trainer(tmp_path, rows=rows, method=method, logging_steps=8, gradient_accumulation_steps=2,
                               **changes)  # fmt: skip
        padded = places = 0
        for batch in trainer.get_train_dataloader():
            for mask in (batch["attention_mask"], batch["english_attention_mask"]):
                places += mask.numel()
                padded += int((mask == 0).sum())
        trainer.train()
        (line,) = step_logs(trainer)
        assert line["padding_share"] == pytest.approx(padded / places, rel=1e-9)
        return line["padding_share"]

    # The English sides of these rows are as long as chance has it: only the target sides are grouped.
    assert share() < (0.9 if method == "deep-supervision" else 0.5) * share(train_sampling_strategy="random")


def test_speed_is_counted_apart(tmp_path):
    """One line for all steps: tokens by the same clock, so that their ratios are those of the rows."""
    trainer = tiny_trainer(tmp_path, logging_steps=4)
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    target = sum(len(example.main.ids) for example in trainer.train_dataset.examples)
    english = sum(len(example.parallel.ids) for example in trainer.train_dataset.examples if example.parallel)
    speeds = [line[f"{side}_tokens_per_second"] for side in ("target", "english", "padding")]
    assert speeds[1] / speeds[0] == pytest.approx(english / target)
    assert line["padding_share"] == pytest.approx(speeds[2] / sum(speeds))


@pytest.mark.parametrize("strategy", ["random", "sequential", "batch_rebalance"])
def test_other_strategies_are_those_of_transformers(tmp_path, strategy):
    trainer = tiny_trainer(tmp_path, rows=make_pairs(20), train_sampling_strategy=strategy,
                           gradient_accumulation_steps=2, dataloader_drop_last=False)  # fmt: skip
    batches = [batch["input_ids"].shape[0] for batch in trainer.get_train_dataloader()]
    assert sum(batches) >= 20
    trainer.train()
    assert trainer.state.global_step == 3
    sampled = list(train_sampler(trainer.train_dataset, trainer.args, trainer.order, lambda: 0))
    if strategy == "sequential":
        assert sampled == list(range(20))
    if strategy == "random":
        assert sorted(sampled) == list(range(20)) != sampled


def test_ranks_run_rows_of_similar_length_together(tmp_path):
    """Two ranks draw from one order, in turn, and neither waits for the other."""
    lengths = LENGTHS
    sampler = LengthGroupedSampler(lengths, batch_size=16, num_batches=2, seed=0, epoch=lambda: 0)
    ranks = [list(BatchSamplerShard(BatchSampler(sampler, 8, False), 2, rank)) for rank in range(2)]
    assert sorted({row for rank in ranks for batch in rank for row in batch}) == list(range(1000))
    gaps = [abs(lengths[one[0]] - lengths[other[0]]) for one, other in zip(*ranks, strict=True)]
    assert statistics.median(gaps) < 0.05 * max(lengths)


def test_evaluation_begins_with_the_longest_rows(tmp_path):
    trainer = tiny_trainer(tmp_path, trainer={"eval_dataset": make_pairs(12, seed=2)})
    dataset = trainer.eval_dataset["target"]
    lengths = sorted((len(dataset[row].main.ids) for row in range(12)), reverse=True)
    read = [batch["attention_mask"].sum(dim=1) for batch in trainer.get_eval_dataloader("target")]
    assert torch.cat(read).tolist() == lengths


# ---- the rows of each rank ----


def rank_batches(num_rows: int, *, batch_size: int, world_size: int, **options) -> list[list[list[int]]]:
    """The batches of every rank, as accelerate deals them out."""
    order = RankOrder(SequentialSampler(range(num_rows)), batch_size=batch_size, world_size=world_size, **options)
    shards = [
        BatchSamplerShard(
            BatchSampler(order, batch_size, drop_last=False), num_processes=world_size, process_index=rank
        )
        for rank in range(world_size)
    ]
    assert all(len(list(shard)) == len(shard) for shard in shards)
    return [list(shard) for shard in shards]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_rows", [1, 5, 8, 12, 13])
def test_every_row_is_read_once_and_all_ranks_read_equally_many_batches(num_rows, world_size):
    ranks = rank_batches(num_rows, batch_size=2, world_size=world_size)
    assert sorted(row for rank in ranks for batch in rank for row in batch if row != BLANK) == list(range(num_rows))
    assert {len(rank) for rank in ranks} == {-(-num_rows // (2 * world_size))}
    assert {len(batch) for rank in ranks for batch in rank} == {2}


def test_a_step_holds_the_rows_that_follow_each_other_in_turn():
    assert rank_batches(11, batch_size=2, world_size=2) == [
        [[0, 2], [4, 6], [8, 10]],
        [[1, 3], [5, 7], [9, BLANK]],
    ]


def test_rows_that_fill_no_batch_on_every_rank_can_be_dropped():
    assert rank_batches(11, batch_size=2, world_size=2, drop_last=True) == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


def test_a_sampler_learns_the_epoch_also_where_batches_are_skipped():
    """A resumed epoch is read through accelerate's `SkipBatchSampler`, which tells samplers nothing."""
    sampler = SeedableRandomSampler(range(8), data_seed=3)
    order = RankOrder(sampler, batch_size=2, world_size=2, epoch=lambda: 5)
    skipping = SkipBatchSampler(BatchSampler(order, 2, drop_last=False), skip_batches=1)
    expected = torch.randperm(8, generator=torch.Generator().manual_seed(3 + 5)).tolist()
    rows = [row for start in (0, 4) for rank in (0, 1) for row in expected[start : start + 4][rank::2]]
    assert [row for batch in skipping for row in batch] == rows[2:]


def test_a_blank_row_adds_nothing():
    examples = make_examples(3)
    dataset = WithBlankRows(ExampleDataset(examples))
    assert len(dataset) == 3
    assert dataset[1] is examples[1]
    batch = DeepSupervisionCollator(pad_token_id=0)([dataset[BLANK], dataset[0], dataset[BLANK]])
    assert batch["attention_mask"].sum(dim=1).tolist() == [0, len(examples[0].main.ids), 0]
    assert (batch["labels"][[0, 2]] == -100).all()
    assert batch["english_attention_mask"][[0, 2]].sum() == 0
    assert batch["answer_characters"].tolist()[::2] == [0, 0]


def test_a_batch_of_blank_rows_has_a_place_for_a_token():
    batch = DeepSupervisionCollator(pad_token_id=7)([blank_like(make_examples(1)[0])] * 2)
    assert batch["input_ids"].tolist() == [[7], [7]]
    assert batch["attention_mask"].tolist() == [[0], [0]]


def test_a_blank_row_collates_with_rows_that_carry_features():
    row = replace(make_examples(1)[0], english_features={"thinking": np.ones(4, dtype=np.float32)})
    batch = DeepSupervisionCollator(pad_token_id=0)([row, blank_like(row)])
    assert batch["english_features_thinking"].tolist() == [[1.0] * 4, [0.0] * 4]
    assert blank_like(make_examples(1)[0]).english_features is None


def test_workers_get_a_copy():
    dataset = pickle.loads(pickle.dumps(WithBlankRows(ExampleDataset(make_examples(2)))))
    assert len(dataset[BLANK].main.ids) == 0
    assert len(dataset) == 2


# ---- the shape of a step ----

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
