"""Weight files: safetensors, written atomically; .pth, .pt and .bin, read safely.

Cropfeed's files hold torchvision's keys and nothing else. Their header describes the model and its input (see `ModelConfig`), so
that a file can be evaluated without its run's folder.
"""

from __future__ import annotations

import base64
import json
import os
import re
import zlib
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from model.resnet import OPTION_A
from pipeline.errors import UserError, writing
from pipeline.progress import announce_if_slow
from pipeline.store.files import sync

# How images are resized before the crop: the short side to eval_short, as in `plan.sampling`; the same as torchvision rounds the
# long side; both sides to eval_short.
RESIZINGS = ("short", "torchvision", "square")
_OPTIONAL = ("resizing", "interpolation")
_BOTH_SIDES = "both sides"  # where option A's shortcuts pad, in headers


@dataclass(frozen=True)
class ModelConfig:
    """A model's architecture, classes and preprocessing.

    - arch: its name in ARCHS, or timm/NAME.
    - classes: their IDs (folder names, wnids) in label order; empty if unknown.
    - image_size: side of the crop, pixels.
    - eval_short: short side to which images are resized for evaluation, pixels. resizing: how, see RESIZINGS.
    - interpolation: as in `LoaderSpec`.
    - mean: float32 (3,), or (H, W, 3) for a mean image, in units of 0..255.
    - std: float32 (3,), in units of 0..255.
    - class_names: class -> its name for people, where the data has one.
    - pads_at_end: option A's shortcuts append all new channels, as in version 0.1. Headers of models with option A have a key
      that says where later versions pad; files without it are older.
    - origin: where the preprocessing comes from, for messages; not in headers.

    Headers have the keys resizing, interpolation and class_names only where they differ from the defaults.
    """

    arch: str
    classes: list[str]
    image_size: int
    eval_short: int
    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]
    class_names: dict[str, str] = field(default_factory=dict)
    resizing: str = "short"
    interpolation: str = "bilinear"
    pads_at_end: bool = False
    origin: str = "the file's header"

    @property
    def preprocessing(self) -> str:
        """The preprocessing for evaluation and its origin, in one line."""
        mean, std = (
            ", ".join(f"{value:.5g}" for value in values.reshape(-1, 3).mean(axis=0)) for values in (self.mean, self.std)
        )
        kind = "mean image of average" if self.mean.ndim == 3 else "mean"
        side = "both sides" if self.resizing == "square" else "short side"
        bicubic = " (bicubic)" if self.interpolation == "bicubic" else ""
        crop = f"{side} {self.eval_short}{bicubic}, crop {self.image_size}"
        return f"{crop}, {kind} ({mean}), std ({std}), from {self.origin}"

    def header(self) -> dict[str, str]:
        """The strings for a file's header."""
        header = {
            "arch": self.arch,
            "classes": json.dumps(self.classes),
            "image_size": str(self.image_size),
            "eval_short": str(self.eval_short),
            "mean": _pack(self.mean),
            "std": _pack(self.std),
        }
        header |= {name: getattr(self, name) for name in _OPTIONAL if getattr(self, name) != getattr(ModelConfig, name)}
        if self.class_names:
            header["class_names"] = json.dumps(self.class_names)
        if self.arch in OPTION_A and not self.pads_at_end:
            header["padding"] = _BOTH_SIDES
        return header

    @staticmethod
    def from_header(header: dict[str, str]) -> ModelConfig | None:
        """The config in a file's header; None if there is none. Raises UserError for a damaged header."""
        if "arch" not in header:
            return None
        try:
            return ModelConfig(
                header["arch"],
                json.loads(header["classes"]),
                int(header["image_size"]),
                int(header["eval_short"]),
                _unpack(header["mean"]),
                _unpack(header["std"]),
                json.loads(header.get("class_names", "{}")),
                **{name: header[name] for name in _OPTIONAL if name in header},
                pads_at_end=header["arch"] in OPTION_A and header.get("padding") != _BOTH_SIDES,
            )
        except (KeyError, ValueError, TypeError, zlib.error) as error:
            raise UserError(f"the header is damaged ({error})", "give another file") from error


def _pack(array: npt.NDArray[np.float32]) -> str:
    data = zlib.compress(np.ascontiguousarray(array, "<f4").tobytes())
    return json.dumps([list(array.shape), base64.b64encode(data).decode()])


def _unpack(text: str) -> npt.NDArray[np.float32]:
    shape, data = json.loads(text)
    return np.frombuffer(zlib.decompress(base64.b64decode(data)), "<f4").reshape(shape).copy()


def save_weights(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write `state` to `path` atomically, under a temporary name first. metadata: strings for the file's header. Raises
    StorageError if the disk is full or fails."""
    temporary = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            temporary.touch()  # with the mode that the user's umask gives; safetensors makes files that only their owner can read
            mode = temporary.stat().st_mode
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, metadata)
            with suppress(OSError):  # some file systems have no modes
                temporary.chmod(mode)
            with temporary.open("rb") as stream:
                sync(stream)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


# Types that training scripts save beside the weights: their arguments and metrics. Loading them runs no code of the file.
_SCALAR = np._core.multiarray.scalar  # type: ignore[attr-defined]
_HARMLESS: list[Any] = [
    Namespace, np.dtype, _SCALAR, (_SCALAR, "numpy.core.multiarray.scalar"), *(type(np.dtype(kind)) for kind in "?bBhHiIlLefd"),
]  # fmt: skip

# Keys of checkpoints that hold a state dict. The first one present wins: a moving average of the weights is what is evaluated.
_WRAPPERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model_state", "model", "net", "network",
    "weights", "params",
)  # fmt: skip
# From DistributedDataParallel (and AveragedModel), torch.compile, Lightning, self-supervised learning, and transformers.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "timm_model.")


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A file's state dict, float32 (BN's batch counters int64) on the CPU, and the strings of its header (safetensors only).

    A .pth, .pt, .th, .bin or .pth.tar is read with weights_only. It may hold the state dict itself or a checkpoint that contains
    it: an exponential moving average takes precedence, as in timm's evaluation. If the checkpoint names the architecture, the
    header has it as "checkpoint_arch". Wrappers' prefixes are removed from keys. Raises UserError for a file that cannot be read.
    """
    header: dict[str, str] = {}
    try:
        path.open("rb").close()  # safetensors calls a file that this user may not read missing
        with announce_if_slow(f"reading {path.stat().st_size / 1e9:.2g} GB from {path}"):
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    header = file.metadata() or {}
                content = load_file(path)
            else:
                with torch.serialization.safe_globals(_HARMLESS):
                    content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason})", "give a .safetensors or .pth file") from error
    except Exception as error:  # pickle.UnpicklingError and related errors
        blocked = _blocked(path)
        what = f"holds objects of {', '.join(blocked)}" if blocked else "holds more than tensors, or is damaged"
        raise UserError(f"{path}: {what}", "give a file that holds only weights") from error
    if isinstance(content, dict) and isinstance(content.get("arch"), str):
        header["checkpoint_arch"] = content["arch"]
    return _as_float32(_plain_names(_unwrapped(content), path)), header


def _plain_names(state: Any, path: Path) -> dict[str, torch.Tensor]:
    """A state dict without the prefixes of wrappers. Raises UserError if it is none, or if it holds several models."""
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict", "give a file of weights")
    has_head = any("backbone." in str(name) for name in state)  # OpenMMLab's names: backbone.conv1.weight, head.fc.weight
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        plain = str(name)
        while plain.startswith(_PREFIXES):
            plain = plain.split(".", 1)[1]
        plain = plain.removeprefix("head.") if has_head and plain.startswith("head.fc.") else plain
        if plain in found:
            raise UserError(f"{path}: holds several models ({name} is there twice)", "give a file with one of them")
        found[plain] = tensor
    found.pop("n_averaged", None)  # AveragedModel's counter, next to its "module." keys
    return found


def _blocked(path: Path) -> list[str]:
    """The types in a .pth file that weights_only refuses; empty if unknown."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # damaged, or of a format before torch 1.6
        return []


def _unwrapped(content: Any) -> Any:
    for _ in range(4):  # a limit, as a pickle can contain itself
        found = [content[name] for name in _WRAPPERS if isinstance(content, dict) and isinstance(content.get(name), dict)]
        if not found:
            break
        content = found[0]
    return content


def _as_float32(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def padded_on_both_sides(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a model whose option A appends all new channels (`ModelConfig.pads_at_end`), for padding on both sides.

    It is the same function: the channels between the blocks of each stage are in another order.
    """
    orders = [torch.arange(len(state["bn1.weight"]))]  # for each stage, the old number of each channel
    while (norm := state.get(f"layer{len(orders)}.0.bn2.weight")) is not None:
        new = torch.arange(len(orders[-1]), len(norm))
        orders.append(torch.cat([new[: len(new) // 2], orders[-1], new[len(new) // 2 :]]))
    found = dict(state)
    for name, tensor in state.items():
        if match := re.fullmatch(r"layer(\d+)\.(\d+)\.(conv1|conv2|bn2)\.\w+", name):
            stage, block, layer = int(match[1]), int(match[2]), match[3]
            if layer == "conv1":
                found[name] = tensor[:, orders[stage if block else stage - 1]]
            elif tensor.ndim:  # not the batch counter
                found[name] = tensor[orders[stage]]
    if "fc.weight" in state:
        found["fc.weight"] = state["fc.weight"][:, orders[-1]]
    return found
