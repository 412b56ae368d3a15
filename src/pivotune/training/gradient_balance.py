"""Gradients of the inner losses beside that of L_TFT: measured, logged, and kept in bounds (`supervision.balance`).

An inner loss whose gradient is several times the task's, and unrelated to it, takes the step from the task. The figures
say which loss moves the model: shares and cosines over the blocks below the loss's layer (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from pivotune.config.supervision import NO_SUPERVISION, BalanceConfig
from pivotune.forward.passes import Batch
from pivotune.models.architecture import find_architecture, unwrap_model
from pivotune.objectives.deep_supervision import DeepSupervisionLoss

# Parameters over which gradients are compared, at most: 1.2 GB for each gradient in float32.
LARGEST_SAMPLE = 300_000_000


class GradientFigures(NamedTuple):
    """The gradient of a mean loss g over the blocks below its layer, beside that of mean L_TFT g_TFT and its English rows.

    Attributes:
        ratio: |g| / |g_TFT|.
        cosine: of g and g_TFT.
        english_cosine: of g and the gradient of L_TFT on English rows; None without English rows.
    """

    ratio: float
    cosine: float
    english_cosine: float | None


def measure_gradients(
    model: nn.Module, batch: Batch, losses: DeepSupervisionLoss, layers: Mapping[str, int], english: Batch | None = None
) -> dict[str, GradientFigures]:
    """Return the figures of every inner loss on one micro-batch: a forward pass, and a backward pass for each loss.

    Leaves the parameters' gradients alone. Blocks are compared at even distances where those below a layer hold more than
    `LARGEST_SAMPLE` trained parameters.

    Args:
        layers: the layer of each inner loss.
        english: rows trained with L_TFT in English; None takes those of the batch (`english_answer`).

    Returns:
        name -> figures; a loss with nothing to count in the batch has none.
    """
    model = unwrap_model(model)
    blocks = _sampled(find_architecture(model).blocks, max(layers.values(), default=0))
    parameters = [(index, p) for index, block in blocks for p in block.parameters() if p.requires_grad]
    terms = losses.terms(model, batch)

    def gradient(loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, [p for _, p in parameters], retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, (_, p) in zip(found, parameters, strict=True)]

    def products(one: Sequence[Tensor], other: Sequence[Tensor], layer: int) -> float:
        below = [(a, b) for (k, _), a, b in zip(parameters, one, other, strict=True) if k < layer]
        return float(torch.stack([torch.sum(a.float() * b.float()) for a, b in below]).double().sum())

    def mean(term: Any) -> Tensor:
        return term.sum.float() / term.count.clamp(min=1)

    task = gradient(mean(terms["tft"]))
    replay = _english_rows(batch) if english is None else english
    reference = None
    if replay is not None:
        reference = gradient(mean(DeepSupervisionLoss(NO_SUPERVISION).terms(model, replay)["tft"]))
    figures = {}
    for name, layer in layers.items():
        if not terms[name].count:
            continue
        own = gradient(mean(terms[name]))
        norm, task_norm = (products(each, each, layer) ** 0.5 for each in (own, task))
        cosine = products(own, task, layer) / max(norm * task_norm, 1e-30)
        english_cosine = None
        if reference is not None:
            english_norm = products(reference, reference, layer) ** 0.5
            english_cosine = products(own, reference, layer) / max(norm * english_norm, 1e-30)
        figures[name] = GradientFigures(norm / max(task_norm, 1e-30), cosine, english_cosine)
    return figures


def _sampled(blocks: nn.ModuleList, depth: int) -> list[tuple[int, nn.Module]]:
    """Return (index, block) of the blocks below layer `depth`, at even distances if they are too large together."""
    below = list(enumerate(blocks))[:depth]
    size = sum(p.numel() for _, block in below for p in block.parameters() if p.requires_grad)
    step = max(1, -(-size // LARGEST_SAMPLE))
    # The last one is the nearest to the loss.
    return below[::-1][::step]


def _english_rows(batch: Batch) -> dict[str, Tensor] | None:
    rows = batch["english_answer"]
    if not rows.any() or rows.all():
        return None
    return {name: tensor[rows] for name, tensor in batch.items()}


class GradientBalance(TrainerCallback, ExportableState):
    """Factors on the weights of the inner losses, set every `balance.every` steps from the measured gradients.

    With `mode: gradient` an inner gradient is at most `max_share` times that of L_TFT, and off while it opposes the
    gradient of the English rows. With `none` figures are only logged.

    Attributes:
        factors: inner loss -> factor from 0 to 1; kept in checkpoints.
    """

    def __init__(self, config: BalanceConfig, layers: Mapping[str, int]) -> None:
        self.config, self.layers = config, dict(layers)
        self.factors: dict[str, float] = {}
        self._figures: dict[str, float] = {}
        self._measured: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measured = None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"factors": self.factors}}

    def due(self, step: int) -> bool:
        """Return True once at every step where gradients are to be measured."""
        return bool(self.layers) and step % self.config.every == 0 and step != self._measured

    def measure(
        self,
        model: nn.Module,
        batch: Batch,
        losses: DeepSupervisionLoss,
        weights: Mapping[str, float],
        step: int,
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        """Measure a micro-batch of this step on every rank, and set the factors; `weights` are the schedule's now."""
        self._measured = step
        active = {name: layer for name, layer in self.layers.items() if weights[name]}
        devices = [find_architecture(model).device]
        # Dropout must not draw from the training's random numbers.
        with torch.random.fork_rng(devices=devices if devices[0].type == "cuda" else []):
            figures = measure_gradients(model, batch, losses, active) if active else {}
        for name, found in _mean_over_ranks(figures, active, sum_over_ranks, devices[0]).items():
            share = weights[name] * found.ratio
            if self.config.mode == "gradient":
                opposed = found.english_cosine is not None and found.english_cosine < 0
                self.factors[name] = 0.0 if opposed else min(1.0, self.config.max_share / max(share, 1e-30))
            self._figures[f"{name}_gradient_share"] = share * self.factors.get(name, 1.0)
            self._figures[f"{name}_cosine"] = found.cosine
            if found.english_cosine is not None:
                self._figures[f"{name}_english_cosine"] = found.english_cosine
            if self.config.mode == "gradient":
                self._figures[f"{name}_factor"] = self.factors[name]

    def take_figures(self) -> dict[str, float]:
        """Return what was measured since the last call, for the log line."""
        figures, self._figures = self._figures, {}
        return figures


def _mean_over_ranks(
    figures: Mapping[str, GradientFigures],
    names: Iterable[str],
    sum_over_ranks: Callable[[Tensor], Tensor],
    device: torch.device,
) -> dict[str, GradientFigures]:
    """Average each figure over the ranks whose micro-batch has it."""
    rows = [figures.get(name, (None, None, None)) for name in names]
    values = torch.tensor([[[value or 0.0, value is not None] for value in row] for row in rows], device=device)
    totals: list[Any] = sum_over_ranks(values).tolist() if rows else []
    means: dict[str, GradientFigures] = {}
    for name, row in zip(names, totals, strict=True):
        ratio, cosine, english = (total / count if count else None for total, count in row)
        if ratio is not None and cosine is not None:
            means[name] = GradientFigures(ratio, cosine, english)
    return means
