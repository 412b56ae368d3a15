"""`pivotune estimate`: memory, steps and time of a run before it starts."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pivotune.cli import options
from pivotune.cli.common import console, print_json, printable, quiet_libraries
from pivotune.errors import UsageError
from pivotune.text.words import counted

if TYPE_CHECKING:
    from rich.console import Console

    from pivotune.config.settings import RunConfig
    from pivotune.estimate.estimate import Estimate, Startup
    from pivotune.estimate.operations import Device
    from pivotune.training.arguments import DeepSupervisionConfig

_STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
_OPERATION_UNITS = ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))


def estimate(
    config: Annotated[Path, typer.Argument(help="Run configuration (YAML).")],
    changes: options.Changes = None,
    processes: Annotated[int, typer.Option("--gpus", "--processes", min=1, help="Devices, one process each.")] = 1,
    strategy: Annotated[str | None, typer.Option(help="ddp, fsdp2, zero2 or zero3; all of them if absent.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of one GPU of another machine: 80GiB.")] = None,
    tflops: Annotated[float | None, typer.Option(min=0, help="Its peak rate of bfloat16 products, in TFLOP/s.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Number of training rows; counted if absent.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON on stdout.")] = False,
) -> None:
    """Estimate memory, steps and time of a run: no weight is read."""
    if strategy is not None and strategy not in _STRATEGIES:
        raise UsageError(f"--strategy: {strategy!r} found; allowed: {', '.join(_STRATEGIES)}")
    memory = None if gpu_memory is None else parse_bytes(gpu_memory)
    from pivotune.config.yaml_text import load_config

    run_config = load_config(config, changes or [])
    quiet_libraries()
    from pivotune.estimate.estimate import Target, estimate_strategies, fitting_changes, why_impossible
    from pivotune.estimate.memory import read_model_config
    from pivotune.estimate.operations import Device, find_device, training_rate
    from pivotune.estimate.rows import read_rows

    device = find_device(use_cpu=bool(run_config.training.get("use_cpu")))
    on_gpus = strategy is not None or processes > 1
    if memory is not None or tflops is not None or (on_gpus and device.kind == "cpu"):
        # A GPU of another machine.
        device = Device(kind="cuda", name="GPU", memory=memory, rate=None if tflops is None else tflops * 1e12)
    names: Any = ("single",) if not on_gpus else _STRATEGIES if strategy is None else (strategy,)
    targets = [Target(device=device.kind, processes=processes, strategy=name) for name in names]
    reasons = [why_impossible(run_config, target) if on_gpus else None for target in targets]
    if strategy is not None and reasons[0] is not None:
        raise UsageError(f"--strategy {strategy}: {reasons[0]}")
    targets = [target for target, reason in zip(targets, reasons, strict=True) if reason is None]

    found = read_rows(run_config, rows=rows)
    estimates = estimate_strategies(run_config, targets, found)
    seconds: list[float | None] = []
    model_config = read_model_config(run_config)
    for item in estimates:
        autocast, tokens = item.autocast, item.batch_tokens
        rate = item.operations and training_rate(device, model_config, autocast=autocast, tokens=tokens)
        seconds.append(rate and (item.operations or 0) / (rate * item.target.processes))
    advice = None
    if device.memory is not None and not any(item.fits(device.memory) for item in estimates):
        least = min(estimates, key=lambda item: item.memory.peak)
        advice = fitting_changes(run_config, least.target, found, device.memory)
    if as_json:
        print_json(to_json(estimates, seconds, device, advice))
    else:
        describe(console(as_json), run_config, estimates, seconds, device, advice)


def parse_bytes(text: str) -> float:
    """Return `80GiB`, `80GB` or `80G` in bytes, all of them powers of two; a `UsageError` for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UsageError(f"--gpu-memory: {text!r} found; allowed: a size such as 80GiB")
    return float(match[1]) * 1024.0 ** " KMGT".index(match[2].upper() or " ")


def gibibytes(size: float) -> str:
    """Format bytes: `6.1 GiB`, small ones in MiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.1f} MiB"


def millions(count: int) -> str:
    """Format a number of parameters."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def training_line(config: RunConfig, args: DeepSupervisionConfig, found: Estimate | Startup) -> str:
    """Describe the trained parameters and the steps in one line."""
    from pivotune.training.arguments import optimizer_name

    kind = "full fine-tuning" if config.lora is None else f"LoRA, r {config.lora.r}"
    kind += ", 4-bit base" if config.quantize else ""
    schedule, processes = found.schedule, found.target.processes
    steps = "" if schedule is None else f" = {schedule.rows_per_step} rows a step, {counted(schedule.steps, 'step')}"
    return (
        f"{millions(found.size.trained)} of {millions(found.size.total)} parameters ({kind}), {optimizer_name(args)}, "
        f"{'bf16 autocast' if args.bf16 else 'no autocast'}, {args.per_device_train_batch_size} rows x "
        f"{args.gradient_accumulation_steps} accumulated x {counted(processes, 'process')}{steps}"
    )


def describe(
    out: Console, config: RunConfig, estimates: list[Estimate], seconds: Any, device: Device, advice: Any
) -> None:
    """Print the estimate: trained parameters, time, memory by strategy, and changes that would make the run fit."""
    from pivotune.estimate.estimate import arguments_for

    first = estimates[0]
    rows, args, schedule = first.rows, arguments_for(config, first.target.device), first.schedule
    lines = [
        ("model", config.model),
        ("trains", training_line(config, args, first)),
        ("batch", f"the largest micro-batch has {first.batch_rows} rows and {first.batch_tokens:,} tokens"),
    ]
    lengths = f"{rows.mean_tokens:.0f} tokens a row" + (", assumed" if rows.assumed else "")
    if schedule is None or first.operations is None:
        lines.append(("run", f"{lengths}; give --rows for steps and time: the rows are not in a local file"))
    else:
        size, unit = next(((size, unit) for size, unit in _OPERATION_UNITS if first.operations >= size), (1e9, "GFLOP"))
        tokens = f"{rows.mean_tokens * schedule.rows_seen / 1e6:,.2f} M tokens"
        operations = f"{first.operations / size:,.1f} {unit}"
        lines.append(("run", f"{counted(schedule.rows)}, {lengths}, {tokens}, {operations}"))
        lines.append(("time", _time(seconds[0], device)))
    for name, text in lines:
        out.print(f"[bold]{name:8}[/] ", end="")
        out.print(printable(text), markup=False, soft_wrap=True)
    out.print(memory_table(estimates, device))
    if advice is None:
        return
    out.print("does not fit; each of these would make it fit:" if len(advice) > 1 else "does not fit; this would do:")
    for text in advice or ["no change that was tried: take a smaller model"]:
        out.print(f"  {text}", markup=False, soft_wrap=True)


def _time(seconds: float | None, device: Device) -> str:
    if seconds is None:
        return "give --tflops (the peak rate of a GPU) for the time"
    if seconds < 60:
        return f"about {seconds:.0f} s on {device.name}"
    return f"about {f'{seconds / 60:.0f} min' if seconds < 7200 else f'{seconds / 3600:,.1f} h'} on {device.name}"


def memory_table(estimates: list[Estimate], device: Device) -> Any:
    """Return a table of one device's memory in GiB, a row for each strategy."""
    from rich import box
    from rich.table import Table

    # Buffers are gathered weights too, but the table has to fit into 80 columns.
    titles = {name: name for name in ("weights", "gradients", "optimizer", "activations")}
    titles |= {"communication": "buffers", "peak": "peak"}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("GiB on one of", no_wrap=True)
    for title in titles.values():
        table.add_column(title, justify="right", no_wrap=True, min_width=len(title))
    if device.memory is not None:
        table.add_column(f"{device.memory / 2**30:.1f} GiB", no_wrap=True)
    for item in estimates:
        target = item.target
        name = "1" if target.strategy == "single" else f"{target.processes}, {target.strategy}"
        verdict = [] if device.memory is None else ["fits" if item.fits(device.memory) else "too much"]
        table.add_row(name, *(f"{getattr(item.memory, column) / 2**30:,.2f}" for column in titles), *verdict)
    return table


def to_json(
    estimates: list[Estimate], seconds: list[float | None], device: Device, advice: list[str] | None
) -> dict[str, Any]:
    """Return the estimate as plain data; sizes in bytes."""
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
                "memory": {name: round(size) for name, size in asdict(item.memory).items()},
                "fits": None if device.memory is None else item.fits(device.memory),
                "schedule": None if item.schedule is None else asdict(item.schedule),
                "operations": item.operations,
                "seconds": duration,
            }
            for item, duration in zip(estimates, seconds, strict=True)
        ],
        "changes_that_fit": advice,
    }
