"""Forward and backward of one training step: deep supervision against plain fine-tuning, and both against their peers.

Goals 1 to 5, 7 and 9 of docs/performance.md. All contenders see the same rows; those that are ours use the same loss
kernels, so that ratios tell what the passes cost. Gradients of the shared forward are compared with those of separate
passes in the same run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import (
    Goal,
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
from benchmarks.peers import trl_trainer
from pivotune.config.supervision import NO_SUPERVISION, SupervisionConfig
from pivotune.data.collator import DeepSupervisionCollator
from pivotune.data.examples import Example, Side
from pivotune.errors import UsageError
from pivotune.forward.passes import (
    BranchStates,
    Passes,
    PassRequest,
    RunPasses,
    branch_inputs,
    separate_passes,
    shared_passes,
)
from pivotune.lenses.logit import lens_logits
from pivotune.models.architecture import find_architecture
from pivotune.models.taps import tap
from pivotune.objectives.base import weighted_total
from pivotune.objectives.deep_supervision import deep_supervision_terms, term_counts

# Tokens of query, answer, English query and English answer: the mean of translated Alpaca rows (docs/performance.md).
FIXED = (105, 165, 70, 110)
SHARED_GOALS = {"smollm2": 1.25, "llama2-7b": 1.25, "gemma2-2b": 1.33}
PROMPT_GOALS = {"smollm2": 1.24, "llama2-7b": 1.18}
MEMORY_GOALS = {"smollm2": 1.25, "llama2-7b": 1.15}
WEIGHTS = {"tft": 1.0, "conversion": 0.3, "thinking": 0.3}


@dataclass(frozen=True)
class Lengths:
    """Tokens of one row."""

    query: int
    answer: int
    english_query: int
    english_answer: int


def main(arguments: Sequence[str] | None) -> None:
    """Measure, print and save."""
    options = _options(arguments)
    # Weights of a random model that takes part in no result may be anything; dropout is off in these shapes.
    model = build_model(options.shape, options.dtype, options.device, options.layers).train()
    lengths = row_lengths(options.batch, options.lengths)
    batch = make_batch(lengths, model.config.vocab_size, options.device, replay=options.replay)
    width = find_architecture(model).head_weight.shape[1]
    # Vectors that training reads from its file; their values do not matter here.
    for name in ("conversion", "thinking"):
        batch[f"english_features_{name}"] = torch.randn(options.batch, width, device=options.device)
    supervisions = _supervisions(find_architecture(model).num_layers)
    with tempfile.TemporaryDirectory(prefix="pivotune-benchmark-") as folder:
        steps = _steps(model, batch, supervisions, options, folder)
        if options.only:
            steps = {name: step for name, step in steps.items() if name in options.only}
        rows = [
            row for kind in ("logits", "prompt") for row in _gradient_rows(model, batch, supervisions[kind], options)
        ]
        seconds = measure(steps, options.rounds)
        memory = {name: peak_memory(step, options.device) for name, step in steps.items()}
    ideal = [
        ideal_ratio(model, lengths[options.replay :], lengths, supervisions[kind]) for kind in ("logits", "prompt")
    ]
    rows += _time_rows(seconds, options, *ideal)
    rows += _memory_rows(memory, options)
    report(options, rows)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parse_options(_parser(), arguments)
    if not 0 <= options.replay < options.batch:
        raise UsageError(f"--replay: {options.replay} found; allowed: 0 to {options.batch - 1}, fewer than --batch")
    if options.layers is not None and options.layers < 3:
        raise UsageError(
            f"--layers: {options.layers} found; allowed: 3 or more, for two supervised layers below the top"
        )
    return options


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("step", __doc__)
    parser.add_argument("--batch", type=positive, default=2, help="rows of the batch")
    parser.add_argument("--lengths", choices=["fixed", "mixed"], default="fixed", help="one length, or as in real data")
    parser.add_argument("--replay", type=int, default=0, help="how many of the rows are English replay rows")
    parser.add_argument("--layers", type=positive, help="blocks, where the shape's own are too many for the machine")
    parser.add_argument(
        "--only",
        type=lambda text: ["tft", *text.split(",")],
        help="contenders beside tft: shared,prompt,thinking alone",
    )
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast over weights of --dtype")
    return parser


# ---- rows ----


def row_lengths(count: int, kind: str, seed: int = 0) -> list[Lengths]:
    """Lengths of `count` rows; `mixed` spreads them log-normally around the same means, as instruction data does.

    Rows of one batch are of similar length, as grouping by length leaves them.
    """
    if kind == "fixed":
        return [Lengths(*FIXED)] * count
    random = np.random.default_rng(seed)
    scale = np.exp(random.normal(0.0, 0.15, (count, 1)) + random.normal(0.0, 0.2, (count, 4)))
    return [Lengths(*(int(n) for n in row)) for row in np.maximum(2, np.round(scale * FIXED))]


def make_batch(lengths: Sequence[Lengths], vocabulary: int, device: str, replay: int = 0) -> dict[str, Tensor]:
    """Random tokens in rows of these lengths; the first `replay` rows have no English side."""
    random = np.random.default_rng(0)
    examples = [
        Example(
            main=_side(random, vocabulary, row.query, row.answer),
            parallel=_side(random, vocabulary, row.english_query, row.english_answer) if index >= replay else None,
            english_prompt=index < replay,
            english_answer=index < replay,
        )
        for index, row in enumerate(lengths)
    ]
    return {name: tensor.to(device) for name, tensor in DeepSupervisionCollator(pad_token_id=0)(examples).items()}


def _side(random: np.random.Generator, vocabulary: int, query: int, answer: int) -> Side:
    ids = random.integers(3, vocabulary, query + answer, dtype=np.int32)
    return Side(ids=ids, query=(0, query), answer=query, characters=answer)


# ---- contenders ----


def _supervisions(num_layers: int) -> dict[str, SupervisionConfig]:
    """LC and ET at the paper's relative depths, 2/32 and 15/32."""
    low = max(1, round(num_layers * 2 / 32))
    high = max(low + 1, round(num_layers * 15 / 32))

    def both(signal: str, **options: Any) -> SupervisionConfig:
        terms = {"conversion": {"signal": signal, "layer": low}, "thinking": {"signal": signal, "layer": high}}
        return SupervisionConfig.model_validate({**terms, "lens": "logit", signal: options})

    return {
        # Random weights have no lens to fit, and a map of the width costs little beside the head.
        "logits": both("logits", gradient="all"),
        "prompt": both("logits", gradient="prompt"),
        "thinking": SupervisionConfig.model_validate(
            {"conversion": {"signal": "none"}, "thinking": {"layer": high}, "lens": "logit"}
        ),
        "positional": both("logits", mode="positional"),
        "feature": both("feature"),
        "frozen": both("feature", english="frozen"),
        "tft": NO_SUPERVISION,
    }


def _steps(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    supervisions: Mapping[str, SupervisionConfig],
    options: argparse.Namespace,
    folder: str,
) -> dict[str, Callable[[], Any]]:
    def step(kind: str, run_passes: RunPasses) -> Callable[[], None]:
        return lambda: _step(model, batch, supervisions[kind], run_passes, options)

    return {
        "tft": step("tft", shared_passes),
        "shared": step("logits", shared_passes),
        "prompt": step("prompt", shared_passes),
        "thinking alone": step("thinking", shared_passes),
        "separate": step("logits", separate_passes),
        "three full-depth calls": step("logits", full_depth_passes),
        "three calls, first writing": lambda: _first_writing(model, batch, supervisions["logits"], options),
        "positional": step("positional", shared_passes),
        "feature, detached": step("feature", shared_passes),
        "feature, frozen": step("frozen", shared_passes),
        **_trainer_steps(model, batch, options, folder),
    }


def _step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    supervision: SupervisionConfig,
    run_passes: RunPasses,
    options: argparse.Namespace,
) -> None:
    model.zero_grad(set_to_none=True)
    device = torch.device(options.device).type
    with torch.autocast(device, dtype=torch.bfloat16) if options.autocast else nullcontext():
        terms = deep_supervision_terms(model, batch, supervision, run_passes=run_passes)
        loss = weighted_total(terms, WEIGHTS, term_counts(batch, supervision))
    loss.backward()


def _first_writing(
    model: nn.Module, batch: Mapping[str, Tensor], supervision: SupervisionConfig, options: argparse.Namespace
) -> None:
    """As one would first write it: three calls of the whole model, logits of all positions, hidden states by index."""
    architecture = find_architecture(model)
    model.zero_grad(set_to_none=True)
    with torch.autocast(torch.device(options.device).type, dtype=torch.bfloat16, enabled=options.autocast):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        loss = model(**inputs, use_cache=False).loss
        for signal, side in ((supervision.conversion, "query"), (supervision.thinking, "answer")):
            input_ids, attention_mask, branch_mask = branch_inputs(batch, side)
            output = model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, output_hidden_states=True
            )
            logits = lens_logits(architecture, output.hidden_states[signal.layer]).float()
            labels = input_ids.masked_fill(~branch_mask, -100)
            loss = loss + 0.3 * F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()


def full_depth_passes(model: nn.Module, batch: Mapping[str, Tensor], request: PassRequest) -> Passes:
    """A whole model call for the rows, and one for each branch; the losses are ours."""
    architecture = find_architecture(model)

    def run(input_ids: Tensor, attention_mask: Tensor, layers: set[int]) -> Any:
        with tap(architecture, layers) as taps:
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
        return taps

    main = run(batch["input_ids"], batch["attention_mask"], set())
    branches = {}
    for name, (layer, side) in request.branches.items():
        input_ids, attention_mask, branch_mask = branch_inputs(batch, side)
        states = run(input_ids, attention_mask, {layer}).hidden_states[layer]
        predicting = branch_mask[:, 1:]
        branches[name] = BranchStates(hidden_states=states[:, :-1][predicting], labels=input_ids[:, 1:][predicting])
    return Passes(main=main, branches=branches, english=None)


def _trainer_steps(
    model: Any, batch: Mapping[str, Tensor], options: argparse.Namespace, folder: str
) -> dict[str, Callable[[], Any]]:
    """`training_step` of our trainer, of the plain `Trainer`, and of TRL's where it is installed."""
    from transformers import Trainer, TrainingArguments

    from pivotune.training.arguments import DeepSupervisionConfig
    from pivotune.training.trainer import DeepSupervisionTrainer

    settings: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": options.device == "cpu",
        "bf16": options.autocast,
        "report_to": "none",
        "save_strategy": "no",
    }
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    ours = DeepSupervisionTrainer(
        model=model, args=DeepSupervisionConfig(method="tft", **settings), processing_class=tokenizer
    )
    plain = Trainer(model=model, args=TrainingArguments(**settings))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    count = (batch["labels"][:, 1:] >= 0).sum()

    def step(trainer: Any, inputs: Mapping[str, Tensor], count: Any) -> Callable[[], None]:
        def run() -> None:
            trainer.model.zero_grad(set_to_none=True)
            trainer.training_step(trainer.model, dict(inputs), count)

        return run

    steps = {"our trainer": step(ours, batch, {"tft": count}), "Trainer": step(plain, inputs, count)}
    trl = trl_trainer(model, settings)
    return {**steps, "SFTTrainer": step(trl, inputs, count)} if trl is not None else steps


# ---- results ----


def ideal_ratio(
    model: nn.Module, branched: Sequence[Lengths], rows: Sequence[Lengths], supervision: SupervisionConfig
) -> float:
    """Products of a logits step over those of a TFT step, for these rows without padding (docs/performance.md)."""
    architecture = find_architecture(model)
    block = sum(p.numel() for p in architecture.blocks[0].parameters() if p.ndim == 2)
    head = architecture.head_weight.numel()
    tft = sum(6 * block * architecture.num_layers * (row.query + row.answer) + 6 * head * row.answer for row in rows)
    low, high = (int(term.layer) for term in (supervision.conversion, supervision.thinking))
    # Detached weights get no gradient from the branch's tokens.
    products = 4 if supervision.logits.gradient == "prompt" else 6
    extra = sum(
        products * block * (low * row.english_query + high * row.english_answer)
        + 4 * head * (row.english_query + row.english_answer)
        for row in branched
    )
    return 1 + extra / tft


def _time_rows(
    seconds: Mapping[str, list[float]], options: argparse.Namespace, ideal: float, ideal_prompt: float
) -> list[Row]:
    limit = at_most(1.05 if options.device == "cpu" else 1.10)
    rows = []
    for what, name, goals, best in (
        ("1: logits, shared forward / TFT", "shared", SHARED_GOALS, ideal),
        ("10: logits, gradient through the prompt only / TFT", "prompt", PROMPT_GOALS, ideal_prompt),
    ):
        if name in seconds:
            rows.append(time_row(what, seconds, name, "tft", _goal(goals, options)))
            rows.append(_against_ideal(rows[-1], best, limit))
    pairs: list[tuple[str, str, str, Goal | None]] = [
        ("3: three calls as first written / shared forward", "three calls, first writing", "shared", at_least(1.6)),
        ("3: three full-depth calls, our losses / shared forward", "three full-depth calls", "shared", at_least(1.6)),
        ("   gradient through the prompt only / all gradients", "prompt", "shared", at_most(1.0)),
        ("   English thinking alone, gradient through the prompt only / TFT", "thinking alone", "tft", None),
        ("   logits, separate truncated passes / TFT", "separate", "tft", None),
        ("   logits, positional / TFT", "positional", "tft", None),
        ("5: feature, detached / TFT", "feature, detached", "tft", at_most(1.22)),
        ("5: feature, frozen with cached vectors / TFT", "feature, frozen", "tft", at_most(1.03)),
        ("7: our trainer, TFT / Trainer", "our trainer", "Trainer", at_most(1.0)),
        ("7: our trainer, TFT / TRL's SFTTrainer", "our trainer", "SFTTrainer", at_most(1.05)),
    ]
    return rows + [
        time_row(what, seconds, above, below, goal)
        for what, above, below, goal in pairs
        if above in seconds and below in seconds
    ]


def _goal(limits: Mapping[str, float], options: argparse.Namespace) -> Goal | None:
    limit = limits.get(options.shape)
    return None if limit is None else at_most(limit)


def _against_ideal(measured: Row, ideal: float, goal: Goal) -> Row:
    low, high = measured.spread
    return Row(
        what=f"2: measured / ideal products ({ideal:.3f})",
        ratio=measured.ratio / ideal,
        spread=(low / ideal, high / ideal),
        goal=goal,
    )


def _memory_rows(memory: Mapping[str, int], options: argparse.Namespace) -> list[Row]:
    pairs = [
        ("4: peak memory, shared forward / TFT", "shared", "tft", _goal(MEMORY_GOALS, options)),
        ("   peak memory, gradient through the prompt only / TFT", "prompt", "tft", None),
        ("   peak memory, separate passes / TFT", "separate", "tft", None),
        ("   peak memory, three calls as first written / TFT", "three calls, first writing", "tft", None),
        ("   peak memory, our trainer / Trainer", "our trainer", "Trainer", None),
    ]
    return [
        memory_row(what, memory, above, below, goal)
        for what, above, below, goal in pairs
        if above in memory and below in memory
    ]


def _gradient_rows(
    model: nn.Module, batch: Mapping[str, Tensor], supervision: SupervisionConfig, options: argparse.Namespace
) -> list[Row]:
    """Norm of the difference between both ways' gradients, relative to the gradient's own norm."""
    gradients = []
    for run_passes in (shared_passes, separate_passes):
        _step(model, batch, supervision, run_passes, options)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    shared, separate = gradients
    difference = sum((shared[name] - separate[name]).double().square().sum() for name in separate)
    norm = sum(gradient.double().square().sum() for gradient in separate.values())
    value = float((difference / norm) ** 0.5)
    exact = options.dtype == torch.float32 and not options.autocast
    what = f"9: gradients ({supervision.logits.gradient}), shared forward against separate passes: relative difference"
    return [Row(what=what, ratio=value, spread=(value, value), goal=at_most(1e-5) if exact else None)]


if __name__ == "__main__":
    run_program(main)
