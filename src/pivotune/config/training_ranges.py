"""Ranges of the numbers in `training:`. Transformers and torch would refuse them only when they use them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pivotune.errors import UsageError

_Check = Callable[[Any], bool]
_POSITIVE: tuple[_Check, str] = (lambda value: value >= 1, "a number from 1")
_NOT_NEGATIVE: tuple[_Check, str] = (lambda value: value >= 0, "a number from 0")
_BETA: tuple[_Check, str] = (lambda value: 0 <= value < 1, "a number from 0, below 1")
_INTERVAL: tuple[_Check, str] = (
    lambda value: value >= 1 or 0 < value < 1,
    "a number of steps from 1, or a share of all steps between 0 and 1",
)
_ALLOWED: dict[str, tuple[_Check, str]] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "save_total_limit"),
        _POSITIVE,
    ),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps", "warmup_ratio",
         "dataloader_num_workers", "data_seed"),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _BETA),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), _INTERVAL),
    "max_steps": (lambda value: value >= 1 or value == -1, "a number from 1, or -1 for num_train_epochs"),
    "num_train_epochs": (lambda value: value > 0, "a number above 0"),
}  # fmt: skip


def check_ranges(training: Mapping[str, Any]) -> None:
    """Refuse numbers that no run can use.

    Raises:
        UsageError: names the key, what was found and what is allowed.
    """
    for key, value in training.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        allowed, words = _ALLOWED.get(key, (lambda found: True, "a number"))
        if not math.isfinite(value) or not allowed(value):
            raise UsageError(f"training.{key}: {value:g} is not allowed; allowed: {words}")
