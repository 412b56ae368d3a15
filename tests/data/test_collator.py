from __future__ import annotations

import numpy as np
import torch
from tiny_batches import make_examples

from pivotune.data.collator import IGNORED, DeepSupervisionCollator, ExampleDataset
from pivotune.data.examples import Example, Side

PAD = 99
MAIN = Side(ids=np.array([5, 6, 7, 8, 9], dtype=np.int32), query=(1, 2), answer=3, characters=11)
SHORT = Side(ids=np.array([4, 3], dtype=np.int32), query=(0, 1), answer=1, characters=2)
ENGLISH = Side(ids=np.array([10, 11, 12, 13], dtype=np.int32), query=(1, 3), answer=3, characters=4)


def batch_of(*examples: Example, **options) -> dict[str, torch.Tensor]:
    return DeepSupervisionCollator(pad_token_id=PAD, **options)(examples)


def test_batch_worked_out_by_hand():
    """A row with an English side and a replay row without one, of different lengths."""
    batch = batch_of(
        Example(main=MAIN, parallel=ENGLISH, number=7), Example(main=SHORT, english_prompt=True, english_answer=True)
    )
    no, yes = False, True
    expected = {
        "input_ids": [[5, 6, 7, 8, 9], [4, 3, PAD, PAD, PAD]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
        "labels": [[IGNORED, IGNORED, IGNORED, 8, 9], [IGNORED, 3, IGNORED, IGNORED, IGNORED]],
        "query_mask": [[no, yes, no, no, no], [yes, no, no, no, no]],
        "answer_characters": [11, 2],
        "english_prompt": [no, yes],
        "english_answer": [no, yes],
        "row_numbers": [7, 0],
        "english_input_ids": [[10, 11, 12, 13], [PAD] * 4],
        "english_attention_mask": [[1] * 4, [0] * 4],
        "english_query_mask": [[no, yes, yes, no], [no] * 4],
        "english_answer_mask": [[no, no, no, yes], [no] * 4],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    masks = {"query_mask", "english_prompt", "english_answer", "english_query_mask", "english_answer_mask"}
    for name, tensor in batch.items():
        assert tensor.dtype == (torch.bool if name in masks else torch.int64), name


def test_batch_without_any_english_side():
    batch = batch_of(Example(main=MAIN), Example(main=SHORT, english_prompt=True, english_answer=True))
    for name in ("input_ids", "attention_mask", "query_mask", "answer_mask"):
        assert batch[f"english_{name}"].shape == (2, 0)
    assert batch["input_ids"].shape == (2, 5)


def test_pooled_english_vectors_are_stacked():
    """In the rows' order; a batch of rows without any has no such entry."""
    vectors = {name: np.arange(3, dtype=np.float32) + start for name, start in (("conversion", 1), ("thinking", 5))}
    zeros = {name: np.zeros(3, dtype=np.float32) for name in vectors}
    batch = batch_of(
        Example(main=SHORT, english_prompt=True, english_answer=True, english_features=zeros),
        Example(main=MAIN, parallel=ENGLISH, english_features=vectors),
    )
    assert batch["english_features_conversion"].tolist() == [[0, 0, 0], [1, 2, 3]]
    assert batch["english_features_thinking"].tolist() == [[0, 0, 0], [5, 6, 7]]
    assert batch["english_features_thinking"].dtype == torch.float32
    assert not any("features" in name for name in batch_of(Example(main=MAIN, parallel=ENGLISH)))


def test_masks_come_from_lengths_not_from_the_padding_id():
    """Many tokenizers pad with end-of-text; a model that never learns it never stops."""
    side = Side(ids=np.array([PAD, 6, PAD], dtype=np.int32), query=(0, 1), answer=2, characters=1)
    batch = batch_of(Example(main=side), Example(main=MAIN))
    assert batch["labels"][0].tolist() == [IGNORED, IGNORED, PAD, IGNORED, IGNORED]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]


def test_every_row_can_be_read_back():
    examples = make_examples(8)
    batch = DeepSupervisionCollator(pad_token_id=0)(examples)
    for row, example in enumerate(examples):
        length = len(example.main.ids)
        assert batch["input_ids"][row, :length].tolist() == example.main.ids.tolist()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        answer = example.main.ids[example.main.answer :].tolist()
        assert batch["labels"][row][batch["labels"][row] >= 0].tolist() == answer
        assert batch["labels"][row, example.main.answer : length].tolist() == answer
        if example.parallel is not None:
            start, end = example.parallel.query
            query = batch["english_input_ids"][row][batch["english_query_mask"][row]]
            assert query.tolist() == example.parallel.ids[start:end].tolist()


def test_dataset_holds_the_examples_in_order():
    examples = make_examples(3)
    dataset = ExampleDataset(examples)
    assert len(dataset) == 3
    assert [dataset[index] for index in range(3)] == examples
