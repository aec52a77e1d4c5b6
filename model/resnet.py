"""The models of He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016 (arXiv 1512.03385).

For ImageNet: the ResNets and plain networks of Table 1. For CIFAR: those of section 4.2, with 6n + 2 layers. `ARCHS` names them
all:

- `resnet18` ... `resnet152`: shortcut option B (section 4.1), a projection where dimensions grow. `_a` and `_c` are the other
  options. The bottleneck has its stride on the 3x3 convolution, as is usual now, and as in torchvision.
- `resnet50_v1`, `resnet101_v1`, `resnet152_v1`: the stride on the bottleneck's first 1x1 convolution, as in the paper.
- `resnet18_blur` ... `resnet152_blur`: not in the paper. The input of each strided convolution except the first is blurred (see
  `model.blur`). Weights fit the models with and without blur.
- `plain18`, `plain34`: no shortcuts.
- `resnet20` ... `resnet1202`, `plain20` ... `plain110`: for CIFAR; shortcut option A.

State-dict keys and shapes equal torchvision's wherever it has the model, so weights can be exchanged in both directions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from model.blur import blur_strided

# Makes a block's shortcut from its input channels, output channels and stride. It returns None for the identity.
Shortcut = Callable[[int, int, int], nn.Module | None]


class ZeroPadding(nn.Module):
    """Option A's shortcut where dimensions grow: every `stride`-th pixel; the new channels are zero. No parameters.

    forward: (N, C, H, W) -> (N, C + new_channels, ceil(H / stride), ceil(W / stride)). Half of the new channels come before the
    others and half after them, as in published models for CIFAR.
    """

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before, self.after = new_channels // 2, new_channels - new_channels // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = x.permute(0, 2, 3, 1)[:, :: self.stride, :: self.stride]  # so that the gradient is channels-last, too
        return F.pad(pixels, (self.before, self.after)).permute(0, 3, 1, 2)


class GlobalAverage(nn.Module):
    """The mean over all positions: (N, C, H, W) -> (N, C, 1, 1). The same as AdaptiveAvgPool2d(1), except that the gradient is in
    channels-last memory, which the layers before it need for their fast kernels.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).mean((1, 2))[:, :, None, None]


def option_a(channels_in: int, channels_out: int, stride: int) -> nn.Module | None:
    """Zero padding where the shape changes."""
    if stride == 1 and channels_in == channels_out:
        return None
    return ZeroPadding(channels_out - channels_in, stride)


def option_b(channels_in: int, channels_out: int, stride: int) -> nn.Module | None:
    """A projection where the shape changes."""
    return None if stride == 1 and channels_in == channels_out else option_c(channels_in, channels_out, stride)


def option_c(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    """A projection, by a 1x1 convolution, in every block."""
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out))


def drop_rows(x: torch.Tensor, probability: float, uniform: torch.Tensor | None = None) -> torch.Tensor:
    """Stochastic depth per image: each row of x (N, C, H, W) becomes zeros with `probability`. The other rows are scaled so that
    the expectation stays the same. The same as torchvision's StochasticDepth in mode "row".

    uniform: (N,), in [0, 1). Rows with a value below `probability` become zeros. None: drawn from the device's default generator.
    """
    if uniform is None:
        uniform = torch.rand(x.shape[0], device=x.device)
    return x * ((uniform >= probability) / (1 - probability)).to(x.dtype)[:, None, None, None]


class Block(nn.Module):
    """Base class of both blocks of Figure 5: ReLU(layers(x) + shortcut(x)). Plain networks have no shortcut.

    drop_path: in training, the probability that an image takes only the shortcut; 0 <= drop_path < 1.
    """

    expansion: int
    drop_path = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.is_residual = False
        self.downsample: nn.Module | None = None

    def add_shortcut(self, shortcut: Shortcut | None, channels_in: int, channels_out: int, stride: int) -> None:
        """Call this last: in torchvision's state dict the shortcut's parameters come after the layers'."""
        if shortcut:
            self.is_residual, self.downsample = True, shortcut(channels_in, channels_out, stride)

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor, uniform: torch.Tensor | None = None) -> torch.Tensor:
        """uniform: see `drop_rows`."""
        out = self.layers(x)
        if self.is_residual:
            if self.training and self.drop_path:
                out = drop_rows(out, self.drop_path, uniform)
            out += x if self.downsample is None else self.downsample(x)
        return cast(torch.Tensor, self.relu(out))


class BasicBlock(Block):
    """Two 3x3 convolutions (Figure 5, left). channels_in -> channels."""

    expansion = 1

    def __init__(self, channels_in: int, channels: int, stride: int, shortcut: Shortcut | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.add_shortcut(shortcut, channels_in, channels, stride)

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return cast(torch.Tensor, self.bn2(self.conv2(x)))


class Bottleneck(Block):
    """1x1, 3x3, 1x1 convolutions (Figure 5, right). channels_in -> 4 * channels."""

    expansion = 4
    strides_first = False  # whether the stride is on the first 1x1 convolution instead of the 3x3

    def __init__(self, channels_in: int, channels: int, stride: int, shortcut: Shortcut | None) -> None:
        super().__init__()
        first, second = (stride, 1) if self.strides_first else (1, stride)
        self.conv1 = nn.Conv2d(channels_in, channels, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, second, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.add_shortcut(shortcut, channels_in, channels * self.expansion, stride)

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return cast(torch.Tensor, self.bn3(self.conv3(x)))


class BottleneckV1(Bottleneck):
    """The bottleneck as in the paper: the stride on the first 1x1 convolution."""

    strides_first = True


class Stage(nn.Sequential):
    """Blocks in sequence. forward: x and optionally uniforms (N, blocks), see `drop_rows`."""

    def forward(self, x: torch.Tensor, uniforms: torch.Tensor | None = None) -> torch.Tensor:
        for number, block in enumerate(self):
            x = block(x, None if uniforms is None else uniforms[:, number])
        return x


class ResNet(nn.Module):
    """A network of blocks in stages. Each stage except the first halves the resolution and doubles the channels.

    forward: images (N, 3, H, W) -> logits (N, num_classes), for any H and W: the classifier sees the mean over positions, so the
    model is fully convolutional on images larger than the training crop. For stochastic depth, forward also takes uniforms
    (N, blocks) in [0, 1), which decide what is dropped. Without them, torch's generator draws them.

    - depths: blocks in each stage.
    - shortcut: `option_a`, `option_b` or `option_c`; None for a plain network.
    - width: channels of the first stage.
    - small: CIFAR's 3x3 stem for images of 32 pixels, instead of 7x7, stride 2 and max pooling for 224.
    - blur: blur the input of strided convolutions, except the first.
    - drop_path: stochastic depth of Huang et al. 2016, "Deep networks with stochastic depth", with their linear decay rule: the
      l-th of L blocks is dropped with probability drop_path * l / L, independently for each image.

    Weights are drawn as in He et al. 2015, "Delving deep into rectifiers": N(0, 2 / fan_out) for convolutions (equation 14),
    N(0, 1 / fan_in) for the classifier, BN at scale 1.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        num_classes: int = 1000,
        *,
        shortcut: Shortcut | None = option_b,
        width: int = 64,
        small: bool = False,
        blur: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        """Raises ValueError for a drop_path outside [0, 1), and for any drop_path in a plain network, which has no shortcuts."""
        super().__init__()
        if not 0 <= drop_path < 1 or (drop_path and shortcut is None):
            raise ValueError(f"drop_path must lie in [0, 1), and be 0 in a plain network, not {drop_path}")
        self.image_size = 32 if small else 224  # side of the images that the model is designed for, pixels
        self.depths, self.num_classes = depths, num_classes
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False) if small else nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        channels_in = width
        self.stage_names = [f"layer{stage + 1}" for stage in range(len(depths))]
        for stage, (name, depth) in enumerate(zip(self.stage_names, depths, strict=True)):
            channels = width << stage
            blocks = []
            for index in range(depth):
                blocks.append(block(channels_in, channels, 2 if stage > 0 and index == 0 else 1, shortcut))
                channels_in = channels * block.expansion
            self.add_module(name, Stage(*blocks))
        self.avgpool = GlobalAverage()
        self.num_features = channels_in
        self.fc = nn.Linear(channels_in, num_classes)
        self.apply(init_weights)
        all_blocks = [module for module in self.modules() if isinstance(module, Block)]
        for number, one in enumerate(all_blocks, 1):
            one.drop_path = drop_path * number / len(all_blocks)
        if blur:  # after the weights are drawn, so that they are the same as without blur
            blur_strided(self)

    @property
    def blocks(self) -> int:
        return sum(self.depths)

    def forward(self, x: torch.Tensor, uniforms: torch.Tensor | None = None) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        by_stage = [None] * len(self.depths) if uniforms is None else uniforms.split(self.depths, 1)
        for name, stage_uniforms in zip(self.stage_names, by_stage, strict=True):
            x = getattr(self, name)(x, stage_uniforms)
        return cast(torch.Tensor, self.fc(self.avgpool(x).flatten(1)))


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        nn.init.zeros_(module.bias)


def pad_at_end(model: nn.Module) -> None:
    """Let option A's shortcuts append all new channels, as in version 0.1, to continue a run that such a version started."""
    for module in model.modules():
        if isinstance(module, ZeroPadding):
            module.before, module.after = 0, module.before + module.after


def _for_cifar(layers: int, shortcut: Shortcut | None) -> partial[ResNet]:
    """A model of section 4.2: layers = 6n + 2, in three stages of 2n layers with 16, 32 and 64 channels."""
    depths = ((layers - 2) // 6,) * 3
    return partial(ResNet, BasicBlock, depths, num_classes=10, shortcut=shortcut, width=16, small=True)


_18, _34, _101, _152 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)  # ResNet-50 has as many blocks as ResNet-34

ARCHS: dict[str, partial[ResNet]] = {
    "plain18": partial(ResNet, BasicBlock, _18, shortcut=None),
    "plain34": partial(ResNet, BasicBlock, _34, shortcut=None),
    "resnet18": partial(ResNet, BasicBlock, _18),
    "resnet18_a": partial(ResNet, BasicBlock, _18, shortcut=option_a),
    "resnet18_c": partial(ResNet, BasicBlock, _18, shortcut=option_c),
    "resnet34": partial(ResNet, BasicBlock, _34),
    "resnet34_a": partial(ResNet, BasicBlock, _34, shortcut=option_a),
    "resnet34_c": partial(ResNet, BasicBlock, _34, shortcut=option_c),
    "resnet50": partial(ResNet, Bottleneck, _34),
    "resnet50_c": partial(ResNet, Bottleneck, _34, shortcut=option_c),
    "resnet101": partial(ResNet, Bottleneck, _101),
    "resnet152": partial(ResNet, Bottleneck, _152),
    "resnet50_v1": partial(ResNet, BottleneckV1, _34),
    "resnet101_v1": partial(ResNet, BottleneckV1, _101),
    "resnet152_v1": partial(ResNet, BottleneckV1, _152),
    "resnet18_blur": partial(ResNet, BasicBlock, _18, blur=True),
    "resnet34_blur": partial(ResNet, BasicBlock, _34, blur=True),
    "resnet50_blur": partial(ResNet, Bottleneck, _34, blur=True),
    "resnet101_blur": partial(ResNet, Bottleneck, _101, blur=True),
    "resnet152_blur": partial(ResNet, Bottleneck, _152, blur=True),
    **{f"resnet{layers}": _for_cifar(layers, option_a) for layers in (20, 32, 44, 56, 110, 1202)},
    **{f"plain{layers}": _for_cifar(layers, None) for layers in (20, 32, 44, 56, 110)},
}
OPTION_A = frozenset(name for name, make in ARCHS.items() if make.keywords.get("shortcut") is option_a)
