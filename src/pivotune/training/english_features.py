"""The English side of `feature.english: frozen`: the starting model's pooled vectors, computed once and kept on disk.

The starting model does not change, so that its vector of a row is the same at every step. Before training, one pass
without gradient over the English sides computes all of them; training then runs no English pass and holds no copy of
the model. A file is used again only where weights, rows and settings are the same, and its content is whole.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pivotune.data.collator import DeepSupervisionCollator, ExampleDataset
from pivotune.data.datasets import ParallelSides, has_parallel
from pivotune.data.examples import Example, Side
from pivotune.errors import UsageError
from pivotune.forward.passes import PassRequest, choose_passes
from pivotune.models.architecture import find_architecture
from pivotune.models.placement import placed
from pivotune.models.sharding import is_partitioned
from pivotune.models.taps import evaluation_mode, truncated
from pivotune.objectives.deep_supervision import Supervision, english_layer, english_states
from pivotune.objectives.feature import pool, span_masks
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.distributed import ranks
from pivotune.training.progress import Progress, silent
from pivotune.training.vector_file import Vectors, map_vectors, rows_digest, save_vectors, weights_digest, why_unusable

logger = logging.getLogger(__name__)
FEATURES_FILE = "english-features.safetensors"
_FORMAT = "1"


class FeatureDataset(ExampleDataset):
    """Examples with their pooled English vectors.

    Args:
        examples: the training rows.
        path: a file of `prepare_features` for these rows; mapped into memory, so that a step reads what it needs.
    """

    def __init__(self, examples: Sequence[Example], path: Path) -> None:
        super().__init__(examples)
        self._path = path
        has_english = has_parallel(self.examples)
        self._places = np.where(has_english, np.cumsum(has_english) - 1, -1)
        self._vectors = map_vectors(path)

    def __getitem__(self, index: int) -> Example:
        place = self._places[index]
        vectors = {
            name: np.zeros(table.shape[1], np.float32) if place < 0 else table[place]
            for name, table in self._vectors.items()
        }
        return replace(self.examples[index], english_features=vectors)

    def __reduce__(self) -> tuple:
        """A worker process maps the file itself."""
        return FeatureDataset, (self.examples, self._path)


def with_features(
    dataset: ExampleDataset | None,
    model: nn.Module,
    supervision: Supervision,
    args: DeepSupervisionConfig,
    *,
    pad_token_id: int,
    progress: Progress = silent,
) -> ExampleDataset | None:
    """The training rows with their pooled English vectors, where the losses compare with the frozen starting model.

    Args:
        model: the starting model.

    Raises:
        UsageError: see `prepare_features`.
    """
    if dataset is None or not wants_features(supervision):
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

    # One process computes for all; the others' weights may not even be loaded yet (FSDP).
    ranks.on_main(compute)
    return FeatureDataset(dataset.examples, path)


def wants_features(supervision: Supervision) -> bool:
    """Whether some inner loss compares with the frozen starting model."""
    return supervision.english == "frozen" and any(s.kind == "feature" for s in supervision.active().values())


def prepare_features(
    model: nn.Module,
    examples: Sequence[Example],
    supervision: Supervision,
    path: Path,
    *,
    pad_token_id: int,
    batch_size: int = 8,
    autocast: torch.dtype | None = None,
    progress: Progress = silent,
) -> None:
    """See to it that `path` holds the pooled English vectors of these rows.

    One tensor (rows with an English side, width), float32, for every feature term: conversion after its layer, thinking at
    the top. Computing holds all of them in memory: 4 bytes x rows x width x terms (1.7 GB for 52,000 rows of width 4,096
    and two terms). A file that is there is used if it is whole and of the same weights, rows and settings.

    Args:
        model: the starting model, without adapters, where it is to run.
        autocast: what training runs in; None for the weights' own type.

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
    problem = why_unusable(path, key, len(sides))
    if problem is None:
        logger.info("%s: used again", path)
        return
    if path.exists():
        logger.warning("%s: computed again (%s)", path, problem)
    with progress("Reading the English side", len(sides)) as advance:
        vectors = _compute(model, sides, supervision, pad_token_id, batch_size, autocast, advance)
    save_vectors(path, vectors, key)


@torch.no_grad()
def _compute(
    model: nn.Module,
    sides: Sequence[Side],
    supervision: Supervision,
    pad_token_id: int,
    batch_size: int,
    autocast: torch.dtype | None,
    advance: Callable[[int], None],
) -> Vectors:
    """Longest rows first: whether memory suffices shows at once."""
    architecture = find_architecture(model)
    layers = _layers(supervision, architecture.num_layers)
    shape = (len(sides), architecture.head_weight.shape[1])
    vectors = {name: np.empty(shape, dtype=np.float32) for name in layers}
    collate = DeepSupervisionCollator(pad_token_id)
    lengths = np.fromiter((len(side.ids) for side in sides), dtype=np.int32, count=len(sides))
    order = np.argsort(-lengths, kind="stable")
    with _starting_model(model, max(layers.values()), autocast):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            # As the English side of a batch; the main side, which a batch must have, is the same.
            batch = collate([Example(main=sides[row], parallel=sides[row]) for row in rows])
            for name, pooled in _pooled(model, batch, supervision, layers).items():
                vectors[name][rows] = pooled.cpu().numpy()
            advance(start + len(rows))
    return vectors


@contextmanager
def _starting_model(model: nn.Module, num_layers: int, autocast: torch.dtype | None) -> Iterator[None]:
    """Without dropout and adapters, and no further than the highest layer asked for."""
    architecture = find_architecture(model)
    device = architecture.device.type
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(truncated(architecture, num_layers))
        stack.enter_context(torch.autocast(device, dtype=autocast, enabled=autocast is not None))
        if hasattr(model, "peft_config"):
            stack.enter_context(cast(Any, model).disable_adapter())
        yield


def _pooled(
    model: nn.Module, batch: Mapping[str, Tensor], supervision: Supervision, layers: Mapping[str, int]
) -> dict[str, Tensor]:
    device = find_architecture(model).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    states = choose_passes(model)(model, inputs, PassRequest(main_layers=frozenset(layers.values()))).main
    mask = span_masks(batch, supervision.span)[1].to(device)
    return {
        name: pool(english_states(states, supervision, name, layer), mask, supervision.pooling)
        for name, layer in layers.items()
    }


def _layers(supervision: Supervision, num_layers: int) -> dict[str, int]:
    """The layer of the English side by feature term."""
    signals = {name: signal for name, signal in supervision.active().items() if signal.kind == "feature"}
    return {name: english_layer(name, signal, num_layers) for name, signal in signals.items()}


def _key(
    model: nn.Module, sides: Sequence[Side], supervision: Supervision, autocast: torch.dtype | None
) -> dict[str, str]:
    """Everything that the vectors depend on, as the file's metadata."""
    settings = {
        "layers": _layers(supervision, find_architecture(model).num_layers),
        "pooling": supervision.pooling,
        "span": supervision.span,
        "english_norm": supervision.english_norm,
        "autocast": str(autocast),
    }
    return {
        "format": _FORMAT,
        "weights": weights_digest(model),
        "rows": rows_digest(sides),
        "settings": json.dumps(settings, sort_keys=True),
    }
