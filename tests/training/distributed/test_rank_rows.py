from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, SkipBatchSampler
from tiny_batches import make_examples
from torch.utils.data import BatchSampler, SequentialSampler

from pivotune.data.collator import DeepSupervisionCollator, ExampleDataset
from pivotune.training.distributed.rank_rows import BLANK, RankOrder, WithBlankRows, blank_like


def batches(num_rows: int, *, batch_size: int, world_size: int, **options) -> list[list[list[int]]]:
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
    ranks = batches(num_rows, batch_size=2, world_size=world_size)
    assert sorted(row for rank in ranks for batch in rank for row in batch if row != BLANK) == list(range(num_rows))
    assert {len(rank) for rank in ranks} == {-(-num_rows // (2 * world_size))}
    assert {len(batch) for rank in ranks for batch in rank} == {2}


def test_a_step_holds_the_rows_that_follow_each_other_in_turn():
    assert batches(11, batch_size=2, world_size=2) == [
        [[0, 2], [4, 6], [8, 10]],
        [[1, 3], [5, 7], [9, BLANK]],
    ]


def test_rows_that_fill_no_batch_on_every_rank_can_be_dropped():
    assert batches(11, batch_size=2, world_size=2, drop_last=True) == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


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
    from dataclasses import replace

    row = replace(make_examples(1)[0], english_features={"thinking": np.ones(4, dtype=np.float32)})
    batch = DeepSupervisionCollator(pad_token_id=0)([row, blank_like(row)])
    assert batch["english_features_thinking"].tolist() == [[1.0] * 4, [0.0] * 4]
    assert blank_like(make_examples(1)[0]).english_features is None


def test_workers_get_a_copy():
    dataset = pickle.loads(pickle.dumps(WithBlankRows(ExampleDataset(make_examples(2)))))
    assert len(dataset[BLANK].main.ids) == 0
    assert len(dataset) == 2
