"""`DeepSupervisionConfig`: `transformers.TrainingArguments` plus the method's options."""

from __future__ import annotations

import dataclasses
import difflib
import os
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from pivotune.config.settings import RunConfig, SupervisionConfig, validate
from pivotune.config.training_ranges import check_ranges
from pivotune.data.examples import Limits
from pivotune.errors import UsageError
from pivotune.training.distributed.strategies import check_engine
from pivotune.training.optimizers import check_optimizer_name, check_optimizer_runs

_SAMPLING_STRATEGIES: list[str] = TrainingArguments.__dataclass_fields__["train_sampling_strategy"].metadata["choices"]


@dataclass
class DeepSupervisionConfig(TrainingArguments):
    """Arguments of `DeepSupervisionTrainer`: everything of `TrainingArguments`, and:

    Args:
        method: `deep-supervision`, or a baseline: `tft` (translated fine-tuning: target language only), `sft` (English
            only).
        conversion_signal: signal of L_LC: `logits`, `feature` or `none`.
        conversion_layer: layer i of L_LC, after i blocks; None chooses it from the entropy of the layers.
        conversion_weight: weight of L_LC. The paper uses 1.0; 0.3 keeps small models whole (docs/experiments.md).
        thinking_signal, thinking_layer, thinking_weight: the same for L_ET at layer j.
        supervision_schedule: `constant`, or `linear` or `cosine` down to 0 at the last step, for both weights.
        logits_mode: `autoregressive` (chain rule) or `positional` (English tokens on the target's positions).
        logits_norm: `final` puts the final norm before the head at inner layers, `none` does not.
        logits_forward: `shared` runs the English branches in the pass of the target rows, `separate` in passes of their
            own; `auto` shares it where the model allows.
        feature_pooling: `mean` or `last`.
        feature_span: `query` or `query+answer`.
        feature_english: gradient through the English side: `detached`, `joint`, or `frozen` for the starting model in its
            place, whose pooled vectors are computed once and kept in `output_dir`.
        feature_english_norm: `final` (what Hugging Face's list of hidden states holds last) or `raw`.
        profile_rows: rows whose entropy decides layers that are None.
        template: `chat`, `alpaca`, a Jinja file, or None for `chat` where the tokenizer has a chat template.
        english_ratio: share of the rows trained on their English prompt and answer with L_TFT only.
        max_prompt_tokens, max_completion_tokens: limits of each side of a row.
        on_bad_row: `error`, or `skip` to leave out rows that cannot be used and count them.
        language: code of the target language, for names in logs and the model card.
        nonfinite: what a loss or gradient that is not finite does: `stop` the training, or `skip` the step.
        skip_limit: steps that a run may skip.
        hang_timeout: seconds without progress after which a training of several processes ends; 0 for never.
        train_sampling_strategy: as in `TrainingArguments`, but `group_by_length` by default: batches of rows of similar
            length, little of which is padding.
        logging_nan_inf_filter: as in `TrainingArguments`, but off by default: see `nonfinite`.
    """

    method: str = field(default="deep-supervision", metadata={"help": "deep-supervision, tft or sft"})
    conversion_signal: str = field(default="logits", metadata={"help": "signal of L_LC: logits, feature or none"})
    conversion_layer: int | None = field(default=None, metadata={"help": "layer i of L_LC; none: from the entropy"})
    conversion_weight: float = field(default=0.3, metadata={"help": "weight of L_LC"})
    thinking_signal: str = field(default="logits", metadata={"help": "signal of L_ET: logits, feature or none"})
    thinking_layer: int | None = field(default=None, metadata={"help": "layer j of L_ET; none: from the entropy"})
    thinking_weight: float = field(default=0.3, metadata={"help": "weight of L_ET"})
    supervision_schedule: str = field(default="linear", metadata={"help": "constant, linear or cosine down to 0"})
    logits_mode: str = field(default="autoregressive", metadata={"help": "autoregressive or positional"})
    logits_norm: str = field(default="final", metadata={"help": "norm before the head at inner layers: final or none"})
    logits_forward: str = field(default="auto", metadata={"help": "auto, shared or separate"})
    feature_pooling: str = field(default="mean", metadata={"help": "mean or last"})
    feature_span: str = field(default="query", metadata={"help": "query or query+answer"})
    feature_english: str = field(default="detached", metadata={"help": "detached, joint or frozen"})
    feature_english_norm: str = field(default="final", metadata={"help": "final or raw"})
    profile_rows: int = field(default=64, metadata={"help": "rows whose entropy decides layers that are none"})
    template: str | None = field(default=None, metadata={"help": "chat, alpaca or a Jinja file"})
    english_ratio: float = field(default=0.25, metadata={"help": "share of rows trained in English with L_TFT only"})
    max_prompt_tokens: int = field(default=256, metadata={"help": "token limit of each prompt"})
    max_completion_tokens: int = field(default=256, metadata={"help": "token limit of each answer"})
    on_bad_row: str = field(default="error", metadata={"help": "error or skip"})
    language: str | None = field(default=None, metadata={"help": "code of the target language"})
    nonfinite: str = field(default="stop", metadata={"help": "a loss or gradient that is not finite: stop or skip"})
    skip_limit: int = field(default=10, metadata={"help": "optimizer steps that a run may skip"})
    hang_timeout: float = field(default=1800.0, metadata={"help": "seconds without progress, then stop; 0: never"})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "sampler of the training rows", "choices": _SAMPLING_STRATEGIES}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "leave such losses out of the logged mean"})

    def __post_init__(self) -> None:
        # The English columns are no arguments of the model's forward; the default would drop them.
        self.remove_unused_columns = False
        if self.ddp_find_unused_parameters is None:
            # All that is trained is used in every step. DDP would look for it in the model's output, which no loss reads.
            self.ddp_find_unused_parameters = False
        if self.data_seed is None:
            # Otherwise accelerate orders rows by whatever has seeded torch last, and a resumed run in another order.
            self.data_seed = self.seed
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            # There is no plain `eval_loss`: each language has its own.
            self.metric_for_best_model = f"eval_{'english' if self.method == 'sft' else 'target'}_loss"
        self._check()
        super().__post_init__()
        if self.mixed_precision in ("bf16", "fp16"):
            # As the launcher has it (`accelerate launch`), which Trainer obeys: scoring and estimates go by these.
            setattr(self, self.mixed_precision, True)
        check_engine(self)

    def supervision(self) -> SupervisionConfig:
        """The method's options as the typed section of a run configuration."""
        return validate(SupervisionConfig, _supervision_settings(self), where="DeepSupervisionConfig")

    def limits(self, context: int | None) -> Limits:
        """Token limits of one side for a model that reads `context` tokens."""
        return Limits(prompt=self.max_prompt_tokens, completion=self.max_completion_tokens, context=context)

    def _check(self) -> None:
        """Refuse what a run configuration would refuse, with the same words."""
        settings = {
            "model": "",
            "method": self.method,
            "data": {
                "train": "",
                "template": self.template,
                "english_ratio": self.english_ratio,
                "max_prompt_tokens": self.max_prompt_tokens,
                "max_completion_tokens": self.max_completion_tokens,
                "on_bad_row": self.on_bad_row,
                "language": self.language,
            },
            "supervision": _supervision_settings(self),
            "faults": {
                "nonfinite": self.nonfinite,
                "skip_limit": self.skip_limit,
                "hang_timeout": float(self.hang_timeout),
            },
            "output_dir": "",
        }
        validate(RunConfig, settings, where="DeepSupervisionConfig")
        if self.train_sampling_strategy not in _SAMPLING_STRATEGIES:
            raise UsageError(
                f"training.train_sampling_strategy: {self.train_sampling_strategy!r} is not allowed; allowed: "
                + ", ".join(_SAMPLING_STRATEGIES)
            )


def _supervision_settings(args: DeepSupervisionConfig) -> dict[str, Any]:
    def signal(name: str) -> dict[str, Any]:
        layer = getattr(args, f"{name}_layer")
        return {
            "signal": getattr(args, f"{name}_signal"),
            "layer": "auto" if layer is None else layer,
            "weight": getattr(args, f"{name}_weight"),
        }

    return {
        "conversion": signal("conversion"),
        "thinking": signal("thinking"),
        "schedule": args.supervision_schedule,
        "logits": {"mode": args.logits_mode, "norm": args.logits_norm, "forward": args.logits_forward},
        "feature": {
            "pooling": args.feature_pooling,
            "span": args.feature_span,
            "english": args.feature_english,
            "english_norm": args.feature_english_norm,
        },
        "profile_rows": args.profile_rows,
    }


def build_arguments(config: RunConfig, *, where: str = "training", here: bool = True) -> DeepSupervisionConfig:
    """The trainer's arguments of a run configuration.

    Where `training:` does not say otherwise: bfloat16 autocast on hardware that has it, no reporting integrations, a log
    line every 10 steps, a checkpoint every epoch.

    Args:
        where: names the settings in messages.
        here: whether the run is for this machine, which must then have what its optimizer needs.

    Raises:
        UsageError: an unknown field of TrainingArguments, or a value it refuses.
    """
    own = _own_settings(config)
    _check_training_keys(config.training, own)
    training = {key: _typed(key, value) for key, value in config.training.items()}
    check_ranges(training)
    _check_reports(training.get("report_to"))
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    other = {"bf16": "fp16", "fp16": "bf16"}.get(launched)
    if training.get(launched) is False or (other is not None and training.get(other)):
        asked = f"{launched}: false" if training.get(launched) is False else f"{other}: true"
        raise UsageError(
            f"training.{asked} found, and the launcher asks for {launched}; set mixed_precision: 'no' in its file"
        )
    defaults = {
        "bf16": bf16_is_native() and not training.get("fp16") and launched != "fp16",
        "report_to": "none",
        "logging_steps": 10,
        "save_strategy": "epoch",
        "disable_tqdm": True,
        "ddp_timeout": _group_timeout(config.faults.hang_timeout),
    }
    settings = {**defaults, **training, **own}
    if not torch.cuda.is_available() and "use_cpu" not in settings and not torch.backends.mps.is_available():
        settings["use_cpu"] = True
    if "optim" in settings:
        check_optimizer_name(settings["optim"])
        if here:
            check_optimizer_runs(settings["optim"], use_cpu=bool(settings.get("use_cpu")))
    try:
        return DeepSupervisionConfig(**settings)
    except UsageError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(f"{where}: {' '.join(str(error).split())}") from error


def optimizer_name(args: TrainingArguments) -> str:
    """`training.optim` as text."""
    return OptimizerNames(args.optim).value


def bf16_is_native() -> bool:
    """Whether bfloat16 arithmetic is in this machine's hardware, so that autocast is faster than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _group_timeout(hang_timeout: float) -> int:
    """Seconds that a collective may wait: longer than the watchdog, which names whom it waits for."""
    return int(4 * hang_timeout) if hang_timeout else 7 * 24 * 3600


def _own_settings(config: RunConfig) -> dict[str, Any]:
    supervision, data = config.supervision, config.data
    conversion, thinking = supervision.conversion, supervision.thinking
    return {
        "output_dir": config.output_dir,
        "seed": config.seed,
        "method": config.method,
        "conversion_signal": conversion.signal,
        "conversion_layer": None if conversion.layer == "auto" else conversion.layer,
        "conversion_weight": conversion.weight,
        "thinking_signal": thinking.signal,
        "thinking_layer": None if thinking.layer == "auto" else thinking.layer,
        "thinking_weight": thinking.weight,
        "supervision_schedule": supervision.schedule,
        "logits_mode": supervision.logits.mode,
        "logits_norm": supervision.logits.norm,
        "logits_forward": supervision.logits.forward,
        "feature_pooling": supervision.feature.pooling,
        "feature_span": supervision.feature.span,
        "feature_english": supervision.feature.english,
        "feature_english_norm": supervision.feature.english_norm,
        "profile_rows": supervision.profile_rows,
        "template": data.template,
        "english_ratio": data.english_ratio,
        "max_prompt_tokens": data.max_prompt_tokens,
        "max_completion_tokens": data.max_completion_tokens,
        "on_bad_row": data.on_bad_row,
        "language": data.language,
        "nonfinite": config.faults.nonfinite,
        "skip_limit": config.faults.skip_limit,
        "hang_timeout": config.faults.hang_timeout,
    }


def _check_training_keys(training: dict[str, Any], own: dict[str, Any]) -> None:
    known = {item.name for item in dataclasses.fields(TrainingArguments) if item.init}
    for key in training:
        if key == "resume_from_checkpoint":
            raise UsageError("training.resume_from_checkpoint: a run goes on with --resume or --auto-resume")
        if key in own:
            raise UsageError(f"training.{key} is set outside of training: (see `pivotune init`)")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean training.{near[0]}?" if near else ""
            raise UsageError(f"unknown key training.{key}{hint} (fields of transformers.TrainingArguments)")


def _check_reports(names: Any) -> None:
    """Refuse where nobody reports to, which `Trainer` would after the model is loaded."""
    known = ("all", "none", *INTEGRATION_TO_CALLBACK)
    for name in [names] if isinstance(names, str) else names or []:
        if name not in known:
            raise UsageError(f"training.report_to: {name!r} is not allowed; allowed: {', '.join(known)}")


def _typed(key: str, value: Any) -> Any:
    """Numbers and switches as the type that TrainingArguments declares, which it does not check itself.

    Fields of other types accept more than they declare and pass as they are.
    """
    hint = get_type_hints(TrainingArguments)[key]
    if not set(get_args(hint) or (hint,)) <= {int, float, bool, NoneType}:
        return value
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        wanted = " or ".join(
            dict.fromkeys(problem["msg"].removeprefix("Input should be ") for problem in error.errors())
        )
        raise UsageError(f"training.{key}: {value!r} is not allowed; allowed: {wanted}") from error
