"""What every layer of a model would say, measured through the logit lens: entropy, agreement, English share.

Shapes: B sequences, T tokens, N counted tokens of a batch, D width, V vocabulary, L layers.
Layer k means "after k decoder blocks": 0 = embeddings, L = after the last block, where the lens gives the model's own
output distribution.
"""

from __future__ import annotations

import inspect
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pivotune.errors import UsageError
from pivotune.layers.statistics import BlockSize, lens_statistics
from pivotune.models.architecture import Architecture, find_architecture, unwrap_model
from pivotune.models.taps import evaluation_mode, tap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """Means over the counted tokens for every layer k = 0..L.

    Attributes:
        num_layers: L; every list has L + 1 values.
        tokens: counted tokens.
        sequences: sequences with at least one counted token.
        entropy: mean entropy of the lens distribution, in nats.
        entropy_stderr: its standard error over sequences, in nats; None where there is only one sequence.
        agreement: share of tokens whose most probable token is the output's (1.0 at layer L).
        english_share: mean probability on English-looking tokens; None where they cannot be told.
    """

    num_layers: int
    tokens: int
    sequences: int
    entropy: list[float]
    entropy_stderr: list[float] | None
    agreement: list[float]
    english_share: list[float] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def profile_layers(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    english_tokens: Tensor | None = None,
    block: BlockSize | None = None,
    tokens_per_sequence: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> LayerProfile:
    """Profile every layer of a causal LM on text (paper, section "Critical layers"; lens in `pivotune.lenses.logit`).

    For each counted token and layer k, with p_k = softmax(lens(h_k)): entropy -sum p_k log p_k in nats, whether
    argmax p_k = argmax p_L, and sum of p_k over `english_tokens`. One forward pass per batch; the lens then makes one
    `block` of logits at a time (`pivotune.layers.statistics`), whatever the number of layers and tokens and however
    large the vocabulary. Entropies are fp32 also for a bf16 model.

    Args:
        model: a supported causal LM, wrapped or not. Evaluation mode inside, its modes as before afterwards.
        batches: mappings with `input_ids`, `attention_mask` (B, T) and boolean `token_mask` (B, T): the positions
            that count. Padded positions never count.
        english_tokens: boolean vector over the vocabulary (see `english_looking_tokens`). A shorter one is padded
            with False: models often have more output rows than the tokenizer has tokens.
        block: how many logits exist at once; chosen by device where None.
        tokens_per_sequence: measure at most this many counted tokens of each sequence, evenly spread. The lens costs
            L + 1 output projections for each token, while the standard error depends mostly on the number of sequences.
        progress: called after each batch with the number of sequences done so far.

    Raises:
        UsageError: unknown architecture, or no counted token in all batches.
    """
    architecture = find_architecture(model)
    english = _english_weights(english_tokens, architecture)
    totals = _Totals()
    # no_grad rather than inference_mode: tensors that a model caches in a forward pass (rotary tables) must stay
    # usable in the training that follows.
    with evaluation_mode(model), torch.no_grad():
        for batch in batches:
            token_mask = _counted_tokens(batch, tokens_per_sequence)
            totals.add(*_batch_sums(model, architecture, batch, token_mask, english, block))
            if progress is not None:
                progress(totals.sequences)
    return totals.profile(with_english=english is not None)


def english_looking_tokens(
    tokenizer: PreTrainedTokenizerBase, target_texts: Iterable[str]
) -> tuple[Tensor | None, str]:
    """Which tokens look English, where it can be told, and a sentence that says how or why not.

    It can be told where most letters of the target language are not Latin. A token then looks English if its own
    decoded text has at least two ASCII letters and no other letter or part of one. Special and added tokens never do.

    Args:
        target_texts: sample of the target-language texts, to see their script.

    Returns:
        A boolean vector over the tokenizer's ids, or None, and the reason.
    """
    latin, letters = _count_letters(target_texts)
    if letters == 0:
        return None, "the target texts have no letters, so English-looking tokens cannot be told"
    if latin * 2 >= letters:
        return None, (
            f"{latin / letters:.0%} of the target language's letters are Latin, so English-looking tokens "
            "cannot be told"
        )
    vocabulary = tokenizer.get_vocab()
    looks_english = torch.zeros(1 + max(vocabulary.values()), dtype=torch.bool)
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    for token, index in vocabulary.items():
        if index not in added:
            looks_english[index] = _looks_english(tokenizer.convert_tokens_to_string([token]))
    share = f"{1 - latin / letters:.0%} of the target language's letters are not Latin"
    return looks_english, f"{share}; {int(looks_english.sum())} tokens of ASCII letters count as English-looking"


@dataclass
class _Totals:
    """Sums by sequence, small enough to keep: (sequences, L + 1, 3) and token counts (sequences)."""

    sums: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)

    @property
    def sequences(self) -> int:
        return sum(len(counts) for counts in self.counts)

    def add(self, sums: Tensor, counts: Tensor) -> None:
        self.sums.append(sums)
        self.counts.append(counts)

    def profile(self, *, with_english: bool) -> LayerProfile:
        counts = torch.cat(self.counts) if self.counts else torch.zeros(0)
        if not counts.sum():
            raise UsageError("layer profile: no token to measure; the data has no row with a counted token")
        counted = counts > 0
        counts, sums = counts[counted], torch.cat(self.sums)[counted]
        means = sums.sum(0) / counts.sum()
        return LayerProfile(
            num_layers=len(means) - 1,
            tokens=int(counts.sum()),
            sequences=len(counts),
            entropy=means[:, 0].tolist(),
            entropy_stderr=_standard_error(sums[..., 0], counts, means[:, 0]),
            agreement=means[:, 1].tolist(),
            english_share=means[:, 2].tolist() if with_english else None,
        )


def _standard_error(sums: Tensor, counts: Tensor, means: Tensor) -> list[float] | None:
    """Of a mean over tokens whose sequences, not tokens, are independent (ratio estimator, Cochran 1977, 6.3).

    sqrt(n / (n - 1) * sum_s (S_s - mean * c_s)^2) / sum_s c_s, with sums S (n, L + 1) and counts c (n).
    """
    sequences = len(counts)
    if sequences < 2:
        return None
    residuals = sums - means * counts[:, None]
    variance = residuals.square().sum(0) * sequences / (sequences - 1)
    return (variance.sqrt() / counts.sum()).tolist()


def _counted_tokens(batch: Mapping[str, Tensor], tokens_per_sequence: int | None) -> Tensor:
    """(B, T) boolean: the positions to measure."""
    token_mask = batch["token_mask"].bool() & batch["attention_mask"].bool()
    if tokens_per_sequence is None:
        return token_mask
    # The n-th of c tokens is taken where n * limit / c passes a whole number: all if c <= limit, else exactly limit.
    nth = token_mask.cumsum(1)
    count = token_mask.sum(1, keepdim=True).clamp(min=1)
    return token_mask & (nth * tokens_per_sequence // count > (nth - 1) * tokens_per_sequence // count)


def _batch_sums(
    model: nn.Module,
    architecture: Architecture,
    batch: Mapping[str, Tensor],
    token_mask: Tensor,
    english: Tensor | None,
    block: BlockSize | None,
) -> tuple[Tensor, Tensor]:
    """Sums of the three statistics (B, L + 1, 3) and counted tokens (B), float64 on the CPU."""
    states = _counted_states(model, architecture, batch, token_mask)
    found = lens_statistics(architecture, states.flatten(0, 1), english, block)
    entropy, top, share = (values.view(states.shape[:2]) for values in found)
    by_token = torch.stack([entropy, (top == top[-1]).float(), share], dim=-1).transpose(0, 1)
    sums = torch.zeros(len(token_mask), len(states), 3, dtype=torch.float64)
    sums.index_add_(0, token_mask.nonzero()[:, 0].cpu(), by_token.double().cpu())
    return sums, token_mask.sum(1).double().cpu()


def _counted_states(
    model: nn.Module, architecture: Architecture, batch: Mapping[str, Tensor], token_mask: Tensor
) -> Tensor:
    """h_0..h_L at the counted positions, (L + 1, N, D), from one forward pass that makes no logits of its own."""
    device = next(model.parameters()).device
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in _forward_arguments(model) else {}
    layers = range(architecture.num_layers + 1)
    with tap(architecture, layers) as taps:
        model(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            use_cache=False,
            **last_only,
        )
    taps.final = None
    output = taps.hidden_states[architecture.num_layers]
    counted = output.new_empty(len(layers), int(token_mask.sum()), output.shape[-1], device=_head_device(architecture))
    for layer in layers:
        # Each layer's full states are freed before the next are picked.
        state = taps.hidden_states.pop(layer)
        counted[layer] = state[token_mask.to(state.device)]
    return counted


def _english_weights(english_tokens: Tensor | None, architecture: Architecture) -> Tensor | None:
    """The boolean vector as float (V): padded with zeros, or cut where the tokenizer has tokens the model lacks."""
    if english_tokens is None:
        return None
    weights = torch.zeros(architecture.vocab_size)
    known = english_tokens[: architecture.vocab_size]
    weights[: len(known)] = known.float().cpu()
    return weights.to(_head_device(architecture))


def _head_device(architecture: Architecture) -> torch.device:
    return next(architecture.lm_head.parameters()).device


def _forward_arguments(model: nn.Module) -> Iterable[str]:
    return inspect.signature(unwrap_model(model).forward).parameters


def _count_letters(texts: Iterable[str]) -> tuple[int, int]:
    """Latin letters and all letters."""
    letters = [character for text in texts for character in text if character.isalpha()]
    latin = {character for character in set(letters) if "LATIN" in unicodedata.name(character, "")}
    return sum(character in latin for character in letters), len(letters)


def _looks_english(text: str) -> bool:
    ascii_letters = sum(character.isascii() and character.isalpha() for character in text)
    foreign = any(not c.isascii() and (c == "�" or unicodedata.category(c)[0] in "LM") for c in text)
    return ascii_letters >= 2 and not foreign
