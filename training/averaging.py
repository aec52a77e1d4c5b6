"""An exponential moving average (EMA) of a model's weights, which is evaluated in place of the weights themselves.

After Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging". The decay warms up as in TensorFlow's
ExponentialMovingAverage, so that the initial weights do not dominate the average of a short run. The arithmetic comes from
torch.optim.swa_utils. Its AveragedModel is not used: it copies its counter to the device in each step, which synchronizes.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightEMA:
    """The average of a model's parameters and BN statistics, updated after each step. BN's batch counters are copied.

    model: the averaged model, on the device and in the memory format of the original, without gradients.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """The average starts as a copy of `model`, which must be the unwrapped module (neither compiled nor in DDP), already on
        its training device. decay: its value after the warm-up, 0 <= decay < 1.
        """
        if not 0 <= decay < 1:
            raise ValueError(f"the decay must lie in [0, 1), not {decay}")
        self.model = deepcopy(model).requires_grad_(False)
        self._decay, self._updates = decay, 0

    def update(self, model: nn.Module) -> None:
        """Update the average after a step: average = d * average + (1 - d) * weights, with d = min(decay, (1 + t) / (10 + t)) at
        the t-th update, counted from 0. It is two operations for any number of tensors, without synchronizing with the device.
        """
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        (floats, counters), (new_floats, new_counters) = _tensors(self.model), _tensors(model)
        get_ema_multi_avg_fn(decay)(floats, new_floats, None)
        with torch.no_grad():
            torch._foreach_copy_(counters, new_counters)

    def state_dict(self) -> dict[str, Any]:
        """weights: the averaged model's state dict. updates: the number of updates so far."""
        return {"weights": self.model.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state: the next averages are the same as without the interruption."""
        self.model.load_state_dict(state["weights"])
        self._updates = state["updates"]


def _tensors(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters and buffers of floats, and the other buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return [one for one in tensors if one.is_floating_point()], [one for one in tensors if not one.is_floating_point()]
