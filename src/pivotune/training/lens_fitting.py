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
from torch import nn

from pivotune.config.registry import LENSES
from pivotune.config.settings import SupervisionConfig, TunedLensConfig
from pivotune.data.examples import Pair
from pivotune.data.pair_store import pairs_digest
from pivotune.errors import UsageError
from pivotune.lenses.base import Lens
from pivotune.lenses.tuned import LensFigures, Text, TunedLens, fit_tuned_lens
from pivotune.models.architecture import find_architecture
from pivotune.models.sharding import is_partitioned, placed
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.distributed import ranks
from pivotune.training.kept_arrays import can_be_reused, map_arrays, save_arrays, weights_digest
from pivotune.training.preparation import spread
from pivotune.training.progress import Progress, silent

logger = logging.getLogger(__name__)
LENS_FILE = "lens.safetensors"
_FORMAT = "1"
# Rows that texts are taken from, at even distances; 10,000 states come from about a hundred.
_ROWS = 2000
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
    layers = sorted({int(term.layer) for term in supervision.active().values()})
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
    key = _key(model, pairs, supervision.tuned, layers, args)

    def fit() -> None:
        if can_be_reused(path, key):
            return
        with placed(model, args.device):
            fitted, figures = fit_lens(model, args, supervision.tuned, pairs, layers, progress)
        save_arrays(path, fitted.to_arrays(), {**key, "figures": json.dumps(figures)})

    ranks.on_main(fit)
    lens.set_arrays(map_arrays(path))
    for layer, figures in read_lens_figures(path).items():
        level = logging.WARNING if figures.kl > UNRELIABLE_KL and ranks.is_main() else logging.INFO
        logger.log(
            level,
            "tuned lens at layer %d: KL %.2f nats from the output (logit lens %.2f)%s",
            layer,
            figures.kl,
            figures.logit_kl,
            f"; above {UNRELIABLE_KL:g}, so the layer holds little of the output: choose a higher layer"
            if figures.kl > UNRELIABLE_KL
            else "",
        )
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
    with progress("Fitting the lens", config.states + config.steps) as advance, autocast:
        return fit_tuned_lens(
            model,
            texts,
            layers,
            config,
            start=start,
            seed=cast(int, args.seed),
            batch_size=args.per_device_eval_batch_size,
            progress=lambda done: advance(min(done, config.states + config.steps)),
        )


def lens_texts(pairs: Sequence[Pair], text: str) -> list[Text]:
    """Return the texts whose states a lens is fitted on.

    `english`: the English side of every row; `both`: every other row's target side instead; `branches`: the English query
    or answer behind the target prompt, as the inner losses read it. The first token's state is not used: it has no context,
    and activations of its own.
    """
    texts = []
    for index, pair in enumerate(pairs):
        english, target = pair.english, pair.target
        if english is None or (text == "both" and index % 2 and target is not None):
            if target is not None:
                texts.append(Text(target.ids, 1))
        elif text == "branches" and target is not None:
            part = slice(*english.query) if index % 2 else slice(english.answer, len(english.ids))
            texts.append(
                Text(np.concatenate([target.ids[: target.answer], english.ids[part]]), max(target.answer - 1, 1))
            )
        else:
            texts.append(Text(english.ids, 1))
    return texts


def read_lens_figures(path: Path) -> dict[int, LensFigures]:
    """Return layer -> held-out KL of the tuned and of the logit lens, as stored with the maps."""
    with safe_open(path, framework="pt") as file:
        stored = json.loads((file.metadata() or {}).get("figures", "{}"))
    return {int(layer): LensFigures(*values) for layer, values in stored.items()}


def _key(
    model: nn.Module,
    pairs: Sequence[Pair],
    config: TunedLensConfig,
    layers: Sequence[int],
    args: DeepSupervisionConfig,
) -> dict[str, str]:
    """Return everything that the maps depend on, as the file's metadata."""
    settings: dict[str, Any] = config.model_dump(exclude={"refit"})
    return {
        "format": _FORMAT,
        "weights": weights_digest(model),
        "rows": pairs_digest(pairs),
        "settings": json.dumps({**settings, "seed": args.seed, "bf16": args.bf16, "fp16": args.fp16}, sort_keys=True),
        "layers": json.dumps(list(layers)),
    }
