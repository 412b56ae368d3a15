"""Build optimizer, schedule and reporting callbacks on a stand-in of the model, so that a wrong option fails early.

Nothing is loaded: `Trainer` makes them after the starting model is read, measured and scored.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from pivotune.errors import UsageError
from pivotune.training.arguments import DeepSupervisionConfig, optimizer_name

# More than any warm-up, so that the options of what follows it are read too.
_STEPS = 1_000_000


class _StandIn(Trainer):
    """The part of `Trainer` that makes optimizer and schedule."""

    def __init__(self, args: DeepSupervisionConfig, model: nn.Module) -> None:
        self.args, self.model = args, model  # type: ignore[assignment]
        self.optimizer = self.lr_scheduler = self.optimizer_cls_and_kwargs = None


def check_setup(args: DeepSupervisionConfig, model_config: Any, *, trust_remote_code: bool = False) -> None:
    """Refuse an optimizer, a schedule or a reporting integration that cannot be built, and options that change nothing.

    Raises:
        UsageError: names the setting, with the message of the library.
    """
    for name in args.report_to or []:
        with _named(f"training.report_to: {name}"):
            INTEGRATION_TO_CALLBACK[name]()
    if args.deepspeed_plugin is not None:
        # Its own file may describe both.
        return
    model: nn.Module = nn.Linear(1, 1)
    if args.optim_target_modules is not None:
        # Modules are found by their names.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
    trainer, name = _StandIn(args, model), optimizer_name(args)
    with _named(f"training.optim: {name}" + (f" with optim_args: {args.optim_args}" if args.optim_args else "")):
        optimizer, void = trainer.create_optimizer(), []
    for option, changed in [] if isinstance(optimizer, LayerWiseDummyOptimizer) else _without_each_option(args):
        with suppress(Exception):
            # An option without which nothing can be built has an effect.
            if repr(_StandIn(changed, model).create_optimizer()) == repr(optimizer):
                void.append(option)
    if void:
        raise UsageError(f"training.{void[0]} has no effect with optim: {name}; leave it out")
    options = f" with lr_scheduler_kwargs: {args.lr_scheduler_kwargs}" if args.lr_scheduler_kwargs else ""
    with _named(f"training.lr_scheduler_type: {args.lr_scheduler_type.value}{options}"):  # type: ignore[union-attr]
        for factor in getattr(trainer.create_scheduler(_STEPS), "lr_lambdas", []):
            factor(_STEPS - 1)


def _without_each_option(args: DeepSupervisionConfig) -> Iterator[tuple[str, DeepSupervisionConfig]]:
    """Yield every option of the optimizer that is set, as `key: value`, and the arguments without it."""
    fields = DeepSupervisionConfig.__dataclass_fields__
    for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if getattr(args, key) != fields[key].default:
            changed = copy.copy(args)
            setattr(changed, key, fields[key].default)
            yield f"{key}: {getattr(args, key):g}", changed
    options = (args.optim_args or "").split(",")
    for option in filter(None, options):
        changed = copy.copy(args)
        changed.optim_args = ",".join(other for other in options if other is not option) or None
        yield f"optim_args: {option.strip()}", changed


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """Turn any error inside into one line that begins with the setting."""
    try:
        yield
    except Exception as error:
        # Each library raises errors of its own.
        raise UsageError(f"{setting}: {' '.join(str(error).split())}") from error
