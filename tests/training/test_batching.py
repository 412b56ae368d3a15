from __future__ import annotations

import statistics
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_training import make_pairs, step_logs, tiny_trainer

from pivotune.training.batching import LengthGroupedSampler, length_grouped_order

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
    sampled = list(trainer._get_train_sampler())
    if strategy == "sequential":
        assert sampled == list(range(20))
    if strategy == "random":
        assert sorted(sampled) == list(range(20)) != sampled


def test_ranks_run_rows_of_similar_length_together(tmp_path):
    """Two ranks draw from one order, in turn, and neither waits for the other."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    lengths = LENGTHS
    sampler = LengthGroupedSampler(lengths, batch_size=16, num_batches=2, seed=0, epoch=lambda: 0)
    ranks = [list(BatchSamplerShard(BatchSampler(sampler, 8, False), 2, rank)) for rank in range(2)]
    assert sorted({row for rank in ranks for batch in rank for row in batch}) == list(range(1000))
    gaps = [abs(lengths[one[0]] - lengths[other[0]]) for one, other in zip(*ranks, strict=True)]
    assert statistics.median(gaps) < 0.05 * max(lengths)


def test_evaluation_begins_with_the_longest_rows(tmp_path):
    trainer = tiny_trainer(tmp_path, trainer={"eval_dataset": make_pairs(12, seed=2)})
    dataset = trainer.eval_dataset["target"]
    lengths = [len(dataset[row].main.ids) for row in trainer._get_eval_sampler(dataset)]
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == 12
