"""How the weights of the inner losses change over training."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def schedule_factor(schedule: Schedule, step: int, num_steps: int) -> float:
    """Factor on the weights at optimizer step `step` (0-based) of `num_steps`: from 1 down to 0 at the last step."""
    if schedule == "constant" or num_steps <= 1:
        return 1.0
    progress = min(step / (num_steps - 1), 1.0)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
