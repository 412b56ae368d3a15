"""What `pivotune train` says of a run before it starts. It must never be the reason that one fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from pivotune.config.settings import RunConfig
from pivotune.data.examples import Pair
from pivotune.estimate.device import Device, find_device
from pivotune.estimate.estimate import Target, estimate_run, read_model_config, rows_of
from pivotune.estimate.model_size import ModelSize, measure_model, meta_model
from pivotune.estimate.rows import Schedule, training_schedule
from pivotune.training.arguments import DeepSupervisionConfig, optimizer_name
from pivotune.training.distributed.strategies import strategy_of
from pivotune.training.preparation import spread

logger = logging.getLogger(__name__)
# Smaller models fit wherever Python does: not worth the second or two that the dry step takes.
_LEAST_PARAMETERS = 20_000_000
# Enough to find the longest batch, and read in no time.
_ROWS_LOOKED_AT = 4096


@dataclass(frozen=True, kw_only=True)
class Startup:
    """Sizes and steps of a run on the devices it really has; `peak` in bytes, None where it was not estimated."""

    size: ModelSize
    target: Target
    schedule: Schedule
    device: Device
    peak: float | None

    @property
    def too_much(self) -> bool:
        """Whether the estimated peak exceeds the device's memory."""
        return None not in (self.peak, self.device.memory) and (self.peak or 0) > (self.device.memory or 0)


def startup_estimate(config: RunConfig, args: DeepSupervisionConfig, train: Sequence[Pair]) -> Startup | None:
    """The estimate of a prepared run, or None where anything is in its way."""
    if is_deepspeed_zero3_enabled():
        # A model that is made now would be partitioned, together with the other processes.
        return None
    try:
        return _estimate(config, args, train)
    except Exception as error:
        logger.debug("no estimate of this run: %s", error)
        return None


def _estimate(config: RunConfig, args: DeepSupervisionConfig, train: Sequence[Pair]) -> Startup:
    device = find_device(use_cpu=args.use_cpu)
    target = Target(device=device.kind, processes=args.world_size, strategy=strategy_of(args))
    model = meta_model(config, read_model_config(config))
    size = measure_model(model, optimizer=optimizer_name(args), quantized=config.quantize is not None)
    peak = None
    if size.total >= _LEAST_PARAMETERS:
        rows = replace(rows_of(spread(train, _ROWS_LOOKED_AT), args), rows=len(train))
        peak = estimate_run(config, target, rows).memory.peak
    schedule = training_schedule(args, len(train), args.world_size)
    return Startup(size=size, target=target, schedule=schedule, device=device, peak=peak)
