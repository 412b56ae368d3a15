"""The lens of one text: the distribution over next tokens at every layer and position, summarized cell by cell.

Shapes: N positions, L layers, D width, V vocabulary, K likeliest tokens. Layer k means "after k decoder blocks"; layer L is
the model's own output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pivotune.layers.profile import counted_states
from pivotune.lenses.base import Lens
from pivotune.lenses.logit import lens_logits
from pivotune.models.architecture import Architecture, find_architecture
from pivotune.models.taps import evaluation_mode

LIKELIEST = 10
# Positions whose logits exist at once: with their temporaries they take less memory than the logits of 64 positions, and
# more of them would be little faster.
_POSITIONS = 16


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
    """Return the inputs of the final norm at the positions from `start` on, (L + 1, N, D), from one forward pass.

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

    # A function, so that its temporaries are freed before those of the next layer are made.
    def summarize(raw: Tensor, wanted: Tensor | None) -> tuple[Tensor, ...]:
        log_p = _log_probabilities(architecture, raw)
        p = log_p.exp()
        top = p.topk(min(LIKELIEST, p.shape[-1]))
        of_output = p.gather(-1, top.indices[:, :1] if wanted is None else wanted)[:, 0]
        return top.indices, top.values, -torch.linalg.vecdot(p, log_p), of_output, p @ marked

    parts = []
    for part in torch.arange(states.shape[1]).split(_POSITIONS):
        found = [summarize(states[-1, part], None)]
        wanted = found[0][0][:, :1]
        found += [summarize(states[layer, part], wanted) for layer in reversed(range(len(states) - 1))]
        parts.append([torch.stack(each[::-1]).cpu() for each in zip(*found, strict=True)])
    tokens, probabilities, entropy, output, shares = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    return LensGrid(tokens=tokens, probabilities=probabilities, entropy=entropy, output=output, letters=shares)


@torch.no_grad()
def grid_difference(
    architecture: Architecture, states: Tensor, other: Architecture, other_states: Tensor
) -> GridDifference:
    """Return how the first model's distributions p_k differ from the other's q_k, a model of the same shape."""

    def compare(mine: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        log_p = _log_probabilities(architecture, mine)
        log_q = _log_probabilities(other, others).to(log_p.device)
        top = log_p.argmax(-1, keepdim=True)
        change = (log_p.gather(-1, top).exp() - log_q.gather(-1, top).exp())[:, 0]
        torch.sub(log_p, log_q, out=log_q)
        return torch.linalg.vecdot(log_p.exp_(), log_q), change

    parts = []
    for part in torch.arange(states.shape[1]).split(_POSITIONS):
        rows = [compare(mine, others) for mine, others in zip(states[:, part], other_states[:, part], strict=True)]
        parts.append([torch.stack(each).cpu() for each in zip(*rows, strict=True)])
    kl, change = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    return GridDifference(kl=kl, change=change)


def _log_probabilities(architecture: Architecture, states: Tensor) -> Tensor:
    # A head may rule tokens out with -inf; 0 * -inf would be NaN.
    logits = lens_logits(architecture, states).float().clamp_(min=torch.finfo(torch.float32).min / 2)
    return logits.log_softmax(-1)
