"""Encoded rows on disk: the same pairs, also in a worker process, and nothing left behind."""

from __future__ import annotations

import errno
import os
import pickle
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import make_pairs

from pivotune.config.registry import METHODS
from pivotune.data.collator import DeepSupervisionCollator, ExampleDataset
from pivotune.data.datasets import (
    ParallelSides,
    has_parallel,
    main_lengths,
    replay_indices,
    side_examples,
    training_examples,
)
from pivotune.data.examples import Example, Pair
from pivotune.data.pair_store import PairStore, pair_languages, pair_table, pairs_digest, store_pairs
from pivotune.errors import UsageError

PAIRS = [*make_pairs(7), Pair(make_pairs(1)[0].target, None, 8), Pair(None, make_pairs(1)[0].english, 12)]


def described(pair: Pair) -> tuple:
    sides = (pair.target, pair.english)
    return (pair.number, *((s.ids.tolist(), s.query, s.answer, s.characters) if s else None for s in sides))


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("count", [0, 1, 9, 2500])
def test_what_comes_out_is_what_went_in(count):
    pairs = [PAIRS[index % len(PAIRS)] for index in range(count)]
    store = store_pairs(iter(pairs))
    assert len(store) == count
    assert [described(pair) for pair in store] == [described(pair) for pair in pairs]
    if count:
        assert described(store[-1]) == described(pairs[-1])
        assert [described(pair) for pair in store[1:7:2]] == [described(pair) for pair in pairs[1:7:2]]
    with pytest.raises(IndexError):
        store[count]


def test_the_table_of_a_store_is_that_of_a_list():
    stored, listed = pair_table(store_pairs(PAIRS)), pair_table(PAIRS)
    for name in ("number", "target", "english"):
        assert (stored[name] == listed[name]).all()
    assert stored.dtype.itemsize == 56


def test_languages_are_kept_and_count_for_the_digest_only_where_rows_have_one():
    pairs = [replace(pair, language=code) for pair, code in zip(PAIRS, ("vi", "zh", "", "vi"), strict=False)]
    store = store_pairs(pairs)
    assert [pair.language for pair in pickle.loads(pickle.dumps(store))] == ["vi", "zh", "", "vi"]
    assert pair_languages(store).tolist() == pair_languages(pairs).tolist() == ["vi", "zh", "", "vi"]
    assert [e.number for e in side_examples(store, "target", "vi")] == [1, 4]
    assert pairs_digest(store) == pairs_digest(pairs) != pairs_digest(PAIRS[:4])
    # As before rows had languages: runs that were begun then go on.
    assert pairs_digest(make_pairs(3)) == "d1f3178934000ab3f01d54a17c983ba2dfa8334e928d5dc8e5000fa236fbe6ce"


def test_ids_can_be_given_to_torch_and_changed_without_changing_the_store():
    store = store_pairs(PAIRS)
    ids = store[0].target.ids
    torch.from_numpy(ids)[0] = 99  # a warning, which is an error here, for arrays that cannot be written
    assert pickle.loads(pickle.dumps(store))[0].target.ids[0] == PAIRS[0].target.ids[0] != 99


def test_a_worker_process_maps_the_files_and_does_not_remove_them(temporary_folder):
    store = store_pairs(PAIRS)
    assert len(pickle.dumps(store)) < 500
    copy = pickle.loads(pickle.dumps(store))
    assert [described(pair) for pair in copy] == [described(pair) for pair in PAIRS]
    del copy
    assert [described(pair) for pair in store] == [described(pair) for pair in PAIRS]
    del store
    assert list(temporary_folder.iterdir()) == []


def test_a_forked_process_that_lets_go_leaves_the_files(temporary_folder, monkeypatch):
    store = store_pairs(PAIRS)
    owner = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: owner + 1)
    del store
    (folder,) = temporary_folder.iterdir()
    monkeypatch.undo()
    assert [described(pair) for pair in PairStore(folder, {"data": 0})] == [described(pair) for pair in PAIRS]


def test_nothing_is_left_where_encoding_fails(temporary_folder):
    def failing():
        yield PAIRS[0]
        raise UsageError("row 2 is too long")

    with pytest.raises(UsageError, match="row 2 is too long"):
        store_pairs(failing())
    assert list(temporary_folder.iterdir()) == []


def test_a_full_disk_is_one_line(temporary_folder, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UsageError) as raised:
        store_pairs(PAIRS)
    assert str(raised.value) == (
        f"{temporary_folder}: temporary data cannot be written (No space left on device); make room there, or set "
        "TMPDIR to a folder with more"
    )


# ---- what is made of it ----


def plain_examples(pairs: list[Pair], method: str, ratio: float) -> list[Example]:
    """What `training_examples` says, row by row."""
    replay = replay_indices(len(pairs), ratio, 3)
    examples = []
    for index, pair in enumerate(pairs):
        if method == "sft" or index in replay:
            examples.append(Example(pair.english, english_prompt=True, english_answer=True, number=pair.number))
        else:
            parallel = pair.english if method == "deep-supervision" else None
            examples.append(Example(pair.target, parallel, number=pair.number))
    return examples


@pytest.mark.parametrize("method", ["sft", "tft", "deep-supervision"])
def test_examples_of_a_store_are_those_of_a_list(method):
    pairs = make_pairs(12)
    expected = plain_examples(pairs, method, 0.25)
    collate = DeepSupervisionCollator(0)
    for given in (pairs, store_pairs(pairs)):
        examples = training_examples(given, METHODS[method], english_ratio=0.25, seed=3)
        assert [e.number for e in examples] == [e.number for e in expected]
        assert main_lengths(examples).tolist() == [len(e.main.ids) for e in expected] == main_lengths(expected).tolist()
        assert has_parallel(examples).tolist() == has_parallel(expected).tolist()
        sides = [e.parallel.ids.tolist() for e in expected if e.parallel]
        assert [side.ids.tolist() for side in ParallelSides(examples)] == sides
        for name, tensor in collate(list(examples)).items():
            assert torch.equal(tensor, collate(expected)[name])
        dataset = ExampleDataset(examples)
        assert dataset.examples is examples
        assert np.array_equal(dataset.lengths, main_lengths(expected))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_worker_processes_are_the_same(workers):
    pairs = make_pairs(12)
    dataset = ExampleDataset(training_examples(store_pairs(pairs), METHODS["tft"]))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, collate_fn=DeepSupervisionCollator(0), num_workers=workers
    )
    ids = [row[mask.bool()].tolist() for batch in loader for row, mask in
           zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
    assert ids == [pair.target.ids.tolist() for pair in pairs]


def test_rows_that_have_a_side():
    store = store_pairs(PAIRS)
    assert [e.number for e in side_examples(store, "target")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [e.number for e in side_examples(store, "english")] == [1, 2, 3, 4, 5, 6, 7, 12]
    with pytest.raises(ValueError, match="lacks the side"):
        training_examples(store, METHODS["tft"])
    assert isinstance(store, PairStore)


def test_a_digest_is_of_the_rows_whether_stored_or_not():
    from dataclasses import replace

    from pivotune.data.pair_store import pairs_digest

    pairs = make_pairs(1500)
    store = store_pairs(pairs)
    assert pairs_digest(store) == pairs_digest(pairs) == pairs_digest(list(store))
    changed = [
        [*pairs[1:], pairs[0]],
        pairs[:-1],
        [replace(pairs[0], number=9), *pairs[1:]],
        [replace(pairs[0], english=None), *pairs[1:]],
        [replace(pairs[0], target=replace(pairs[0].target, answer=pairs[0].target.answer + 1)), *pairs[1:]],
        [replace(pairs[0], target=replace(pairs[0].target, ids=pairs[0].target.ids + 1)), *pairs[1:]],
    ]
    assert pairs_digest(pairs) not in {pairs_digest(rows) for rows in changed}
    assert len({pairs_digest(rows) for rows in changed}) == len(changed)
