"""Pad examples into batches. The docstring of `DeepSupervisionCollator` is the batch contract of the project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pivotune.data.datasets import main_lengths
from pivotune.data.examples import Example, Side

IGNORED = -100  # the label that F.cross_entropy and Transformers leave out


class ExampleDataset(Dataset):
    """Examples as a map-style dataset; lazy ones stay lazy. An item is the `Example` itself; the collator pads."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every main side, int32 (examples,)."""
        return main_lengths(self.examples)


@dataclass
class DeepSupervisionCollator:
    """Pad examples on the right into a batch of B rows.

    Main side, T = longest sequence (target language; English for replayed rows and `english-only`):
        input_ids           (B, T) int64
        attention_mask      (B, T) int64, 1 on tokens, 0 on padding
        labels              (B, T) int64, the answer's token ids, -100 elsewhere (not shifted, as Transformers has it)
        query_mask          (B, T) bool, the user's text inside the prompt
        answer_characters   (B,) int64, characters of the answer's text
        english_prompt      (B,) bool, the prompt is English
        english_answer      (B,) bool, the answer is English
        row_numbers         (B,) int64, the rows' places in their file, to name them; 0 where not known
    English parallel side, S = longest one, 0 without any. Rows without it (replayed rows, baselines) are all padding:
        english_input_ids       (B, S) int64
        english_attention_mask  (B, S) int64
        english_query_mask      (B, S) bool, the tokens of x_en
        english_answer_mask     (B, S) bool, the tokens of y_en
    Where the examples carry pooled English vectors (`feature.english: frozen`), by loss term:
        english_features_conversion, english_features_thinking  (B, width) float32, zeros in rows without an English side
    Where the examples carry the starting model's predictions (`keep_english`), its K likeliest tokens at up to N answer
    tokens; zeros in rows that are not replayed and behind a row's answer:
        start_tokens                (B, N, K) int64
        start_log_probabilities     (B, N, K + 1) float32, that of all other tokens last

    In every row the answer is contiguous and last, so a prompt is what stands before the first label. A row without any
    token is all padding; T is 1 at least.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        main = self._pad([example.main for example in examples], least=1)
        labels = np.where(main["answer_mask"], main["input_ids"], IGNORED)
        english = self._pad([example.parallel for example in examples])
        batch: dict[str, Any] = {
            "input_ids": main["input_ids"],
            "attention_mask": main["attention_mask"],
            "labels": labels,
            "query_mask": main["query_mask"],
            "answer_characters": np.array([example.main.characters for example in examples], dtype=np.int64),
            "english_prompt": np.array([example.english_prompt for example in examples], dtype=bool),
            "english_answer": np.array([example.english_answer for example in examples], dtype=bool),
            "row_numbers": np.array([example.number for example in examples], dtype=np.int64),
            **{f"english_{name}": array for name, array in english.items()},
        }
        # All rows carry vectors of the same terms, or none does.
        features = [example.english_features for example in examples if example.english_features is not None]
        for name in features[0] if features else ():
            batch[f"english_features_{name}"] = np.stack([vectors[name] for vectors in features])
        predictions = [example.start_predictions for example in examples if example.start_predictions is not None]
        if predictions:
            tokens, log_probabilities = zip(*predictions, strict=True)
            batch["start_tokens"] = _stacked(tokens, np.int64)
            batch["start_log_probabilities"] = _stacked(log_probabilities, np.float32)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _pad(self, sides: Sequence[Side | None], *, least: int = 0) -> dict[str, np.ndarray]:
        shape = (len(sides), max((len(side.ids) for side in sides if side is not None), default=0) or least)
        arrays = {
            "input_ids": np.full(shape, self.pad_token_id, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
            "query_mask": np.zeros(shape, dtype=bool),
            "answer_mask": np.zeros(shape, dtype=bool),
        }
        for index, side in enumerate(sides):
            if side is not None:
                length = len(side.ids)
                arrays["input_ids"][index, :length] = side.ids
                arrays["attention_mask"][index, :length] = 1
                arrays["query_mask"][index, slice(*side.query)] = True
                arrays["answer_mask"][index, side.answer : length] = True
        return arrays


def _stacked(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    """Return arrays (n, K) of several lengths as one (arrays, longest n, K), with zeros behind the shorter ones."""
    stacked = np.zeros((len(arrays), max(map(len, arrays)), arrays[0].shape[1]), dtype)
    for row, array in zip(stacked, arrays, strict=True):
        row[: len(array)] = array
    return stacked
