"""Outputs of the starting model on the training rows, computed once and kept on disk: training holds no second model.

- For `feature.english: frozen` the pooled vectors of the English sides; training then runs no English pass.
- For `keep_english` the predictions on the rows replayed in English.

The starting model does not change, so one pass without gradient before training computes them. A file is used again only if
weights, rows and settings are the same and its content is whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from pivotune.config.supervision import SupervisionConfig
from pivotune.data.collator import DeepSupervisionCollator, ExampleDataset
from pivotune.data.datasets import ParallelSides, has_parallel, predicted_english_tokens
from pivotune.data.examples import Example
from pivotune.errors import UsageError
from pivotune.forward.passes import PassRequest, choose_passes
from pivotune.kernels.chunked_linear_head import even_chunks
from pivotune.kernels.cross_entropy import shifted
from pivotune.models.architecture import find_architecture
from pivotune.models.head import chunk_rows, readout
from pivotune.models.sharding import is_partitioned, placed
from pivotune.models.taps import evaluation_mode, truncated
from pivotune.objectives.cosine import english_layer, english_states, frozen_losses, pool, span_masks
from pivotune.objectives.english_kl import top_log_probabilities
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.distributed import ranks
from pivotune.training.kept_arrays import Arrays, can_be_reused, key_of, map_arrays, save_arrays
from pivotune.training.progress import Progress, silent

FEATURES_FILE = "english-features.safetensors"
PREDICTIONS_FILE = "english-predictions.safetensors"
_FORMAT = "1"
# All others together, where their probability rounds to 0: float16 has no log of that.
_LEAST = -60.0


class _MappedDataset(ExampleDataset):
    """Examples with arrays of a file, which is mapped into memory, so that a step reads only its rows.

    Args:
        dataset: the training rows.
        path: a file that was prepared for these rows.
    """

    def __init__(self, dataset: ExampleDataset, path: Path) -> None:
        super().__init__(dataset.examples)
        self._dataset, self._path = dataset, path
        self._arrays = map_arrays(path)

    def __reduce__(self) -> tuple:
        """Map the file again in a worker process."""
        return type(self), (self._dataset, self._path)


class FeatureDataset(_MappedDataset):
    """Examples with their pooled English vectors (`prepare_features`)."""

    def __init__(self, dataset: ExampleDataset, path: Path) -> None:
        super().__init__(dataset, path)
        has_english = has_parallel(self.examples)
        self._places = np.where(has_english, np.cumsum(has_english) - 1, -1)

    def __getitem__(self, index: int) -> Example:
        place = self._places[index]
        vectors = {
            name: np.zeros(table.shape[1], np.float32) if place < 0 else table[place]
            for name, table in self._arrays.items()
        }
        return replace(self._dataset[index], english_features=vectors)


class PredictionDataset(_MappedDataset):
    """Examples with the starting model's predictions (`prepare_predictions`)."""

    def __init__(self, dataset: ExampleDataset, path: Path) -> None:
        super().__init__(dataset, path)
        self._counts = predicted_english_tokens(self.examples)
        self._ends = self._counts.cumsum()

    def __getitem__(self, index: int) -> Example:
        places = slice(self._ends[index] - self._counts[index], self._ends[index])
        predictions = self._arrays["tokens"][places], self._arrays["log_probabilities"][places]
        return replace(self._dataset[index], start_predictions=predictions)


def with_starting_model(
    dataset: ExampleDataset | None,
    model: nn.Module,
    supervision: SupervisionConfig,
    args: DeepSupervisionConfig,
    *,
    pad_token_id: int,
    progress: Progress = silent,
) -> ExampleDataset | None:
    """Return the training rows with the outputs of the starting model that the losses compare with.

    Args:
        model: the starting model, without adapters.

    Raises:
        UsageError: see `prepare_features` and `prepare_predictions`.
    """

    def extended(dataset: ExampleDataset, kind: type[_MappedDataset], file: str, prepare: Callable[..., None]) -> Any:
        path = Path(cast(str, args.output_dir)) / file

        def compute() -> None:
            with placed(model, args.device):
                prepare(
                    model,
                    dataset.examples,
                    supervision,
                    path,
                    pad_token_id=pad_token_id,
                    batch_size=args.per_device_eval_batch_size,
                    autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
                    progress=progress,
                )

        # One process computes for all: under FSDP the others have not loaded their weights yet.
        ranks.on_main(compute)
        return kind(dataset, path)

    if dataset is not None and frozen_losses(supervision):
        dataset = extended(dataset, FeatureDataset, FEATURES_FILE, prepare_features)
    if dataset is not None and supervision.keep_english.kl:
        dataset = extended(dataset, PredictionDataset, PREDICTIONS_FILE, prepare_predictions)
    return dataset


def prepare_features(
    model: nn.Module,
    examples: Sequence[Example],
    supervision: SupervisionConfig,
    path: Path,
    *,
    pad_token_id: int,
    batch_size: int = 8,
    autocast: torch.dtype | None = None,
    progress: Progress = silent,
) -> None:
    """Write the pooled English vectors of these rows to `path`, unless it holds them already.

    One tensor (rows with an English side, width), float32, for every feature term: conversion after its layer, thinking at
    the top. Memory: 4 bytes x rows x width x terms (1.7 GB for 52,000 rows of width 4,096 and two terms).

    Args:
        model: the starting model on the device to run on; adapters are switched off.
        autocast: autocast dtype of training; None for the weights' own type.

    Raises:
        UsageError: the file cannot be written, or the weights are not whole on this device.
    """
    if is_partitioned(model):
        raise UsageError(
            "supervision.feature.english: frozen needs the whole starting model on one device, and its weights are "
            "sharded (DeepSpeed ZeRO-3); allowed here: detached, joint"
        )
    architecture, losses, sides = find_architecture(model), frozen_losses(supervision), ParallelSides(examples)
    feature = supervision.feature
    settings = {
        "layers": {loss.name: english_layer(loss, architecture.num_layers) for loss in losses},
        "pooling": feature.pooling,
        "span": feature.span,
        "english_norm": feature.english_norm,
        "autocast": str(autocast),
    }
    digest = _digest(([len(side.ids), *side.query, side.answer], side.ids) for side in sides)
    key = key_of(model, digest, settings, version=_FORMAT)
    if can_be_reused(path, key):
        return
    shape = (len(sides), architecture.head_weight.shape[1])
    vectors: Arrays = {loss.name: np.empty(shape, dtype=np.float32) for loss in losses}
    layers = frozenset(settings["layers"].values())
    collate, run_passes = DeepSupervisionCollator(pad_token_id), choose_passes(model)
    # Longest rows first: a lack of memory shows at once.
    order = np.argsort([-len(side.ids) for side in sides], kind="stable")
    without_adapters = cast(Any, model).disable_adapter() if hasattr(model, "peft_config") else nullcontext()
    with (
        progress("Reading the English side", len(sides)) as advance,
        _evaluated(model, autocast),
        truncated(architecture, max(layers)),
        without_adapters,
    ):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            # A batch needs a main side; the English side stands in for it.
            batch = collate([Example(main=sides[row], parallel=sides[row]) for row in rows])
            inputs = {name: batch[name].to(architecture.device) for name in ("input_ids", "attention_mask")}
            states = run_passes(model, inputs, PassRequest(main_layers=layers)).main
            mask = span_masks(batch, feature.span)[1].to(architecture.device)
            for loss in losses:
                english = english_states(states, loss, architecture, feature)
                vectors[loss.name][rows] = pool(english, mask, feature.pooling).cpu().numpy()
            advance(start + len(rows))
    save_arrays(path, vectors, key)


def prepare_predictions(
    model: nn.Module,
    examples: Sequence[Example],
    supervision: SupervisionConfig,
    path: Path,
    *,
    pad_token_id: int,
    batch_size: int = 8,
    autocast: torch.dtype | None = None,
    progress: Progress = silent,
) -> None:
    """Write the predictions on the rows replayed in English to `path`, unless it holds them already.

    `tokens` (N, top) and `log_probabilities` (N, top + 1) of the N predicted tokens of all replayed rows. On disk: 6 bytes
    x N x `keep_english.top` (250 MB for 13,000 rows of 100 tokens). Arguments and errors as for `prepare_features`.
    """
    if is_partitioned(model):
        raise UsageError(
            "supervision.keep_english: ZeRO-3 has partitioned the starting model; train with FSDP2 or ZeRO-2"
        )
    counts, top = predicted_english_tokens(examples), supervision.keep_english.top
    mains = ((int(index), examples[int(index)].main) for index in np.flatnonzero(counts))
    digest = _digest(([index, len(side.ids), side.answer], side.ids) for index, side in mains)
    key = key_of(model, digest, {"top": top, "autocast": str(autocast)}, version=_FORMAT)
    if can_be_reused(path, key):
        return
    ends, total = counts.cumsum(), int(counts.sum())
    tokens, log_probabilities = np.empty((total, top), np.int32), np.empty((total, top + 1), np.float16)
    architecture, run_passes = find_architecture(model), choose_passes(model)
    collate = DeepSupervisionCollator(pad_token_id)
    # Longest answers first: a lack of memory shows at once.
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    with progress("Reading the English rows", len(order)) as advance, _evaluated(model, autocast):
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
    save_arrays(path, {"tokens": tokens, "log_probabilities": log_probabilities}, key)


@contextmanager
def _evaluated(model: nn.Module, autocast: torch.dtype | None) -> Iterator[None]:
    device = find_architecture(model).device.type
    with torch.no_grad(), evaluation_mode(model), torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        yield


def _digest(texts: Iterable[tuple[list[int], np.ndarray]]) -> str:
    """Return the SHA-256 of texts: the places that are read, and the tokens."""
    digest = hashlib.sha256()
    for places, ids in texts:
        digest.update(np.array(places, dtype=np.int64).tobytes())
        digest.update(ids.astype(np.int64).tobytes())
    return digest.hexdigest()
