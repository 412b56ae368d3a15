"""Profile every layer of a model through a lens: entropy, agreement with the output, share of English tokens.

Statistics are computed block by block of the vocabulary, so that no row of logits exists as a whole. With
w_k = sum_{v in block k} p_v and the distribution inside the block q_k = p / w_k, the chain rule of entropy gives
H(p) = H(w) + sum_k w_k H(q_k) (Shannon 1948, section 6). All terms are positive: nothing cancels.

Shapes: B sequences, T tokens, N counted tokens of a batch, D width, V vocabulary, L layers; R rows (a token at a layer),
C columns of a block, K = ceil(V / C) blocks.
Layer k means "after k decoder blocks": 0 = embeddings, L = after the last block, where the lens gives the model's own
output distribution.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pivotune.errors import UsageError
from pivotune.lenses.base import Lens
from pivotune.models.architecture import Architecture, find_architecture, unwrap_model
from pivotune.models.head import chunk_rows, frozen_norm, logit_blocks, plain_head
from pivotune.models.taps import evaluation_mode, tap


class BlockSize(NamedTuple):
    """Number of logits that exist at once, `rows` x `columns`."""

    rows: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """Means over the counted tokens for every layer k = 0..L.

    Attributes:
        num_layers: L; every list has L + 1 values.
        tokens: counted tokens.
        sequences: sequences with at least one counted token.
        entropy: mean entropy of the lens distribution, in nats.
        entropy_stderr: its standard error over sequences, in nats; None for a single sequence.
        agreement: share of tokens whose most probable token is the output's (1.0 at layer L).
        english_share: mean probability on English-looking tokens; None if they are not known.
    """

    num_layers: int
    tokens: int
    sequences: int
    entropy: list[float]
    entropy_stderr: list[float] | None
    agreement: list[float]
    english_share: list[float] | None


def profile_layers(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    lens: Lens | None = None,
    english_tokens: Tensor | None = None,
    block: BlockSize | None = None,
    tokens_per_sequence: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> LayerProfile:
    """Profile every layer of a causal LM on text (paper, section "Critical layers"; lens in `pivotune.lenses.logit`).

    For each counted token and layer k, with p_k = softmax(head(norm(lens(h_k, k)))): entropy -sum p_k log p_k in nats,
    the indicator argmax p_k = argmax p_L, and the sum of p_k over `english_tokens`. There is one forward pass per batch.
    Entropies are float32 for a bfloat16 model too.

    Args:
        model: a supported causal LM, wrapped or not. Evaluation mode inside, its modes as before afterwards.
        batches: mappings with `input_ids`, `attention_mask` (B, T) and boolean `token_mask` (B, T): the positions
            that count. Padded positions never count.
        lens: called as `lens(hidden_states, layer)` on raw states (N, D) of the layers below L, before the final norm;
            None for the logit lens, which changes nothing.
        english_tokens: boolean vector over the vocabulary (see `english_looking_tokens`). A shorter one is padded
            with False: models often have more output rows than the tokenizer has tokens.
        block: how many logits exist at once; None chooses by device.
        tokens_per_sequence: measure at most this many counted tokens of each sequence, evenly spread.
        progress: called after each batch with the number of sequences done so far.

    Raises:
        UsageError: unknown architecture, or no counted token in all batches.
    """
    architecture = find_architecture(model)
    english = None
    if english_tokens is not None:
        known = english_tokens[: architecture.vocab_size].float()
        english = F.pad(known, (0, architecture.vocab_size - len(known))).to(_head_device(architecture))
    all_sums, all_counts, sequences = [], [], 0
    # no_grad rather than inference_mode: tensors that a model caches in a forward pass (rotary tables) must stay
    # usable in the training that follows.
    with evaluation_mode(model), torch.no_grad():
        for batch in batches:
            token_mask = _counted_tokens(batch, tokens_per_sequence)
            states = counted_states(model, architecture, batch, token_mask, lens)
            found = lens_statistics(architecture, states.flatten(0, 1), english, block)
            entropy, top, share = (values.view(states.shape[:2]) for values in found)
            by_token = torch.stack([entropy, (top == top[-1]).float(), share], dim=-1).transpose(0, 1)
            sums = torch.zeros(len(token_mask), len(states), 3, dtype=torch.float64)
            all_sums.append(sums.index_add_(0, token_mask.nonzero()[:, 0].cpu(), by_token.double().cpu()))
            all_counts.append(token_mask.sum(1).double().cpu())
            sequences += len(token_mask)
            if progress is not None:
                progress(sequences)
    counts = torch.cat(all_counts) if all_counts else torch.zeros(0)
    if not counts.sum():
        raise UsageError("layer profile: no token to measure; the data has no row with a counted token")
    counted = counts > 0
    return _means(torch.cat(all_sums)[counted], counts[counted], with_english=english is not None)


def _means(sums: Tensor, counts: Tensor, *, with_english: bool) -> LayerProfile:
    """Return the profile of n sequences from the sums (n, L + 1, 3) of their statistics and their token counts (n,).

    The standard error is that of a mean over tokens of independent sequences (ratio estimator, Cochran 1977, 6.3):
    sqrt(n / (n - 1) * sum_s (S_s - mean * c_s)^2) / sum_s c_s, with sums S (n, L + 1) and counts c (n,).
    """
    sequences = len(counts)
    means = sums.sum(0) / counts.sum()
    stderr = None
    if sequences > 1:
        residuals = sums[..., 0] - means[:, 0] * counts[:, None]
        variance = residuals.square().sum(0) * sequences / (sequences - 1)
        stderr = (variance.sqrt() / counts.sum()).tolist()
    return LayerProfile(
        num_layers=len(means) - 1,
        tokens=int(counts.sum()),
        sequences=sequences,
        entropy=means[:, 0].tolist(),
        entropy_stderr=stderr,
        agreement=means[:, 1].tolist(),
        english_share=means[:, 2].tolist() if with_english else None,
    )


def _counted_tokens(batch: Mapping[str, Tensor], tokens_per_sequence: int | None) -> Tensor:
    """Return the positions to measure, (B, T) boolean."""
    token_mask = batch["token_mask"].bool() & batch["attention_mask"].bool()
    if tokens_per_sequence is None:
        return token_mask
    # The n-th of c tokens is taken if n * limit / c passes a whole number: all if c <= limit, else exactly limit.
    nth = token_mask.cumsum(1)
    count = token_mask.sum(1, keepdim=True).clamp(min=1)
    return token_mask & (nth * tokens_per_sequence // count > (nth - 1) * tokens_per_sequence // count)


def counted_states(
    model: nn.Module, architecture: Architecture, batch: Mapping[str, Tensor], token_mask: Tensor, lens: Lens | None
) -> Tensor:
    """Return the lens's h_0..h_L at the counted positions, (L + 1, N, D), from one forward pass without logits."""
    device = next(model.parameters()).device
    takes_last_only = "logits_to_keep" in inspect.signature(unwrap_model(model).forward).parameters
    options = {"logits_to_keep": 1} if takes_last_only else {}
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    layers = range(architecture.num_layers + 1)
    with tap(architecture, layers) as taps:
        model(**inputs, use_cache=False, **options)
    taps.final = None
    output = taps.hidden_states[architecture.num_layers]
    counted = output.new_empty(len(layers), int(token_mask.sum()), output.shape[-1], device=_head_device(architecture))
    for layer in layers:
        # Each layer's full states are freed before the next are picked.
        state = taps.hidden_states.pop(layer)
        picked = state[token_mask.to(state.device)]
        counted[layer] = picked if lens is None or layer == architecture.num_layers else lens(picked, layer)
    return counted


def _head_device(architecture: Architecture) -> torch.device:
    return next(architecture.lm_head.parameters()).device


# --- statistics of lens distributions ------------------------------------------------------------------------------


class LensStatistics(NamedTuple):
    """Of each row's lens distribution p, (R,): -sum p log p in nats, argmax p, sum of p over English tokens (or 0)."""

    entropy: Tensor
    top: Tensor
    english: Tensor


def default_block(architecture: Architecture, device: torch.device) -> BlockSize:
    """Return the block that is fast on this device.

    On a CPU 32 MiB: 0.6 of the time of whole rows at 576 x 49,152. Blocks of 4 MiB were another 5 % faster alone on the
    machine and up to four times slower beside other programs. On a GPU 256 MiB. A head that must be called as a module
    gives whole rows, so fewer of them.
    """
    if plain_head(architecture) is None:
        return BlockSize(chunk_rows(architecture.vocab_size, device), architecture.vocab_size)
    return BlockSize(512, 16384) if device.type == "cpu" else BlockSize(2048, 32768)


@torch.no_grad()
def lens_statistics(
    architecture: Architecture, hidden_states: Tensor, english: Tensor | None = None, block: BlockSize | None = None
) -> LensStatistics:
    """Return statistics of softmax(head(norm(h))) for raw (or lens) states h of any layers, (R, D).

    Args:
        english: 1.0 for the tokens of the English share, else 0.0, (V,) float32 on the states' device.
        block: how many logits to make at once; see `default_block`.
    """
    rows, columns = block or default_block(architecture, hidden_states.device)
    chunks = []
    for chunk in hidden_states.split(rows):
        normed = frozen_norm(architecture, chunk)
        scratch, blocks = None, []
        for start, logits in logit_blocks(architecture, normed, columns):
            if scratch is None:
                # Memory for every block's temporaries, two for logits of another type. Fresh memory costs page faults and
                # leaves holes in the heap that add up to the size of all logits.
                scratch = logits.new_empty((1 + (logits.dtype != torch.float32), logits.numel()), dtype=torch.float32)
            marked = None if english is None else english[start : start + logits.shape[-1]]
            blocks.append(_block_statistics(start, logits, marked, scratch))
        chunks.append(_combine(*map(torch.stack, zip(*blocks, strict=True))))
    return LensStatistics(*map(torch.cat, zip(*chunks, strict=True)))


def _block_statistics(
    start: int, logits: Tensor, english: Tensor | None, scratch: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return a block's largest logit, its token, -log q_k of it, H(q_k) and q_k's English share; overwrite its logits."""
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
    """Combine blocks, each argument (K, R), to whole rows (R,) by the chain rule above."""
    # The largest logits' difference before the sum, so that a constant in all logits costs no digits.
    weight = (largest - largest.amax(0) + log_sum).softmax(0)
    best = largest.argmax(0, keepdim=True)
    return LensStatistics(
        entropy=torch.special.entr(weight).sum(0) + (weight * entropy).sum(0),
        top=top.gather(0, best)[0],
        english=(weight * english).sum(0),
    )
