"""The starting model's predictions on the rows replayed in English, for `supervision.keep_english`.

One pass without gradient computes them before training and keeps them on disk, so that training holds no second model.
A file is used again only if weights, rows and settings are the same and its content is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from pivotune.config.supervision import SupervisionConfig
from pivotune.data.collator import DeepSupervisionCollator, ExampleDataset
from pivotune.data.datasets import predicted_english_tokens
from pivotune.data.examples import Example
from pivotune.errors import UsageError
from pivotune.forward.passes import PassRequest, choose_passes
from pivotune.kernels.chunked_linear_head import even_chunks
from pivotune.kernels.cross_entropy import shifted
from pivotune.models.architecture import find_architecture
from pivotune.models.head import chunk_rows, readout
from pivotune.models.sharding import is_partitioned, placed
from pivotune.models.taps import evaluation_mode
from pivotune.objectives.english_kl import top_log_probabilities
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.distributed import ranks
from pivotune.training.kept_arrays import Arrays, can_be_reused, map_arrays, save_arrays, weights_digest
from pivotune.training.progress import Progress, silent

PREDICTIONS_FILE = "english-predictions.safetensors"
_FORMAT = "1"
# All others together, where their probability rounds to 0: float16 has no log of that.
_LEAST = -60.0


class PredictionDataset(ExampleDataset):
    """Examples with the starting model's predictions.

    Args:
        dataset: the training rows.
        path: a file of `with_start_predictions` for these rows; mapped into memory, so that a step reads only its rows.
    """

    def __init__(self, dataset: ExampleDataset, path: Path) -> None:
        super().__init__(dataset.examples)
        self._dataset, self._path = dataset, path
        self._counts = predicted_english_tokens(self.examples)
        self._ends = self._counts.cumsum()
        self._arrays = map_arrays(path)

    def __getitem__(self, index: int) -> Example:
        places = slice(self._ends[index] - self._counts[index], self._ends[index])
        predictions = self._arrays["tokens"][places], self._arrays["log_probabilities"][places]
        return replace(self._dataset[index], start_predictions=predictions)

    def __reduce__(self) -> tuple:
        """Map the file again in a worker process."""
        return PredictionDataset, (self._dataset, self._path)


def with_start_predictions(
    dataset: ExampleDataset | None,
    model: nn.Module,
    supervision: SupervisionConfig,
    args: DeepSupervisionConfig,
    *,
    pad_token_id: int,
    progress: Progress = silent,
) -> ExampleDataset | None:
    """Return the training rows with the predictions of the starting model where `keep_english` compares with them.

    On disk: 6 bytes x answer tokens of the replayed rows x `top` (250 MB for 13,000 rows of 100 tokens).

    Args:
        model: the starting model, without adapters.

    Raises:
        UsageError: the file cannot be written, or the weights are not whole on this device.
    """
    if dataset is None or not supervision.keep_english.kl:
        return dataset
    if is_partitioned(model):
        raise UsageError(
            "supervision.keep_english: ZeRO-3 has partitioned the starting model; train with FSDP2 or ZeRO-2"
        )
    path = Path(cast(str, args.output_dir)) / PREDICTIONS_FILE

    def compute() -> None:
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        top, batch_size = supervision.keep_english.top, args.per_device_eval_batch_size
        key = _key(model, dataset.examples, top, autocast)
        if can_be_reused(path, key):
            return
        with placed(model, args.device):
            arrays = _predict(
                model,
                dataset.examples,
                top,
                DeepSupervisionCollator(pad_token_id),
                batch_size=batch_size,
                autocast=autocast,
                progress=progress,
            )
        save_arrays(path, arrays, key)

    # One process computes for all: under FSDP the others have not loaded their weights yet.
    ranks.on_main(compute)
    return PredictionDataset(dataset, path)


def _predict(
    model: nn.Module,
    examples: Sequence[Example],
    top: int,
    collate: DeepSupervisionCollator,
    *,
    batch_size: int,
    autocast: torch.dtype | None,
    progress: Progress,
) -> Arrays:
    """Return `tokens` (N, top) and `log_probabilities` (N, top + 1) of the N predicted tokens of all replayed rows."""
    counts = predicted_english_tokens(examples)
    ends, total = counts.cumsum(), int(counts.sum())
    tokens, log_probabilities = np.empty((total, top), np.int32), np.empty((total, top + 1), np.float16)
    architecture, run_passes = find_architecture(model), choose_passes(model)
    # Longest answers first: a lack of memory shows at once.
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    with ExitStack() as stack:
        advance = stack.enter_context(progress("Reading the English rows", len(order)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.autocast(architecture.device.type, dtype=autocast, enabled=autocast is not None))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = collate([examples[row] for row in rows])
            inputs = {name: batch[name].to(architecture.device) for name in ("input_ids", "attention_mask", "labels")}
            final = run_passes(model, inputs, PassRequest()).main.final
            assert final is not None
            states, _ = shifted(final, inputs["labels"])
            places = np.concatenate([np.arange(int(ends[row] - counts[row]), int(ends[row])) for row in rows])
            for part in even_chunks(len(states), chunk_rows(architecture.vocab_size, states.device)):
                found = top_log_probabilities(readout(architecture, states[part], frozen=True), top)
                tokens[places[part]] = found[0].cpu().numpy()
                log_probabilities[places[part]] = found[1].clamp(min=_LEAST).cpu().numpy()
            advance(start + len(rows))
    return {"tokens": tokens, "log_probabilities": log_probabilities}


def _key(model: nn.Module, examples: Sequence[Example], top: int, autocast: torch.dtype | None) -> dict[str, str]:
    """Return everything that the predictions depend on, as the file's metadata."""
    rows = hashlib.sha256()
    for index in np.flatnonzero(predicted_english_tokens(examples)):
        side = examples[int(index)].main
        rows.update(np.array([index, len(side.ids), side.answer], dtype=np.int64).tobytes())
        rows.update(side.ids.astype(np.int64).tobytes())
    return {
        "format": _FORMAT,
        "weights": weights_digest(model),
        "rows": rows.hexdigest(),
        "settings": json.dumps({"top": top, "autocast": str(autocast)}, sort_keys=True),
    }
