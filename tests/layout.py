"""The memory format of activations and gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn


class LayoutCheck:
    """Notes which 4-D tensors of a model are not channels-last: each layer's inputs, outputs and their gradients, in all passes
    from now on. tensors: how many were seen."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.tensors, self._others = model, 0, list[str]()
        for name, module in model.named_modules():
            module.register_forward_hook(partial(self._passed, name))

    def others(self) -> list[str]:
        """Those that are not channels-last, also among the parameters and their gradients."""
        for name, parameter in self.model.named_parameters():
            self._see(f"{name}", parameter)
            if parameter.grad is not None:
                self._see(f"gradient of {name}", parameter.grad)
        return self._others

    def _passed(self, name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        for what, tensor in (("input", inputs[0]), ("output", output)):
            described = f"{what} of {name} ({type(module).__name__})"
            self._see(described, tensor)
            if tensor.requires_grad:
                tensor.register_hook(partial(self._see, f"gradient of {described}"))

    def _see(self, what: str, tensor: torch.Tensor) -> None:
        if tensor.ndim == 4:
            self.tensors += 1
            if not tensor.is_contiguous(memory_format=torch.channels_last):
                self._others.append(what)
