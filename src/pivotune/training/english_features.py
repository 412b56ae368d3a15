"""The English side of `feature.english: frozen`: the starting model's pooled vectors, computed once and kept on disk.

The starting model does not change, so its vector of a row is the same at every step. One pass without gradient computes
all of them before training; training then runs no English pass and holds no copy of the model. A file is used again only
if weights, rows and settings are the same and its content is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from pivotune.config.supervision import SupervisionConfig
from pivotune.data.collator import DeepSupervisionCollator, ExampleDataset
from pivotune.data.datasets import ParallelSides, has_parallel
from pivotune.data.examples import Example, Side
from pivotune.errors import UsageError
from pivotune.forward.passes import PassRequest, choose_passes
from pivotune.models.architecture import find_architecture
from pivotune.models.sharding import is_partitioned, placed
from pivotune.models.taps import evaluation_mode, truncated
from pivotune.objectives.cosine import english_layer, english_states, frozen_losses, pool, span_masks
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.distributed import ranks
from pivotune.training.kept_arrays import Arrays, can_be_reused, map_arrays, save_arrays, weights_digest
from pivotune.training.progress import Progress, silent

logger = logging.getLogger(__name__)
FEATURES_FILE = "english-features.safetensors"
_FORMAT = "1"


class FeatureDataset(ExampleDataset):
    """Examples with their pooled English vectors.

    Args:
        examples: the training rows.
        path: a file of `prepare_features` for these rows; mapped into memory, so that a step reads only its rows.
    """

    def __init__(self, examples: Sequence[Example], path: Path) -> None:
        super().__init__(examples)
        self._path = path
        has_english = has_parallel(self.examples)
        self._places = np.where(has_english, np.cumsum(has_english) - 1, -1)
        self._vectors = map_arrays(path)

    def __getitem__(self, index: int) -> Example:
        place = self._places[index]
        vectors = {
            name: np.zeros(table.shape[1], np.float32) if place < 0 else table[place]
            for name, table in self._vectors.items()
        }
        return replace(self.examples[index], english_features=vectors)

    def __reduce__(self) -> tuple:
        """Map the file again in a worker process."""
        return FeatureDataset, (self.examples, self._path)


def with_features(
    dataset: ExampleDataset | None,
    model: nn.Module,
    supervision: SupervisionConfig,
    args: DeepSupervisionConfig,
    *,
    pad_token_id: int,
    progress: Progress = silent,
) -> ExampleDataset | None:
    """Return the training rows with their pooled English vectors where a loss compares with the frozen starting model.

    Raises:
        UsageError: see `prepare_features`.
    """
    if dataset is None or not frozen_losses(supervision):
        return dataset
    path = Path(cast(str, args.output_dir)) / FEATURES_FILE

    def compute() -> None:
        with placed(model, args.device):
            prepare_features(
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
    return FeatureDataset(dataset.examples, path)


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
        model: the starting model, without adapters, on the device to run on.
        autocast: autocast dtype of training; None for the weights' own type.

    Raises:
        UsageError: the file cannot be written, or the weights are not whole on this device.
    """
    if is_partitioned(model):
        raise UsageError(
            "supervision.feature.english: frozen needs the whole starting model on one device, and its weights are "
            "sharded (DeepSpeed ZeRO-3); allowed here: detached, joint"
        )
    sides = ParallelSides(examples)
    key = _key(model, sides, supervision, autocast)
    if can_be_reused(path, key):
        return
    architecture, losses = find_architecture(model), frozen_losses(supervision)
    shape = (len(sides), architecture.head_weight.shape[1])
    vectors: Arrays = {loss.name: np.empty(shape, dtype=np.float32) for loss in losses}
    layers = frozenset(english_layer(loss, architecture.num_layers) for loss in losses)
    collate, run_passes = DeepSupervisionCollator(pad_token_id), choose_passes(model)
    # Longest rows first: a lack of memory shows at once.
    order = np.argsort([-len(side.ids) for side in sides], kind="stable")
    with ExitStack() as stack:
        advance = stack.enter_context(progress("Reading the English side", len(sides)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(truncated(architecture, max(layers)))
        stack.enter_context(torch.autocast(architecture.device.type, dtype=autocast, enabled=autocast is not None))
        if hasattr(model, "peft_config"):
            stack.enter_context(cast(Any, model).disable_adapter())
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            # A batch needs a main side; the English side stands in for it.
            batch = collate([Example(main=sides[row], parallel=sides[row]) for row in rows])
            inputs = {name: batch[name].to(architecture.device) for name in ("input_ids", "attention_mask")}
            states = run_passes(model, inputs, PassRequest(main_layers=layers)).main
            mask = span_masks(batch, supervision.feature.span)[1].to(architecture.device)
            for loss in losses:
                english = english_states(states, loss, architecture, supervision.feature)
                vectors[loss.name][rows] = pool(english, mask, supervision.feature.pooling).cpu().numpy()
            advance(start + len(rows))
    save_arrays(path, vectors, key)


def _key(
    model: nn.Module, sides: Sequence[Side], supervision: SupervisionConfig, autocast: torch.dtype | None
) -> dict[str, str]:
    """Return everything that the vectors depend on, as the file's metadata."""
    num_layers, feature = find_architecture(model).num_layers, supervision.feature
    settings = {
        "layers": {loss.name: english_layer(loss, num_layers) for loss in frozen_losses(supervision)},
        "pooling": feature.pooling,
        "span": feature.span,
        "english_norm": feature.english_norm,
        "autocast": str(autocast),
    }
    rows = hashlib.sha256()
    for side in sides:
        rows.update(np.array([len(side.ids), *side.query, side.answer], dtype=np.int64).tobytes())
        rows.update(side.ids.astype(np.int64).tobytes())
    return {
        "format": _FORMAT,
        "weights": weights_digest(model),
        "rows": rows.hexdigest(),
        "settings": json.dumps(settings, sort_keys=True),
    }
