"""Entropy of every layer: Pivotune's blocks against stacked logits and, where installed, TransformerLens.

All contenders get the same weights and tokens and return entropy and most probable token of every layer and position. The
forward pass is part of each. `python -m benchmarks.profile --shape smollm2 --tokens 256`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    Contender,
    Row,
    at_least,
    at_most,
    benchmark_parser,
    build_model,
    measure,
    memory_row,
    parse_options,
    peak_memory,
    positive,
    report,
    run_program,
    time_row,
)
from pivotune.errors import UsageError
from pivotune.layers.profile import lens_statistics, profile_layers
from pivotune.lenses.logit import lens_logits
from pivotune.models.architecture import find_architecture
from pivotune.models.taps import tap

OURS, STACKED, PEER = "pivotune", "stacked logits", "TransformerLens logit_lens"
OURS_LENS, PEER_LENS = "pivotune, lens alone", "TransformerLens logit_readout"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program.

    Raises:
        UsageError: an option is wrong.
    """
    parser = benchmark_parser("profile", __doc__)
    parser.add_argument("--tokens", type=positive, default=256, help="tokens of a batch, all counted")
    parser.add_argument("--sequences", type=positive, default=4, help="sequences they are divided into")
    parser.add_argument("--layers", type=positive, help="blocks of the model; the shape's own where not given")
    options = parse_options(parser, arguments)
    if options.tokens % options.sequences:
        raise UsageError(f"--tokens: {options.tokens} found; allowed: a multiple of --sequences {options.sequences}")
    build = _builder(options)
    model = build()
    shape = (options.sequences, options.tokens // options.sequences)
    input_ids = torch.randint(model.config.vocab_size, shape, device=options.device)
    contenders: dict[str, Contender] = {
        OURS: lambda: ours(model, input_ids),
        STACKED: lambda: stacked(model, input_ids),
    }
    if find_spec("transformer_lens") is not None:
        contenders |= _peer_contenders(build(), model, input_ids)
    report(options, _rows(contenders, options))


def ours(model: torch.nn.Module, input_ids: Tensor) -> Tensor:
    """Mean entropy of each layer (L + 1,)."""
    ones = torch.ones_like(input_ids)
    batch = {"input_ids": input_ids, "attention_mask": ones, "token_mask": ones}
    return torch.tensor(profile_layers(model, [batch]).entropy)


@torch.no_grad()
def stacked(model: torch.nn.Module, input_ids: Tensor) -> Tensor:
    """The naive way: the logits of all layers and tokens at once, (L + 1, B, T, V)."""
    architecture = find_architecture(model)
    logits = lens_logits(architecture, _states(model, input_ids)).float()
    probabilities = logits.softmax(-1)
    top = probabilities.argmax(-1)
    (top == top[-1]).float().mean((1, 2))
    return torch.special.entr(probabilities).sum(-1).mean((1, 2)).cpu()


@torch.no_grad()
def _states(model: torch.nn.Module, input_ids: Tensor) -> Tensor:
    """h_0..h_L, (L + 1, B, T, D)."""
    architecture = find_architecture(model)
    layers = range(architecture.num_layers + 1)
    with tap(architecture, layers) as taps:
        model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    return torch.stack([taps.hidden_states.pop(layer) for layer in layers])


def _peer_contenders(peer_model: Any, model: torch.nn.Module, input_ids: Tensor) -> dict[str, Contender]:
    """TransformerLens from tokens, and both lenses alone on the same states. The bridge takes its model apart: a copy."""
    from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]
    from transformer_lens.tools.analysis import logit_lens, logit_readout  # pyright: ignore[reportMissingImports]

    bridge = TransformerBridge.boot_transformers("random weights", hf_model=peer_model, tokenizer=_tokenizer())
    bridge.eval()
    states = _states(model, input_ids)
    architecture = find_architecture(model)
    return {
        PEER: lambda: logit_lens(bridge, input_ids, positions=None, top_k=1).readout.entropy.mean((1, 2)).cpu(),
        PEER_LENS: lambda: logit_readout(bridge, states, top_k=1).entropy.mean((1, 2)).cpu(),
        OURS_LENS: lambda: lens_statistics(architecture, states.flatten(0, 2)).entropy.view(len(states), -1).mean(1),
    }


def _tokenizer() -> Any:
    """TransformerLens asks for one; without a begin-of-text token it does not look for files."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


def _builder(options: Any) -> Callable[[], Any]:
    return lambda: build_model(options.shape, options.dtype, options.device, options.layers)


def _rows(contenders: dict[str, Contender], options: Any) -> list[Row]:
    """Goal 8 of the table in docs/performance.md; its figures against stacked logits are for a CPU."""
    differences = _differences(contenders)
    seconds = measure(contenders, options.rounds)
    memory = {name: peak_memory(run, options.device) for name, run in contenders.items()}
    published = options.shape != "tiny"
    on_cpu = published and options.device == "cpu"
    rows = [
        time_row(f"{STACKED} / {OURS}, time", seconds, STACKED, OURS, at_least(1.25) if on_cpu else None),
        memory_row(f"{STACKED} / {OURS}, memory", memory, STACKED, OURS, at_least(15) if on_cpu else None),
    ]
    if PEER in contenders:
        rows += [
            time_row(f"{PEER} / {OURS}, time", seconds, PEER, OURS, at_least(1.2) if published else None),
            memory_row(f"{PEER} / {OURS}, memory", memory, PEER, OURS),
            time_row(f"{PEER_LENS} / {OURS_LENS}, time", seconds, PEER_LENS, OURS_LENS),
        ]
    return rows + differences


def _differences(contenders: dict[str, Contender]) -> list[Row]:
    """Largest relative difference of a layer's mean entropy between ours and each other way, in the same run."""
    # Peers run another attention kernel; in bfloat16 its rounding shows.
    expected = {name: contenders[name]() for name in contenders if name in (STACKED, PEER)}
    found = contenders[OURS]()
    rows = []
    for name, entropy in expected.items():
        value = ((found - entropy).abs() / entropy).max().item()
        goal = at_most(1e-5) if name == STACKED else None
        what = f"largest relative difference of an entropy, {OURS} against {name}"
        rows.append(Row(what=what, ratio=value, spread=(value, value), goal=goal))
    return rows


if __name__ == "__main__":
    run_program(main)
