"""Weight files: safetensors written whole or not at all; .pth, .pt and .bin read safely.

Our files hold torchvision's keys and nothing else; how to feed the net stands in the header's strings (see `ModelConfig`), so
that a file moved elsewhere can still be evaluated.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pipeline.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """How a net was made and is fed.

    arch: its name in ARCHS. classes: their names in label order; none where nobody told them. image_size: the crop's side,
    pixels. eval_short: the short side in evaluation, pixels. mean: float32 (3,) or (H, W, 3) and std: float32 (3,), in units of
    0..255.
    """

    arch: str
    classes: list[str]
    image_size: int
    eval_short: int
    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]

    def header(self) -> dict[str, str]:
        return {
            "arch": self.arch,
            "classes": json.dumps(self.classes),
            "image_size": str(self.image_size),
            "eval_short": str(self.eval_short),
            "mean": _pack(self.mean),
            "std": _pack(self.std),
        }

    @staticmethod
    def from_header(header: dict[str, str]) -> ModelConfig | None:
        """The recipe in a file's header, None where there is none. Raises UserError for a damaged one."""
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
            )
        except (KeyError, ValueError, TypeError, zlib.error) as error:
            raise UserError(f"damaged header of a weight file ({error}); give another file") from error


def _pack(array: npt.NDArray[np.float32]) -> str:
    data = zlib.compress(np.ascontiguousarray(array, "<f4").tobytes())
    return json.dumps([list(array.shape), base64.b64encode(data).decode()])


def _unpack(text: str) -> npt.NDArray[np.float32]:
    shape, data = json.loads(text)
    return np.frombuffer(zlib.decompress(base64.b64decode(data)), "<f4").reshape(shape).copy()


def save_weights(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write `state` to `path` under a temporary name, then rename. metadata: strings kept in the file's header."""
    temporary = path.with_name(path.name + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, metadata)
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)


# What a state dict is wrapped in, most wanted first: a moving average of the weights, where there is one, is what is evaluated.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel (and AveragedModel), of torch.compile


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by torchvision's key names, float32 (counts int64) on the CPU, and the header's strings (none but in safetensors).

    A .pth, .pt or .bin is read with weights_only and may hold the state dict itself or a checkpoint with it: an exponential
    moving average ("state_dict_ema", "model_ema") is taken before "state_dict" and "model", as timm does in evaluation. The
    prefixes "module." and "_orig_mod." before keys are taken off. Raises UserError for a file that cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            return _as_float32(load_file(path)), metadata
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); give a .safetensors or .pth file") from error
    except Exception as error:  # pickle.UnpicklingError and its kin
        raise UserError(f"{path}: holds more than tensors, or is damaged; give a file of weights alone") from error
    state = _unwrapped(content)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict; give a file of weights")
    names = {_without_prefixes(str(name)): tensor for name, tensor in state.items()}
    names.pop("n_averaged", None)  # AveragedModel's count, beside its "module." keys
    return _as_float32(names), {}


def _unwrapped(content: Any) -> Any:
    for _ in range(4):  # wrappers in wrappers; a pickle can also hold itself
        found = [content[name] for name in _WRAPPERS if isinstance(content, dict) and isinstance(content.get(name), dict)]
        if not found:
            break
        content = found[0]
    return content


def _without_prefixes(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _as_float32(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
