"""The settings of a run as one typed tree, shared by YAML, `--set` and `DeepSupervisionConfig`; imports no torch.

Defaults stand beside their reason; the measured ones are explained in docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pivotune.config.messages import LIST_TAG, describe
from pivotune.config.registry import LENSES, METHODS, OBJECTIVES
from pivotune.config.training_ranges import check_ranges
from pivotune.text.languages import check_language

MethodName = Annotated[str, AfterValidator(METHODS.check)]
SignalName = Annotated[str, AfterValidator(lambda name: OBJECTIVES.check(name, "none"))]
LensName = Annotated[str, AfterValidator(LENSES.check)]
Layer = Annotated[int, Field(ge=1)] | Literal["auto"]
InnerTerm = Literal["conversion", "thinking"]


class Section(BaseModel):
    """Base of all settings sections. Types are strict (`true` is not a number), and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", validate_default=True, strict=True)


class EncodingConfig(Section):
    """Settings of the encoding: the part of `data` that a trainer needs beside its rows."""

    language: str | None = None
    template: str | None = None  # chat where the tokenizer has one, alpaca otherwise
    turns: Literal["all", "last"] = "all"  # answers of a conversation that are trained
    fold_system: bool = False  # a system message becomes the beginning of the first user text
    # A quarter keeps the model able to answer in English, which inner logits losses otherwise destroy (measured).
    english_ratio: float = Field(default=0.25, ge=0, lt=1)
    max_prompt_tokens: int = Field(default=256, ge=1)
    max_completion_tokens: int = Field(default=256, ge=1)
    on_bad_row: Literal["error", "skip"] = "error"

    @property
    def saved_template(self) -> str | None:
        """Return the template to use with the saved tokenizer: it holds the text of a Jinja file as its chat template."""
        return self.template if self.template in (None, "chat", "alpaca") else "chat"

    @field_validator("language", mode="before")
    @classmethod
    def _check_code(cls, value: Any) -> Any:
        value = "no" if value is False else value  # YAML reads the code of Norwegian as false
        if isinstance(value, str):
            check_language(value, "data.language")
        return value


class DataSource(Section):
    """One file or Hub dataset of several to train on; text alone is its path."""

    path: str
    english: str | None = None  # one aligned English file beside it
    # Times that a row is seen in an epoch, held-out rows aside: 2 is every row twice, 0.5 a half drawn once by the seed.
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0


class DataConfig(EncodingConfig):
    """Training and held-out rows, and their encoding."""

    # The discriminator keeps the form that was not meant out of messages.
    train: Annotated[
        Annotated[str, Tag("str")] | Annotated[list[DataSource], Tag(LIST_TAG)],
        Discriminator(lambda train: "str" if isinstance(train, str) else LIST_TAG),
    ]
    english: str | None = None  # one aligned English file beside `train`
    # Rows, share (at most 500 rows) or file.
    validation: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] | str = 0.05
    validation_english: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None  # rows of each source

    @property
    def sources(self) -> list[DataSource]:
        """Return the sources of `train`."""
        return [DataSource(path=self.train, english=self.english)] if isinstance(self.train, str) else self.train

    @field_validator("train", mode="before")
    @classmethod
    def _text_is_a_path(cls, train: Any) -> Any:
        if isinstance(train, str):
            return train
        entries = [train] if isinstance(train, Mapping) else train
        if not (
            isinstance(entries, list)
            and entries
            and all(isinstance(entry, str | Mapping | DataSource) for entry in entries)
        ):
            raise PydanticCustomError(
                "sources", "a file, a Hub dataset, or a list of them and of {path, english, weight}"
            )
        return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]

    @model_validator(mode="after")
    def _sources_are_distinct(self) -> DataConfig:
        if self.english is not None and not isinstance(self.train, str):
            raise ValueError("data.english: belongs to one file; write {path: FILE, english: FILE} into data.train")
        paths = [Path(source.path).expanduser().absolute() for source in self.sources]
        for source, path in zip(self.sources, paths, strict=True):
            if paths.count(path) > 1:
                # Its rows would be trained on and held out.
                raise ValueError(f"data.train: {source.path} is named twice; give it weight: 2")
        return self


class SignalConfig(Section):
    """One inner loss. The paper's weight 1.0 wrecks small models; 0.3 is measured."""

    signal: SignalName = "logits"
    layer: Layer = "auto"
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.3


class LogitsConfig(Section):
    """Options of the logits signal."""

    mode: Literal["autoregressive", "positional"] = "autoregressive"
    norm: Literal["final", "none"] = "final"
    # prompt: English tokens are computed with detached weights, so that reading is trained and not writing English.
    gradient: Literal["all", "prompt"] = "prompt"
    forward: Literal["auto", "shared", "separate"] = "auto"  # one pass with the target rows, or passes of their own

    @model_validator(mode="before")
    @classmethod
    def _positional_has_no_branches(cls, settings: Any) -> Any:
        if not (isinstance(settings, Mapping) and settings.get("mode") == "positional"):
            return settings
        if settings.get("gradient") == "prompt":
            raise ValueError(
                "supervision.logits.gradient: prompt needs English branches; set gradient: all, or mode: autoregressive"
            )
        return {"gradient": "all", **settings}


class FeatureConfig(Section):
    """Options of the feature signal. Gradient through the English side collapses English: detached by default."""

    pooling: Literal["mean", "last"] = "mean"
    span: Literal["query", "query+answer"] = "query"
    english: Literal["detached", "joint", "frozen"] = "detached"
    english_norm: Literal["final", "raw"] = "final"


class CkaConfig(Section):
    """Options of the cka signal."""

    span: Literal["query", "query+answer"] = "query"
    english: Literal["detached", "joint"] = "detached"


class ContrastiveConfig(CkaConfig):
    """Options of the contrastive signal."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1  # arXiv 2502.14830


class TunedLensConfig(Section):
    """The fit of the tuned lens on the starting model, before training."""

    text: Literal["english", "both", "branches"] = "english"
    states: Annotated[int, Field(ge=100)] = 10_000  # token states
    steps: Annotated[int, Field(ge=0)] = 60  # Adam steps after the regression
    refit: Annotated[int, Field(ge=0)] = 0  # optimizer steps between fits on the model in training; 0: frozen


class BalanceConfig(Section):
    """Bounds on the gradients of the inner losses; `balance: gradient` is short for `{mode: gradient}`."""

    mode: Literal["none", "gradient"] = "none"
    every: Annotated[int, Field(ge=1)] = 100  # optimizer steps between measurements, each about two micro-batches long
    max_share: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5  # of the gradient of L_TFT


class PhaseConfig(Section):
    """A first phase that aligns: only the inner losses train in it, and only L_TFT trains after it."""

    steps: Annotated[int, Field(ge=0)] = 0  # optimizer steps; 0: no phase
    task: bool = False  # L_TFT trains in the phase too
    # Learning rate of the phase; None: the scheduled one.
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _options_need_steps(self) -> PhaseConfig:
        if not self.steps and (self.task or self.learning_rate is not None):
            raise ValueError("supervision.phase: task and learning_rate belong to a phase; set supervision.phase.steps")
        return self


class KeepEnglishConfig(Section):
    """A loss at the top on the rows replayed in English: KL(starting model || model) over the answer, in nats."""

    kl: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # weight, in every step; 0: off
    top: Annotated[int, Field(ge=1)] = 32  # likeliest tokens of the starting model; all others are compared as one

    @model_validator(mode="after")
    def _top_needs_weight(self) -> KeepEnglishConfig:
        if not self.kl and self.top != type(self).model_fields["top"].default:
            raise ValueError("supervision.keep_english: top belongs to a loss; set supervision.keep_english.kl")
        return self


class SupervisionConfig(Section):
    """The inner losses: conversion (L_LC at layer i) and thinking (L_ET at layer j).

    Options of an objective that another package registers stand under its name, as `logits` and `feature` do.
    """

    model_config = ConfigDict(extra="allow")

    # Off unless given: beside thinking it adds cost and no gain (docs/experiments.md).
    conversion: SignalConfig = SignalConfig(signal="none")
    thinking: SignalConfig = SignalConfig()
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    alternate: bool = False  # inner losses and L_TFT train in turn: even optimizer steps, counted from 0, and odd ones
    phase: PhaseConfig = PhaseConfig()
    keep_english: KeepEnglishConfig = KeepEnglishConfig()
    lens: LensName = "tuned"
    logits: LogitsConfig = LogitsConfig()
    feature: FeatureConfig = FeatureConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    cka: CkaConfig = CkaConfig()
    tuned: TunedLensConfig = TunedLensConfig()
    balance: BalanceConfig = BalanceConfig()
    # What an `auto` layer is chosen by: what each layer can say through a tuned lens, or the paper's entropy curve.
    layers: Literal["reading", "paper"] = "reading"
    profile_rows: Annotated[int, Field(ge=1)] = 64  # rows that are measured for it

    @field_validator("balance", mode="before")
    @classmethod
    def _mode_alone(cls, value: Any) -> Any:
        return {"mode": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _registered_options(self) -> SupervisionConfig:
        for key, value in (self.model_extra or {}).items():
            if key not in OBJECTIVES.options:
                raise PydanticCustomError("unknown_key", "{key}", {"key": key})
            options = OBJECTIVES.options[key]
            try:
                self.__pydantic_extra__[key] = options.model_validate(value)  # type: ignore[index]
            except ValidationError as error:
                raise ValueError(describe(options, error, f"supervision.{key}.")) from error
        return self

    @model_validator(mode="after")
    def _lens_fits_logits(self) -> SupervisionConfig:
        logits = self.logits
        if self.lens != "logit" and logits.norm == "none":
            raise ValueError(
                f"supervision.lens: {self.lens} reads through the final norm; set logits.norm: final, or lens: logit"
            )
        if logits.mode == "positional" and self.lens == "model":
            raise ValueError("supervision.lens: model continues English branches; set logits.mode: autoregressive")
        return self

    @model_validator(mode="after")
    def _alternate_without_phase(self) -> SupervisionConfig:
        if self.alternate and self.phase.steps:
            raise ValueError("supervision.alternate: a phase has steps of its own; set supervision.phase.steps: 0")
        return self

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

    def active(self) -> dict[InnerTerm, SignalConfig]:
        """Return the inner losses that are on, by name."""
        terms: dict[InnerTerm, SignalConfig] = {"conversion": self.conversion, "thinking": self.thinking}
        return {name: term for name, term in terms.items() if term.signal != "none"}

    def options(self, signal: str) -> Any:
        """Return the options section of a signal: as given, else its defaults; None where it has no options."""
        if signal in type(self).model_fields or signal in (self.model_extra or {}):
            return getattr(self, signal)
        return OBJECTIVES.options[signal]() if signal in OBJECTIVES.options else None


# No inner loss: the supervision of the baselines.
NO_SUPERVISION = SupervisionConfig(thinking=SignalConfig(signal="none"))


class CrossLingualConfig(Section):
    """Shares of the rows of `method: cross-lingual`; the others are translated rows."""

    english_answers: Annotated[float, Field(ge=0, le=1)] = 1 / 3  # target prompt, English answer
    english_prompts: Annotated[float, Field(ge=0, le=1)] = 0.0  # English prompt, target answer
    translations: Annotated[float, Field(ge=0, le=1)] = 0.0  # of the answer, half of them into English

    @model_validator(mode="after")
    def _shares_of_one(self) -> CrossLingualConfig:
        total = self.english_answers + self.english_prompts + self.translations
        if total > 1 + 1e-9:
            raise ValueError(f"cross_lingual: the shares add up to {total:g}; allowed: at most 1")
        return self


class LoraSettings(Section):
    """Low-rank adapters in place of full fine-tuning."""

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


class FaultsConfig(Section):
    """Reactions to faults of a training (docs/reliability.md)."""

    # A non-finite number means that rows or settings are wrong: stopping shows it.
    nonfinite: Literal["stop", "skip"] = "stop"
    skip_limit: Annotated[int, Field(ge=0)] = 10  # optimizer steps that a run may skip
    # Seconds that a collective of several processes may wait; longer than any pause of a healthy run. 0: a week.
    hang_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1800.0


def check_signals(method: str, supervision: SupervisionConfig) -> None:
    """Refuse a method with inner losses where both signals are `none`.

    Raises:
        ValueError: names the method that trains the same.
    """
    if METHODS[method].inner_losses and not supervision.active():
        raise ValueError("supervision: both signals are none; that is method: tft")


# Settings in place of the defaults above; keys that are given change them.
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
    # arXiv 2503.01275: unweighted inner losses all the way, read through the logit lens, translated rows only.
    "paper": {
        "data": {"english_ratio": 0.0},
        "supervision": {
            "conversion": {"weight": 1.0},
            "thinking": {"weight": 1.0},
            "schedule": "constant",
            "lens": "logit",
            "layers": "paper",
            "logits": {"gradient": "all"},
        },
    },
}


def merged(defaults: Any, given: Any) -> Any:
    """Return nested settings in which `given` values replace `defaults`."""
    if not (isinstance(defaults, Mapping) and isinstance(given, Mapping)):
        return given
    both = {key: merged(defaults[key], given[key]) for key in defaults.keys() & given.keys()}
    return {**defaults, **given, **both}


class RunConfig(Section):
    """Everything `pivotune train` reads."""

    model: str
    preset: Literal["recommended", "paper"] = "recommended"
    method: MethodName = "deep-supervision"
    data: DataConfig
    supervision: SupervisionConfig = SupervisionConfig()
    cross_lingual: CrossLingualConfig = CrossLingualConfig()
    training: dict[str, Any] = Field(default_factory=dict)  # fields of transformers.TrainingArguments
    faults: FaultsConfig = FaultsConfig()
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay of a moving average of the weights, which is saved
    interpolate: Annotated[float, Field(gt=0, le=1)] = (
        1.0  # share of the trained weights; the rest are the starting ones
    )
    lora: LoraSettings | None = None
    quantize: Literal["4bit"] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    output_dir: str
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, settings: Any) -> Any:
        preset = settings.get("preset") if isinstance(settings, Mapping) else None
        return merged(PRESETS[preset], settings) if isinstance(preset, str) and preset in PRESETS else settings

    @field_validator("training")
    @classmethod
    def _numbers_and_strategies(cls, training: dict[str, Any]) -> dict[str, Any]:
        """Check numbers; YAML reads `save_strategy: no` as false."""
        check_ranges(training)
        return {key: "no" if value is False and key.endswith("_strategy") else value for key, value in training.items()}

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if self.quantize and self.lora is None:
            raise ValueError("quantize: 4bit trains adapters only; add lora: {r: 16}")
        check_signals(self.method, self.supervision)
        return self
