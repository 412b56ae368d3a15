"""Cross-entropy over the vocabulary, forward and backward: ours, naive, torch's and Liger's.

Goals 6 and 9 of docs/performance.md, and the head's part of goal 7. Every contender gets the same random states, labels
and head; gradients are compared with those of naive in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import (
    Row,
    at_least,
    at_most,
    benchmark_parser,
    build_config,
    measure,
    memory_row,
    parse_options,
    peak_memory,
    positive,
    report,
    run_program,
    time_row,
)
from pivotune.kernels.chunked_linear_head import LinearHead, linear_cross_entropies, linear_cross_entropy_sum
from pivotune.kernels.cross_entropy import fused_cross_entropy_sum

Loss = Callable[[Tensor, LinearHead, Tensor], Tensor]

TORCH_CHUNKS = (128, 256, 512)
FROZEN, TRAINED = "frozen head", "trained head"


@dataclass(frozen=True)
class Problem:
    """N states, their labels, and a head of the shape."""

    states: Tensor
    head: LinearHead
    labels: Tensor
    autocast: bool

    def context(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.states.device.type, dtype=torch.bfloat16, enabled=self.autocast)

    def run(self, loss_of: Loss, *, trained: bool) -> list[Tensor]:
        """Forward and backward; the gradients, and nothing left behind."""
        head = self.head if trained else LinearHead(self.head.weight.detach(), softcap=self.head.softcap)
        with self.context():
            loss = loss_of(self.states, head, self.labels) / len(self.labels)
        return list(torch.autograd.grad(loss, [self.states, head.weight] if trained else [self.states]))


def main(arguments: Sequence[str] | None) -> None:
    """Measure, print and save."""
    options = parse_options(_parser(), arguments)
    problem = make_problem(options)
    rows: list[Row] = []
    for name in (FROZEN, TRAINED):
        losses = contenders(name, problem, options)
        runs = {contender: partial(problem.run, loss, trained=name == TRAINED) for contender, loss in losses.items()}
        rows += _gradient_rows(name, runs, options)
        rows += _time_rows(name, measure(runs, options.rounds), options)
        memory = {contender: peak_memory(run, options.device) for contender, run in runs.items()}
        rows += _memory_rows(name, memory, options)
    report(options, rows)


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("cross_entropy", __doc__)
    parser.add_argument("--tokens", type=positive, default=1024, help="labelled rows")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast over states and weights of --dtype")
    return parser


def make_problem(options: argparse.Namespace) -> Problem:
    """Random states of unit size under a head of the shape, which need no model around them."""
    config = build_config(options.shape).get_text_config()
    generator = torch.Generator(options.device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, device=options.device).to(options.dtype)

    # Logits with a standard deviation of 3, about that of a trained model.
    weight = nn.Parameter(normal(config.vocab_size, config.hidden_size, scale=3 / config.hidden_size**0.5))
    labels = torch.randint(config.vocab_size, (options.tokens,), generator=generator, device=options.device)
    return Problem(
        states=normal(options.tokens, config.hidden_size).requires_grad_(),
        head=LinearHead(weight, softcap=getattr(config, "final_logit_softcapping", None)),
        labels=labels,
        autocast=options.autocast,
    )


# ---- contenders ----


def contenders(name: str, problem: Problem, options: argparse.Namespace) -> dict[str, Loss]:
    """Ours and naive, and the peers that can compute this loss here."""
    losses: dict[str, Loss] = {"naive": naive}
    losses["ours"] = _ours_frozen if name == FROZEN else linear_cross_entropy_sum
    # Torch's knows no soft-cap, and its operands must have one dtype.
    if hasattr(F, "linear_cross_entropy") and problem.head.softcap is None and not problem.autocast:
        for rows in TORCH_CHUNKS:
            losses[f"torch, {rows} rows"] = partial(torch_loss, rows=rows)
        losses["torch, its own chunk"] = torch_loss
    if name == TRAINED and options.device == "cuda" and find_spec("liger_kernel") is not None:
        losses["Liger"] = fused_cross_entropy_sum
    return losses


def naive(states: Tensor, head: LinearHead, labels: Tensor) -> Tensor:
    """As Transformers computes it: all logits, in float32 for the loss."""
    logits = F.linear(states, head.weight)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def _ours_frozen(states: Tensor, head: LinearHead, labels: Tensor) -> Tensor:
    return linear_cross_entropies(states, head, labels).sum()


def torch_loss(states: Tensor, head: LinearHead, labels: Tensor, rows: int | None = None) -> Tensor:
    """`F.linear_cross_entropy`, `rows` rows at once, or as many as it chooses."""
    chunks = {} if rows is None else {"batch_chunk_size": rows, "chunking_method": None}
    return F.linear_cross_entropy(
        states, head.weight, labels, reduction="sum", options=nn.LinearCrossEntropyOptions(**chunks)
    )


# ---- rows ----


def _gradient_rows(name: str, runs: dict[str, Callable[[], list[Tensor]]], options: argparse.Namespace) -> list[Row]:
    """Goal 9: how far the gradients are from naive's, all of them in one number."""
    expected = runs["naive"]()
    goal = at_most(1e-5) if options.dtype == torch.float32 and not options.autocast else None
    return [
        _value_row(f"{name}: gradients, {contender} against naive", _difference(run(), expected), goal)
        for contender, run in runs.items()
        if contender != "naive"
    ]


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of the norms of the differences, each relative to its gradient."""
    return max(
        ((one.double() - other.double()).norm() / other.double().norm()).item()
        for one, other in zip(found, expected, strict=True)
    )


def _value_row(what: str, value: float, goal: Any) -> Row:
    return Row(what=what, ratio=value, spread=(value, value), goal=goal)


def _goal_6(options: argparse.Namespace) -> bool:
    """Set for this width and vocabulary: the wider the model, the more of the time is the products themselves."""
    return options.device == "cpu" and options.shape == "smollm2" and options.tokens >= 1024


def _time_rows(name: str, seconds: dict[str, list[float]], options: argparse.Namespace) -> list[Row]:
    """Goal 6 for the frozen head; the trained one, part of goal 7, must not be slower than naive."""
    goal = at_most(1.0) if name == TRAINED else at_most(0.85) if _goal_6(options) else None
    rows = [time_row(f"{name}: time, ours / naive", seconds, "ours", "naive", goal)]
    peers = [contender for contender in seconds if contender not in ("naive", "ours")]
    return rows + [time_row(f"{name}: time, ours / {peer}", seconds, "ours", peer) for peer in peers]


def _memory_rows(name: str, memory: dict[str, int], options: argparse.Namespace) -> list[Row]:
    """Goal 6 for the frozen head in one dtype; the trained one has to hold the gradient of its weight."""
    goal = at_least(10) if name == FROZEN and _goal_6(options) and not options.autocast else None
    return [
        memory_row(
            f"{name}: memory, {contender} / ours", memory, contender, "ours", goal if contender == "naive" else None
        )
        for contender in memory
        if contender != "ours"
    ]


if __name__ == "__main__":
    run_program(main)
