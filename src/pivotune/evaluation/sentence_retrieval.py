"""Sentences as vectors, layer by layer, and finding a sentence's translation among all by cosine.

Shapes: B sentences of a batch, T tokens, D width, L layers, N pairs. Layer k means "after k decoder blocks".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pivotune.models.architecture import Architecture, find_architecture
from pivotune.models.taps import evaluation_mode, tap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Similarities held at once: _CHUNK rows of N.
_CHUNK = 512
# Cosines of one vector with copies of itself differ by less than this in float64, whatever its fp32 rounding.
_TIE = 1e-12
# Relative to a vector's length; a mean of fp32 states is right to about 1e-6.
_NOISE = 1e-5


@torch.no_grad()
def pooled_states(
    model: nn.Module,
    token_ids: Sequence[Sequence[int]],
    *,
    batch_size: int,
    with_first_token: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Mean of `h_k` over each sentence's tokens but the first, for every layer k = 0..L.

    The states are raw (`h_L` before the final norm). Only the decoder runs: no logits are made.
    The first token is an attention sink in most models: from some layer on its state is long and nearly the same in every
    sentence (in SmolLM2-135M a norm of 23,000 beside 180), and would drown the others.

    Args:
        model: a supported causal LM, wrapped or not.
        token_ids: of each sentence; a sentence without tokens has the zero vector.
        batch_size: sentences at once; they are sorted by length, so that little is padding.
        with_first_token: whether the first token counts; the only token of a sentence always does.
        progress: called with the number of sentences done so far.

    Returns:
        (sentences, L + 1, D), fp32, on the CPU.

    Raises:
        UsageError: unknown architecture.
    """
    architecture = find_architecture(model)
    device = next(model.parameters()).device
    order = sorted(range(len(token_ids)), key=lambda index: len(token_ids[index]), reverse=True)
    pooled: Tensor | None = None
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = [token_ids[index] for index in indices]
            means = _batch_means(architecture, batch, device, with_first_token)
            if pooled is None:
                pooled = torch.empty(len(token_ids), *means.shape[1:])
            pooled[indices] = means
            if progress is not None:
                progress(start + len(indices))
    assert pooled is not None, "no sentences"
    return pooled


def _batch_means(
    architecture: Architecture, token_ids: Sequence[Sequence[int]], device: torch.device, with_first_token: bool
) -> Tensor:
    """(B, L + 1, D), fp32, on the CPU."""
    input_ids, mask = _pad_right(token_ids)
    layers = range(architecture.num_layers + 1)
    with tap(architecture, layers) as taps:
        attention_mask = mask.long()
        # An empty sentence would attend to nothing and give NaN; its mean has no token and is zero.
        attention_mask[:, 0] = 1
        architecture.decoder(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False)
    if not with_first_token:
        mask[:, 0] &= mask.sum(1) == 1
    means = []
    for layer in layers:
        states = taps.hidden_states.pop(layer)
        kept = mask.to(states.device)[:, :, None]
        sums = states.float().masked_fill(~kept, 0.0).sum(1)
        means.append((sums / kept.sum(1).clamp(min=1)).cpu())
    return torch.stack(means, dim=1)


def _pad_right(token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids (B, T) and which of them are real (B, T) bool. Padding is id 0: behind the mask any valid id will do."""
    width = max(1, *(len(ids) for ids in token_ids))
    input_ids = torch.zeros(len(token_ids), width, dtype=torch.long)
    mask = torch.zeros(len(token_ids), width, dtype=torch.bool)
    for row, ids in enumerate(token_ids):
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        mask[row, : len(ids)] = True
    return input_ids, mask


def tokenize(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], max_tokens: int
) -> tuple[list[list[int]], int]:
    """Ids of each sentence as it stands, with the begin-of-text token where the tokenizer adds one.

    Returns:
        The ids, and how many sentences were cut to their first `max_tokens` tokens.
    """
    encoded: Any = tokenizer(list(sentences), add_special_tokens=True)["input_ids"]
    return [ids[:max_tokens] for ids in encoded], sum(len(ids) > max_tokens for ids in encoded)


def unit_vectors(vectors: Tensor) -> Tensor:
    """Vectors (N, D) scaled to length 1, in float64; zero stays zero."""
    vectors = vectors.double()
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def without_mean(vectors: Tensor) -> Tensor:
    """Vectors (N, D) less their mean; zero where nothing but the rounding of fp32 states is left."""
    centered = vectors - vectors.mean(0)
    is_noise = centered.norm(dim=-1) < _NOISE * vectors.norm(dim=-1)
    return centered.masked_fill(is_noise[:, None], 0.0)


def retrieval_success(queries: Tensor, keys: Tensor) -> Tensor:
    """Whether each query's nearest key is its own: 1, 0, or 1/m where m keys are equally near and its own is one.

    A model that maps all sentences to one vector so has 1/N, chance, in place of whatever sorts first.

    Args:
        queries: (N, D) unit vectors, float64.
        keys: (N, D), the n-th belonging to the n-th query.

    Returns:
        (N), float64. At most 512 x N similarities exist at once.
    """
    own = (queries * keys).sum(-1)
    successes = []
    for start in range(0, len(queries), _CHUNK):
        similarities = queries[start : start + _CHUNK] @ keys.T
        nearest = similarities.amax(1, keepdim=True) - _TIE
        ties = (similarities >= nearest).sum(1)
        is_nearest = own[start : start + _CHUNK, None] >= nearest
        successes.append(is_nearest[:, 0].double() / ties)
    return torch.cat(successes)


def both_ways(first: Tensor, second: Tensor) -> Tensor:
    """Mean of `retrieval_success` in both directions, (N)."""
    return (retrieval_success(first, second) + retrieval_success(second, first)) / 2


def mean_of_non_pairs(queries: Tensor, keys: Tensor) -> float:
    """Mean cosine of all N (N - 1) pairs that do not belong together, of unit vectors (N, D)."""
    count = len(queries)
    everything = queries.sum(0) @ keys.sum(0)
    return float((everything - (queries * keys).sum()) / (count * (count - 1)))
