"""BlurPool: blurs the input of each strided convolution, so that predictions change less when the image is shifted.

Zhang 2019, "Making convolutional networks shift-invariant again", in the form of ffcv-imagenet: before each strided convolution
except the model's first one, and not in max pooling. The filter is not in the state dict, so weights fit models with and without
it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

MIN_CHANNELS = 16  # convolutions with fewer input channels are not blurred, such as a model's first one


class BlurredConv2d(nn.Conv2d):
    """A convolution that first blurs its zero-padded input by [1, 2, 1] x [1, 2, 1] / 16. forward: as in nn.Conv2d."""

    blur: torch.Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        """conv: the convolution to replace: square, 3x3 or 1x1 without padding, without bias. Its weight is shared."""
        kernel_size, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        super().__init__(conv.in_channels, conv.out_channels, kernel_size, stride, padding, bias=False)
        self.weight = conv.weight
        binomial = torch.tensor([1.0, 2.0, 1.0])
        kernel = torch.outer(binomial, binomial) / 16
        self.register_buffer("blur", kernel.repeat(conv.in_channels, 1, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kernel_size == (1, 1):  # only every stride-th pixel is read, so only these are blurred
            blurred = F.conv2d(x, self.blur, None, self.stride, 1, groups=self.in_channels)
            return F.conv2d(blurred, self.weight)
        return super().forward(F.conv2d(x, self.blur, None, 1, 1, groups=self.in_channels))


def blur_strided(model: nn.Module) -> None:
    """Replace each strided convolution with at least MIN_CHANNELS input channels by a blurred one with the same weight."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Conv2d and max(child.stride) > 1 and child.in_channels >= MIN_CHANNELS:
                setattr(module, name, BlurredConv2d(child))
