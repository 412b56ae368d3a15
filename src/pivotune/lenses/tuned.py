"""The tuned lens: an affine map for each layer, before the frozen final norm and head (Belrose et al. 2023).

`lens_k(h) = h + A_k h + b_k` predicts the last layer's state. The raw state of an inner layer has another basis than the
head reads: through the logit lens it costs more nats than a uniform guess (docs/method.md). The maps are fitted on the
starting model and then frozen: by ridge regression from h_k to h_L in closed form, then by Adam on the Kullback-Leibler
divergence from the model's own output, KL(p_L || p_k) ([arXiv 2303.08112](https://arxiv.org/abs/2303.08112), section 2).

Shapes: N states, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pivotune.config.supervision import TunedLensConfig
from pivotune.data.examples import Pair
from pivotune.errors import UsageError
from pivotune.forward.passes import PassRequest, choose_passes
from pivotune.forward.shared.packing import leading
from pivotune.models.architecture import Architecture, find_architecture
from pivotune.models.head import chunk_rows, frozen_norm, readout
from pivotune.models.taps import evaluation_mode

# Of the mean diagonal of the states' covariance.
RIDGE = 0.01
ADAM_LEARNING_RATE = 3e-4
ADAM_STATES = 256
LEAST_STATES = 100
HELD_OUT, MOST_HELD_OUT = 0.1, 1000  # share of the texts, states


class Text(NamedTuple):
    """Tokens of a text, and the first place whose state is read."""

    ids: np.ndarray
    first: int


class LensFigures(NamedTuple):
    """KL(p_L || p_k) in nats on held-out texts: through the fitted lens, and through the logit lens."""

    kl: float
    logit_kl: float


class TunedLens:
    """`lens_k(h) = h + A_k h + b_k`.

    Attributes:
        maps: layer -> A (D, D) and b (D,), float32, without gradient; empty until it is fitted or loaded.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.maps: dict[int, tuple[Tensor, Tensor]] = {}
        self._cast: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, hidden_states: Tensor, layer: int) -> Tensor:
        """Map raw `h_k` (..., D) of layer k to (..., D).

        Raises:
            ValueError: no map for this layer.
        """
        if layer not in self.maps:
            raise ValueError(f"the tuned lens has no map for layer {layer}; fit it with `fit_tuned_lens`")
        matrix, offset = self._cast.get(layer) or self.maps[layer]
        if matrix.dtype != hidden_states.dtype or matrix.device != hidden_states.device:
            matrix, offset = (tensor.to(hidden_states) for tensor in self.maps[layer])
            self._cast[layer] = matrix, offset
        return hidden_states + F.linear(hidden_states, matrix, offset)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the maps as `layer.<k>.weight` and `layer.<k>.bias`."""
        return {
            f"layer.{layer}.{name}": tensor.cpu().numpy()
            for layer, maps in self.maps.items()
            for name, tensor in zip(("weight", "bias"), maps, strict=True)
        }

    def set_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take the maps of `to_arrays`."""
        layers = {int(name.split(".")[1]) for name in arrays}
        self._cast.clear()
        self.maps = {
            layer: (torch.tensor(arrays[f"layer.{layer}.weight"]), torch.tensor(arrays[f"layer.{layer}.bias"]))
            for layer in sorted(layers)
        }


def lens_texts(pairs: Sequence[Pair], text: str) -> list[Text]:
    """Return the texts whose states a lens is fitted on.

    `english`: the English side of every row; `both`: every other row's target side instead; `branches`: the English query,
    and the answer, behind the target prompt, as the inner losses read them. The first token's state is not used: it has no
    context, and activations of its own.
    """
    texts = []
    for index, pair in enumerate(pairs):
        english, target = pair.english, pair.target
        if english is None or (text == "both" and index % 2 and target is not None):
            if target is not None:
                texts.append(Text(target.ids, 1))
        elif text == "branches" and target is not None:
            for part in (english.ids[slice(*english.query)], english.ids[english.answer :]):
                texts.append(Text(np.concatenate([target.ids[: target.answer], part]), max(target.answer - 1, 1)))
        else:
            texts.append(Text(english.ids, 1))
    return texts


def count_states(texts: Sequence[Text]) -> int:
    """Return the number of token states that texts have."""
    return sum(max(len(text.ids) - text.first, 0) for text in texts)


def check_enough_states(count: int) -> None:
    """Refuse to fit a lens on fewer than `LEAST_STATES` token states."""
    if count < LEAST_STATES:
        raise UsageError(
            f"tuned lens: the rows have {count} token states; at least {LEAST_STATES} are needed: give more rows, or read "
            "through the logit lens (supervision.lens: logit, supervision.layers: paper)"
        )


def fit_tuned_lens(
    model: nn.Module,
    texts: Sequence[Text],
    layers: Sequence[int],
    config: TunedLensConfig,
    *,
    start: TunedLens | None = None,
    seed: int = 0,
    batch_size: int = 8,
    measured: bool = True,
    progress: Callable[[int], None] | None = None,
) -> tuple[TunedLens, dict[int, LensFigures]]:
    """Fit a map for every layer on the states of some texts; call it under the autocast of training.

    Memory: the states, 4 N D bytes a layer, and the logits of `chunk_rows` states. Time: one forward pass over the
    texts, and 2 products of a head's size for each of `config.steps` x 256 states a layer.

    Args:
        model: a supported causal LM, wrapped or not; runs in evaluation mode.
        texts: read in a random order until `config.states` states are there.
        layers: 0 to L - 1.
        start: maps to continue from in place of the regression (`config.refit`).
        measured: compute the figures, which cost more than the regression of many layers; Adam steps need them.
        progress: called with the percentage of the operations done: forward pass, regression, Adam steps.

    Raises:
        UsageError: the texts have fewer than 100 states.
    """
    architecture, random = find_architecture(model), np.random.default_rng(seed)
    chosen = _choose(texts, config.states, random)
    top, head, count = architecture.num_layers, architecture.head_weight, count_states(chosen)
    # Multiplications; those of the regression count double, for two matrices, and for float64 again.
    a_state = sum(parameter.numel() for parameter in model.parameters()) - head.numel()
    a_map = 4 * count * head.shape[1] ** 2
    a_step = ADAM_STATES * head.numel() * (1 + 2 * len(layers))
    total = count * a_state + len(layers) * a_map + config.steps * a_step

    def tell(states: int, maps: int = 0, steps: int = 0) -> None:
        if progress is not None:
            progress(100 * (states * a_state + maps * a_map + steps * a_step) // total)

    check_enough_states(count)
    states, text_of = _collect(model, architecture, chosen, [*layers, top], batch_size, tell)
    # Whole texts are held out: the states of one text resemble each other.
    held = torch.from_numpy(text_of >= max(1, int(len(chosen) * (1 - HELD_OUT))))
    if not held.any():
        # A single text: its last states.
        held[-int(len(held) * HELD_OUT) :] = True
    outputs, lens = states.pop(top), TunedLens(architecture)
    train = {layer: found[~held] for layer, found in states.items()}
    test = {layer: found[held][:MOST_HELD_OUT] for layer, found in states.items()}
    for done, layer in enumerate(layers, start=1):
        known = None if start is None else start.maps[layer]
        lens.maps[layer] = known or _ridge(train[layer], outputs[~held])
        tell(count, done)
    if not (measured or config.steps):
        return lens, {}
    expected = outputs[held][:MOST_HELD_OUT]
    logit_kl, kl = (_mean_kl(architecture, read, test, expected) for read in (None, lens))
    before = dict(lens.maps)
    if config.steps:
        _refine(architecture, lens, train, outputs[~held], config.steps, random, partial(tell, count, len(layers)))
        for layer, refined in _mean_kl(architecture, lens, test, expected).items():
            if refined < kl[layer]:
                kl[layer] = refined
            else:
                lens.maps[layer] = before[layer]
        lens._cast.clear()
    return lens, {layer: LensFigures(kl[layer], logit_kl[layer]) for layer in layers}


def _choose(texts: Sequence[Text], states: int, random: np.random.Generator) -> list[Text]:
    """Return texts in a random order with at least `states` states, or all texts."""
    chosen, count = [], 0
    for index in random.permutation(len(texts)):
        text = texts[int(index)]
        chosen.append(text)
        count += count_states([text])
        if count >= states:
            break
    return chosen


@torch.no_grad()
def _collect(
    model: nn.Module,
    architecture: Architecture,
    texts: Sequence[Text],
    layers: Sequence[int],
    batch_size: int,
    progress: Callable[[int], None],
) -> tuple[dict[int, Tensor], np.ndarray]:
    """Return layer -> raw states (N, D), float32, and the place of each state's text (N,)."""
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    text_of, run_passes = [], choose_passes(model)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index].ids))
    with evaluation_mode(model):
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            ids = [torch.from_numpy(texts[row].ids.astype(np.int64)) for row in rows]
            input_ids = pad_sequence(ids, batch_first=True)
            present = leading(torch.tensor([len(each) for each in ids]), input_ids.shape[1])
            read = present & ~leading(torch.tensor([texts[row].first for row in rows]), input_ids.shape[1])
            inputs = {"input_ids": input_ids, "attention_mask": present.long()}
            inputs = {name: tensor.to(architecture.device) for name, tensor in inputs.items()}
            taps = run_passes(model, inputs, PassRequest(main_layers=frozenset(layers))).main
            for layer in layers:
                parts[layer].append(taps.hidden_states[layer][read.to(architecture.device)].float())
            text_of.append(np.repeat(rows, read.sum(1).numpy()))
            progress(sum(map(len, text_of)))
    return {layer: torch.cat(found) for layer, found in parts.items()}, np.concatenate(text_of)


def _ridge(states: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and b of the smallest |h_L - h_k - A h_k - b|^2 + lambda |A|^2, with lambda of `RIDGE`."""
    # The products of large activations need more digits than float32 has.
    exact = torch.float64 if states.device.type == "cpu" else torch.float32
    mean, change = states.mean(0).to(exact), (outputs - states).to(exact)
    centred, mean_change = states.to(exact) - mean, change.mean(0)
    gram = centred.T @ centred
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    matrix = torch.linalg.solve(gram, centred.T @ (change - mean_change)).T
    return matrix.float().contiguous(), (mean_change - matrix @ mean).float()


def _refine(
    architecture: Architecture,
    lens: TunedLens,
    states: Mapping[int, Tensor],
    outputs: Tensor,
    steps: int,
    random: np.random.Generator,
    progress: Callable[[int], None],
) -> None:
    """Minimize KL(p_L || p_k) of all layers together; the output's distribution is computed once for all of them."""
    for layer, maps in lens.maps.items():
        lens.maps[layer] = (maps[0].clone().requires_grad_(), maps[1].clone().requires_grad_())
    optimizer = torch.optim.Adam([tensor for maps in lens.maps.values() for tensor in maps], ADAM_LEARNING_RATE)
    for step in range(steps):
        # Down to 0, so that the last steps average out the noise of small batches.
        for group in optimizer.param_groups:
            group["lr"] = ADAM_LEARNING_RATE * (1 - step / steps)
        rows = torch.from_numpy(random.integers(0, len(outputs), ADAM_STATES)).to(outputs.device)
        for part in rows.split(chunk_rows(architecture.vocab_size, outputs.device)):
            with torch.no_grad():
                wanted = _logits(architecture, outputs[part]).softmax(-1)
            for layer, inner in states.items():
                matrix, offset = lens.maps[layer]
                read = inner[part] + F.linear(inner[part], matrix, offset)
                # The cross-entropy from p_L has the gradient of the KL.
                loss = F.cross_entropy(_logits(architecture, read), wanted, reduction="sum") / len(rows)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # Autocast keeps the bfloat16 copy of a trained tensor for as long as its context lasts.
        torch.clear_autocast_cache()
        progress(step + 1)
    for layer, maps in lens.maps.items():
        lens.maps[layer] = (maps[0].detach(), maps[1].detach())


@torch.no_grad()
def _mean_kl(
    architecture: Architecture, lens: TunedLens | None, states: Mapping[int, Tensor], outputs: Tensor
) -> dict[int, float]:
    """Return the mean of KL(p_L || p_k) in nats over N states, by layer; through the logit lens without a lens."""
    totals = dict.fromkeys(states, 0.0)
    size = chunk_rows(architecture.vocab_size, outputs.device)
    for begin in range(0, len(outputs), size):
        part = slice(begin, begin + size)
        wanted = _logits(architecture, outputs[part]).log_softmax(-1)
        for layer, inner in states.items():
            read = inner[part] if lens is None else lens(inner[part], layer)
            found = _logits(architecture, read).log_softmax(-1)
            totals[layer] += F.kl_div(found, wanted, log_target=True, reduction="sum").item()
    return {layer: total / len(outputs) for layer, total in totals.items()}


def _logits(architecture: Architecture, states: Tensor) -> Tensor:
    # Outside autocast the norm keeps the type of its states, and the head has its own.
    normed = frozen_norm(architecture, states)
    if not torch.is_autocast_enabled(states.device.type):
        normed = normed.to(architecture.head_weight.dtype)
    return readout(architecture, normed, frozen=True).float()
