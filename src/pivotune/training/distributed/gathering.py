"""From a model that several processes share out to one that is whole, to be saved as a plain folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pivotune.errors import UsageError
from pivotune.training.distributed import ranks


def is_sharded(trainer: Trainer) -> bool:
    """Whether no process holds all weights: FSDP2, or DeepSpeed ZeRO-3."""
    if trainer.is_fsdp_enabled:
        return True
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    return plugin is not None and plugin.zero_stage == 3


def gathered_model(trainer: Trainer, make_model: Callable[[], Any]) -> Any:
    """The trained model with all its weights; on the main process only where it has to be gathered. All ranks call this.

    Args:
        make_model: makes the model as training began with it, adapters included, on the CPU; its weights are replaced.

    Raises:
        UsageError: ZeRO-3 without `stage3_gather_16bit_weights_on_model_save`, which gathers them.
    """
    if not is_sharded(trainer):
        return trainer.model
    try:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    except ValueError as error:
        raise UsageError(f"the weights cannot be gathered: {' '.join(str(error).split())}") from error
    if not ranks.is_main():
        return None
    if trainer.is_deepspeed_enabled:
        # Transformers would make it partitioned too, which needs the other processes.
        unset_hf_deepspeed_config()
    model = make_model()
    missing, unexpected = model.load_state_dict(state, strict=False)
    # A head that is the embedding is gathered under one name.
    tied = {name for name, parameter in model.named_parameters(remove_duplicate=False)} - dict(
        model.named_parameters()
    ).keys()
    lost = [*sorted(set(missing) - tied), *unexpected]
    if lost:
        raise RuntimeError(f"{len(lost)} gathered weights do not fit the model, first {lost[0]}")
    return model
