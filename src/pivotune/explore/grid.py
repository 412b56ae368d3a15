"""The lens of one text: the distribution over next tokens at every layer and position, summarized cell by cell.

Shapes: N positions, L layers, D width, V vocabulary, K likeliest tokens. Layer k means "after k decoder blocks"; layer L is
the model's own output.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
def lens_grids(
    read: Sequence[tuple[Architecture, Tensor]], letters: tuple[Tensor, Tensor]
) -> tuple[list[LensGrid], GridDifference | None]:
    """Return the grid of each model, and of two models how the first differs from the other.

    Args:
        read: one model, or two of the same shape, with its `lens_states`.
        letters: boolean vectors over the tokenizer's ids: tokens of ASCII letters, and tokens with other letters (see
            `pivotune.layers.measure.token_letters`).
    """
    architecture, states = read[0]
    size = architecture.vocab_size
    # Models often have more output rows than the tokenizer has tokens.
    fitted = [F.pad(mask, (0, max(size - len(mask), 0)))[:size] for mask in letters]
    marked = torch.stack(fitted, dim=1).to(states.device, torch.float32)
    parts: list[list[list[Tensor]]] = [[] for _ in range(len(read) + 1)]
    for part in torch.arange(states.shape[1]).split(_POSITIONS // len(read)):
        layers = []
        wanted: list[Tensor | None] = [None] * len(read)
        # From the output down, whose likeliest token all layers report.
        for layer in reversed(range(len(states))):
            layers.append(_read_layer([(each, found[layer, part]) for each, found in read], marked, wanted))
        for place, columns in enumerate(zip(*layers[::-1], strict=True)):
            parts[place].append([torch.stack(each).cpu() for each in zip(*columns, strict=True)])
    *grids, change = ([torch.cat(each, dim=1) for each in zip(*found, strict=True)] for found in parts)
    return [LensGrid(*grid) for grid in grids], GridDifference(*change) if change else None


def _read_layer(
    read: Sequence[tuple[Architecture, Tensor]], marked: Tensor, wanted: list[Tensor | None]
) -> list[tuple[Tensor, ...]]:
    """Return the columns of each model's grid at some positions of one layer, and those of the difference.

    `wanted` holds each model's likeliest tokens at the output (N, 1), and is filled at the first call.
    """
    # A head may rule tokens out with -inf; 0 * -inf would be NaN.
    least = torch.finfo(torch.float32).min / 2
    log_p = [lens_logits(each, states).float().clamp_(min=least).log_softmax(-1) for each, states in read]
    columns = []
    for place, each in enumerate(log_p):
        p = each.exp()
        top = p.topk(min(LIKELIEST, p.shape[-1]))
        output = wanted[place]
        if output is None:
            output = wanted[place] = top.indices[:, :1]
        columns.append((top.indices, top.values, -torch.linalg.vecdot(p, each), p.gather(-1, output)[:, 0], p @ marked))
        del p
    if len(log_p) == 1:
        return [*columns, ()]
    mine, other = log_p[0], log_p[1].to(log_p[0].device)
    likeliest = columns[0][0][:, :1]
    change = (mine.gather(-1, likeliest).exp() - other.gather(-1, likeliest).exp())[:, 0]
    return [*columns, (torch.linalg.vecdot(mine.exp(), other.neg_().add_(mine)), change)]
