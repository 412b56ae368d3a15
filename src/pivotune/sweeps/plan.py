"""Plan a sweep: grid, seeds and ablation become named cells, each with the checked configuration of one run.

Nothing here trains or reads data.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pivotune.compare.seed_groups import short_key
from pivotune.config.registry import BASELINE_METHOD, METHODS, OBJECTIVES
from pivotune.config.settings import RunConfig
from pivotune.config.yaml_text import apply_changes, load_config
from pivotune.errors import UsageError

# Keys that a sweep sets itself, and the option to use in place of a grid over them.
_RESERVED = {"seed": "--seeds", "output_dir": "--out"}
_LONGEST_VALUE, _LONGEST_NAME = 40, 200  # characters; file systems allow 255 bytes for a whole name
_SIGNALS = tuple(OBJECTIVES)


@dataclass(frozen=True, slots=True)
class Option:
    """One value of an axis: its part of a cell's name (`thinking.layer=5`) and its settings, as after `--set`."""

    label: str
    changes: tuple[str, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(change.partition("=")[0] for change in self.changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a sweep, named `thinking.layer=5,seed=0`; `options` distinguish it from others, besides the seed."""

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
    """Return one axis for each `key=v1,v2`; commas within brackets or quotes belong to a value."""
    axes: dict[str, list[str]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        key = key.strip()
        if not key or not values.strip():
            raise UsageError(f"--grid {text}: expected key=value,value such as supervision.thinking.layer=5,10,15")
        if key in _RESERVED:
            raise UsageError(f"--grid {text}: use {_RESERVED[key]} for {key}")
        if key in axes:
            raise UsageError(f"--grid {text}: {key} has a --grid already; put all its values into one")
        axes[key] = _split_values(text, values)
    short = [short_key(key) for key in axes]
    names = {key: name if short.count(name) == 1 else key for key, name in zip(axes, short, strict=True)}
    return [
        [Option(f"{names[key]}={_file_safe(value)}", (f"{key}={value}",)) for value in values]
        for key, values in axes.items()
    ]


def parse_seeds(text: str) -> list[int]:
    """Return `0,1,2` as numbers; none for an empty text."""
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    for word in words:
        if not (word.isascii() and word.isdecimal()):
            raise UsageError(f"--seeds {text}: {word!r} found; allowed: whole numbers from 0, such as 0,1,2")
    seeds = [int(word) for word in words]
    _refuse_repeats(f"--seeds {text}", seeds)
    return seeds


def ablation_axis(config: RunConfig, signals: str = "") -> list[Option]:
    """Return the paper's Table 3: TFT, conversion alone (+LC), thinking alone (+ET), and both, for each signal.

    Args:
        config: gives the signal of each term where `signals` is empty.
        signals: `logits`, `feature` or both, comma-separated; each is used for both terms.
    """
    names = [name.strip() for name in signals.split(",")] if signals.strip() else []
    for name in names:
        if name not in _SIGNALS:
            raise UsageError(f"--signals {signals}: {name!r} found; allowed: {', '.join(_SIGNALS)}")
    _refuse_repeats(f"--signals {signals}", names)
    own = [config.supervision.conversion.signal, config.supervision.thinking.signal]
    fallback = next((signal for signal in own if signal != "none"), _SIGNALS[0])
    pairs = [(name, name) for name in names] or [[fallback if signal == "none" else signal for signal in own]]
    axis = [Option(BASELINE_METHOD, (f"method={BASELINE_METHOD}",))]
    for conversion, thinking in pairs:
        both = (f"LC={conversion},ET={thinking}", conversion, thinking)
        for label, low, high in ((f"LC={conversion}", conversion, "none"), (f"ET={thinking}", "none", thinking), both):
            terms = (f"supervision.conversion.signal={low}", f"supervision.thinking.signal={high}")
            axis.append(Option(label, ("method=deep-supervision", *terms)))
    return axis


def plan_cells(
    path: Path, changes: Sequence[str], axes: Sequence[Sequence[Option]], *, seeds: Sequence[int] = (), folder: Path
) -> list[Cell]:
    """Return every combination of the axes with every seed, each once; the first seed's cells come first.

    Keys that a combination's method or signals do not use are left out: TFT has no thinking layer, so a grid over methods
    and layers holds TFT once.

    Args:
        path: the run configuration (YAML).
        changes: `--set` changes of all cells.
        seeds: the configuration's own where this is empty.
    """
    # Two axes may not set one key, nor may one axis set a key within another's.
    for one, other in itertools.combinations([{key for option in axis for key in option.keys} for axis in axes], 2):
        for first, second in itertools.product(sorted(one), sorted(other)):
            if f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}."):
                both = first if first == second else f"{first} and {second}"
                raise UsageError(f"--grid, --ablation: {both} would be set twice in each cell; leave one of them out")
    seeds = seeds or [load_config(path, changes).seed]
    combinations: dict[tuple[Option, ...], RunConfig] = {}
    # Method, signals, whole sections of `supervision` and every key of conversion, which is off unless given, decide
    # which other keys a combination uses.
    decides = re.compile(r"method|supervision(\.\w+)?|supervision\.conversion\..*|.*\.signal")
    for options in itertools.product(*axes):
        deciding = [option for option in options if any(map(decides.fullmatch, option.keys))]
        config = _load(path, changes, deciding)
        used = tuple(option for option in options if not all(_is_unused(key, config) for key in option.keys))
        if used not in combinations:
            combinations[used] = _load(path, changes, used)
    cells = []
    for seed, (options, config) in itertools.product(seeds, combinations.items()):
        name = ",".join([*(option.label for option in options), f"seed={seed}"])
        if len(name) > _LONGEST_NAME:
            name = f"{name[: _LONGEST_NAME - 40]}-{_digest(name)},seed={seed}"
        own = config.model_copy(update={"seed": seed, "output_dir": str(folder / name)})
        cells.append(Cell(name=name, options=options, config=own))
    _refuse_repeats("the sweep's cells", [cell.name for cell in cells])
    return cells


def _load(path: Path, changes: Sequence[str], options: Sequence[Option]) -> RunConfig:
    try:
        return load_config(path, [*changes, *(change for option in options for change in option.changes)])
    except UsageError as error:
        where = f" (cell {','.join(option.label for option in options)})" if options else ""
        raise UsageError(f"{error}{where}") from error


def _is_unused(key: str, config: RunConfig) -> bool:
    method = METHODS[config.method]
    owner = key.partition(".")[0].replace("_", "-")  # the method whose section holds the key
    if owner in METHODS:
        return config.method != owner
    if not method.inner_losses:
        if method.replay and key.startswith("supervision.keep_english"):
            return False
        return key.partition(".")[0] == "supervision" or (not method.replay and key == "data.english_ratio")
    supervision = config.supervision
    signals = {"conversion": supervision.conversion.signal, "thinking": supervision.thinking.signal}
    section, _, rest = key.removeprefix("supervision.").partition(".")
    if section in signals:
        return signals[section] == "none" and rest in ("layer", "weight")
    return key.startswith("supervision.") and section in _SIGNALS and section not in signals.values()


def _split_values(grid: str, text: str) -> list[str]:
    """Split at the commas of a YAML list, those outside of brackets and quotes."""
    try:
        # Without a last item YAML would accept a comma at the end, after which a value is missing.
        *nodes, _ = yaml.compose(f"[{text}, end]").value
    except yaml.YAMLError as error:
        problem = "an empty value, an open bracket or quote, or no YAML"
        raise UsageError(f"--grid {grid}: {problem} found; expected key=value,value") from error
    values = [text[node.start_mark.index - 1 : node.end_mark.index - 1].strip() for node in nodes]
    # Compared as YAML, because 1e-4 and 0.0001 are one value.
    read = [repr(apply_changes({}, [f"value={value}"])["value"]) for value in values]
    _refuse_repeats(f"--grid {grid}", read)
    return values


def _refuse_repeats(where: str, values: Sequence[Any]) -> None:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise UsageError(f"{where}: {value} is given twice")


def _file_safe(value: str) -> str:
    """Return the value as a part of a file name, with a digest if characters had to be replaced."""
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "-", value).strip("-")[:_LONGEST_VALUE]
    return value if safe == value else f"{safe}-{_digest(value)}".lstrip("-")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
