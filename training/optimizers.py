"""Optimizers: SGD as He et al. 2015 have it, LARS for large batches, and which parameters take weight decay.

Sources:
- SGD with momentum 0.9 and weight decay 0.0001 of all parameters: He et al. 2015, section 3.4.
- No decay of BN's scales and shifts and of biases, and rates in proportion to the batch: He, Zhang, et al. 2019, "Bag of tricks
  for image classification", section 3.1; Goyal et al. 2017, "Accurate, large minibatch SGD", sections 2.1 and 5.1.
- LARS: You, Gitman, Ginsburg 2017, "Large batch training of convolutional networks" (arXiv 1708.03888), Algorithm 1. No library
  that we need has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.errors import UserError

OPTIMIZERS = ("sgd", "lars")
REFERENCE_BATCH = 256  # that rates are given for, Goyal et al. 2017, section 2.1
TRUST = 0.001  # LARS's trust coefficient

_FUSED = ("cpu", "cuda", "mps", "xpu")  # devices whose SGD torch does in one kernel

Group = dict[str, Any]


def scaled_rate(lr: float, batch_size: int) -> float:
    """The learning rate of a global batch: `lr`, which is that of 256 images, in proportion."""
    return lr * batch_size / REFERENCE_BATCH


def parameter_groups(net: nn.Module, weight_decay: float, norm_and_bias: bool) -> list[Group]:
    """Groups for an optimizer. norm_and_bias: whether BN's scales and shifts and biases, the vectors of a net, decay, too.

    One group then, else two: what decays, and the vectors; either in the order of `net.parameters()`, so that an optimizer's
    state, which goes by place, fits the next process's.
    """
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if norm_and_bias:
        return [{"params": parameters, "weight_decay": weight_decay}]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(
    name: str, net: nn.Module, lr: float, momentum: float, weight_decay: float, norm_and_bias: bool
) -> torch.optim.Optimizer:
    """An optimizer of OPTIMIZERS for a net. norm_and_bias: see `parameter_groups`. Neither waits for the device in a step."""
    groups = parameter_groups(net, weight_decay, norm_and_bias)
    if name == "sgd":
        fused = all(parameter.device.type in _FUSED for parameter in net.parameters())
        return torch.optim.SGD(groups, lr, momentum, fused=fused, foreach=not fused)
    if name == "lars":
        return LARS(groups, lr, momentum)
    raise ValueError(f"unknown optimizer {name!r}; choose from {', '.join(OPTIMIZERS)}")


def load_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Give an optimizer the momentum of a checkpoint, `saved` by its state_dict.

    Rates, decay and torch's choice of kernels stay as they are here; torch would take the checkpoint's, which another machine may
    have written. Raises UserError where the checkpoint is of another optimizer, or of other groups.
    """
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    theirs = saved["param_groups"]
    if ["trust" in group for group in own] != ["trust" in group for group in theirs]:
        raise UserError("the checkpoint is of another optimizer, or of other parameters with weight decay; resume with the same")
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        raise UserError(f"the checkpoint's optimizer is of another net ({error}); resume with the same options") from error
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling, Algorithm 1 of You et al. 2017. For a layer's weights w, gradient g, at the rate lr:

        local = trust * |w| / (|g| + weight_decay * |w|)
        v = momentum * v + lr * local * (g + weight_decay * w);    w = w - v

    The rate is within v, other than in torch's SGD: it matters when the rate changes. BN's scales and shifts and biases, the
    vectors, have local = 1, as have weights that are all zero, which would never move. Gradients must come unscaled, as
    torch.amp.GradScaler and Accelerate make them, and averaged over processes, as DDP does.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = TRUST,
    ) -> None:
        """params: parameters, or groups of them with options of their own."""
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or trust <= 0:
            raise ValueError(f"no LARS with lr {lr}, momentum {momentum}, weight_decay {weight_decay}, trust {trust}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; closure as in torch's optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[torch.Tensor], group: Group) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        momenta = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            momenta.append(state["momentum_buffer"])
        updates = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        layers = [place for place, parameter in enumerate(parameters) if parameter.ndim > 1]
        if layers:
            weights, slopes = ([tensors[place] for place in layers] for tensors in (parameters, gradients))
            rates = local_rates(weights, slopes, group["weight_decay"], group["trust"])
            torch._foreach_mul_([updates[place] for place in layers], list(rates.unbind()))
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, updates, alpha=group["lr"])
        torch._foreach_sub_(parameters, momenta)


def local_rates(weights: list[torch.Tensor], gradients: list[torch.Tensor], weight_decay: float, trust: float) -> torch.Tensor:
    """LARS's local learning rates of L layers, (L,), on their device; 1 where weights, or all of the denominator, are zero."""
    size, slope = (torch.stack(list(torch._foreach_norm(tensors))) for tensors in (weights, gradients))
    below = slope + weight_decay * size
    usual = (size > 0) & (below > 0)
    return torch.where(usual, trust * size / torch.where(usual, below, 1.0), 1.0)
