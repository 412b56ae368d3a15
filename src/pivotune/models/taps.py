"""Hidden states by layer, and passes that stop early.

The index convention of the whole project: `h_k` is the hidden state after k decoder blocks. `h_0` is what enters the
first block (the embeddings), `h_L` what leaves the last block *before* the final norm. Hugging Face's own list of
hidden states ends with the *normed* last state; nobody else in this project indexes such a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from pivotune.models.architecture import Architecture


@dataclass
class Taps:
    """What a pass left behind.

    Attributes:
        hidden_states: k -> `h_k`, shape (batch, tokens, width), for the layers asked for.
        final: the output of the final norm, shape (batch, tokens, width); None until the pass has run.
    """

    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    final: Tensor | None = None


@contextmanager
def tap(architecture: Architecture, layers: Iterable[int]) -> Iterator[Taps]:
    """Record `h_k` for every k in `layers`, and the final norm's output, of the first pass inside the context.

    Only the first firing of a hook counts: with activation checkpointing a block may run again in the backward pass,
    and that copy has no gradient history of ours. Hooks are removed when the context ends, also by an exception.
    """
    taps = Taps()
    blocks = architecture.blocks
    with ExitStack() as stack:
        for layer in sorted(set(layers)):
            if layer == 0:
                handle = blocks[0].register_forward_pre_hook(_first_input(taps), with_kwargs=True)
            else:
                handle = blocks[layer - 1].register_forward_hook(_output_of(taps, layer))
            stack.callback(handle.remove)
        stack.callback(architecture.final_norm.register_forward_hook(_final(taps)).remove)
        yield taps


@contextmanager
def truncated(architecture: Architecture, num_layers: int) -> Iterator[None]:
    """Inside the context the model runs its first `num_layers` blocks only; the final norm then sees `h_{num_layers}`."""
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
    """Dropout off inside; every module's own mode as before afterwards (some may have been frozen in evaluation)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _first_input(taps: Taps):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        taps.hidden_states.setdefault(0, args[0] if args else kwargs["hidden_states"])

    return hook


def _output_of(taps: Taps, layer: int):
    def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        taps.hidden_states.setdefault(layer, output[0] if isinstance(output, tuple) else output)

    return hook


def _final(taps: Taps):
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        if taps.final is None:
            taps.final = output

    return hook
