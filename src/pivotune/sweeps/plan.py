"""What a sweep runs: a grid over a run configuration as cells, each of them a run of its own.

Nothing here trains or reads data: grid, seeds and ablation become named cells with checked configurations.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pivotune.config.registry import METHODS, OBJECTIVES
from pivotune.config.settings import RunConfig
from pivotune.config.yaml_text import apply_changes, load_config
from pivotune.errors import UsageError

# Keys that a sweep sets itself, and what to use in place of a grid over them.
_RESERVED = {"seed": "--seeds", "output_dir": "--out"}
# Left out of names: the rest of the key says enough.
_SECTIONS = ("supervision.", "training.", "data.")
_LONGEST_VALUE = 40  # characters in a name; file systems allow 255 bytes for all of it
_LONGEST_NAME = 200
_DIGEST = 6
_SIGNALS = tuple(OBJECTIVES)
_TERMS = ("conversion", "thinking")


@dataclass(frozen=True, slots=True)
class Option:
    """One value of an axis.

    Attributes:
        label: its part of a cell's name (`thinking.layer=5`).
        changes: what it sets, as after `--set`.
    """

    label: str
    changes: tuple[str, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(change.partition("=")[0] for change in self.changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: of its folder, such as `thinking.layer=5,seed=0`.
        options: what tells it from the other cells, besides the seed.
    """

    name: str
    options: tuple[Option, ...]
    config: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def seed(self) -> int:
        return self.config.seed


def parse_grid(texts: Iterable[str]) -> list[list[Option]]:
    """One axis for each `key=v1,v2`; commas within brackets or quotes belong to a value.

    Raises:
        UsageError: not of this form, a value or key twice, or a key that a sweep sets itself.
    """
    axes: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        key = key.strip()
        if not equals or not key or not values.strip():
            raise UsageError(f"--grid {text}: expected key=value,value such as supervision.thinking.layer=5,10,15")
        if key in _RESERVED:
            raise UsageError(f"--grid {text}: use {_RESERVED[key]} for {key}")
        if key in axes:
            raise UsageError(f"--grid {text}: {key} has a --grid already; put all its values into one")
        axes[key] = _split_values(text, values)
    names = _short_names(axes)
    return [
        [Option(f"{names[key]}={_file_safe(value)}", (f"{key}={value}",)) for value in values]
        for key, values in axes.items()
    ]


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` as numbers; none for an empty text.

    Raises:
        UsageError: something that is no whole number from 0, or a seed twice.
    """
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    bad = next((word for word in words if not (word.isascii() and word.isdecimal())), None)
    if bad is not None:
        raise UsageError(f"--seeds {text}: {bad!r} found; allowed: whole numbers from 0, such as 0,1,2")
    seeds = [int(word) for word in words]
    _refuse_repeats(f"--seeds {text}", seeds)
    return seeds


def ablation_axis(config: RunConfig, signals: str = "") -> list[Option]:
    """The paper's Table 3: TFT, conversion alone (+LC), thinking alone (+ET), and both, for each signal.

    Args:
        config: gives the signals where `signals` is empty: those of the run, each for its own term.
        signals: `logits`, `feature` or both, comma-separated; each is used for both terms.

    Raises:
        UsageError: an unknown signal, or one twice.
    """
    axis = [Option("tft", ("method=tft",))]
    for conversion, thinking in _signal_pairs(config, signals):
        axis += [
            _ablation(conversion, "none", f"LC={conversion}"),
            _ablation("none", thinking, f"ET={thinking}"),
            _ablation(conversion, thinking, f"LC={conversion},ET={thinking}"),
        ]
    return axis


def plan_cells(
    path: Path,
    changes: Sequence[str],
    axes: Sequence[Sequence[Option]],
    *,
    seeds: Sequence[int] = (),
    folder: Path,
) -> list[Cell]:
    """Every combination of the axes with every seed, each once; the first seed's cells come first.

    A key that a combination's method or signal does not use is left out of it: TFT has no thinking layer, so a grid over
    methods and layers holds TFT once.

    Args:
        path: the run configuration (YAML).
        changes: `--set` changes of all cells.
        seeds: the configuration's own where this is empty.

    Raises:
        UsageError: the first configuration that is not allowed, or two axes that set the same key.
    """
    _check_axes(axes)
    seeds = seeds or [load_config(path, changes).seed]
    combinations: dict[tuple[Option, ...], RunConfig] = {}
    for options in itertools.product(*axes):
        used = _used_options(path, changes, options)
        if used not in combinations:
            combinations[used] = _load(path, changes, used)
    cells = [_cell(folder, options, config, seed) for seed in seeds for options, config in combinations.items()]
    _refuse_repeats("the sweep's cells", [cell.name for cell in cells])
    return cells


def _cell(folder: Path, options: tuple[Option, ...], config: RunConfig, seed: int) -> Cell:
    name = ",".join([*(option.label for option in options), f"seed={seed}"])
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 40]}-{_digest(name)},seed={seed}"
    config = config.model_copy(update={"seed": seed, "output_dir": str(folder / name)})
    return Cell(name=name, options=options, config=config)


def _load(path: Path, changes: Sequence[str], options: Iterable[Option]) -> RunConfig:
    own = [change for option in options for change in option.changes]
    try:
        return load_config(path, [*changes, *own])
    except UsageError as error:
        where = f" (cell {','.join(option.label for option in options)})" if own else ""
        raise UsageError(f"{error}{where}") from error


def _used_options(path: Path, changes: Sequence[str], options: tuple[Option, ...]) -> tuple[Option, ...]:
    """The options of which this combination uses at least one key."""
    deciding = [option for option in options if any(_decides(key) for key in option.keys)]
    config = _load(path, changes, deciding)
    return tuple(option for option in options if not all(_is_unused(key, config) for key in option.keys))


def _decides(key: str) -> bool:
    """Whether other keys may go unused because of this one."""
    return key == "method" or (key.startswith("supervision") and key.count(".") <= 1) or key.endswith(".signal")


def _is_unused(key: str, config: RunConfig) -> bool:
    if not METHODS[config.method].inner_losses:
        return key.partition(".")[0] == "supervision" or (
            not METHODS[config.method].replay and key == "data.english_ratio"
        )
    signals = {term: getattr(config.supervision, term).signal for term in _TERMS}
    section, _, rest = key.removeprefix("supervision.").partition(".")
    if section in _TERMS:
        return signals[section] == "none" and rest in ("layer", "weight")
    return key.startswith("supervision.") and section in _SIGNALS and section not in signals.values()


def _check_axes(axes: Sequence[Sequence[Option]]) -> None:
    """Two axes may not set one key, nor one axis a key within another's."""
    keys = [{key for option in axis for key in option.keys} for axis in axes]
    for one, other in itertools.combinations(keys, 2):
        for first, second in itertools.product(sorted(one), sorted(other)):
            if first == second or f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}."):
                both = first if first == second else f"{first} and {second}"
                raise UsageError(f"--grid, --ablation: {both} would be set twice in each cell; leave one of them out")


def _ablation(conversion: str, thinking: str, label: str) -> Option:
    signals = (f"supervision.conversion.signal={conversion}", f"supervision.thinking.signal={thinking}")
    return Option(label, ("method=deep-supervision", *signals))


def _signal_pairs(config: RunConfig, signals: str) -> list[tuple[str, str]]:
    names = [name.strip() for name in signals.split(",")] if signals.strip() else []
    for name in names:
        if name not in _SIGNALS:
            raise UsageError(f"--signals {signals}: {name!r} found; allowed: {', '.join(_SIGNALS)}")
    _refuse_repeats(f"--signals {signals}", names)
    if names:
        return [(name, name) for name in names]
    own = [getattr(config.supervision, term).signal for term in _TERMS]
    fallback = next((signal for signal in own if signal != "none"), _SIGNALS[0])
    conversion, thinking = (fallback if signal == "none" else signal for signal in own)
    return [(conversion, thinking)]


def _split_values(grid: str, text: str) -> list[str]:
    """The values between commas that stand outside of brackets and quotes."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += (character in "[{") - (character in "]}") if not quote else 0
        if character == "," and depth == 0 and not quote:
            values.append("")
        else:
            values[-1] += character
    values = [value.strip() for value in values]
    if depth or quote or not all(values):
        problem = "an empty value" if not (depth or quote) else "a bracket or quote that is not closed"
        raise UsageError(f"--grid {grid}: {problem} found; expected key=value,value")
    # 1e-4 and 0.0001 are one value.
    _refuse_repeats(f"--grid {grid}", [_as_yaml(grid, value) for value in values])
    return values


def _as_yaml(grid: str, value: str) -> str:
    """The value as the configuration will read it."""
    try:
        return repr(apply_changes({}, [f"value={value}"])["value"])
    except UsageError as error:
        raise UsageError(f"--grid {grid}: the value {value} is not valid YAML") from error


def _refuse_repeats(where: str, values: Sequence[Any]) -> None:
    repeated = next((value for index, value in enumerate(values) if value in values[:index]), None)
    if repeated is not None:
        raise UsageError(f"{where}: {repeated} stands there twice")


def _short_names(keys: Iterable[str]) -> dict[str, str]:
    """Keys without their section, where that leaves them apart."""
    keys = list(keys)
    short = [next((key.removeprefix(head) for head in _SECTIONS if key.startswith(head)), key) for key in keys]
    return {key: name if short.count(name) == 1 else key for key, name in zip(keys, short, strict=True)}


def _file_safe(value: str) -> str:
    """The value as a part of a file name; a digest tells values apart that look the same in one."""
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "-", value).strip("-")[:_LONGEST_VALUE]
    return value if safe == value else f"{safe}-{_digest(value)}".lstrip("-")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]
