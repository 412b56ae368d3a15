"""Measure the likelihood of the English query and answer after the target prompt, at every layer.

The entropy of a layer says how sure it is, not of what. Read through a tuned lens, -log P of x_en and of y_en at layer k
are the inner losses themselves before training: they show from which layer on the losses have something to work with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pivotune.data.collator import DeepSupervisionCollator
from pivotune.data.examples import Example, Pair
from pivotune.forward.passes import branch_inputs
from pivotune.kernels.cross_entropy import cross_entropies
from pivotune.lenses.base import Lens
from pivotune.models.architecture import find_architecture
from pivotune.models.head import frozen_norm
from pivotune.models.taps import evaluation_mode, tap
from pivotune.objectives.english_nll import SIDES

# English tokens of each side that are read of a row: more rows say more than more tokens of one row.
TOKENS_PER_ROW = 16


@dataclass(frozen=True, kw_only=True)
class LayerReading:
    """Mean negative log-likelihoods in nats per token, for every layer k = 0..L.

    Attributes:
        conversion: of x_en after the target prompt.
        thinking: of y_en after the target prompt.
        tokens: English tokens read, by loss.
    """

    conversion: list[float]
    thinking: list[float]
    tokens: dict[str, int]


@torch.no_grad()
def measure_reading(
    model: nn.Module,
    pairs: Sequence[Pair],
    lens: Lens,
    *,
    pad_token_id: int = 0,
    batch_size: int = 8,
) -> LayerReading:
    """Read both English sides behind the target prompts through a lens at layers 0 to L - 1, and at the output.

    Args:
        pairs: rows; those without both sides are left out.
        lens: with a map for every layer below L, for a tuned lens.
    """
    architecture = find_architecture(model)
    layers = range(architecture.num_layers + 1)
    examples = [Example(main=pair.target, parallel=pair.english) for pair in pairs if pair.target and pair.english]
    collate = DeepSupervisionCollator(pad_token_id)
    sums, counts = {name: torch.zeros(len(layers)) for name in SIDES}, dict.fromkeys(SIDES, 0)
    with evaluation_mode(model):
        for begin in range(0, len(examples), batch_size):
            batch = collate(examples[begin : begin + batch_size])
            batch = {name: tensor.to(architecture.device) for name, tensor in batch.items()}
            for name, side in SIDES.items():
                input_ids, attention_mask, branch_mask = branch_inputs(batch, side)
                # The first tokens of every row.
                read = (branch_mask & (branch_mask.cumsum(1) <= TOKENS_PER_ROW))[:, 1:]
                with tap(architecture, layers) as taps:
                    model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
                labels = input_ids[:, 1:][read]
                counts[name] += len(labels)
                for layer in layers:
                    states = taps.hidden_states.pop(layer)[:, :-1][read]
                    if layer < architecture.num_layers:
                        states = lens(states, layer)
                    normed = frozen_norm(architecture, states)
                    sums[name][layer] += cross_entropies(architecture, normed, labels).sum().item()
    means = {name: (total / max(counts[name], 1)).tolist() for name, total in sums.items()}
    return LayerReading(tokens=counts, **means)
