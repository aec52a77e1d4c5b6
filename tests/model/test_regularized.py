"""Stochastic depth and BlurPool."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from scipy.signal import convolve2d
from torch import nn

from model import ARCHS
from model.blur import BlurredConv2d
from model.describe import describe
from model.loading import arch_of_name, load_model
from model.resnet import BasicBlock, Block, Bottleneck, drop_rows, option_b

pytestmark = pytest.mark.usefixtures("one_core")

BLURRED = [arch for arch in ARCHS if arch.endswith("_blur")]
KERNEL = np.outer([1, 2, 1], [1, 2, 1]) / 16


def dropped(model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """Run the model and compare each block's input and output. Returns which images took only the shortcut, bool (N, blocks)."""
    found = []

    def watch(block: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(block, Block)
        shortcut = inputs[0] if block.downsample is None else block.downsample(inputs[0])
        found.append((output == shortcut.relu()).flatten(1).all(1))

    for block in model.modules():
        if isinstance(block, Block):
            block.register_forward_hook(watch)
    with torch.no_grad():
        model(*inputs)
    return torch.stack(found, 1)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet56"])
def test_later_blocks_are_dropped_more_often(arch: str) -> None:
    """Huang et al. 2016, equation 4: survival falls linearly from 1 at the input to 1 - drop_path at the last block."""
    with torch.device("meta"):
        blocks = [module for module in ARCHS[arch](drop_path=0.3).modules() if isinstance(module, Block)]
    survival = [1 - (place + 1) / len(blocks) * (1 - 0.7) for place in range(len(blocks))]
    assert [1 - block.drop_path for block in blocks] == pytest.approx(survival)


def test_blocks_are_dropped_per_image_with_their_probability() -> None:
    """In a whole model, the images that take only the shortcut are drawn in each block independently of the other blocks."""
    torch.manual_seed(0)
    model = ARCHS["resnet20"](num_classes=3, drop_path=0.6).train()
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock)]
    count = 3000
    shares = dropped(model, torch.randn(count, 3, 8, 8)).T.double()  # (blocks, images)
    for share, block in zip(shares.mean(1).tolist(), blocks, strict=True):
        assert abs(share - block.drop_path) < 4.5 * (block.drop_path * (1 - block.drop_path) / count) ** 0.5
    assert shares.corrcoef().fill_diagonal_(0).abs().max() < 4.5 / count**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_rows_are_scaled_to_keep_the_expectation(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(40_000, 2, 1, 1, dtype=dtype)
    found = drop_rows(x, 0.2)
    assert found.dtype == dtype
    assert torch.equal(found[:, 0], found[:, 1])
    assert set(found.unique().tolist()) == {0.0, torch.tensor(1 / 0.8, dtype=dtype).item()}
    assert abs(float(found.double().mean()) - 1) < 4.5 * (0.2 / 0.8 / 40_000) ** 0.5
    images = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    assert drop_rows(images, 0.5).is_contiguous(memory_format=torch.channels_last)


def test_the_same_seed_drops_the_same_and_gradients_flow() -> None:
    images = torch.randn(8, 3, 16, 16)
    model = ARCHS["resnet20"](num_classes=3, drop_path=0.5)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(images))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    outputs[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("arch", ["resnet20", "resnet50"])
def test_uniforms_decide_what_is_dropped(arch: str) -> None:
    """In each block an image takes only the shortcut if its uniform is below the block's probability."""
    torch.manual_seed(0)
    model = ARCHS[arch](num_classes=3, drop_path=0.7).train()
    uniforms = torch.rand(12, model.blocks)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    assert len(blocks) == model.blocks
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    found = dropped(model, images, uniforms)
    assert torch.equal(torch.get_rng_state(), before)
    expected = uniforms < torch.tensor([block.drop_path for block in blocks])
    assert torch.equal(found, expected)
    assert 0 < int(expected.sum()) < expected.numel()


def test_evaluation_drops_nothing_and_zero_probability_draws_nothing() -> None:
    torch.manual_seed(0)
    plain = ARCHS["resnet20"](num_classes=3)
    torch.manual_seed(0)
    dropping = ARCHS["resnet20"](num_classes=3, drop_path=0.5)
    assert plain.state_dict().keys() == dropping.state_dict().keys()
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(plain.eval()(images), dropping.eval()(images))
    before = torch.get_rng_state()
    plain.train()(images)
    assert torch.equal(torch.get_rng_state(), before)
    dropping.train()(images)
    assert not torch.equal(torch.get_rng_state(), before)


def test_stochastic_depth_compiles() -> None:
    """There is no graph break, and a compiled block drops rows as often as an eager one."""
    block = BasicBlock(4, 4, 1, option_b)
    block.drop_path = 0.5
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(400, 4, 3, 3)
    with torch.no_grad():
        is_dropped = (compiled(x) == x.relu()).flatten(1).all(1)
    assert 150 < int(is_dropped.sum()) < 250


@pytest.mark.parametrize(("arch", "drop_path"), [("plain18", 0.1), ("plain20", 0.1), ("resnet18", 1.0), ("resnet18", -0.1)])
def test_impossible_stochastic_depth_is_refused(arch: str, drop_path: float) -> None:
    with pytest.raises(ValueError, match=r"drop_path must lie in \[0, 1\), and be 0 in a plain network"):
        ARCHS[arch](drop_path=drop_path)
    ARCHS["plain18"](drop_path=0.0)


@pytest.mark.parametrize("arch", BLURRED)
def test_a_blurred_models_weights_have_the_unblurred_keys_and_shapes(arch: str) -> None:
    """All strided convolutions are blurred except the first."""
    with torch.device("meta"):
        blurred, plain = ARCHS[arch](), ARCHS[arch.removesuffix("_blur")]()
    shapes, expected = ({name: value.shape for name, value in model.state_dict().items()} for model in (blurred, plain))
    assert list(shapes.items()) == list(expected.items())
    assert [name for name, _ in blurred.named_parameters()] == [name for name, _ in plain.named_parameters()]
    strided = [name for name, layer in plain.named_modules() if isinstance(layer, nn.Conv2d) and layer.stride[0] > 1]
    assert [name for name, layer in blurred.named_modules() if isinstance(layer, BlurredConv2d)] == strided[1:]
    assert len(strided) == 7
    assert len(BLURRED) == 5


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (1, 2, 0), (1, 3, 0), (3, 1, 1)])
@pytest.mark.parametrize("sides", [(8, 8), (7, 10)])
def test_a_blurred_convolution_equals_scipys_blur_and_a_convolution(
    kernel: int, stride: int, padding: int, sides: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 5, kernel, stride, padding, bias=False)
    x = torch.randn(2, 16, *sides)
    blurred = np.stack([[convolve2d(channel, KERNEL, "same") for channel in image] for image in x.double().numpy()])
    padded = np.pad(blurred, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    places = sliding_window_view(padded, (kernel, kernel), (2, 3))[:, :, ::stride, ::stride]
    expected = np.einsum("nchwij,ocij->nohw", places, conv.weight.detach().double().numpy())
    np.testing.assert_allclose(BlurredConv2d(conv)(x).detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_blurred_model_equals_ffcv_imagenets(block: type[Block]) -> None:
    """The reference is an unblurred model with hooks that blur the inputs of strided convolutions, as ffcv-imagenet's
    BlurPoolConv2d does."""
    arch = "resnet18" if block is BasicBlock else "resnet50"
    torch.manual_seed(3)
    plain = ARCHS[arch](num_classes=4).eval()
    torch.manual_seed(3)
    model = ARCHS[f"{arch}_blur"](num_classes=4).eval()
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in model.state_dict().items())
    kernel = torch.from_numpy(KERNEL).float()[None, None]

    def blurred(layer: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        channels = inputs[0].shape[1]
        return F.conv2d(inputs[0], kernel.repeat(channels, 1, 1, 1), padding=1, groups=channels)

    for layer in plain.modules():
        if isinstance(layer, nn.Conv2d) and layer.stride[0] > 1 and layer.in_channels >= 16:
            layer.register_forward_pre_hook(blurred)
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(images), rtol=1e-4, atol=1e-5)
        before = plain(images)
    assert not torch.allclose(ARCHS[arch](num_classes=4).eval()(images), before, atol=1e-2)


def test_the_file_name_decides_whether_a_model_is_blurred(tmp_path: Path) -> None:
    """Both kinds of models have the same keys and shapes, so the file's name or header decides."""
    assert [arch_of_name(name) for name in ("resnet50-0676ba61.pth", "resnet50_blur.pth")] == ["resnet50", "resnet50_blur"]
    model = ARCHS["resnet18"](num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "resnet18-1234abcd.pth")
    loaded, config = load_model(tmp_path / "resnet18-1234abcd.pth", None, None)
    blurred, other = load_model(tmp_path / "resnet18-1234abcd.pth", "resnet18_blur", None)
    assert (config.arch, other.arch) == ("resnet18", "resnet18_blur")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), model(images))
        assert not torch.allclose(blurred.eval()(images), model(images), atol=1e-3)


def test_a_blurred_models_output_changes_less_when_the_image_is_shifted() -> None:
    """This is the purpose of BlurPool in Zhang 2019. Compares logits before and after a shift by one pixel."""
    torch.manual_seed(0)
    noise = F.avg_pool2d(torch.randn(8, 3, 100, 100), 5, 1)  # as smooth as natural images
    changes = {}
    for arch in ("resnet18", "resnet18_blur"):
        torch.manual_seed(1)
        model = ARCHS[arch](num_classes=10).train()  # batch statistics, as the weights are random
        with torch.no_grad():
            logits = [model(noise[:, :, shift : shift + 64, shift : shift + 64]) for shift in (16, 17)]
        changes[arch] = float((logits[0] - logits[1]).norm() / logits[0].norm())
    assert changes["resnet18_blur"] < 0.9 * changes["resnet18"]


def test_multiply_adds_of_blur_are_counted() -> None:
    """Nine for each blurred pixel and channel. A 3x3 convolution needs all input pixels blurred, a 1x1 only as many as it
    outputs."""
    hand = 0
    for channels, side in ((64, 56), (128, 28), (256, 14)):
        hand += 9 * channels * side**2 + 9 * channels * (side // 2) ** 2
    assert describe("resnet18_blur").multiply_adds - describe("resnet18").multiply_adds == hand
    assert describe("resnet18_blur").parameters == describe("resnet18").parameters


def test_a_blurred_model_trains_in_bfloat16_and_channels_last() -> None:
    model = ARCHS["resnet18_blur"](num_classes=2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        model(images).float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.to(torch.bfloat16)(images.bfloat16()).dtype == torch.bfloat16
