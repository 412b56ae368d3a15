"""What the benchmark programs share: options, rows of results with their goals, the table and the JSON file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from benchmarks.machine import describe_machine
from benchmarks.measuring import Contender, measure, memory_method, peak_memory, ratio
from benchmarks.shapes import SHAPES, build_config, build_model
from pivotune.errors import UsageError

__all__ = [
    "SHAPES",
    "Contender",
    "Goal",
    "Row",
    "at_least",
    "at_most",
    "benchmark_parser",
    "build_config",
    "build_model",
    "describe_machine",
    "measure",
    "memory_row",
    "parse_options",
    "peak_memory",
    "positive",
    "print_table",
    "ratio",
    "report",
    "run_program",
    "time_row",
    "write_result",
]

RESULTS = Path(__file__).parent / "results"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Goal:
    """A limit on a ratio."""

    kind: Literal["<=", ">="]
    limit: float

    def reached(self, value: float) -> bool:
        return value <= self.limit if self.kind == "<=" else value >= self.limit

    def __str__(self) -> str:
        return f"{self.kind} {self.limit:g}"


def at_most(limit: float) -> Goal:
    return Goal("<=", limit)


def at_least(limit: float) -> Goal:
    return Goal(">=", limit)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        what: which ratio of what to what.
        ratio: the median over the rounds, or a single value.
        spread: smallest and largest over the rounds.
        goal: None where the goal table names none for this shape and device.
        seconds: the rounds of both sides.
        memory: peak bytes of both sides.
    """

    what: str
    ratio: float
    spread: tuple[float, float]
    goal: Goal | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        return None if self.goal is None else self.goal.reached(self.ratio)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "what": self.what,
            "ratio": self.ratio,
            "spread": list(self.spread),
            "goal": None if self.goal is None else str(self.goal),
            "reached": self.reached,
            "seconds": self.seconds,
            "memory": self.memory,
        }


def time_row(
    what: str, seconds: Mapping[str, list[float]], numerator: str, denominator: str, goal: Goal | None = None
) -> Row:
    """Time of one contender over that of another, as `measure` gave them."""
    median, spread = ratio(seconds[numerator], seconds[denominator])
    sides = {name: seconds[name] for name in (numerator, denominator)}
    return Row(what=what, ratio=median, spread=spread, goal=goal, seconds=sides)


def memory_row(what: str, memory: Mapping[str, int], numerator: str, denominator: str, goal: Goal | None = None) -> Row:
    """Peak memory of one contender over that of another, as `peak_memory` gave them."""
    value = memory[numerator] / max(memory[denominator], 1)
    sides = {name: memory[name] for name in (numerator, denominator)}
    return Row(what=what, ratio=value, spread=(value, value), goal=goal, memory=sides)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def positive(text: str) -> int:
    """A number from 1, for `add_argument(type=positive)`."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} found; allowed: a number from 1")
    return int(text)


def benchmark_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options that all programs have; add your own, then call `parse_options`."""
    parser = _Parser(prog=f"python -m benchmarks.{name}", description=description, allow_abbrev=False)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2", help="model shape, random weights")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(_DTYPES), help="of the weights; float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--rounds", type=positive, default=5, help="measured rounds; every contender runs once in each")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads on a CPU")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/NAME-SHAPE-DEVICE.json where not given")
    parser.set_defaults(benchmark=name)
    return parser


def parse_options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, check everything before anything is measured, and set the number of threads.

    `dtype` becomes a `torch.dtype`, `out` the file that will be written.

    Raises:
        UsageError: an unknown option or a value that is not allowed.
    """
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: cuda found, but this machine has no usable GPU; allowed here: cpu")
    options.dtype = _DTYPES[options.dtype or ("bfloat16" if options.device == "cuda" else "float32")]
    options.out = options.out or RESULTS / f"{options.benchmark}-{options.shape}-{options.device}.json"
    _check_writable(options.out)
    torch.set_num_threads(options.threads)
    return options


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"--out: {path} is a folder; name a file, such as {path / 'result.json'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise UsageError(f"--out: {path} cannot be written ({error.strerror})") from error
    if not path.stat().st_size:
        path.unlink()


def report(options: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Print the table and write the result file."""
    print_table(rows)
    settings = {name: _plain(value) for name, value in vars(options).items() if name not in ("benchmark", "out")}
    write_result(options.out, options.benchmark, settings, rows)
    print(f"saved {options.out}")


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype | Path) else value


def write_result(path: Path, name: str, settings: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write settings, machine and rows as JSON."""
    content = {
        "benchmark": name,
        "settings": dict(settings),
        "memory_method": memory_method(settings.get("device", "cpu")),
        "machine": describe_machine(),
        "rows": [row.to_dict() for row in rows],
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def print_table(rows: Sequence[Row]) -> None:
    """Ratio, spread, goal and whether it was reached, in plain text on stdout."""
    cells = [("ratio of", "median", "min .. max", "goal", "reached"), *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    reached = {None: "", True: "yes", False: "no"}[row.reached]
    low, high = row.spread
    return row.what, f"{row.ratio:.3g}", f"{low:.3g} .. {high:.3g}", str(row.goal or ""), reached


def run_program(main: Callable[[Sequence[str] | None], None]) -> None:
    """Run a program's `main(arguments)`; a user's mistake is one line on stderr and exit code 2."""
    try:
        main(None)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
