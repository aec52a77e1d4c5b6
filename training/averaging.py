"""An exponential moving average of a net's weights, to evaluate instead of the weights themselves.

After Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging". The decay warms up as that of
TensorFlow's ExponentialMovingAverage does, so that short runs do not carry the initial weights along. torch.optim.swa_utils has
the arithmetic; its AveragedModel is not taken, as it copies its count to the device in each step and waits for that.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightEMA:
    """The average of a net's parameters and BN statistics after each update; BN's counts of batches are the net's own.

    net: the averaged net, on the device and in the memory format of the one averaged; without gradients.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        """net: bare, neither compiled nor in DDP, on the device where it trains: the average begins as its copy. decay: that of
        a long run, 0 <= decay < 1.
        """
        if not 0 <= decay < 1:
            raise ValueError(f"the decay must lie in [0, 1), not {decay}")
        self.net = deepcopy(net).requires_grad_(False)
        self._decay, self._updates = decay, 0

    def update(self, net: nn.Module) -> None:
        """Take in a net's weights after a step: average = d * average + (1 - d) * weights, d = min(decay, (1 + t) / (10 + t)) at
        the t-th update, counted from 0. Does not wait for the device.
        """
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        averaged, current = ([*one.parameters(), *one.buffers()] for one in (self.net, net))
        pairs = list(zip(averaged, current, strict=True))
        real = [pair for pair in pairs if pair[0].is_floating_point()]
        whole = [pair for pair in pairs if not pair[0].is_floating_point()]
        get_ema_multi_avg_fn(decay)(*(list(tensors) for tensors in zip(*real, strict=True)), None)
        with torch.no_grad():
            for count, new in whole:
                count.copy_(new)

    def state_dict(self) -> dict[str, Any]:
        """weights: the averaged net's state dict. updates: how many there were."""
        return {"weights": self.net.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state: the next averages are those that would have come."""
        self.net.load_state_dict(state["weights"])
        self._updates = state["updates"]
