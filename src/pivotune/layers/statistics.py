"""Statistics of lens distributions, block by block of the vocabulary, so that a row of logits never exists as a whole.

Shapes: R rows (a token at a layer), D width, V vocabulary, C columns of a block, K = ceil(V / C) blocks.

With w_k = sum_{v in block k} p_v and the distribution inside the block q_k = p / w_k, the chain rule of entropy gives
H(p) = H(w) + sum_k w_k H(q_k) (Shannon 1948, section 6). All terms are positive: nothing cancels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pivotune.models.architecture import Architecture
from pivotune.models.head import chunk_rows, frozen_norm, logit_blocks, plain_head


class BlockSize(NamedTuple):
    """How many logits exist at once, `rows` x `columns`; a temporary or two of the same size stand beside them."""

    rows: int
    columns: int


class LensStatistics(NamedTuple):
    """Of each row's lens distribution p.

    Attributes:
        entropy: -sum p log p in nats, (R,) float32.
        top: index of the most probable token, (R,).
        english: sum of p over the tokens marked as English, (R,) float32; 0 where none were given.
    """

    entropy: Tensor
    top: Tensor
    english: Tensor


def default_block(architecture: Architecture, device: torch.device) -> BlockSize:
    """The block that is fast on this device.

    On a CPU 32 MiB. At 576 x 49,152 that took 0.6 of the time of chunks of whole rows. Blocks of 4 MiB were another 5 %
    faster alone on the machine and up to four times slower beside other programs, because threads then wait for each other
    at every small operation. On a GPU 256 MiB. A head that can only be called as a module gives whole rows, so fewer.
    """
    if plain_head(architecture) is None:
        return BlockSize(chunk_rows(architecture.vocab_size, device), architecture.vocab_size)
    return BlockSize(512, 16384) if device.type == "cpu" else BlockSize(2048, 32768)


@torch.no_grad()
def lens_statistics(
    architecture: Architecture, hidden_states: Tensor, english: Tensor | None = None, block: BlockSize | None = None
) -> LensStatistics:
    """Statistics of softmax(lens(h)) for raw states `h_k` of any layers, (R, D).

    Args:
        english: 1.0 for the tokens whose share is asked for, else 0.0, (V,) float32 on the states' device.
        block: how many logits to make at once; see `default_block`.
    """
    rows, columns = block or default_block(architecture, hidden_states.device)
    chunks = [_rows_statistics(architecture, chunk, english, columns) for chunk in hidden_states.split(rows)]
    return LensStatistics(*map(torch.cat, zip(*chunks, strict=True)))


def _rows_statistics(
    architecture: Architecture, hidden_states: Tensor, english: Tensor | None, columns: int
) -> LensStatistics:
    normed = frozen_norm(architecture, hidden_states)
    scratch, blocks = None, []
    for start, logits in logit_blocks(architecture, normed, columns):
        scratch = _scratch(logits) if scratch is None else scratch
        marked = None if english is None else english[start : start + logits.shape[-1]]
        blocks.append(_block_statistics(start, logits, marked, scratch))
    return _combine(*map(torch.stack, zip(*blocks, strict=True)))


def _scratch(logits: Tensor) -> Tensor:
    """Float32 memory for every block's temporaries: one of the first block's size, two where its type is another.

    Fresh memory costs page faults and, with the blocks' small results in between, leaves holes in the heap that add up to
    the size of all logits.
    """
    return logits.new_empty((1 if logits.dtype == torch.float32 else 2, logits.numel()), dtype=torch.float32)


def _block_statistics(
    start: int, logits: Tensor, english: Tensor | None, scratch: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of a block's logits (R, C), overwritten: largest logit, its token, -log q_k of it, H(q_k), q_k's English."""
    inside = scratch[0, : logits.numel()].view_as(logits)
    if logits.dtype != torch.float32:
        logits = scratch[1, : logits.numel()].view_as(logits).copy_(logits)
    # A head may rule tokens out with -inf; 0 * -inf would be NaN, 0 * (a huge number) is 0.
    logits.clamp_(min=torch.finfo(torch.float32).min / 2)
    largest, top = logits.max(-1, keepdim=True)
    torch.softmax(logits.sub_(largest), -1, out=inside)
    log_sum = -inside.gather(-1, top)[:, 0].log()
    share = torch.zeros_like(log_sum) if english is None else inside @ english
    entropy = log_sum - inside.mul_(logits).sum(-1)
    return largest[:, 0], start + top[:, 0], log_sum, entropy, share


def _combine(largest: Tensor, top: Tensor, log_sum: Tensor, entropy: Tensor, english: Tensor) -> LensStatistics:
    """From blocks, each argument (K, R), to whole rows (R,): the chain rule above."""
    # The largest logits' difference before the sum, so that a constant in all logits costs no digits.
    weight = (largest - largest.amax(0) + log_sum).softmax(0)
    best = largest.argmax(0, keepdim=True)
    return LensStatistics(
        entropy=torch.special.entr(weight).sum(0) + (weight * entropy).sum(0),
        top=top.gather(0, best)[0],
        english=(weight * english).sum(0),
    )
