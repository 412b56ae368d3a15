"""The estimate of a run, from its configuration, the model's `config.json` and a sample of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from pivotune.config.registry import METHODS
from pivotune.config.settings import RunConfig, SupervisionConfig
from pivotune.data.collator import DeepSupervisionCollator
from pivotune.data.datasets import training_examples
from pivotune.data.examples import Example, Pair
from pivotune.errors import UsageError
from pivotune.estimate.allocations import Timeline
from pivotune.estimate.dry_step import StepSettings, dry_step
from pivotune.estimate.model_size import ModelSize, measure_model, meta_model
from pivotune.estimate.operations import Costs, measure_costs, row_operations
from pivotune.estimate.rows import Schedule, assumed_pairs, largest_batch, num_tokens, training_schedule
from pivotune.estimate.strategies import Memory, memory_of
from pivotune.models.architecture import check_architecture
from pivotune.models.loading import load_tokenizer, read_config
from pivotune.objectives.cosine import frozen_losses
from pivotune.training.arguments import DeepSupervisionConfig, build_arguments, optimizer_name
from pivotune.training.distributed.strategies import Strategy, why_not_divided
from pivotune.training.preparation import assumed_supervision, build_encoder, spread

# Rows that are tokenized: enough to know their lengths.
SAMPLE_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a run would go: `device` (`cpu` or `cuda`), and over how many processes in which way."""

    device: str
    processes: int = 1
    strategy: Strategy = "single"


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """The rows of a run as far as they were looked at.

    Attributes:
        examples: a sample of what is trained on, or all of it.
        rows: how many there are; None where nobody has counted.
        assumed: whether the lengths are typical ones and not those of real rows.
    """

    examples: Sequence[Example]
    rows: int | None
    assumed: bool = False

    @property
    def mean_tokens(self) -> float:
        """Tokens of a row, both sides."""
        return fmean(map(num_tokens, self.examples))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run needs.

    Attributes:
        size: parameters and their bytes.
        memory: of one device.
        schedule: rows and steps; None where the number of rows is not known.
        operations: of the whole run, over all processes; None as `schedule`.
        batch_rows, batch_tokens: of the largest micro-batch, which `memory` is for.
        autocast: whether products run in bfloat16.
        rows: what was looked at.
    """

    target: Target
    size: ModelSize
    memory: Memory
    schedule: Schedule | None
    operations: float | None
    batch_rows: int
    batch_tokens: int
    autocast: bool
    rows: RunRows


def why_impossible(config: RunConfig, target: Target) -> str | None:
    """What keeps the run from being divided over the target's processes; None where it can be."""
    optimizer = optimizer_name(arguments_for(config, target.device))
    return why_not_divided(target.strategy, quantized=config.quantize is not None, optimizer=optimizer)


def estimate_run(config: RunConfig, target: Target, rows: RunRows) -> Estimate:
    """Estimate memory, steps and operations. No weight is read or made.

    Raises:
        UsageError: what is wrong with the configuration.
    """
    return estimate_strategies(config, [target], rows)[0]


def estimate_strategies(config: RunConfig, targets: Sequence[Target], rows: RunRows) -> list[Estimate]:
    """The same for several ways to divide a run over processes of one kind of device: the step is run dry once."""
    model_config = read_model_config(config)
    args = arguments_for(config, targets[0].device)
    supervision = assumed_supervision(args, model_config.get_text_config().num_hidden_layers)
    num_rows = rows.rows or len(rows.examples)
    batch = largest_batch(rows.examples, args, rows=num_rows, processes=targets[0].processes)
    timeline = dry_run(config, model_config, args, supervision, batch, targets[0].device)
    model = meta_model(config, model_config)
    size = measure_model(model, optimizer=optimizer_name(args), quantized=config.quantize is not None)
    whole_squares = targets[0].device == "cpu" and args.bf16
    costs = measure_costs(model, checkpointing=bool(args.gradient_checkpointing), whole_squares=whole_squares)
    estimates = []
    for target in targets:
        schedule = None if rows.rows is None else training_schedule(args, rows.rows, target.processes)
        estimates.append(
            Estimate(
                target=target,
                size=size,
                memory=_memory(size, timeline, args, target),
                schedule=schedule,
                operations=None if schedule is None else _operations(rows, schedule, costs, supervision, args),
                batch_rows=len(batch),
                batch_tokens=sum(map(num_tokens, batch)),
                autocast=args.bf16,
                rows=rows,
            )
        )
    return estimates


def dry_run(
    config: RunConfig,
    model_config: Any,
    args: DeepSupervisionConfig,
    supervision: SupervisionConfig,
    batch: Sequence[Example],
    device: str,
) -> Timeline:
    """The allocations of one micro-batch of a run."""
    settings = StepSettings(
        device=device,
        autocast=args.bf16,
        checkpointing=bool(args.gradient_checkpointing),
        accumulated=args.gradient_accumulation_steps > 1,
        forward=args.supervision.logits.forward,
    )
    width = model_config.get_text_config().hidden_size
    return dry_step(meta_model(config, model_config), _collate(batch, supervision, width), supervision, settings)


def read_model_config(config: RunConfig) -> Any:
    """The model's configuration; a folder that holds nothing but a `config.json` will do.

    Raises:
        UsageError: no such model, or a family that is not supported.
    """
    folder = Path(config.model).expanduser()
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
        from transformers import AutoConfig

        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    else:
        model_config = read_config(config.model, trust_remote_code=config.trust_remote_code, revision=config.revision)
    check_architecture(model_config.model_type)
    return model_config


def arguments_for(config: RunConfig, device: str) -> DeepSupervisionConfig:
    """The trainer's arguments as they would be on such a device: a GPU computes in bfloat16 if nothing else is said."""
    training = dict(config.training)
    if device == "cuda":
        training.setdefault("bf16", not (training.get("fp16") or training.get("use_cpu")))
    return build_arguments(config.model_copy(update={"training": training}), here=False)


def read_rows(config: RunConfig, *, rows: int | None = None) -> RunRows:
    """Count the rows of a local file and tokenize a sample of them.

    Args:
        rows: how many rows are trained on, where the caller knows; then only the sample is read.

    Raises:
        UsageError: a local file that cannot be used.
    """
    args = build_arguments(config, here=False)
    tokenizer = _tokenizer(config)
    if tokenizer is None or not Path(config.data.train).is_file():
        return RunRows(examples=_examples(assumed_pairs(args), args), rows=rows, assumed=True)
    pairs, counted = _sample(config, args, tokenizer, rows)
    return RunRows(examples=_examples(pairs, args), rows=rows or counted)


def rows_of(pairs: Sequence[Pair], args: DeepSupervisionConfig) -> RunRows:
    """The rows of a run whose data is encoded already."""
    return RunRows(examples=_examples(pairs, args), rows=len(pairs))


def _sample(config: RunConfig, args: DeepSupervisionConfig, tokenizer: Any, rows: int | None) -> tuple[list[Pair], int]:
    from pivotune.training.preparation import load_run_rows

    if rows is not None:
        data = config.data.model_copy(update={"limit": 2 * SAMPLE_ROWS})
        config = config.model_copy(update={"data": data})
    train = load_run_rows(config.data, config.method, config.seed).train
    encoder = build_encoder(args, tokenizer, read_model_config(config))
    pairs = encoder.encode(spread(train, SAMPLE_ROWS), on_bad_row="skip", source=config.data.train)
    if not pairs:
        raise UsageError(f"{config.data.train}: no row is left to train on")
    return pairs, len(train)


def _tokenizer(config: RunConfig) -> Any:
    try:
        return load_tokenizer(config.model, trust_remote_code=config.trust_remote_code, revision=config.revision)
    except UsageError:
        # A folder with a config.json alone.
        return None


def _examples(pairs: Sequence[Pair], args: DeepSupervisionConfig) -> Sequence[Example]:
    return training_examples(pairs, METHODS[args.method], english_ratio=args.data.english_ratio, seed=args.seed)


def _collate(batch: Sequence[Example], supervision: SupervisionConfig, width: int) -> dict[str, Tensor]:
    tensors = DeepSupervisionCollator(0)(batch)
    tensors |= {f"english_features_{loss.name}": torch.zeros(len(batch), width) for loss in frozen_losses(supervision)}
    return tensors


def _memory(size: ModelSize, timeline: Timeline, args: DeepSupervisionConfig, target: Target) -> Memory:
    return memory_of(
        size,
        timeline,
        target.strategy,
        processes=target.processes,
        compute_bytes=2 if args.bf16 else 4,
        accumulated=args.gradient_accumulation_steps > 1,
        # Torch's AdamW goes over lists of tensors on a GPU, with one temporary for each, unless it is fused.
        foreach_copies=target.device == "cuda" and optimizer_name(args) == "adamw_torch",
    )


def _operations(
    rows: RunRows, schedule: Schedule, costs: Costs, supervision: SupervisionConfig, args: DeepSupervisionConfig
) -> float:
    separate = args.supervision.logits.forward == "separate"
    of_row = fmean(row_operations(example, costs, supervision, separate=separate) for example in rows.examples)
    return of_row * schedule.rows_seen
