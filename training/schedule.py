"""Learning-rate schedules as pure functions of the step: no state to save, the same after any restart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FACTOR = 0.1  # He et al. 2015, section 3.4: "divided by 10"
MILESTONES = (1 / 3, 2 / 3)  # fractions of the run: epochs 30 and 60 of 90
PATIENCE = 3
THRESHOLD = 1e-4  # relative improvement that counts as a new minimum, as in torch's ReduceLROnPlateau

SIZE_STEP = 16  # pixels; progressive resizing grows the image by multiples of this

SCHEDULES = ("step", "plateau", "cosine", "linear")


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step of a run.

    kind: "step" divides the rate by 10 at `milestones`; "plateau" divides it by 10 when the validation error stops falling (see
    `plateaus`); "cosine" and "linear" decay from `base` to 0. base: the rate after warm-up. steps: number of steps of the run.
    milestones, warmup: in steps. warmup_lr: a constant rate during warm-up (He et al. 2015, section 4.2, for ResNet-110); by
    default the rate rises linearly from 0. patience: of "plateau", in validations.
    """

    kind: str
    base: float
    steps: int
    milestones: tuple[float, ...] = ()
    warmup: float = 0.0
    warmup_lr: float | None = None
    patience: int = PATIENCE

    def rate(self, step: int, errors: Sequence[float]) -> float:
        """The learning rate of a step, counted from 0. errors: all validation errors so far; only "plateau" uses them."""
        middle = step + 0.5  # so that no step has a rate of 0
        if middle < self.warmup:
            return self.base * middle / self.warmup if self.warmup_lr is None else self.warmup_lr
        if self.kind == "step":
            return self.base * FACTOR ** sum(middle >= milestone for milestone in self.milestones)
        if self.kind == "plateau":
            return self.base * FACTOR ** plateaus(errors, self.patience)
        done = (middle - self.warmup) / (self.steps - self.warmup)
        if self.kind == "cosine":
            return self.base * 0.5 * (1 + math.cos(math.pi * done))
        if self.kind == "linear":
            return self.base * (1 - done)
        raise ValueError(f"unknown schedule {self.kind!r}; choose from {', '.join(SCHEDULES)}")


def plateaus(errors: Sequence[float], patience: int) -> int:
    """The number of plateaus so far. A plateau is reached when more than `patience` validations in a row bring no new minimum;
    then their count restarts. The same rule as torch.optim.lr_scheduler.ReduceLROnPlateau, computed from the whole history.
    """
    count, waited, lowest = 0, 0, math.inf
    for error in errors:
        if error < lowest * (1 - THRESHOLD):
            waited, lowest = 0, error
        else:
            waited += 1
        if waited > patience:
            count, waited = count + 1, 0
    return count


def image_sizes(start: int, end: int, ramp: tuple[float, float], epochs: int) -> tuple[tuple[int, int], ...]:
    """Progressive resizing, as `LoaderSpec.image_size` takes it: a (first epoch, size) pair for each change of the size.

    The size is `start` until epoch ramp[0], then grows linearly, in multiples of SIZE_STEP, and is `end` from epoch ramp[1] on.
    Raises ValueError if no epoch is left for `end`.
    """
    first, last = ramp
    if not 0 <= first <= last <= epochs - 1:
        raise ValueError(f"no ramp from epoch {first:g} to {last:g} in {epochs} epochs")
    steps: list[tuple[int, int]] = []
    for epoch in range(epochs):
        done = 1.0 if epoch >= last else max(0.0, (epoch - first) / (last - first))
        size = end if done == 1 else start + int((end - start) * done / SIZE_STEP) * SIZE_STEP
        if not steps or size != steps[-1][1]:
            steps.append((epoch, size))
    return tuple(steps)
