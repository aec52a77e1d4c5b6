"""How strongly a net's layers respond: figure 7 of He et al. 2015, section 4.2, "Analysis of layer responses"."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn


class Response(NamedTuple):
    """A 3x3 layer's response. layer: its convolution's name. std: deviation over all images, places and channels."""

    layer: str
    std: float


@torch.inference_mode()
def responses(
    net: nn.Module, batches: Iterable[torch.Tensor], device: torch.device, autocast: Callable[[], Any]
) -> list[Response]:
    """The responses of a net's 3x3 layers to images (N, 3, H, W), in the order of the layers.

    "The responses are the outputs of each 3x3 layer, after BN and before other nonlinearity (ReLU/addition)." The net is left in
    evaluation mode. autocast: makes the context that forward runs in.
    """
    norms = norms_of_3x3_layers(net)
    sums = {layer: torch.zeros(3, dtype=torch.float64, device=device) for layer in norms}  # of 1, x and x squared
    hooks = [norm.register_forward_hook(_adding_to(sums[layer])) for layer, norm in norms.items()]
    net.eval()
    try:
        for images in batches:
            with autocast():
                net(images)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for layer, (count, total, squares) in ((layer, sums[layer].tolist()) for layer in norms):
        found.append(Response(layer, max(squares / count - (total / count) ** 2, 0.0) ** 0.5 if count else 0.0))
    return found


def norms_of_3x3_layers(net: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The batch normalization behind each 3x3 convolution, by the convolution's name; convN is followed by bnN."""
    norms = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            parent, _, own = name.rpartition(".")
            norm = net.get_submodule(f"{parent}.{own.replace('conv', 'bn')}".lstrip("."))
            assert isinstance(norm, nn.BatchNorm2d)
            norms[name] = norm
    return norms


def _adding_to(sums: torch.Tensor) -> Any:
    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        # Image by image sums in float32 are exact enough; over a data set they are added in float64.
        values = output.detach().float().flatten(1)
        sums[0] += values.numel()
        sums[1] += values.sum(1).double().sum()
        sums[2] += values.square().sum(1).double().sum()

    return hook
