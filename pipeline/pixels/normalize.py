"""The last steps from 8-bit pixels to a batch: whole-pixel shift, PCA lighting, normalization.

The result is `(pixels + lighting - mean) / std`, computed in float32 without clipping, and rounded once to the batch's dtype.
There are three implementations: `Normalizer`, compiled for the CPU, in one pass without the GIL; `normalize_tensor`, on torch
tensors on any device; and `fused.normalize_fused`, its equal in one kernel for GPUs. `normalize_on_device` chooses one of them.

Sources: PCA lighting is Krizhevsky et al., "ImageNet classification with deep convolutional neural networks", section 4.1;
per-pixel mean subtraction He et al., "Deep residual learning for image recognition", section 3.4.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from PIL import Image

from ..jit import jit

if TYPE_CHECKING:  # imported where it is used: the converter's worker processes do not need it
    import torch

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

log = logging.getLogger("cropfeed")

# The NumPy types that represent torch's in compiled code. NumPy has no bfloat16, and numba hardly supports float16.
_STORED: dict[str, np.dtype[Any]] = {
    "torch.float32": np.dtype(np.float32),
    "torch.float16": np.dtype(np.int16),
    "torch.bfloat16": np.dtype(np.uint16),
}


def stored_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """The NumPy type in which images of a torch dtype are stored: integers with the bit patterns for float16 and bfloat16."""
    return _STORED.get(str(dtype), np.dtype(np.uint8))


@dataclass(frozen=True)
class Normalization:
    """The mean to subtract and the standard deviation to divide by, for pixels in 0..255.

    mean: float32 (3,) per channel or (H, W, 3) per pixel. std: float32 (3,); ones if the recipe does not divide.
    """

    mean: Floats
    std: Floats

    @staticmethod
    def of(mean: Any, std: Any = (1.0, 1.0, 1.0)) -> Normalization:
        return Normalization(np.ascontiguousarray(mean, np.float32), np.ascontiguousarray(std, np.float32))

    def at(self, size: int) -> Normalization:
        """The same for size x size crops: a per-pixel mean is resized (bilinear), a per-channel mean stays as it is."""
        if self.mean.ndim == 1 or self.mean.shape[:2] == (size, size):
            return self
        planes = [
            np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BILINEAR))
            for plane in self.mean.transpose(2, 0, 1)
        ]
        return Normalization(np.ascontiguousarray(np.stack(planes, axis=-1)), self.std)

    def per_channel(self) -> Normalization:
        """The same with a mean per channel, averaged over the pixels of a per-pixel mean."""
        return Normalization(self.mean.reshape(-1, 3).mean(axis=0), self.std)


# The normalization of torchvision's published weights: ImageNet's channel mean and standard deviation, times 255.
TORCHVISION = Normalization.of(
    np.array([0.485, 0.456, 0.406], np.float32) * 255, np.array([0.229, 0.224, 0.225], np.float32) * 255
)


def lighting_basis(covariance: npt.ArrayLike) -> Floats:
    """The matrix B of the lighting shift B @ alphas, float32 (3, 3), in units of 0..255 (Krizhevsky et al. 2012, section 4.1).

    covariance: (3, 3), of RGB values in 0..1. B's columns are its eigenvectors, each times its eigenvalue times 255. As in every
    published implementation, the eigenvalue is used, not its square root. ImageNet's eigenvalues are 0.2175, 0.0188, 0.0045.
    """
    values, vectors = eigenbasis(covariance)
    return np.ascontiguousarray(vectors * values * 255.0, np.float32)


def eigenbasis(covariance: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Eigenvalues (3,), largest first, and eigenvectors (3, 3) as columns, each with its largest component positive."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    values, vectors = values[::-1].clip(min=0.0), vectors[:, ::-1]
    largest = np.abs(vectors).argmax(axis=0)
    return values, vectors * np.sign(vectors[largest, np.arange(3)])


def lighting(alphas: Floats, basis: Floats) -> Floats:
    """The lighting shift of N images, float32 (N, 3), in units of 0..255. alphas: (N, 3). basis: from `lighting_basis`."""
    # Not by BLAS, whose last bits depend on N, so on how images are divided into batches.
    return alphas[:, :1] * basis[:, 0] + alphas[:, 1:2] * basis[:, 1] + alphas[:, 2:] * basis[:, 2]


def translate(images: Pixels, shift: npt.NDArray[np.int64]) -> Pixels:
    """Move V images, uint8 (V, H, W, 3), by whole pixels. The uncovered border is 0 before the mean is subtracted, as with
    torchvision's padding. shift: int64 (V, 2), down and right, smaller than the images.
    """
    height, width = images.shape[1:3]
    moved = np.zeros_like(images)
    for image, out, (down, right) in zip(images, moved, shift.tolist(), strict=True):
        rows, columns = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
        out[rows, columns] = image[max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)]
    return moved


def translate_tensor(pixels: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`translate` on the tensors' device, without waiting for the device. pixels: uint8 (V, H, W, 3). shift: int64 (V, 2)."""
    import torch

    height, width = pixels.shape[1:3]
    views = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    rows = torch.arange(height, device=pixels.device) - shift[:, :1]  # (V, H): the source row of each row
    columns = torch.arange(width, device=pixels.device) - shift[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    moved = pixels[views, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    return moved * inside[..., None]


def normalize_tensor(
    pixels: torch.Tensor, shift: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Lighting and normalization of a batch, on the tensors' device: uint8 (N, H, W, 3) to channels-last `dtype` (N, 3, H, W).

    shift: float32 (N, 3). mean: float32 (3,) or (H, W, 3). std: float32 (3,). Computed in float32, rounded once.
    """
    images = (pixels.float() + shift[:, None, None, :] - mean) / std
    return images.to(dtype).permute(0, 3, 1, 2)


_fused_fails = False  # known after the first batch


def normalize_on_device(
    pixels: torch.Tensor, shift: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`normalize_tensor` by `normalize_fused` for CUDA tensors, or for any under TRITON_INTERPRET=1.

    Where Triton is missing or fails, this is logged once, and `normalize_tensor` is used from then on.
    """
    global _fused_fails
    import torch

    if not _fused_fails and (pixels.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        try:
            from .fused import normalize_fused

            return normalize_fused(pixels, shift, mean, std, dtype)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers and drivers raise all kinds
            _fused_fails = True
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            log.warning("lighting and normalization run slower, in several kernels, because Triton does not work: %s", reason)
    return normalize_tensor(pixels, shift, mean, std, dtype)


@intrinsic
def _to_half(typing: Any, value: Any) -> Any:
    """Convert a float32 to the bits of the nearest float16, as int16."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), codegen


def _store(row: Any, out: Any) -> None:
    """Convert a row of float32 to a row of a `stored_dtype`. Only for compiled code, see `_compile_store`."""
    raise NotImplementedError


@overload(_store)
def _compile_store(row: Any, out: Any) -> Any:
    def to_float32(row: Any, out: Any) -> None:
        for i in range(len(row)):
            out[i] = row[i]

    def to_float16(row: Any, out: Any) -> None:
        for i in range(len(row)):
            out[i] = _to_half(row[i])

    def to_bfloat16(row: Any, out: Any) -> None:
        """Round to nearest, ties to even: bfloat16 is the upper half of float32."""
        bits = row.view(np.uint32)
        for i in range(len(row)):
            out[i] = (bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)

    return {types.float32: to_float32, types.int16: to_float16, types.uint16: to_bfloat16}[out.dtype]


@jit
def _normalize(pixels: Any, shift: Any, mean: Any, inverse: Any, out: Any) -> None:
    """Normalize V images. pixels: uint8 (V, H, W, 3). shift: float32 (V, 3). mean: float32 (H or 1, W * 3).

    inverse: float32 (W * 3,), 1 / std. out: (V, H, W, 3) of a `stored_dtype`.
    """
    images, height, width, _ = pixels.shape
    row = np.empty(3 * width, np.float32)
    shifts = np.empty(3 * width, np.float32)
    for image in range(images):
        for x in range(width):
            for channel in range(3):
                shifts[3 * x + channel] = shift[image, channel]
        for y in range(height):
            source, means = pixels[image, y].reshape(-1), mean[y if len(mean) > 1 else 0]
            for i in range(3 * width):
                row[i] = (np.float32(source[i]) + shifts[i] - means[i]) * inverse[i]
            _store(row, out[image, y].reshape(-1))


class Normalizer:
    """Lighting and normalization on the CPU, for images of one size. Thread-safe."""

    def __init__(self, normalization: Normalization, width: int) -> None:
        """normalization: at the images' size. width: of the images, pixels."""
        mean = normalization.mean
        self._mean = np.tile(mean, width)[None] if mean.ndim == 1 else mean.reshape(len(mean), -1)
        self._inverse = np.tile(1 / normalization.std, width).astype(np.float32)

    def __call__(self, pixels: Any, shift: Floats, out: Any) -> None:
        """pixels: uint8 (V, H, W, 3). shift: float32 (V, 3), lighting. out: (V, H, W, 3) of a `stored_dtype`."""
        _normalize(pixels, shift, self._mean, self._inverse, out)
