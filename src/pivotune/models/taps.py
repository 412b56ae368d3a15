"""Hidden states by layer, and passes that stop early.

The index convention of the whole project: `h_k` is the hidden state after k decoder blocks. `h_0` is the input of the
first block (the embeddings), `h_L` the output of the last block *before* the final norm. Hugging Face's own list of
hidden states ends with the *normed* last state; nothing else in this project indexes such a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from pivotune.models.architecture import Architecture


@dataclass
class Taps:
    """Hidden states recorded during a pass.

    Attributes:
        hidden_states: k -> `h_k`, shape (batch, tokens, width), for the requested layers.
        final: the output of the final norm, shape (batch, tokens, width); None until the pass has run.
    """

    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    final: Tensor | None = None


@contextmanager
def tap(architecture: Architecture, layers: Iterable[int]) -> Iterator[Taps]:
    """Record `h_k` for every k in `layers`, and the final norm's output, of the first pass inside the context.

    Only the first firing of a hook counts: with activation checkpointing a block may run again in the backward pass,
    and that copy has no gradient history of ours.
    """
    taps = Taps()

    def record_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        taps.hidden_states.setdefault(0, args[0] if args else kwargs["hidden_states"])

    def record_output(layer: int, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        taps.hidden_states.setdefault(layer, output[0] if isinstance(output, tuple) else output)

    def record_final(module: nn.Module, args: tuple, output: Tensor) -> None:
        if taps.final is None:
            taps.final = output

    blocks = architecture.blocks
    with ExitStack() as stack:
        for layer in sorted(set(layers)):
            if layer == 0:
                handle = blocks[0].register_forward_pre_hook(record_input, with_kwargs=True)
            else:
                handle = blocks[layer - 1].register_forward_hook(partial(record_output, layer))
            stack.callback(handle.remove)
        stack.callback(architecture.final_norm.register_forward_hook(record_final).remove)
        yield taps


@contextmanager
def truncated(architecture: Architecture, num_layers: int) -> Iterator[None]:
    """Run only the model's first `num_layers` blocks inside the context; the final norm then reads `h_{num_layers}`."""
    blocks = architecture.blocks
    if not 1 <= num_layers <= len(blocks):
        raise ValueError(f"cannot stop after {num_layers} of {len(blocks)} blocks")
    if num_layers == len(blocks):
        yield
        return
    setattr(architecture.decoder, architecture.blocks_name, blocks[:num_layers])
    try:
        yield
    finally:
        setattr(architecture.decoder, architecture.blocks_name, blocks)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Turn dropout off inside the context; afterwards every module has its own mode back (some may be frozen in eval)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
