"""The optimizers of `training.optim`, and the packages and devices that they need."""

from __future__ import annotations

import importlib.util

import torch

from pivotune.errors import UsageError

# Optimizer -> (module to import, package to install), beyond torch and Transformers.
_BITSANDBYTES = ("bitsandbytes", "bitsandbytes")
_NEEDS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        (
            "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "ademamix", "ademamix_8bit",
            "paged_ademamix_32bit", "paged_ademamix_8bit", "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit",
            "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
        ),
        _BITSANDBYTES,
    ),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), ("torchao", "torchao")),
    **dict.fromkeys(("galore_adamw", "galore_adamw_layerwise", "galore_adafactor", "galore_adafactor_layerwise"),
                    ("galore_torch", "galore-torch")),
    **dict.fromkeys(("galore_adamw_8bit", "galore_adamw_8bit_layerwise"), ("galore_torch", "galore-torch bitsandbytes")),
    **dict.fromkeys(("apollo_adamw", "apollo_adamw_layerwise"), ("apollo_torch", "apollo-torch")),
    **dict.fromkeys(("lomo", "adalomo"), ("lomo_optim", "lomo-optim")),
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"), ("schedulefree", "schedulefree")),
    "grokadamw": ("grokadamw", "grokadamw"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
    "adamw_torch_xla": ("torch_xla", "torch_xla"),
    "adamw_torch_npu_fused": ("torch_npu", "torch_npu"),
}  # fmt: skip


def check_optimizer_runs(name: str, *, use_cpu: bool) -> None:
    """Refuse an optimizer that this machine cannot run, before anything slow.

    Args:
        use_cpu: True for a run on the CPU, even beside a GPU.

    Raises:
        UsageError: names the missing package or device.
    """
    module, package = _NEEDS.get(name, (None, None))
    if module is not None and importlib.util.find_spec(module) is None:
        raise UsageError(f"training.optim: {name} needs a package that is not installed: pip install {package}")
    # Paged states lie in CUDA's unified memory.
    if name.startswith("paged_") and (use_cpu or not torch.cuda.is_available()):
        raise UsageError(
            f"training.optim: {name} needs a CUDA device and "
            + ("training.use_cpu is set" if torch.cuda.is_available() else "none is found")
            + "; allowed here: adamw_torch, adafactor, sgd and others of torch"
        )


def needs_bitsandbytes(name: str) -> bool:
    """Return True for optimizers whose states and steps are those of bitsandbytes."""
    return _NEEDS.get(name) == _BITSANDBYTES or name.startswith("galore_adamw_8bit")
