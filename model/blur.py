"""BlurPool: what is about to be subsampled is blurred first, so that a shifted picture is classified as the picture is.

Zhang 2019, "Making convolutional networks shift-invariant again", as ffcv-imagenet has it: before each strided convolution but
the net's first, and not in max pooling. The filter is no part of the state dict: weights fit nets with and without it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

MIN_CHANNELS = 16  # into a convolution for it to be blurred: a net's first one sees the picture as it is


class BlurredConv2d(nn.Conv2d):
    """A convolution of its input blurred by [1, 2, 1] x [1, 2, 1] / 16, with a border of zeros. forward: as nn.Conv2d's."""

    blur: torch.Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        """conv: whose weights, shared, and settings it takes: square, 3x3 or 1x1 without padding, without a bias."""
        kernel_size, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        super().__init__(conv.in_channels, conv.out_channels, kernel_size, stride, padding, bias=False)
        self.weight = conv.weight
        binomial = torch.tensor([1.0, 2.0, 1.0])
        kernel = torch.outer(binomial, binomial) / 16
        self.register_buffer("blur", kernel.repeat(conv.in_channels, 1, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kernel_size == (1, 1):  # it sees only every stride-th place: no other need be blurred
            blurred = F.conv2d(x, self.blur, None, self.stride, 1, groups=self.in_channels)
            return F.conv2d(blurred, self.weight)
        return super().forward(F.conv2d(x, self.blur, None, 1, 1, groups=self.in_channels))


def blur_strided(net: nn.Module) -> None:
    """Replace each strided convolution from at least MIN_CHANNELS channels by a blurred one with the same weights."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Conv2d and max(child.stride) > 1 and child.in_channels >= MIN_CHANNELS:
                setattr(module, name, BlurredConv2d(child))
