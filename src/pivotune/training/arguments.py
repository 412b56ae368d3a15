"""`DeepSupervisionConfig`: `transformers.TrainingArguments` plus the method's options."""

from __future__ import annotations

import json
import math
import os
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from pydantic import create_model
from pydantic_core import PydanticCustomError
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames

from pivotune.config.messages import validate
from pivotune.config.registry import METHODS
from pivotune.config.settings import (
    PRESETS,
    CrossLingualConfig,
    EncodingConfig,
    FaultsConfig,
    RunConfig,
    SdrrlConfig,
    merged,
)
from pivotune.config.supervision import Section, SupervisionConfig, check_signals
from pivotune.config.training_fields import check_training, check_used
from pivotune.data.examples import Limits
from pivotune.errors import UsageError
from pivotune.training.distributed import ranks
from pivotune.training.distributed.strategies import check_fsdp, fsdp_version, strategy_of, whole_weights_reason
from pivotune.training.optimizers import check_optimizer_runs

_SAMPLING_STRATEGIES: list[str] = TrainingArguments.__dataclass_fields__["train_sampling_strategy"].metadata["choices"]
if TYPE_CHECKING:
    SupervisionSection: TypeAlias = SupervisionConfig
    DataSection: TypeAlias = EncodingConfig
    FaultsSection: TypeAlias = FaultsConfig
    CrossLingualSection: TypeAlias = CrossLingualConfig
    SdrrlSection: TypeAlias = SdrrlConfig
else:
    # `HfArgumentParser` takes a section as JSON; the constructor takes a mapping or a typed section, too.
    SupervisionSection = DataSection = FaultsSection = CrossLingualSection = SdrrlSection = dict | str | None


@dataclass
class DeepSupervisionConfig(TrainingArguments):
    """Arguments of `DeepSupervisionTrainer`: everything of `TrainingArguments`, and the sections of a run configuration.

    A section is given as in YAML, `supervision={"thinking": {"layer": 20}, "lens": "logit"}`, and read as a typed object,
    `args.supervision.thinking.layer`. `pivotune.config.settings` and `pivotune.config.supervision` list keys and defaults.

    Args:
        method: `deep-supervision`, its control `cross-lingual`, `sdrrl` (self-distillation from the model's English
            answers), `plug` (an English answer first), or a baseline: `tft` (target language), `english-only`.
        preset: `recommended`, the defaults, or `paper`; what the sections give changes it.
        supervision: the inner losses: signal, layer and weight of `conversion` and `thinking`, schedule, lens, options.
        data: how rows become tokens: language, template, English share, token limits, treatment of bad rows.
        cross_lingual: shares of the rows of `method: cross-lingual`.
        sdrrl: weights of the kinds of rows of `method: sdrrl`, and code switching.
        faults: treatment of non-finite losses, and the time limit of collectives.
        ema: decay of an exponential moving average of the trained weights, which replaces them at the end; None for none.
        interpolate: share A of the trained weights at the end, which become A x trained + (1 - A) x starting weights.
        train_sampling_strategy: as in `TrainingArguments`, but `group_by_length` by default: batches of rows of similar
            length, with little padding.
        logging_nan_inf_filter, remove_unused_columns: off, and refused otherwise: `faults.nonfinite` decides on such
            losses, and the English columns are no arguments of the model's forward.

    Raises:
        UsageError: an unknown key, or a value that is not allowed.
    """

    method: str = field(default="deep-supervision", metadata={"help": ", ".join(METHODS)})
    preset: str = field(default="recommended", metadata={"help": "recommended or paper"})
    supervision: SupervisionSection = field(default_factory=SupervisionConfig, metadata={"help": "section, as JSON"})
    data: DataSection = field(default_factory=EncodingConfig, metadata={"help": "section, as JSON"})
    cross_lingual: CrossLingualSection = field(
        default_factory=CrossLingualConfig, metadata={"help": "section, as JSON"}
    )
    sdrrl: SdrrlSection = field(default_factory=SdrrlConfig, metadata={"help": "section, as JSON"})
    faults: FaultsSection = field(default_factory=FaultsConfig, metadata={"help": "section, as JSON"})
    ema: float | None = field(
        default=None, metadata={"help": "decay of a moving average of the weights, which is saved"}
    )
    interpolate: float = field(
        default=1.0, metadata={"help": "share of the trained weights; the rest are the starting ones"}
    )
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "sampler of the training rows", "choices": _SAMPLING_STRATEGIES}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "not supported: see faults.nonfinite"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "not supported: drops the English columns"})

    def __post_init__(self) -> None:
        self._read_sections()
        changed = {each.name: getattr(self, each.name) for each in fields(TrainingArguments)}
        check_used({key: value for key, value in changed.items() if value != _FIELD_DEFAULTS[key]}, changed)
        if self.ddp_find_unused_parameters is None:
            # Every trained parameter is used in every step. DDP would search the model's output, which no loss reads.
            self.ddp_find_unused_parameters = False
        if self.ddp_timeout == TrainingArguments.ddp_timeout:
            self.ddp_timeout = math.ceil(self.faults.hang_timeout) or 7 * 24 * 3600
        if self.data_seed is None:
            # Otherwise accelerate orders rows by the last seed of torch, and a resumed run in another order.
            self.data_seed = self.seed
        judged = self.load_best_model_at_end or self.save_strategy == "best"
        if (judged or self.lr_scheduler_type in _ON_METRIC) and self.metric_for_best_model is None:
            # There is no plain `eval_loss`: each language has its own.
            self.metric_for_best_model = f"eval_{METHODS[self.method].main_language}_loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # Everything that is measured of held-out rows is a loss; `Trainer` knows losses by the end of their name.
            self.greater_is_better = False
        super().__post_init__()
        if self.mixed_precision in ("bf16", "fp16"):
            # Trainer obeys the launcher (`accelerate launch`): scoring and estimates must agree with it.
            setattr(self, self.mixed_precision, True)
        ranks.set_timeout(self.ddp_timeout)
        config: Any = self.accelerator_config
        for name in ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler"):
            # They would change the rows of a step.
            if getattr(config, name) != getattr(AcceleratorConfig(), name):
                raise UsageError(
                    f"training.accelerator_config: {name}: {getattr(config, name)} is not supported: rows have an order "
                    "of their own; allowed: non_blocking, gradient_accumulation_kwargs"
                )
        if "num_steps" in (config.gradient_accumulation_kwargs or {}):
            raise UsageError("training.accelerator_config: num_steps is not supported; set gradient_accumulation_steps")
        check_fsdp(fsdp_version(self))
        reason = whole_weights_reason(strategy_of(self), ema=self.ema, interpolate=self.interpolate)
        if reason is not None:
            raise UsageError(reason)
        if self.ema is not None and self.load_best_model_at_end:
            raise UsageError(
                "training.load_best_model_at_end: true would replace the moving average of ema; set one of them"
            )

    def _read_sections(self) -> None:
        """Replace mappings and JSON texts by checked sections."""
        if self.preset not in PRESETS:
            raise UsageError(
                f"DeepSupervisionConfig: preset: {self.preset!r} is not allowed; allowed: {', '.join(PRESETS)}"
            )
        for name, section in _SECTIONS.items():
            value, preset = getattr(self, name), PRESETS[self.preset].get(name, {})
            if isinstance(value, section) and not preset:
                continue
            if isinstance(value, section):
                value = value.model_dump(exclude_unset=True)
            value = merged(preset, json.loads(value) if isinstance(value, str) else dict(value or {}))
            setattr(self, name, validate(section, value, where="DeepSupervisionConfig", within=f"{name}."))
        validate(_Weights, {name: getattr(self, name) for name in _WEIGHTS}, where="DeepSupervisionConfig")
        try:
            self.method = METHODS.check(self.method)
            check_signals(self.method, self.supervision)
        except PydanticCustomError as error:
            allowed = error.message().removeprefix("Input should be ")
            raise UsageError(
                f"DeepSupervisionConfig: method: {self.method!r} is not allowed; allowed: {allowed}"
            ) from error
        except ValueError as error:
            raise UsageError(f"DeepSupervisionConfig: {error}") from error
        if self.train_sampling_strategy not in _SAMPLING_STRATEGIES:
            raise UsageError(
                f"training.train_sampling_strategy: {self.train_sampling_strategy!r} is not allowed; allowed: "
                + ", ".join(_SAMPLING_STRATEGIES)
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, as `TrainingArguments` does; integrations log them."""
        return {**super().to_dict(), **{name: getattr(self, name).model_dump(mode="json") for name in _SECTIONS}}

    def limits(self, context: int | None) -> Limits:
        """Return the token limits of one side for a model that reads `context` tokens.

        An answer of two parts (`Method.pivot_marker`) may have twice as many tokens: the target's part comes last.
        """
        parts = 1 if METHODS[self.method].pivot_marker is None else 2
        completion = parts * self.data.max_completion_tokens
        return Limits(prompt=self.data.max_prompt_tokens, completion=completion, context=context)


# Settings of a run beside its sections, declared once.
_WEIGHTS = ("ema", "interpolate")
_Weights = create_model(
    "_Weights",
    __base__=Section,
    **cast(Any, {name: (RunConfig.model_fields[name].annotation, RunConfig.model_fields[name]) for name in _WEIGHTS}),
)
_SECTIONS = {
    "supervision": SupervisionConfig,
    "data": EncodingConfig,
    "cross_lingual": CrossLingualConfig,
    "sdrrl": SdrrlConfig,
    "faults": FaultsConfig,
}
# Schedules that lower the learning rate when the metric gets no better.
_ON_METRIC = ("reduce_lr_on_plateau", "greedy")
_FIELD_DEFAULTS = {
    each.name: each.default if each.default_factory is MISSING else each.default_factory()
    for each in fields(DeepSupervisionConfig)
}


def build_arguments(config: RunConfig, *, here: bool = True) -> DeepSupervisionConfig:
    """Return the trainer's arguments of a run configuration.

    Defaults where `training:` names no other: bfloat16 autocast on hardware that has it, no reporting integrations, a log
    line every 10 steps, a checkpoint every epoch, or every `save_steps`.

    Args:
        here: True for a run on this machine, which must then have the packages that its optimizer needs.

    Raises:
        UsageError: an unknown field of TrainingArguments, or a value it refuses.
    """
    own = {name: getattr(config, name) for name in ("output_dir", "seed", "method", *_WEIGHTS, *_SECTIONS)}
    training = check_training(config.training)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    other = {"bf16": "fp16", "fp16": "bf16"}.get(launched)
    if training.get(launched) is False or (other is not None and training.get(other)):
        asked = f"{launched}: false" if training.get(launched) is False else f"{other}: true"
        raise UsageError(
            f"training.{asked} found, and the launcher asks for {launched}; set mixed_precision: 'no' in its file"
        )
    bf16 = bf16_is_native() and not training.get("fp16") and launched != "fp16"
    settings = {"bf16": bf16, **training, **own}
    if not torch.cuda.is_available() and "use_cpu" not in settings and not torch.backends.mps.is_available():
        settings["use_cpu"] = True
    if here and "optim" in settings:
        check_optimizer_runs(settings["optim"], use_cpu=bool(settings.get("use_cpu")))
    try:
        return DeepSupervisionConfig(**settings)
    except UsageError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(f"training: {' '.join(str(error).split())}") from error


def optimizer_name(args: TrainingArguments) -> str:
    """Return `training.optim` as text."""
    return OptimizerNames(args.optim).value


def bf16_is_native() -> bool:
    """Return True where the hardware computes in bfloat16, so that autocast is faster than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
