"""Makes models from the names of architectures: those in `model.resnet.ARCHS`, and timm/NAME for the models of the package timm.

timm is imported only for such names. It is in the extra `timm`.
"""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any, cast

from torch import nn

from model.resnet import ARCHS
from pipeline.errors import UserError

PREFIX = "timm/"


def check_arch(arch: str) -> None:
    """Raise UserError unless `make_model` can make this model."""
    if arch.startswith(PREFIX):
        timm_cfg(arch)
    elif arch not in ARCHS:
        raise UserError(f"unknown `arch` {arch!r}", f"choose from {', '.join(ARCHS)}, or timm/NAME for a model of timm")


def bare_name(arch: str) -> str:
    """The name without timm/ and without the tag of timm's weights: resnet50 for timm/resnet50.a1_in1k."""
    return arch.removeprefix(PREFIX).partition(".")[0]


@cache
def timm_cfg(arch: str) -> dict[str, Any]:
    """timm's default_cfg of timm/NAME, or of timm/NAME.TAG for certain weights. Raises UserError if there is none, or no timm."""
    try:
        import timm
    except (ImportError, RuntimeError, OSError) as error:  # without torchvision, or with one for another torch
        raise UserError(f"`arch` {arch} needs timm, which cannot be imported ({error})", "pip install -e '.[timm]'") from error
    name = arch.removeprefix(PREFIX)
    if not timm.is_model(bare_name(arch)):
        close = difflib.get_close_matches(name, timm.list_models(), 3, 0.4)
        raise UserError(f"`arch` {arch}: timm {timm.__version__} has no such model", f"choose from {', '.join(close)}, ...")
    try:
        cfg: dict[str, Any] = timm.get_pretrained_cfg(name).to_dict()
    except (RuntimeError, AttributeError) as error:  # an unknown tag; no cfg
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{bare_name(arch)}.*")]
        raise UserError(f"`arch` {arch}: timm knows no such weights", f"choose from the tags {', '.join(tags)}") from error
    channels, height, width = cfg["input_size"]
    if channels != 3 or height != width:
        raise UserError(f"`arch` {arch} takes {channels} x {height} x {width} images, not square ones in RGB", "choose another")
    return cfg


def make_model(arch: str, classes: int | None = None, drop_path: float = 0.0, image_size: int | None = None) -> nn.Module:
    """A new model with random weights.

    classes: outputs; by default as many as the architecture has. drop_path: stochastic depth, for models of `model.resnet`.
    image_size: side of the images, pixels; only models for one size need it. Models have the attributes num_classes and
    num_features, the inputs of the classifier. Raises UserError.
    """
    check_arch(arch)
    options: dict[str, Any] = {"num_classes": classes} if classes else {}
    if not arch.startswith(PREFIX):
        return ARCHS[arch](**options, **({"drop_path": drop_path} if drop_path else {}))
    import timm

    if image_size and image_size != image_size_of(arch) and has_one_size(arch):
        options["img_size"] = image_size
    try:
        return cast(nn.Module, timm.create_model(arch.removeprefix(PREFIX), **options))
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        if "img_size" not in options:
            raise
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{arch} cannot be made for images of {image_size} pixels ({why})", f"use {image_size_of(arch)}"
        ) from error


def classes_of(model: nn.Module) -> int:
    """The number of outputs."""
    return cast(int, model.num_classes)


def image_size_of(arch: str) -> int:
    """The side of the images that an architecture is designed for, pixels."""
    if arch.startswith(PREFIX):
        return int(timm_cfg(arch)["input_size"][1])
    return 32 if ARCHS[arch].keywords.get("small") else 224


def has_one_size(arch: str) -> bool:
    """Whether a model takes images of one size only, as most vision transformers do. Others take any height and width."""
    return arch.startswith(PREFIX) and bool(timm_cfg(arch).get("fixed_input_size"))


def classifiers_of(arch: str) -> tuple[str, ...]:
    """The names of the last layer, in state dicts; distilled models have two. Empty if it is unknown."""
    names = timm_cfg(arch).get("classifier") or () if arch.startswith(PREFIX) else "fc"
    return (names,) if isinstance(names, str) else tuple(names)
