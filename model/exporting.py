"""Export of models as graphs that other programs can run: ONNX and torch.export, both with raw pixels as input.

Input "images": uint8 (N, 3, H, W), RGB, decoded, resized and cropped. The graph subtracts the config's mean and divides by its
standard deviation. Output "logits": float32 (N, classes). N is dynamic. H and W are dynamic, too, because the models are fully
convolutional. If the config has a mean image, H and W are fixed to image_size, because a mean image fits only crops of that size.
They are fixed for timm's models, too: some of them take one size only.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.export import Dim

from model.resnet import ResNet
from model.weights import ModelConfig
from pipeline.errors import UserError
from pipeline.pixels.normalize import Normalization

TOLERANCE = 1e-4  # for differences from torch's logits, relative to the largest one: float32 sums in another order
_NEEDS = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "safetensors": ("huggingface_hub",)}


def check_packages(formats: Sequence[str]) -> None:
    """Raise UserError if a package that these formats need is missing."""
    missing = [name for form in formats for name in _NEEDS.get(form, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"exporting needs {', '.join(missing)}", "pip install -e '.[export]'")


class ExportedModel(nn.Module):
    """A model with its normalization, in evaluation mode. forward: uint8 (N, 3, H, W) -> logits float32 (N, classes).

    net: the model. Graphs name its weights `net.*`.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        normalization = Normalization.of(config.mean, config.std).at(config.image_size)
        mean = torch.from_numpy(normalization.mean)
        self.takes_one_size = mean.ndim == 3 or not isinstance(model, ResNet)
        self.net = model
        self.register_buffer("mean", mean.permute(2, 0, 1).contiguous() if mean.ndim == 3 else mean.view(3, 1, 1))
        self.register_buffer("std", torch.from_numpy(normalization.std).view(3, 1, 1))
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.net((images.float() - self.mean) / self.std))


def export_onnx(model: nn.Module, config: ModelConfig, path: Path) -> float:
    """Write one ONNX file. Its metadata holds arch, classes, image_size and eval_short.

    Returns the largest difference between ONNX Runtime's logits and torch's. Raises UserError if it exceeds TOLERANCE.
    """
    import onnx
    import onnxruntime

    exported = ExportedModel(model, config)
    # The traced images' last feature map must have more than one pixel, otherwise the exporter would assume exactly one.
    side = config.image_size if exported.takes_one_size else max(config.image_size, 64)
    names = {0: "batch"} if exported.takes_one_size else {0: "batch", 2: "height", 3: "width"}
    with _quiet():
        program = torch.onnx.export(
            exported,
            (_pixels(2, side, side),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": names},
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props.update(_metadata(config))
        program.save(path, external_data=False)
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return _greatest_difference(exported, run, config.image_size, not exported.takes_one_size, "the ONNX graph")


def export_program(model: nn.Module, config: ModelConfig, path: Path) -> float:
    """Write a torch.export program (.pt2). Its extra file recipe.json holds the same metadata as the ONNX file.

    Returns the largest difference between the logits of the program, loaded from the file, and torch's; raises UserError as
    `export_onnx` does. H and W are dynamic as long as the last feature map has more than one pixel (from 33 pixels on, for CIFAR
    models from 5 on). If it has one pixel at image_size, torch.export fixes H and W to image_size.
    """
    exported, side = ExportedModel(model, config), config.image_size
    fixed = exported.takes_one_size or _last_map(exported, side) == 1
    dynamic = {0: Dim("batch")} if fixed else {0: Dim("batch"), 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with _quiet():
        program = torch.export.export(exported, (_pixels(2, side, side),), dynamic_shapes={"images": dynamic})
        torch.export.save(program, path, extra_files={"recipe.json": json.dumps(_metadata(config))})
        run = torch.export.load(path).module()
    return _greatest_difference(exported, run, side, not fixed, "the torch.export program")


def _metadata(config: ModelConfig) -> dict[str, str]:
    header = config.header()
    return {name: header[name] for name in ("arch", "classes", "image_size", "eval_short")}


def _pixels(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


@torch.inference_mode()
def _last_map(exported: ExportedModel, side: int) -> int:
    """The side of the last feature map, pixels, for images of `side` pixels."""
    found: list[int] = []
    hook = exported.net.get_submodule("avgpool").register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].shape[-1]))
    exported(_pixels(1, side, side))
    hook.remove()
    return found[0]


@torch.inference_mode()
def _greatest_difference(
    exported: ExportedModel, run: Callable[[torch.Tensor], torch.Tensor], side: int, any_shape: bool, name: str
) -> float:
    """The largest difference between logits, for batches of one and three images and, with any_shape, for a batch of another
    height and width. Raises UserError above TOLERANCE."""
    shapes = [(1, side, side), (3, side, side), *([(2, side + 32, side + 7)] if any_shape else [])]
    greatest = 0.0
    for shape in shapes:
        images = _pixels(*shape)
        expected = exported(images)
        difference = float((run(images) - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):  # catches NaN, too
            raise UserError(
                f"the logits of {name} differ from torch's by up to {difference:.2g}",
                "do not use it; report this as a bug",
            )
        greatest = max(greatest, difference)
    return greatest


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences messages of torch's exporters, such as that torchvision is missing, which they do not need."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
