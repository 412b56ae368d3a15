"""The run configuration: typed, read from YAML, changed with `--set`; imports no torch.

Every mistake is one line that names the key, what was found and what is allowed. Defaults stand beside their reason; the
measured ones are explained in docs/experiments.md.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pivotune.errors import UsageError
from pivotune.text.redaction import redact_settings

Method = Literal["sft", "tft", "deep-supervision"]
SignalName = Literal["logits", "feature", "none"]
Layer = Annotated[int, Field(ge=1)] | Literal["auto"]
METHODS: tuple[str, ...] = get_args(Method)
_SectionT = TypeVar("_SectionT", bound="_Section")


class _Section(BaseModel):
    # Strict: `true` is no number and "yes" no boolean.
    model_config = ConfigDict(extra="forbid", validate_default=True, strict=True)


class DataConfig(_Section):
    """Which rows are trained on, and how they become tokens."""

    train: str
    english: str | None = None  # one aligned English file beside `train`
    validation: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] | str = (
        0.05  # rows, share (at most 500 rows) or file
    )
    validation_english: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    language: str | None = None
    template: str | None = None  # chat where the tokenizer has one, alpaca otherwise
    # A quarter keeps the model able to answer in English, which inner logits losses otherwise destroy (measured).
    english_ratio: float = Field(0.25, ge=0, lt=1)
    max_prompt_tokens: int = Field(256, ge=1)
    max_completion_tokens: int = Field(256, ge=1)
    on_bad_row: Literal["error", "skip"] = "error"

    @field_validator("language", mode="before")
    @classmethod
    def _norwegian(cls, value: Any) -> Any:
        """YAML reads the code `no` as false."""
        return "no" if value is False else value


class SignalConfig(_Section):
    """One inner loss. Weight: the paper adds the terms with 1.0, which wrecks small models; 0.3 is measured."""

    signal: SignalName = "logits"
    layer: Layer = "auto"
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.3


class LogitsConfig(_Section):
    """Options of the logits signal."""

    mode: Literal["autoregressive", "positional"] = "autoregressive"
    norm: Literal["final", "none"] = "final"
    forward: Literal["auto", "shared", "separate"] = "auto"  # one pass with the target rows, or passes of their own


class FeatureConfig(_Section):
    """Options of the feature signal. Gradient through the English side collapses English: detached by default."""

    pooling: Literal["mean", "last"] = "mean"
    span: Literal["query", "query+answer"] = "query"
    english: Literal["detached", "joint", "frozen"] = "detached"
    english_norm: Literal["final", "raw"] = "final"


class SupervisionConfig(_Section):
    """The inner losses: conversion (L_LC at layer i) and thinking (L_ET at layer j)."""

    conversion: SignalConfig = SignalConfig()
    thinking: SignalConfig = SignalConfig()
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    logits: LogitsConfig = LogitsConfig()
    feature: FeatureConfig = FeatureConfig()
    profile_rows: Annotated[int, Field(ge=1)] = 64  # rows whose entropy decides an `auto` layer

    @model_validator(mode="after")
    def _conversion_below_thinking(self) -> SupervisionConfig:
        low, high = self.conversion, self.thinking
        if "none" in (low.signal, high.signal) or "auto" in (low.layer, high.layer):
            return self
        if not int(low.layer) < int(high.layer):
            raise ValueError(
                f"supervision.conversion.layer: {low.layer} is not below supervision.thinking.layer: {high.layer}; "
                "conversion comes before thinking"
            )
        return self


class LoraSettings(_Section):
    """Low-rank adapters in place of full fine-tuning."""

    r: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


class FaultsConfig(_Section):
    """What a training does when something goes wrong (docs/reliability.md)."""

    # A number that is not finite says that something is wrong with rows or settings: stopping shows it.
    nonfinite: Literal["stop", "skip"] = "stop"
    skip_limit: Annotated[int, Field(ge=0)] = 10  # optimizer steps that a run may skip
    # Seconds without progress, with several processes; longer than any pause of a healthy run. 0 never stops.
    hang_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1800.0


class RunConfig(_Section):
    """Everything `pivotune train` reads."""

    model: str
    method: Method = "deep-supervision"
    data: DataConfig
    supervision: SupervisionConfig = SupervisionConfig()
    training: dict[str, Any] = Field(default_factory=dict)  # fields of transformers.TrainingArguments
    faults: FaultsConfig = FaultsConfig()
    lora: LoraSettings | None = None
    quantize: Literal["4bit"] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    output_dir: str
    seed: int = Field(0, ge=0, lt=2**32)

    @field_validator("training")
    @classmethod
    def _no_strategy(cls, training: dict[str, Any]) -> dict[str, Any]:
        """YAML reads `save_strategy: no` as false."""
        return {key: "no" if value is False and key.endswith("_strategy") else value for key, value in training.items()}

    @model_validator(mode="after")
    def _quantized_needs_lora(self) -> RunConfig:
        if self.quantize and self.lora is None:
            raise ValueError("quantize: 4bit trains adapters only; add lora: {r: 16}")
        return self

    @model_validator(mode="after")
    def _some_signal(self) -> RunConfig:
        signals = {self.supervision.conversion.signal, self.supervision.thinking.signal}
        if self.method == "deep-supervision" and signals == {"none"}:
            raise ValueError("supervision: both signals are none; that is method: tft")
        return self

    @property
    def needs_english(self) -> bool:
        """Whether every row must have an English side for training."""
        return self.method != "tft" or self.data.english_ratio > 0


def needed_by(method: str, english_ratio: float) -> str:
    """Who needs the English side, for messages about rows that lack it."""
    if method == "tft":
        return f"data.english_ratio {english_ratio:g} (0 for none)"
    return f"method {method}"


def load_config(path: str | Path, changes: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `--set` changes such as `training.learning_rate=1e-4`.

    Raises:
        UsageError: no such file, broken YAML, unknown key, or a value that is not allowed.
    """
    return parse_config(apply_changes(_read_yaml(Path(path)), changes), where=str(path))


def parse_config(settings: Mapping[str, Any], *, where: str = "configuration") -> RunConfig:
    """Check settings and fill in defaults; `where` names them in messages."""
    return validate(RunConfig, settings, where=where)


def validate(section: type[_SectionT], settings: Mapping[str, Any], *, where: str) -> _SectionT:
    """Build a section from plain settings, with the first mistake as a one-line `UsageError`."""
    try:
        return section.model_validate(settings)
    except ValidationError as error:
        raise UsageError(f"{where}: {_describe(section, error)}") from error


def apply_changes(settings: Mapping[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """Apply `key.path=value` changes, values read as YAML; returns a new mapping."""
    result = _deep_copy(settings)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {change}: expected key=value, such as training.learning_rate=1e-4")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {change}: the value is not valid YAML") from error
        _set_path(result, key.strip().split("."), value, change)
    return result


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML, defaults included and secrets (`training.hub_token`) left out."""
    return to_yaml(redact_settings(config.model_dump(mode="json")))


def to_yaml(value: Any) -> str:
    """YAML text that a run configuration may hold and `load_config` reads back as `value`."""
    # One line for each text: a folded one could not stand behind a key with a comment.
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)


_MOST_ALIASES = 20


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 2e-5 is a number, a date is text, and a repeated key is an error, not the last value."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._num_aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Aliases of aliases grow without end when they are written out: twenty of them stay small, whatever they do."""
        if self.check_event(yaml.AliasEvent):
            self._num_aliases += 1
            if self._num_aliases > _MOST_ALIASES:
                problem = f"more than {_MOST_ALIASES} aliases (*name); write the values out"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                problem = f"the key {key.value} stands here again, first in line {lines[key.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[key.value if isinstance(key, yaml.ScalarNode) else id(key)] = key.start_mark.line + 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as another type."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 wants a point and a sign in the exponent and reads 2e-5 as text; everybody means the number.
_EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
for _resolver in (_Loader, _Dumper):
    _resolver.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        if path.is_dir():
            raise UsageError(f"{path}: a folder; give a YAML file" + _config_in(path))
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise UsageError(f"{path}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise UsageError(f"{path}{line}: not valid YAML: {problem}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text") from error
    if not isinstance(settings, dict):
        found = "nothing" if settings is None else type(settings).__name__
        raise UsageError(f"{path}: expected keys such as model: and data:, found {found}")
    return settings


def _config_in(folder: Path) -> str:
    own = folder / "config.yaml"
    return f", such as {own}" if own.is_file() else ""


def _set_path(settings: dict[str, Any], path: list[str], value: Any, change: str) -> None:
    *parents, last = path
    for name in parents:
        child = settings.get(name)
        if child is None:
            child = settings[name] = {}
        if not isinstance(child, dict):
            raise UsageError(f"--set {change}: {name} is a value, not a section")
        settings = child
    settings[last] = value


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _deep_copy(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


def _describe(section: type[BaseModel], error: ValidationError) -> str:
    """The first mistake: which key, what was found, what is allowed."""
    problem = _most_specific(error.errors())
    found = problem.get("input")
    if problem["type"] == "extra_forbidden":
        return _unknown_key(section, [str(part) for part in problem["loc"]])
    if problem["type"] == "invalid_key":
        return _unknown_key(section, [*map(str, problem["loc"][:-1]), str(found)])
    key = ".".join(str(part) for part in problem["loc"] if _is_key(str(part)))
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{key}: {found!r} is not allowed; {_allowed(error, problem)}"


def _most_specific(problems: Sequence[Any]) -> Any:
    """Unknown keys first: they explain missing ones."""
    return next((p for p in problems if p["type"] in ("extra_forbidden", "invalid_key")), problems[0])


def _is_key(part: str) -> bool:
    """Pydantic puts the names of union members into the path; they are no keys."""
    return not any(mark in part for mark in "[(") and part not in {
        "int",
        "str",
        "float",
        "literal",
        "constrained-int",
        "constrained-float",
    }


def _allowed(error: ValidationError, problem: Any) -> str:
    """What is allowed, joined over the members of a union."""
    keys = [part for part in problem["loc"] if _is_key(str(part))]
    alike = [p for p in error.errors() if [part for part in p["loc"] if _is_key(str(part))] == keys]
    wordings = [p["msg"].removeprefix("Input should be ").removeprefix("Value error, ") for p in alike]
    return "allowed: " + ", or ".join(dict.fromkeys(wordings))


def _unknown_key(section: type[BaseModel], path: list[str]) -> str:
    fields = section.model_fields
    for name in path[:-1]:
        fields = _nested_fields(fields[name].annotation)
    near = difflib.get_close_matches(path[-1], fields, n=1)
    hint = f"; did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"; known keys: {', '.join(fields)}"
    return f"unknown key {'.'.join(path)}{hint}"


def _nested_fields(annotation: Any) -> dict[str, Any]:
    candidates = [annotation, *get_args(annotation)]
    section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return section.model_fields
