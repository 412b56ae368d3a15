"""Short examples of random tokens with different lengths in every part, and batches of them."""

from __future__ import annotations

import copy

import numpy as np
import torch
from conftest import VOCABULARY, build_tiny_model
from torch import Tensor, nn

from pivotune.config.supervision import FeatureConfig, LogitsConfig, SignalConfig, SupervisionConfig
from pivotune.data.collator import DeepSupervisionCollator
from pivotune.data.examples import Example, Side
from pivotune.objectives.base import LossTerm

# Tokens of prefix, query, suffix and answer on the target side, then on the English side; None for a replay row.
# Some are longer than the sliding window (8) of the tiny models.
_LENGTHS: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = [
    ((2, 5, 1, 4), (2, 3, 1, 6)),
    ((2, 3, 1, 2), (2, 4, 1, 1)),
    ((1, 4, 2, 5), None),
    ((2, 1, 1, 7), (2, 5, 1, 3)),
    ((2, 6, 1, 1), (2, 2, 1, 5)),
    ((3, 2, 2, 3), None),
    ((2, 4, 1, 6), (2, 6, 1, 2)),
    ((2, 2, 1, 3), (2, 1, 1, 4)),
]


def signal(kind: str = "none", layer: int | str = "auto") -> SignalConfig:
    return SignalConfig(signal=kind, layer=layer)


def supervise(
    *, conversion: SignalConfig | None = None, thinking: SignalConfig | None = None, **options: str
) -> SupervisionConfig:
    """Inner losses, none by default, with options of both signals: `logits_mode`, `logits_norm`, `pooling`, `english`...

    The lens is `logit` and all tokens train unless asked otherwise. The order of the layers is not checked.
    """
    lens = options.pop("lens", "logit")
    logits = {key.removeprefix("logits_"): value for key, value in options.items() if key.startswith("logits_")}
    feature = {key: value for key, value in options.items() if not key.startswith("logits_")}
    return SupervisionConfig().model_copy(
        update={
            "conversion": conversion or signal(),
            "thinking": thinking or signal(),
            "lens": lens,
            "logits": LogitsConfig(**{"gradient": "all", **logits}),
            "feature": FeatureConfig(**feature),
        }
    )


def make_side(random: np.random.Generator, prefix: int, query: int, suffix: int, answer: int) -> Side:
    ids = random.integers(3, VOCABULARY, prefix + query + suffix + answer, dtype=np.int32)
    return Side(ids=ids, query=(prefix, prefix + query), answer=prefix + query + suffix, characters=3 * answer)


def make_examples(count: int = 8, *, replay: bool = True, parallel: bool = True, seed: int = 0) -> list[Example]:
    """The first `count` examples; without the replay rows, or without English sides, where asked."""
    random = np.random.default_rng(seed)
    lengths = [pair for pair in _LENGTHS if replay or pair[1] is not None][:count]
    examples = []
    for target, english in lengths:
        main = make_side(random, *target)
        other = make_side(random, *english) if english is not None and parallel else None
        examples.append(
            Example(main=main, parallel=other, english_prompt=english is None, english_answer=english is None)
        )
    return examples


def collate(examples: list[Example]) -> dict[str, Tensor]:
    return DeepSupervisionCollator(pad_token_id=0)(examples)


def make_batch(count: int = 4, **options) -> dict[str, Tensor]:
    return collate(make_examples(count, **options))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter by name; those that the loss does not reach are left out."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def relative_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference of two sets of gradients, relative to the norm of the second."""
    assert one.keys() == other.keys()
    difference = torch.cat([(one[name] - other[name]).flatten() for name in one])
    return (difference.norm() / torch.cat([gradient.flatten() for gradient in other.values()]).norm()).item()


def values(terms: dict[str, LossTerm]) -> dict[str, tuple[float, int]]:
    return {name: (term.sum.item(), int(term.count)) for name, term in terms.items()}


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def attention_implementations(model: nn.Module) -> list[str]:
    """What every module's configuration names as its attention."""
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


def random_batch(seed: int) -> dict[str, Tensor]:
    """1 to 6 rows with random lengths of every part; about a quarter are replay rows without an English side.

    English sides have one token at least, which predicts nothing: its branch is empty.
    """
    random = np.random.default_rng(seed)

    def lengths() -> tuple[int, ...]:
        return tuple(int(random.integers(low, 15)) for low in (1, 1, 0, 1))

    examples = []
    for _ in range(int(random.integers(1, 7))):
        main, other = make_side(random, *lengths()), make_side(random, *lengths())
        replay = random.random() < 0.25
        examples.append(
            Example(main=main, parallel=None if replay else other, english_prompt=replay, english_answer=replay)
        )
    return collate(examples)


def build_tied_pair(family: str) -> tuple[nn.Module, nn.Module]:
    """A model whose head is the embedding matrix, and a copy whose head is a clone of it."""
    tied = build_tiny_model(family, tie_word_embeddings=True)
    tied.get_output_embeddings().weight = tied.get_input_embeddings().weight
    untied = copy.deepcopy(tied)
    untied.get_output_embeddings().weight = nn.Parameter(untied.get_input_embeddings().weight.detach().clone())
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight
    return tied, untied


def single_rows(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows of a batch, one by one, still padded."""
    return [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(len(batch["labels"]))]


def unpadded(ids: Tensor, mask: Tensor) -> Tensor:
    """The tokens of one row as a batch of one, without padding."""
    return ids[mask.bool()][None]


def by_hand_logits(model: nn.Module, head: nn.Module, states: Tensor) -> Tensor:
    """What each family's own forward does after its final norm, written out."""
    config = model.config.get_text_config()
    logits = states @ head.weight.T
    if model.config.model_type == "cohere":
        logits = logits * config.logit_scale
    if model.config.model_type == "granite":
        logits = logits / config.logits_scaling
    if model.config.model_type in ("gemma2", "gemma3_text"):
        logits = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
    return logits
