"""Alignment: how near a model's inner layers bring a sentence and its English translation.

For every layer k = 0..L ("after k decoder blocks"):

- retrieval accuracy: share of sentences whose nearest neighbour by cosine, among all sentences of the other language,
  is their own translation; mean of both directions;
- centered retrieval accuracy: the same after subtraction of each language's mean vector, which separates languages and
  says nothing of a sentence's meaning;
- mean cosine of translations, to be read beside the mean cosine of other sentences: in many layers all sentences are
  near one another.

Shapes: B sentences of a batch, D width, L layers, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pivotune.errors import UsageError
from pivotune.evaluation.tasks.translation import SentencePair
from pivotune.models.architecture import Architecture, find_architecture
from pivotune.models.taps import evaluation_mode, tap

# Rows of N similarities held at once.
_CHUNK = 512
# Cosines of one vector with copies of itself differ by less than this in float64, after any fp32 rounding.
_TIE = 1e-12
# Relative to a vector's length; a mean of fp32 states is right to about 1e-6.
_NOISE = 1e-5
# Pairs in the picture; more points hide each other.
_PROJECTED = 150
_FEWEST_NEIGHBOURS = 10


class Alignment(NamedTuple):
    """Alignment of N pairs.

    Attributes:
        records: one per pair, with the fields of `ALIGNMENT_METRICS`, means over the layers 1..L; retrieval in 0..1.
        by_layer: lists of L + 1 values, k = 0 (embeddings) .. L (before the final norm), retrieval in percent; `chance` is
            100/N, `truncated` counts sentences longer than the limit.
        projection: the first pairs in two dimensions, see `project`.
    """

    records: list[dict[str, Any]]
    by_layer: dict[str, Any]
    projection: dict[str, Any]


def measure_alignment(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[SentencePair],
    *,
    batch_size: int = 16,
    max_tokens: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Alignment:
    """Return retrieval accuracy and cosine of translations for every layer.

    A sentence is the mean of the raw hidden states (fp32) of its tokens except the first (see `pooled_states`), without
    a template, with the begin-of-text token if the tokenizer adds one. Each distinct sentence is run once, so repeated
    sentences tie exactly. Cosines are computed in float64.

    Args:
        pairs: at least two.
        batch_size: sentences per batch.
        max_tokens: limit of a sentence; longer ones are cut and counted in `truncated`.
        progress: called with the number of sentences done, two per pair.

    Raises:
        UsageError: unknown architecture, or fewer than two pairs.
    """
    if len(pairs) < 2:
        raise UsageError(f"alignment: needs at least 2 sentence pairs, found {len(pairs)}")
    sentences = list(dict.fromkeys(text for pair in pairs for text in (pair.target, pair.english)))
    token_ids = tokenizer(sentences, add_special_tokens=True)["input_ids"]
    pooled = pooled_states(model, [ids[:max_tokens] for ids in token_ids], batch_size=batch_size, progress=progress)
    if progress is not None:
        progress(2 * len(pairs))
    place = {text: index for index, text in enumerate(sentences)}
    rows = [[place[pair.target] for pair in pairs], [place[pair.english] for pair in pairs]]
    device = next(model.parameters()).device
    device = device if device.type == "cuda" else torch.device("cpu")  # others have no float64
    layers, non_pairs = [], []
    for states in pooled.unbind(1):
        sides = [states[side].to(device).double() for side in rows]
        target, english = map(unit_vectors, sides)
        centered = both_directions(*(unit_vectors(without_mean(side)) for side in sides))
        layers.append(torch.stack([both_directions(target, english), centered, (target * english).sum(-1)]).cpu())
        non_pairs.append(mean_of_non_pairs(target, english))
    figures = torch.stack(layers)  # (L + 1, 3, N)
    items = zip(pairs, figures[1:].mean(0).T.tolist(), strict=True)
    records = [
        {"item": pair.id, "retrieval": r, "centered_retrieval": c, "cosine": near} for pair, (r, c, near) in items
    ]
    retrieval, centered_retrieval, cosine = figures.mean(2).T.tolist()
    by_layer = {
        "retrieval_accuracy": [100 * value for value in retrieval],
        "centered_retrieval_accuracy": [100 * value for value in centered_retrieval],
        "cosine": cosine,
        "cosine_of_non_pairs": non_pairs,
        "chance": 100 / len(pairs),
        "truncated": sum(len(ids) > max_tokens for ids in token_ids),
    }
    # The embeddings, layer 0, know nothing of the sentence.
    layer = 1 + max(range(len(retrieval) - 1), key=lambda index: retrieval[index + 1])
    shown = [index for side in rows for index in side[:_PROJECTED]]
    projection = {"layer": layer, "accuracy": 100 * retrieval[layer], **project(pooled[shown, layer])}
    return Alignment(records, by_layer, projection)


def project(vectors: Tensor) -> dict[str, list[list[float]]]:
    """Return the places of vectors (N, D) on their first two principal axes, and by t-SNE where scikit-learn is installed.

    t-SNE starts from the principal axes, with a fixed seed: the same vectors give the same picture. Fewer than
    `_FEWEST_NEIGHBOURS` vectors have no t-SNE.
    """
    centered = vectors.double() - vectors.double().mean(0)
    places, values, axes = torch.linalg.svd(centered, full_matrices=False)
    # The sign of an axis is arbitrary: its largest part is positive.
    largest = axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign().flatten()
    found = {"pca": (places[:, :2] * values[:2] * largest).tolist()}
    if len(vectors) >= _FEWEST_NEIGHBOURS and values[0] > 0 and find_spec("sklearn"):
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(vectors) - 1) / 3)
        found["tsne"] = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(centered.numpy()).tolist()
    return {method: [[round(value, 3) for value in place] for place in own] for method, own in found.items()}


@torch.no_grad()
def pooled_states(
    model: nn.Module,
    token_ids: Sequence[Sequence[int]],
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Return the mean of `h_k` over each sentence's tokens except the first, for every layer k = 0..L.

    The states are raw (`h_L` before the final norm). Only the decoder runs: no logits are made.
    The first token is an attention sink in most models: from some layer on its state is long and nearly equal in every
    sentence (in SmolLM2-135M a norm of 23,000 beside 180), and would hide the others.

    Args:
        token_ids: of each sentence. A single token counts although it is the first; no token gives the zero vector.
        batch_size: sentences per batch; they are sorted by length against padding.

    Returns:
        (sentences, L + 1, D), fp32, on the CPU.
    """
    architecture = find_architecture(model)
    device = next(model.parameters()).device
    order = sorted(range(len(token_ids)), key=lambda index: len(token_ids[index]), reverse=True)
    pooled: Tensor | None = None
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            means = _batch_means(architecture, [token_ids[index] for index in indices], device)
            if pooled is None:
                pooled = torch.empty(len(token_ids), *means.shape[1:])
            pooled[indices] = means
            if progress is not None:
                progress(start + len(indices))
    assert pooled is not None, "no sentences"
    return pooled


def _batch_means(architecture: Architecture, token_ids: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return (B, L + 1, D), fp32, on the CPU."""
    width = max(1, *(len(ids) for ids in token_ids))
    # Behind the mask any valid id will do.
    input_ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in token_ids], dtype=torch.long)
    mask = torch.tensor([[column < len(ids) for column in range(width)] for ids in token_ids])
    layers = range(architecture.num_layers + 1)
    with tap(architecture, layers) as taps:
        attention_mask = mask.long()
        # An empty sentence would attend to nothing and give NaN; its mean has no token and is zero.
        attention_mask[:, 0] = 1
        architecture.decoder(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False)
    mask[:, 0] &= mask.sum(1) == 1
    means = []
    for layer in layers:
        states = taps.hidden_states.pop(layer)  # (B, T, D)
        kept = mask.to(states.device)[:, :, None]
        sums = states.float().masked_fill(~kept, 0.0).sum(1)
        means.append((sums / kept.sum(1).clamp(min=1)).cpu())
    return torch.stack(means, dim=1)


def unit_vectors(vectors: Tensor) -> Tensor:
    """Scale vectors (N, D) to length 1, in float64; zero stays zero."""
    vectors = vectors.double()
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def without_mean(vectors: Tensor) -> Tensor:
    """Subtract the mean of vectors (N, D); a rest at the level of fp32 rounding becomes zero."""
    centered = vectors - vectors.mean(0)
    is_noise = centered.norm(dim=-1) < _NOISE * vectors.norm(dim=-1)
    return centered.masked_fill(is_noise[:, None], 0.0)


def retrieval_success(queries: Tensor, keys: Tensor) -> Tensor:
    """Return 1 for a query whose nearest key is its own, 0 for another, 1/m for its own among m equally near keys, (N).

    A model that maps all sentences to one vector so scores 1/N, chance, independent of the order of keys.

    Args:
        queries, keys: (N, D) unit vectors, float64; the n-th ones belong together.
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


def both_directions(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean of `retrieval_success` in both directions, (N)."""
    return (retrieval_success(first, second) + retrieval_success(second, first)) / 2


def mean_of_non_pairs(queries: Tensor, keys: Tensor) -> float:
    """Return the mean cosine of all N (N - 1) pairs of unit vectors (N, D) that do not belong together."""
    count = len(queries)
    everything = queries.sum(0) @ keys.sum(0)
    return float((everything - (queries * keys).sum()) / (count * (count - 1)))
