"""Nets from weight files: which net a file holds, and how it is fed."""

from __future__ import annotations

from pathlib import Path

from model.resnet import ARCHS, ResNet
from model.weights import Recipe, load_weights
from pipeline.augment import TORCHVISION
from pipeline.errors import UserError


def weights_file(path: Path) -> Path:
    """The weights of a run's folder, or the file itself."""
    if path.is_file():
        return path
    for candidate in (path / "model.safetensors", path / "checkpoints" / "last" / "model.safetensors"):
        if candidate.is_file():
            return candidate
    raise UserError(f"{path}: no weights there; give a run's folder, a .safetensors or a .pth file")


def load_net(path: Path, arch: str | None, classes: list[str]) -> tuple[ResNet, Recipe]:
    """The net in a weight file and how to feed it, checked against the data's classes."""
    weights, header = load_weights(path)
    recipe = Recipe.from_header(header)
    if recipe is None:
        if arch is None:
            raise UserError(f"{path}: does not say which net it holds; give --arch")
        recipe = Recipe(arch, classes, 224, 256, TORCHVISION.mean, TORCHVISION.std)
    elif arch not in (None, recipe.arch):
        raise UserError(f"{path}: holds a {recipe.arch}, not --arch {arch}")
    if recipe.arch not in ARCHS:
        raise UserError(f"unknown --arch {recipe.arch!r}; choose from {', '.join(ARCHS)}")
    if "fc.weight" not in weights:
        raise UserError(f"{path}: holds no {recipe.arch} (no fc.weight)")
    outputs = len(weights["fc.weight"])
    if outputs != len(classes) or recipe.classes != classes:
        raise UserError(
            f"{path}: was trained on {outputs} classes, the data has {len(classes)} (or others); give the data it belongs to"
        )
    net = ARCHS[recipe.arch](num_classes=outputs)
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{path}: holds no {recipe.arch} ({str(error).splitlines()[1].strip()}); give the right --arch"
        ) from error
    return net, recipe
