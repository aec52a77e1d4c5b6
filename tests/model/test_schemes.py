"""Testing schemes: the fully convolutional form, scales, averages, means. On shards: tests/tools/test_evaluate_schemes.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model import ARCHS
from model.schemes import SCALES, MultiViewClassifier, view_specs_of
from model.weights import ModelConfig
from pipeline.engines.multiview import MultiViewBatch, ViewSpec
from pipeline.plan.geometry import CentreCrop, TenCrop, WholeImage

MEAN = np.random.default_rng(0).uniform(80, 160, (32, 32, 3)).astype(np.float32)
STD = np.array([50, 60, 70], np.float32)
CONFIG = ModelConfig("resnet18", ["a", "b", "c"], 32, 36, MEAN, STD)


class MeanColour(nn.Module):
    """A model that returns an image's mean colour as logits, and records the shape of every input."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        return x.mean(dim=(2, 3))


def pixels(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("sides", [(64, 64), (75, 131), (224, 97)])
def test_models_are_fully_convolutional(arch: str, sides: tuple[int, int]) -> None:
    """A forward pass equals the classifier applied as a 1x1 convolution to the last feature map, averaged over positions."""
    torch.manual_seed(0)
    model = ARCHS[arch](num_classes=5).eval()
    images = torch.randn(2, 3, *sides)
    maps: list[torch.Tensor] = []
    model.get_submodule("layer4").register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.inference_mode():
        logits = model(images)
        scores = F.conv2d(maps[0], model.fc.weight[:, :, None, None], model.fc.bias)
    assert scores.shape == (2, 5, -(-sides[0] // 32), -(-sides[1] // 32))
    torch.testing.assert_close(logits, scores.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


def test_schemes_have_the_papers_views() -> None:
    full = ModelConfig("resnet18", [], 224, 256, MEAN, STD)
    assert view_specs_of("centre", full) == {"centre": ViewSpec(CentreCrop(256), 224)}
    assert view_specs_of("ten-crop", full) == {"ten-crop": ViewSpec(TenCrop(256), 224)}
    assert SCALES == (224, 256, 384, 480, 640)
    whole = [view.geometry for view in view_specs_of("multi-scale", full).values()]
    assert whole == [WholeImage(short, mirrored=True) for short in SCALES]
    half = ModelConfig("resnet18", [], 64, 73, MEAN, STD)
    assert list(view_specs_of("multi-scale", half)) == ["scale-64", "scale-73", "scale-110", "scale-137", "scale-183"]
    assert list(view_specs_of("multi-scale", half, [90, 70])) == ["scale-90", "scale-70"]


def test_probabilities_are_averages_of_softmax_over_crops_mirror_images_and_scales() -> None:
    model = MeanColour()
    classifier = MultiViewClassifier("model", model, CONFIG, ["centre", "ten-crop", "multi-scale"], [40, 50])
    centre, ten, low, high = classifier.view_specs
    images = {centre: pixels(4, 32, 32), ten: pixels(40, 32, 32), low: pixels(8, 40, 60), high: pixels(8, 50, 75)}
    found = classifier.probabilities(MultiViewBatch(images, torch.zeros(4, dtype=torch.int64), np.arange(4)))

    def plain(view: ViewSpec, mean: np.ndarray) -> np.ndarray:
        logits = ((images[view].numpy().astype(np.float64) - mean) / STD).mean(axis=(1, 2))
        exponentials = np.exp(logits)
        return (exponentials / exponentials.sum(axis=1, keepdims=True)).reshape(4, -1, 3).mean(axis=1)

    channels = MEAN.mean(axis=(0, 1))  # a mean image fits only crops
    expected = {"centre": plain(centre, MEAN), "ten-crop": plain(ten, MEAN)}
    expected |= {"scale-40": plain(low, channels), "scale-50": plain(high, channels)}
    expected["multi-scale"] = (expected["scale-40"] + expected["scale-50"]) / 2
    assert found.keys() == expected.keys()
    for name, probabilities in found.items():
        assert probabilities.dtype == torch.float32
        np.testing.assert_allclose(probabilities.numpy(), expected[name], atol=1e-5)
    assert not np.allclose(expected["ten-crop"], expected["centre"], atol=1e-3)


def test_no_forward_pass_has_more_pixels_than_a_batch_of_crops() -> None:
    found = []
    for batch_size in (1, 3, 1000):
        model = MeanColour()
        classifier = MultiViewClassifier("model", model, CONFIG, ["ten-crop", "multi-scale"], [32, 80], batch_size=batch_size)
        ten, low, high = classifier.view_specs
        images = {ten: pixels(20, 32, 32), low: pixels(4, 32, 40), high: pixels(4, 80, 100)}
        found.append(classifier.probabilities(MultiViewBatch(images, torch.zeros(2, dtype=torch.int64), np.arange(2))))
        assert sum(shape[0] for shape in model.shapes) == 28
        for count, _, height, width in model.shapes:
            assert count == 1 or count * height * width <= batch_size * 32 * 32
    assert len(model.shapes) == 3
    for other in found[1:]:
        for name, probabilities in other.items():
            torch.testing.assert_close(probabilities, found[0][name])


def test_images_have_the_requested_precision() -> None:
    kinds = []
    model = MeanColour()
    model.register_forward_pre_hook(lambda module, inputs: kinds.append((inputs[0].dtype, torch.is_autocast_enabled("cpu"))))
    for dtype in (torch.float32, torch.bfloat16):
        classifier = MultiViewClassifier("model", model, CONFIG, ["centre"], dtype=dtype)
        batch = MultiViewBatch({classifier.view_specs[0]: pixels(2, 32, 32)}, torch.zeros(2, dtype=torch.int64), np.arange(2))
        assert classifier.probabilities(batch)["centre"].dtype == torch.float32
    assert kinds == [(torch.float32, False), (torch.bfloat16, True)]
