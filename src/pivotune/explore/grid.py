"""The lens of one text: the distribution over next tokens at every layer and position, summarized cell by cell.

Shapes: N positions, L layers, D width, V vocabulary, K likeliest tokens. Layer k means "after k decoder blocks"; layer L is
the model's own output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pivotune.errors import UsageError
from pivotune.layers.profile import counted_states
from pivotune.lenses.base import Lens
from pivotune.lenses.logit import lens_logits
from pivotune.models.architecture import Architecture, find_architecture
from pivotune.models.taps import evaluation_mode

LIKELIEST = 10
# Share of one layer's rows whose logits exist at once: with their temporaries they stay below the logits of one layer.
_PARTS = 6


@dataclass(frozen=True, kw_only=True)
class LensGrid:
    """Statistics of p_k = softmax(head(norm(lens(h_k)))) for k = 0..L at every position, float32 on the CPU.

    Attributes:
        tokens: ids of the K likeliest tokens, likeliest first, (L + 1, N, K).
        probabilities: their probabilities, (L + 1, N, K).
        entropy: -sum p log p in nats, (L + 1, N).
        output: p_k of the token that the output finds likeliest, (L + 1, N).
        letters: sum of p_k over tokens of ASCII letters and over tokens with other letters, (L + 1, N, 2).
    """

    tokens: Tensor
    probabilities: Tensor
    entropy: Tensor
    output: Tensor
    letters: Tensor


@dataclass(frozen=True, kw_only=True)
class GridDifference:
    """Changes from another model's distributions q_k to p_k on the same tokens, (L + 1, N).

    Attributes:
        kl: KL(p_k || q_k) in nats.
        change: p_k - q_k of the token that p_k finds likeliest.
    """

    kl: Tensor
    change: Tensor


@torch.no_grad()
def lens_states(model: nn.Module, ids: list[int], lens: Lens | None, start: int = 0) -> Tensor:
    """Return what the final norm reads at the positions from `start` on, (L + 1, N, D), from one forward pass.

    Args:
        lens: applied below layer L; None for the logit lens.
    """
    input_ids = torch.tensor([ids])
    shown = (torch.arange(len(ids)) >= start)[None]
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    with evaluation_mode(model):
        return counted_states(model, find_architecture(model), batch, shown, lens)


@torch.no_grad()
def lens_grid(architecture: Architecture, states: Tensor, letters: tuple[Tensor, Tensor]) -> LensGrid:
    """Return the grid of `lens_states`.

    Args:
        letters: boolean vectors over the tokenizer's ids: tokens of ASCII letters, and tokens with other letters (see
            `pivotune.layers.measure.token_letters`).
    """
    # Models often have more output rows than the tokenizer has tokens.
    fitted = [
        F.pad(mask, (0, max(architecture.vocab_size - len(mask), 0)))[: architecture.vocab_size] for mask in letters
    ]
    marked = torch.stack(fitted, dim=1).to(states.device, torch.float32)
    parts = []
    for part in _parts(states):
        found, wanted = [], None
        for layer in reversed(range(len(states))):
            log_p = _log_probabilities(architecture, states[layer, part])
            wanted = log_p.argmax(-1, keepdim=True) if wanted is None else wanted
            of_output = log_p.gather(-1, wanted)[:, 0].exp()
            p = log_p.exp_()
            top = p.topk(min(LIKELIEST, p.shape[-1]))
            found.append((top.indices, top.values, torch.special.entr(p).sum(-1), of_output, p @ marked))
        parts.append([torch.stack(each[::-1]).cpu() for each in zip(*found, strict=True)])
    tokens, probabilities, entropy, output, shares = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    return LensGrid(tokens=tokens, probabilities=probabilities, entropy=entropy, output=output, letters=shares)


@torch.no_grad()
def grid_difference(
    architecture: Architecture, states: Tensor, other: Architecture, other_states: Tensor
) -> GridDifference:
    """Return how the first model's distributions p_k differ from the other's q_k; both states are of the same tokens.

    Raises:
        UsageError: the models have different numbers of layers or output tokens.
    """
    for what, mine, others in (
        ("layers", len(states) - 1, len(other_states) - 1),
        ("output tokens", architecture.vocab_size, other.vocab_size),
    ):
        if mine != others:
            raise UsageError(
                f"--against: the models have {mine} and {others} {what}; allowed: models of the same shape"
            )
    parts = []
    for part in _parts(states):
        rows = []
        for mine, others in zip(states[:, part], other_states[:, part], strict=True):
            log_p, log_q = _log_probabilities(architecture, mine), _log_probabilities(other, others)
            top = log_p.argmax(-1, keepdim=True)
            change = (log_p.gather(-1, top).exp() - log_q.gather(-1, top).exp().to(log_p.device))[:, 0]
            kl = log_p.exp().mul_(log_p.sub_(log_q.to(log_p.device))).sum(-1)
            rows.append((kl, change))
        parts.append([torch.stack(each).cpu() for each in zip(*rows, strict=True)])
    kl, change = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    return GridDifference(kl=kl, change=change)


def _parts(states: Tensor) -> list[slice]:
    """Return slices of the N positions."""
    size = max(states.shape[1] // _PARTS, 1)
    return [slice(start, start + size) for start in range(0, states.shape[1], size)]


def _log_probabilities(architecture: Architecture, states: Tensor) -> Tensor:
    # A head may rule tokens out with -inf; 0 * -inf would be NaN.
    logits = lens_logits(architecture, states).float().clamp_(min=torch.finfo(torch.float32).min / 2)
    return logits.log_softmax(-1)
