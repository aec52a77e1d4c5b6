"""Learning-rate schedules as pure functions: nothing to save, nothing that steps, the same after any restart."""

from __future__ import annotations

import math
from collections.abc import Sequence

STEP_MILESTONES = (1 / 3, 2 / 3)  # epochs 30 and 60 of 90
STEP_FACTOR = 0.1
PLATEAU_PATIENCE = 3  # epochs without a lower validation error before the rate falls

SCHEDULES = ("step", "plateau", "cosine")


def learning_rate(schedule: str, base: float, progress: float, warmup: float, errors: Sequence[float]) -> float:
    """The rate for the next step. He et al. 2015, section 3.4, divides by 10 "when the error plateaus".

    progress: share of the run's steps done, 0..1. warmup: share of the run over which the rate first rises linearly from 0.
    errors: the validation error after each epoch so far, which "plateau" alone looks at.
    """
    if progress < warmup:
        return base * progress / warmup
    if schedule == "step":
        return base * STEP_FACTOR ** sum(progress >= milestone for milestone in STEP_MILESTONES)
    if schedule == "plateau":
        return base * STEP_FACTOR ** plateaus(errors)
    if schedule == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    raise ValueError(f"unknown schedule {schedule!r}; choose from {', '.join(SCHEDULES)}")


def plateaus(errors: Sequence[float]) -> int:
    """How often the error went `PLATEAU_PATIENCE` epochs without a new minimum, counting afresh after each such time."""
    count, waited, lowest = 0, 0, math.inf
    for error in errors:
        waited = 0 if error < lowest else waited + 1
        lowest = min(lowest, error)
        if waited == PLATEAU_PATIENCE:
            count, waited = count + 1, 0
    return count
