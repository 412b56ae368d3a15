"""Build the lens of a run: a tuned lens is fitted on the starting model before training and kept in the run folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn
from transformers import TrainerCallback

from pivotune.config.registry import LENSES, OBJECTIVES
from pivotune.config.supervision import SupervisionConfig, TunedLensConfig
from pivotune.data.datasets import spread
from pivotune.data.examples import Pair
from pivotune.data.pair_store import pairs_digest
from pivotune.errors import UsageError
from pivotune.lenses.base import Lens
from pivotune.lenses.tuned import (
    LEAST_STATES,
    LensFigures,
    TunedLens,
    check_enough_states,
    count_states,
    fit_tuned_lens,
    lens_texts,
)
from pivotune.models.architecture import find_architecture, unwrap_model
from pivotune.models.sharding import is_partitioned, placed
from pivotune.objectives.deep_supervision import build_objectives
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.distributed import ranks
from pivotune.training.kept_arrays import can_be_reused, key_of, map_arrays, save_arrays
from pivotune.training.progress import Progress, silent

logger = logging.getLogger(__name__)
LENS_FILE = "lens.safetensors"
# 2: fits under autocast follow the changed maps.
_FORMAT = "2"
# Rows that texts are taken from, at even distances; 10,000 states come from about a hundred.
_ROWS = 2000
# Rows beside the measured ones that an analysis fits its lens on.
FITTED_ON = 400
# KL in nats from the model's own output above which a lens reads little of what a layer holds.
UNRELIABLE_KL = 4.0


def build_lens(
    model: nn.Module,
    args: DeepSupervisionConfig,
    supervision: SupervisionConfig,
    pairs: Sequence[Pair] | None,
    progress: Progress = silent,
) -> Lens:
    """Return the lens of `supervision.lens` for the starting model; a tuned one is fitted, or read from the run folder.

    The main process fits it for all, before adapters are added and weights are sharded.

    Raises:
        UsageError: no rows to fit it on, or ZeRO-3 has partitioned the model already, or the file cannot be written.
    """
    lens: Lens = LENSES[supervision.lens](find_architecture(model))
    groups = build_objectives(supervision)
    layers = sorted({loss.layer for objective, losses in groups if objective.uses_lens for loss in losses})
    if not isinstance(lens, TunedLens) or not layers:
        return lens
    if not pairs:
        raise UsageError("supervision.lens: tuned is fitted on training rows; give train_dataset, or use lens: logit")
    if is_partitioned(model):
        raise UsageError(
            "supervision.lens: tuned needs the whole starting model on one device, and ZeRO-3 has partitioned it already; "
            "set zero3_init_flag: false, or use lens: logit"
        )
    path = Path(cast(str, args.output_dir)) / LENS_FILE
    settings = {
        **supervision.tuned.model_dump(exclude={"refit"}),
        "seed": args.seed,
        "bf16": args.bf16,
        "fp16": args.fp16,
    }
    key = key_of(model, pairs_digest(pairs), settings, version=_FORMAT)

    def fit() -> None:
        # The map of a layer does not depend on the other layers: those that a file has are kept.
        known = read_lens_figures(path) if can_be_reused(path, key) else {}
        missing = [layer for layer in layers if layer not in known]
        if not missing:
            return
        with placed(model, args.device):
            fitted, figures = fit_lens(model, args, supervision.tuned, pairs, missing, progress)
        arrays = {**(map_arrays(path) if known else {}), **fitted.to_arrays()}
        save_arrays(path, arrays, {**key, "figures": json.dumps({**known, **figures})})

    ranks.on_main(fit)
    lens.set_arrays(map_arrays(path))
    for layer, figures in read_lens_figures(path).items():
        found = f"layer {layer}: KL {figures.kl:.2f} nats from the output (logit lens {figures.logit_kl:.2f})"
        if figures.kl > UNRELIABLE_KL and ranks.is_main():
            remedy = "so the layer holds little of the output: choose a higher layer"
            logger.warning("tuned lens at %s; above %g, %s", found, UNRELIABLE_KL, remedy)
        else:
            logger.info("tuned lens at %s", found)
    return lens


def fit_lens(
    model: nn.Module,
    args: DeepSupervisionConfig,
    config: TunedLensConfig,
    pairs: Sequence[Pair],
    layers: Sequence[int],
    progress: Progress = silent,
    start: TunedLens | None = None,
) -> tuple[TunedLens, dict[int, LensFigures]]:
    """Fit a tuned lens on the rows' texts, under the autocast of training."""
    texts = lens_texts(spread(pairs, _ROWS), config.text)
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    autocast = torch.autocast(args.device.type, dtype=dtype, enabled=args.bf16 or args.fp16)
    with progress("Fitting the lens", 100) as advance, autocast:
        return fit_tuned_lens(
            model,
            texts,
            layers,
            config,
            start=start,
            seed=cast(int, args.seed),
            batch_size=args.per_device_eval_batch_size,
            progress=advance,
        )


class LensRefit(TrainerCallback):
    """Fit a tuned lens again on the model in training, every `tuned.refit` optimizer steps; kept in every checkpoint.

    Args:
        trainer: its model is read in evaluation mode; `resumed_from` names the checkpoint that holds the maps.
        lens: changed in place.
        pairs: rows whose texts are read.
    """

    def __init__(self, trainer: Any, lens: TunedLens, config: TunedLensConfig, pairs: Sequence[Pair]) -> None:
        self._trainer, self._lens, self._config, self._pairs = trainer, lens, config, pairs

    def save(self, folder: Path) -> None:
        """Write the maps into a checkpoint."""
        save_file(self._lens.to_arrays(), folder / LENS_FILE)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the maps of the checkpoint.

        Raises:
            UsageError: the checkpoint has none.
        """
        checkpoint = self._trainer.resumed_from
        if checkpoint is None:
            return
        path = checkpoint / LENS_FILE
        if not path.is_file():
            raise UsageError(f"{path}: not there; resume with the supervision.tuned.refit that the run was begun with")
        self._lens.set_arrays(map_arrays(path))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step or state.global_step % self._config.refit:
            return

        def fit() -> dict[str, np.ndarray]:
            model, start = unwrap_model(self._trainer.model), self._lens
            # Dropout is off and no random number of the training is drawn.
            lens, _ = fit_lens(model, args, self._config, self._pairs, list(start.maps), start=start)
            return lens.to_arrays()

        self._lens.set_arrays(ranks.on_main(fit))


def fit_all_layers(
    model: nn.Module,
    others: Sequence[Pair],
    config: TunedLensConfig,
    progress: Progress = silent,
    measured: Sequence[Pair] = (),
) -> TunedLens:
    """Fit a lens for every layer by the regression alone, to see what each layer can say of the `measured` rows."""
    quick = config.model_copy(update={"steps": 0})
    texts = lens_texts(others, config.text)
    if count_states(texts) < LEAST_STATES:
        # Too few rows to set some apart.
        texts = lens_texts([*others, *measured], config.text)
    with progress("Fitting a lens for every layer", 100) as advance:
        layers = range(find_architecture(model).num_layers)
        return fit_tuned_lens(model, texts, layers, quick, measured=False, progress=advance)[0]


def check_lens_rows(supervision: SupervisionConfig, pairs: Sequence[Pair]) -> None:
    """Refuse rows that are too few to fit a lens on, before anything is loaded or written.

    Raises:
        UsageError: names the number of token states, and what to do.
    """
    by_reading = supervision.layers == "reading" and any(t.layer == "auto" for t in supervision.active().values())
    signals = {term.signal for term in supervision.active().values()}
    reads = any(OBJECTIVES[signal](supervision.options(signal)).uses_lens for signal in signals)
    if by_reading or (reads and LENSES[supervision.lens] is TunedLens):
        check_enough_states(count_states(lens_texts(spread(pairs, _ROWS), supervision.tuned.text)))


def read_lens_figures(path: Path) -> dict[int, LensFigures]:
    """Return layer -> held-out KL of the tuned and of the logit lens, as stored with the maps."""
    with safe_open(path, framework="pt") as file:
        stored = json.loads((file.metadata() or {}).get("figures", "{}"))
    return {int(layer): LensFigures(*values) for layer, values in stored.items()}
