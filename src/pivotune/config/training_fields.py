"""The fields of `transformers.TrainingArguments` in `training:`; each one has an effect or is refused, without torch.

Names, types and choices are read from the source of Transformers, because importing it takes seconds.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from functools import cache, reduce
from operator import or_
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pivotune.config.messages import allowed_values
from pivotune.config.settings import EncodingConfig, FaultsConfig, RunConfig
from pivotune.errors import UsageError
from pivotune.text.redaction import is_secret_name

# Defaults of Transformers that decide if another field has an effect.
_OF_TRANSFORMERS = {
    "eval_strategy": "no",
    "logging_strategy": "steps",
    "dataloader_num_workers": 0,
    "optim": "adamw_torch_fused",
}
# Defaults of `training:` that differ from those of Transformers.
_DEFAULTS = {"report_to": "none", "save_strategy": "epoch", "disable_tqdm": True}
_LOGGING_STEPS = 10
# Choices that a message lists; of more (the optimizers) it names the nearest.
_LISTED = 20

# Fields whose value lies in the states of a checkpoint, so that another one would have no effect on a resumed run.
IN_CHECKPOINTS = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args",
    "optim_target_modules", "lr_scheduler_type", "lr_scheduler_kwargs", "metric_for_best_model", "greater_is_better",
)  # fmt: skip

# ---- refused fields ----

_NO_PREDICTIONS = "evaluation sums losses and keeps no predictions; leave it out"
_NO_UPLOAD = "nothing is uploaded in training; `pivotune push` uploads a finished run"
_LIGER = "cross-entropy without full logits is built in, through Liger's kernel where it is installed; leave it out"
# Field -> (its default, which alone is allowed; the reason and what to do instead).
REFUSED: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "the cross-entropy in chunks has no smoothing; set weight_decay or interpolate"),
    "neftune_noise_alpha": (None, "its noise depends on the length of a row, and rows are packed; set weight_decay"),
    "use_liger_kernel": (False, _LIGER),
    "liger_kernel_config": (None, _LIGER),
    "auto_find_batch_size": (False, "a resumed run would have other steps; `pivotune estimate` shows which batch fits"),
    "average_tokens_across_devices": (True, "losses are means over the tokens of all processes; leave it out"),
    "logging_nan_inf_filter": (False, "set faults.nonfinite: stop or skip"),
    "prediction_loss_only": (False, _NO_PREDICTIONS),
    "eval_do_concat_batches": (True, _NO_PREDICTIONS),
    "eval_use_gather_object": (False, _NO_PREDICTIONS),
    "eval_accumulation_steps": (None, _NO_PREDICTIONS),
    "include_for_metrics": ([], _NO_PREDICTIONS),
    "batch_eval_metrics": (False, _NO_PREDICTIONS),
    "save_on_each_node": (False, "rank 0 saves for all machines; choose an output_dir that all of them share"),
    "enable_jit_checkpoint": (False, "SIGTERM and SIGUSR1 save a checkpoint without it; leave it out"),
    "push_to_hub": (False, _NO_UPLOAD),
    "hub_token": (None, _NO_UPLOAD),
    "hub_private_repo": (None, _NO_UPLOAD),
    "hub_model_id": (None, _NO_UPLOAD),
    "hub_strategy": ("every_save", _NO_UPLOAD),
    "hub_always_push": (False, _NO_UPLOAD),
    "hub_revision": (None, _NO_UPLOAD),
    "ignore_data_skip": (False, "a resumed run reads the rows that come next; leave it out"),
    "restore_callback_states_from_checkpoint": (False, "a resumed run always restores its callbacks; leave it out"),
    "parallelism_config": (None, "use DDP, FSDP2 or ZeRO (docs/scaling.md)"),
    "dataloader_in_order": (True, "batches in another order cannot be resumed exactly; leave it out"),
    "remove_unused_columns": (False, "it would remove the English columns; leave it out"),
    "label_names": (None, "batches have columns of their own; leave it out"),
    "length_column_name": ("length", "lengths are counted after encoding; leave it out"),
}  # fmt: skip
# The same for YAML only: a script in Python may read or use them.
REFUSED_IN_YAML: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), (False, "a flag for scripts; leave it out")),
    "bf16_full_eval": (False, "held-out rows are scored as in training; set bf16"),
    "fp16_full_eval": (False, "held-out rows are scored as in training; set fp16"),
    "ddp_timeout": (1800, "set faults.hang_timeout"),
    "local_rank": (-1, "torchrun and accelerate launch set it; leave it out"),
    "resume_from_checkpoint": (None, "a run goes on with --resume or --auto-resume"),
}  # fmt: skip

# ---- fields that need another one ----

_OFF = (None, False, "", "no", "none", [], ())


def _without(*values: Any) -> Callable[[Any], bool]:
    return lambda found: found in values


def _unreported(*integrations: str) -> Callable[[Any], bool]:
    """Return a test of `report_to`: it names none of the integrations."""

    def test(found: Any) -> bool:
        names = [found] if isinstance(found, str) else found or []
        return not {"all", *integrations} & set(names)

    return test


_TRACKIO = ("report_to", _unreported("trackio"), "set report_to: trackio")
_EVALUATED = ("eval_strategy", _without("no"), "set eval_strategy: epoch or steps")
_WORKERS = ("dataloader_num_workers", _without(0), "set dataloader_num_workers from 1")
_CHECKPOINTED = ("activation_checkpointing", _without(*_OFF), "set activation_checkpointing: true")
# Field -> (the other field, True for a value with which the first one changes nothing, the remedy).
_NEEDS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    **{f"{kind}_steps": (f"{kind}_strategy", _without("no", "epoch", "best"), f"set {kind}_strategy: steps")
       for kind in ("save", "eval", "logging")},
    **dict.fromkeys(("eval_delay", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _EVALUATED),
    "warmup_steps": ("lr_scheduler_type", _without("constant", "reduce_lr_on_plateau", "greedy"),
                     "set a schedule with a warm-up, such as constant_with_warmup"),
    "lr_scheduler_kwargs": ("lr_scheduler_type", _without("constant", "constant_with_warmup"),
                            "set a schedule with options, such as cosine_with_min_lr"),
    "save_total_limit": ("save_strategy", _without("no"), "set save_strategy: epoch, steps or best"),
    "run_name": ("report_to", _without(*_OFF), "set report_to"),
    **dict.fromkeys(("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _TRACKIO),
    "optim_target_modules": ("optim", lambda name: not name.startswith(("galore", "apollo")),
                             "set an optimizer of GaLore or APOLLO"),
    "fsdp_config": ("fsdp", _without(*_OFF), "set fsdp: true"),
    **dict.fromkeys(("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), _CHECKPOINTED),
    **dict.fromkeys(("dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_prefetch_factor"),
                    _WORKERS),
}  # fmt: skip


def check_used(given: Mapping[str, Any], settings: Mapping[str, Any], *, yaml: bool = False) -> None:
    """Refuse fields that change nothing, or that the trainer cannot use.

    Args:
        given: the fields that the user has set.
        settings: all fields.
        yaml: the fields are those of a YAML file.

    Raises:
        UsageError: names the field, its value, and what to do instead.
    """
    refused = {**REFUSED, **REFUSED_IN_YAML} if yaml else REFUSED
    checkpointed = settings.get("activation_checkpointing") or settings.get("gradient_checkpointing")
    settings = {**settings, "activation_checkpointing": checkpointed}
    for key, value in given.items():
        if key in refused and value != refused[key][0]:
            found = "" if is_secret_name(key) else f"{_shown(value)} "
            raise UsageError(f"training.{key}: {found}is not supported: {refused[key][1]}")
        if key not in _NEEDS or value in _OFF:
            continue
        other, is_void, remedy = _NEEDS[key]
        if is_void(settings.get(other)):
            found = _shown(settings.get(other))
            raise UsageError(
                f"training.{key}: {_shown(value)} has no effect with {other}: {found}; {remedy}, or leave it out"
            )
    if "tpu_metrics_debug" in (settings.get("debug") or ()):
        raise UsageError(
            "training.debug: tpu_metrics_debug needs a TPU, which is not supported; allowed: underflow_overflow"
        )
    if settings.get("save_strategy") == "best" and settings.get("eval_strategy") == "no":
        raise UsageError(
            "training.save_strategy: best saves nothing with eval_strategy: no; set eval_strategy: epoch or steps"
        )


def _shown(value: Any) -> str:
    """Return a value as YAML shows it."""
    value = getattr(value, "value", value)
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


# ---- YAML ----


def check_training(training: Mapping[str, Any], *, where: str = "") -> dict[str, Any]:
    """Return the `training:` of a YAML file with defaults and typed numbers.

    Args:
        where: names the settings in messages.

    Raises:
        UsageError: an unknown field, or a value that has no effect or is not allowed.
    """
    try:
        typed = {key: _typed(key, value) for key, value in training.items()}
        settings = _with_defaults(typed)
        check_used(typed, {**_OF_TRANSFORMERS, **settings}, yaml=True)
    except UsageError as error:
        raise UsageError(f"{where}: {error}" if where else str(error)) from error
    return settings


def _with_defaults(training: Mapping[str, Any]) -> dict[str, Any]:
    """Add the defaults of `training:`; a number of steps without a strategy is a strategy of steps."""
    strategies = {f"{kind}_strategy": "steps" for kind in ("save", "eval") if training.get(f"{kind}_steps") is not None}
    settings = {**_DEFAULTS, **strategies, **training}
    if settings.get("logging_strategy", "steps") == "steps":
        settings.setdefault("logging_steps", _LOGGING_STEPS)
    return settings


def _typed(key: str, value: Any) -> Any:
    """Convert a number or a switch to the type that TrainingArguments declares and does not check.

    Fields of other types accept more than they declare and are left alone.
    """
    declared = declared_fields()
    if key in {*RunConfig.model_fields, *EncodingConfig.model_fields, *FaultsConfig.model_fields} - {"training"}:
        raise UsageError(f"training.{key} is set outside of training: (see `pivotune init`)")
    if key not in declared:
        hint = _nearest(key, declared, "training.")
        raise UsageError(f"unknown key training.{key}{hint} (fields of transformers.TrainingArguments)")
    allowed = declared[key]
    if isinstance(allowed, tuple):
        for name in value if isinstance(value, list) else [value]:
            if name not in allowed and name is not None:
                near = _nearest(str(name), allowed) if len(allowed) > _LISTED else ""
                hint = near or f"; allowed: {', '.join(allowed)}"
                raise UsageError(f"training.{key}: {name!r} is not allowed{hint}")
    if allowed is None or isinstance(allowed, tuple):
        return value
    try:
        return TypeAdapter(allowed).validate_python(value)
    except ValidationError as error:
        wanted = allowed_values(problem["msg"] for problem in error.errors())
        raise UsageError(f"training.{key}: {value!r} is not allowed; allowed: {' or '.join(wanted)}") from error


def _nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


# ---- the source of Transformers ----

_TYPES = {"int": int, "float": float, "bool": bool, "None": NoneType}


@cache
def declared_fields() -> dict[str, Any]:
    """Return the fields of TrainingArguments: a type of numbers or switches, a tuple of choices, or None for others."""
    classes = {**_classes("trainer_utils.py"), **_classes("training_args.py")}
    fields = {
        node.target.id: _declared(node, classes)
        for node in classes["TrainingArguments"].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    table = next(
        node.value for node in _parse("integrations/integration_utils.py").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INTEGRATION_TO_CALLBACK"
    )  # fmt: skip
    fields["report_to"] = ("all", "none", *(ast.literal_eval(key) for key in table.keys))  # type: ignore[attr-defined]
    return fields


def _declared(field: ast.AnnAssign, classes: Mapping[str, ast.ClassDef]) -> Any:
    names = ast.unparse(field.annotation).split(" | ")
    if all(name in _TYPES for name in names):
        return reduce(or_, (_TYPES[name] for name in names))
    for name in names:
        if name in classes:
            # An enumeration of texts.
            return tuple(ast.literal_eval(node.value) for node in classes[name].body if isinstance(node, ast.Assign))
    for node in ast.walk(field):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
                    return tuple(ast.literal_eval(value))
    return None


def _classes(file: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _parse(file).body if isinstance(node, ast.ClassDef)}


def _parse(file: str) -> ast.Module:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    return ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
