"""The settings of the inner losses: the section `supervision`; imports no torch.

Defaults stand beside their reason; the measured ones are explained in docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pivotune.config.messages import describe
from pivotune.config.registry import LENSES, METHODS, OBJECTIVES

SignalName = Annotated[str, AfterValidator(lambda name: OBJECTIVES.check(name, "none"))]
LensName = Annotated[str, AfterValidator(LENSES.check)]
Layer = Annotated[int, Field(ge=1)] | Literal["auto"]
InnerTerm = Literal["conversion", "thinking"]


class Section(BaseModel):
    """Base of all settings sections. Types are strict (`true` is not a number), and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", validate_default=True, strict=True)


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

    text: Literal["english", "both", "branches"] = "english"  # docs/experiments.md, "Both languages once more"
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


def check_signals(method: str, supervision: SupervisionConfig) -> None:
    """Refuse a method with inner losses where both signals are `none`.

    Raises:
        ValueError: names the method that trains the same.
    """
    if METHODS[method].inner_losses and not supervision.active():
        raise ValueError("supervision: both signals are none; that is method: tft")
