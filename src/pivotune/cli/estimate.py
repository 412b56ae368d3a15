"""`pivotune estimate`: memory, steps and time of a run before it starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pivotune.cli.common import console, print_json, printable, quiet_libraries
from pivotune.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from pivotune.config.settings import RunConfig
    from pivotune.estimate.device import Device
    from pivotune.estimate.estimate import Estimate, Target
    from pivotune.estimate.model_size import ModelSize
    from pivotune.estimate.rows import Schedule
    from pivotune.training.arguments import DeepSupervisionConfig

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
_EXPONENT_NAMES = ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))


def estimate(
    config: Annotated[Path, typer.Argument(help="Run configuration (YAML).")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: lora='{r: 16}'. Repeatable.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--gpus", "--processes", min=1, help="Devices, one process each.")
    ] = None,
    strategy: Annotated[str | None, typer.Option(help="ddp, fsdp2, zero2 or zero3; all of them if absent.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of one GPU that is not here: 80GiB.")] = None,
    tflops: Annotated[float | None, typer.Option(min=0, help="Its peak rate of bfloat16 products, in TFLOP/s.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows trained on, where they are not to be counted.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON on stdout.")] = False,
) -> None:
    """Estimate memory, steps and time of a run: no weight is read."""
    if strategy is not None and strategy not in _STRATEGIES:
        raise UsageError(f"--strategy: {strategy!r} found; allowed: {', '.join(_STRATEGIES)}")
    memory = None if gpu_memory is None else parse_bytes(gpu_memory)
    from pivotune.config.yaml_text import load_config

    run_config = load_config(config, changes or [])
    quiet_libraries()
    from pivotune.estimate.estimate import estimate_strategies, read_rows

    device = _device(run_config, memory, tflops, on_gpus=strategy is not None or (processes or 1) > 1)
    found = read_rows(run_config, rows=rows)
    estimates = estimate_strategies(run_config, _targets(run_config, device, processes or 1, strategy), found)
    seconds = [_seconds(run_config, item, device) for item in estimates]
    advice = _advice(run_config, estimates, device)
    if as_json:
        print_json(to_json(estimates, seconds, device, advice))
    else:
        describe(console(as_json), run_config, estimates, seconds, device, advice)


def parse_bytes(text: str) -> float:
    """`80GiB`, `80GB` or `80G` in bytes, all of them powers of two.

    Raises:
        UsageError: something else.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UsageError(f"--gpu-memory: {text!r} found; allowed: a size such as 80GiB")
    return float(match[1]) * _UNITS[match[2].upper()]


def gibibytes(size: float) -> str:
    """Bytes for a person: `6.1 GiB`, small ones in MiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.1f} MiB"


def millions(count: int) -> str:
    """A number of parameters for a person."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def _device(config: RunConfig, memory: float | None, tflops: float | None, *, on_gpus: bool) -> Device:
    from pivotune.estimate.device import described_device, find_device

    found = find_device(use_cpu=bool(config.training.get("use_cpu")))
    if memory is not None or tflops is not None or (on_gpus and found.kind == "cpu"):
        return described_device(memory, tflops)
    return found


def _targets(config: RunConfig, device: Device, processes: int, strategy: str | None) -> list[Target]:
    """What is asked for; of all strategies those that the run can be divided by."""
    from pivotune.estimate.estimate import Target, why_impossible

    if processes == 1 and strategy is None:
        return [Target(device=device.kind)]
    names: Any = _STRATEGIES if strategy is None else (strategy,)
    targets = [Target(device=device.kind, processes=processes, strategy=name) for name in names]
    reasons = [why_impossible(config, target) for target in targets]
    if strategy is not None and reasons[0] is not None:
        raise UsageError(f"--strategy {strategy}: {reasons[0]}")
    return [target for target, reason in zip(targets, reasons, strict=True) if reason is None]


def _seconds(config: RunConfig, estimate: Estimate, device: Device) -> float | None:
    from pivotune.estimate.operations import seconds_needed
    from pivotune.estimate.speed import training_rate

    if estimate.operations is None:
        return None
    rate = training_rate(config, estimate, device)
    return None if rate is None else seconds_needed(estimate.operations, rate, estimate.target.processes)


def _advice(config: RunConfig, estimates: list[Estimate], device: Device) -> list[str] | None:
    """What would make the run fit; None where something fits already or the memory is not known."""
    from pivotune.estimate.fitting import fits, fitting_changes

    if device.memory is None or any(fits(item, device.memory) for item in estimates):
        return None
    least = min(estimates, key=lambda item: item.memory.peak)
    return fitting_changes(config, least.target, least.rows, device.memory)


def describe(
    out: Console,
    config: RunConfig,
    estimates: list[Estimate],
    seconds: list[float | None],
    device: Device,
    advice: list[str] | None,
) -> None:
    """The estimate for a person: what is trained, how long, memory by strategy, and what would make it fit."""
    first = estimates[0]
    for name, text in _lines(config, first, seconds[0], device):
        out.print(f"[bold]{name:8}[/] ", end="")
        out.print(printable(text), markup=False, soft_wrap=True)
    out.print(memory_table(estimates, device))
    if advice is None:
        return
    out.print("does not fit; each of these would make it fit:" if len(advice) > 1 else "does not fit; this would do:")
    for text in advice or ["nothing that is tried: take a smaller model"]:
        out.print(f"  {text}", markup=False, soft_wrap=True)


def _lines(config: RunConfig, estimate: Estimate, seconds: float | None, device: Device) -> list[tuple[str, str]]:
    from pivotune.estimate.estimate import arguments_for

    rows, args = estimate.rows, arguments_for(config, estimate.target.device)
    lengths = f"{rows.mean_tokens:.0f} tokens a row" + (", assumed" if rows.assumed else "")
    lines = [
        ("model", config.model),
        ("trains", training_words(config, args, estimate.size, estimate.target, estimate.schedule)),
        ("batch", f"the largest micro-batch has {estimate.batch_rows} rows and {estimate.batch_tokens:,} tokens"),
    ]
    if estimate.schedule is None or estimate.operations is None:
        return [*lines, ("run", f"{lengths}; give --rows for steps and time: the rows are not in a local file")]
    tokens = rows.mean_tokens * estimate.schedule.rows_seen
    total = (
        f"{estimate.schedule.rows:,} rows, {lengths}, {tokens / 1e6:,.2f} M tokens, {_operations(estimate.operations)}"
    )
    return [*lines, ("run", total), ("time", _time_words(seconds, device))]


def training_words(
    config: RunConfig, args: DeepSupervisionConfig, size: ModelSize, target: Target, schedule: Schedule | None
) -> str:
    """What is trained and in which steps, in one line."""
    from pivotune.training.arguments import optimizer_name

    kind = "full fine-tuning" if config.lora is None else f"LoRA, r {config.lora.r}"
    kind += ", 4-bit base" if config.quantize else ""
    steps = "" if schedule is None else f" = {schedule.rows_per_step} rows a step, {schedule.steps:,} steps"
    return (
        f"{millions(size.trained)} of {millions(size.total)} parameters ({kind}), {optimizer_name(args)}, "
        f"{'bf16 autocast' if args.bf16 else 'no autocast'}, {args.per_device_train_batch_size} rows x "
        f"{args.gradient_accumulation_steps} accumulated x {target.processes} "
        f"process{'' if target.processes == 1 else 'es'}{steps}"
    )


def memory_table(estimates: list[Estimate], device: Device) -> Any:
    """Memory of one device in GiB, a row for each strategy."""
    from rich import box
    from rich.table import Table

    from pivotune.estimate.fitting import fits

    columns = ("weights", "gradients", "optimizer", "activations", "communication", "peak")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("GiB on one of", no_wrap=True)
    for column in columns:
        # Gathered weights too, but the table has to fit into 80 columns.
        title = "buffers" if column == "communication" else column
        table.add_column(title, justify="right", no_wrap=True, min_width=len(title))
    if device.memory is not None:
        table.add_column(f"{device.memory / 2**30:.1f} GiB", no_wrap=True)
    for item in estimates:
        memory, target = item.memory, item.target
        name = "1" if target.strategy == "single" else f"{target.processes}, {target.strategy}"
        verdict = [] if device.memory is None else ["fits" if fits(item, device.memory) else "too much"]
        table.add_row(name, *(f"{getattr(memory, column) / 2**30:,.2f}" for column in columns), *verdict)
    return table


def to_json(
    estimates: list[Estimate], seconds: list[float | None], device: Device, advice: list[str] | None
) -> dict[str, Any]:
    """The estimate as plain data; sizes in bytes."""
    from dataclasses import asdict

    from pivotune.estimate.fitting import fits

    first = estimates[0]
    return {
        "device": asdict(device),
        "parameters": {"total": first.size.total, "trained": first.size.trained},
        "largest_micro_batch": {"rows": first.batch_rows, "tokens": first.batch_tokens},
        "tokens_per_row": first.rows.mean_tokens,
        "lengths_assumed": first.rows.assumed,
        "strategies": [
            {
                "strategy": item.target.strategy,
                "processes": item.target.processes,
                "memory": item.memory.to_dict(),
                "fits": None if device.memory is None else fits(item, device.memory),
                "schedule": None if item.schedule is None else asdict(item.schedule),
                "operations": item.operations,
                "seconds": duration,
            }
            for item, duration in zip(estimates, seconds, strict=True)
        ],
        "changes_that_fit": advice,
    }


def _operations(count: float) -> str:
    size, name = next(((size, name) for size, name in _EXPONENT_NAMES if count >= size), (1e9, "GFLOP"))
    return f"{count / size:,.1f} {name}"


def _time_words(seconds: float | None, device: Device) -> str:
    if seconds is None:
        return "give --tflops (the peak rate of a GPU) for the time"
    return f"about {_duration(seconds)} on {device.name}"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:,.1f} h"
