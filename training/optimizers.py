"""Optimizers: SGD as in He et al. 2015, LARS for large batches, and the parameter groups with and without weight decay.

Sources:
- SGD with momentum 0.9 and weight decay 0.0001 of all parameters: He et al. 2015, section 3.4.
- No weight decay for BN parameters and biases, and the linear scaling rule for learning rates: He, Zhang, et al. 2019, "Bag of
  tricks for image classification", section 3.1; Goyal et al. 2017, "Accurate, large minibatch SGD", sections 2.1 and 5.1.
- LARS: You, Gitman, Ginsburg 2017, "Large batch training of convolutional networks" (arXiv 1708.03888), Algorithm 1. It is
  implemented here because no dependency provides it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.errors import UserError

OPTIMIZERS = ("sgd", "lars")
REFERENCE_BATCH = 256  # the batch size that learning rates refer to: Goyal et al. 2017, section 2.1
TRUST = 0.001  # LARS's trust coefficient

_FUSED = ("cpu", "cuda", "mps", "xpu")  # devices on which torch has a fused SGD

Group = dict[str, Any]


def scaled_rate(lr: float, batch_size: int) -> float:
    """The learning rate for a global batch, by the linear scaling rule. lr: the rate for REFERENCE_BATCH images."""
    return lr * batch_size / REFERENCE_BATCH


def parameter_groups(model: nn.Module, weight_decay: float, norm_and_bias: bool) -> list[Group]:
    """Parameter groups for an optimizer. norm_and_bias: whether weight decay also applies to BN parameters and biases, which are
    all vectors.

    If it does, there is one group. Otherwise there are two: weights with decay, and vectors without. Each group keeps the order
    of `model.parameters()`, because an optimizer's state refers to parameters by position.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if norm_and_bias:
        return [{"params": parameters, "weight_decay": weight_decay}]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(
    name: str, model: nn.Module, lr: float, momentum: float, weight_decay: float, norm_and_bias: bool
) -> torch.optim.Optimizer:
    """One of OPTIMIZERS. norm_and_bias: see `parameter_groups`.

    A step does not synchronize with the device, with one exception: in fp16, a gradient scaler waits for the device before each
    step of LARS, to leave out steps with infinite gradients. A fused SGD leaves them out on the device.
    """
    groups = parameter_groups(model, weight_decay, norm_and_bias)
    if name == "sgd":
        fused = all(parameter.device.type in _FUSED for parameter in model.parameters())
        return torch.optim.SGD(groups, lr, momentum, fused=fused, foreach=not fused)
    if name == "lars":
        return LARS(groups, lr, momentum)
    raise ValueError(f"unknown optimizer {name!r}; choose from {', '.join(OPTIMIZERS)}")


def load_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load the momentum from a checkpoint. saved: the state_dict of the optimizer there.

    The optimizer keeps its learning rate, weight decay and choice of kernels. torch's load_state_dict would replace them by those
    of the checkpoint, which may come from another machine. Raises UserError for a checkpoint of another optimizer or of other
    parameter groups.
    """
    current = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    if ["trust" in group for group in current] != ["trust" in group for group in saved["param_groups"]]:
        raise UserError(
            "the checkpoint was saved with another optimizer, or with weight decay on other parameters",
            "resume with the same options",
        )
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        raise UserError(f"the checkpoint belongs to another model ({error})", "resume with the same options") from error
    for group, options in zip(optimizer.param_groups, current, strict=True):
        group.update(options)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling, Algorithm 1 of You et al. 2017. For a layer's weights w, gradient g and learning rate lr:

        local = trust * |w| / (|g| + weight_decay * |w|)
        v = momentum * v + lr * local * (g + weight_decay * w);    w = w - v

    Unlike in torch's SGD, lr is part of v, which matters when lr changes. local is 1 for vectors (BN parameters and biases), and
    for weights that are all zero, which would otherwise never change. Gradients must be unscaled, as torch.amp.GradScaler and
    Accelerate leave them, and averaged over processes, as in DDP.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = TRUST,
    ) -> None:
        """params: parameters, or groups of parameters with their own options."""
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or trust <= 0:
            raise ValueError(f"invalid LARS options: lr {lr}, momentum {momentum}, weight_decay {weight_decay}, trust {trust}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update. closure: as in torch's optimizers."""
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
        layers = [index for index, parameter in enumerate(parameters) if parameter.ndim > 1]
        if layers:
            layer_weights, layer_gradients = ([tensors[index] for index in layers] for tensors in (parameters, gradients))
            rates = local_rates(layer_weights, layer_gradients, group["weight_decay"], group["trust"])
            torch._foreach_mul_([updates[index] for index in layers], list(rates.unbind()))
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, updates, alpha=group["lr"])
        torch._foreach_sub_(parameters, momenta)


def local_rates(weights: list[torch.Tensor], gradients: list[torch.Tensor], weight_decay: float, trust: float) -> torch.Tensor:
    """LARS's local learning rates of L layers, (L,), on their device. They are 1 if the weights or the denominator are zero."""
    weight_norm, gradient_norm = (torch.stack(list(torch._foreach_norm(tensors))) for tensors in (weights, gradients))
    denominator = gradient_norm + weight_decay * weight_norm
    is_defined = (weight_norm > 0) & (denominator > 0)
    return torch.where(is_defined, trust * weight_norm / torch.where(is_defined, denominator, 1.0), 1.0)
