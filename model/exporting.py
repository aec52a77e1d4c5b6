"""Nets as graphs that others can run: ONNX and torch.export, fed with plain pixels.

Input "images": uint8 (N, 3, H, W), RGB, as a decoder gives them once resized and cropped. The recipe's mean and deviation are
part of the graph. Output "logits": float32 (N, classes). N is free. H and W are free, too, as the nets are fully convolutional,
unless the recipe subtracts a mean image: that one belongs to the places of a crop, so H and W are then image_size.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from model.resnet import ResNet
from model.weights import ModelConfig
from pipeline.errors import UserError
from pipeline.pixels.normalize import Normalization

TOLERANCE = 1e-4  # of a graph's logits, against the greatest of torch's: float32, summed in another order
_NEEDS = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "safetensors": ("huggingface_hub",)}


def check_packages(formats: list[str]) -> None:
    """Raises UserError if a package that writing these formats takes is missing."""
    missing = [name for form in formats for name in _NEEDS.get(form, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"needs {', '.join(missing)}: pip install -e '.[export]'")


class ExportedModel(nn.Module):
    """A net behind its normalization, in evaluation mode. forward: uint8 (N, 3, H, W) -> logits float32 (N, classes)."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, net: ResNet, recipe: ModelConfig) -> None:
        super().__init__()
        normalization = Normalization.of(recipe.mean, recipe.std).at(recipe.image_size)
        mean = torch.from_numpy(normalization.mean)
        self.has_mean_image = mean.ndim == 3
        self.net = net
        self.register_buffer("mean", mean.permute(2, 0, 1).contiguous() if self.has_mean_image else mean.view(3, 1, 1))
        self.register_buffer("std", torch.from_numpy(normalization.std).view(3, 1, 1))
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net((images.float() - self.mean) / self.std)


def write_onnx(net: ResNet, recipe: ModelConfig, path: Path) -> float:
    """Write one ONNX file; the greatest difference of ONNX Runtime's logits from torch's. Raises UserError if it is too great.

    Its metadata names arch, classes, image_size and eval_short.
    """
    import onnx
    import onnxruntime

    served = ExportedModel(net, recipe)
    # Traced on pictures whose last feature map has more than one pixel, or that would be taken for granted.
    side = recipe.image_size if served.has_mean_image else max(recipe.image_size, 64)
    names = {0: "batch"} if served.has_mean_image else {0: "batch", 2: "height", 3: "width"}
    with _quiet():
        program = torch.onnx.export(
            served,
            (_pixels(2, side, side),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": names},
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props.update(_facts(recipe))
        program.save(path, external_data=False)
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return _greatest_difference(served, run, recipe.image_size, not served.has_mean_image, "the ONNX graph")


def write_program(net: ResNet, recipe: ModelConfig, path: Path) -> float:
    """Write a torch.export program (.pt2); the difference of what is read back, as `write_onnx` tells it.

    Its extra file recipe.json names what ONNX's metadata does. H and W are free as long as the last feature map has more than one
    pixel (from 33 on, for CIFAR's nets from 5); with one pixel at image_size they are image_size. torch.export insists on that.
    """
    served, side = ExportedModel(net, recipe), recipe.image_size
    fixed = served.has_mean_image or _last_map(served, side) == 1
    free = {0: Dim("batch")} if fixed else {0: Dim("batch"), 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with _quiet():
        program = torch.export.export(served, (_pixels(2, side, side),), dynamic_shapes={"images": free})
        torch.export.save(program, path, extra_files={"recipe.json": json.dumps(_facts(recipe))})
        run = torch.export.load(path).module()
    return _greatest_difference(served, run, side, not fixed, "the torch.export program")


def _facts(recipe: ModelConfig) -> dict[str, str]:
    header = recipe.header()
    return {name: header[name] for name in ("arch", "classes", "image_size", "eval_short")}


def _pixels(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


@torch.inference_mode()
def _last_map(served: ExportedModel, side: int) -> int:
    """The side of the last feature map of pictures of `side`, in pixels."""
    found: list[int] = []
    hook = served.net.avgpool.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].shape[-1]))
    served(_pixels(1, side, side))
    hook.remove()
    return found[0]


@torch.inference_mode()
def _greatest_difference(
    served: ExportedModel, run: Callable[[torch.Tensor], torch.Tensor], side: int, any_shape: bool, name: str
) -> float:
    """On one and on three pictures, and with any_shape on two of another shape. Raises UserError above TOLERANCE."""
    shapes = [(1, side, side), (3, side, side), *([(2, side + 32, side + 7)] if any_shape else [])]
    greatest = 0.0
    for shape in shapes:
        images = _pixels(*shape)
        expected = served(images)
        difference = float((run(images) - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):  # nor is it NaN
            raise UserError(f"{name} gives other logits than torch, by up to {difference:.2g}; do not use it, and report this")
        greatest = max(greatest, difference)
    return greatest


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters say about themselves."""
    logger: Any = logging.getLogger("torch.onnx._internal.exporter._registration")  # torchvision is missing, which is all right
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
