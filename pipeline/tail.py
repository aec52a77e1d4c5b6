"""The colour tail on the CPU, compiled: what `augment.colour_tail` does in torch, in one pass without the GIL."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from pipeline.augment import Floats, Normalization
from pipeline.jit import jit

# What an array is to NumPy that torch sees in each dtype; NumPy has no bfloat16, numba hardly float16.
STORED: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.int16),
    torch.bfloat16: np.dtype(np.uint16),
}


@intrinsic
def _to_half(typing: Any, value: Any) -> Any:
    """float32 to the bits of the nearest float16, int16."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), codegen


def _store(row: Any, out: Any) -> None:
    """A row of float32 to a row in one of `STORED`'s types; compiled code only."""
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
        """Round to the nearest, ties to even: bfloat16 is float32's upper half."""
        bits = row.view(np.uint32)
        for i in range(len(row)):
            out[i] = (bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)

    return {types.float32: to_float32, types.int16: to_float16, types.uint16: to_bfloat16}[out.dtype]


@jit
def _tail(pixels: Any, shift: Any, mean: Any, inverse: Any, out: Any) -> None:
    """One picture. pixels: uint8 (H, W, 3). shift: float32 (3,). mean: float32 (H or 1, W * 3). inverse: float32 (W * 3,).

    out: (H, W, 3) of `STORED`.
    """
    height, width, _ = pixels.shape
    row = np.empty(3 * width, np.float32)
    shifts = np.empty(3 * width, np.float32)
    for x in range(width):
        shifts[3 * x], shifts[3 * x + 1], shifts[3 * x + 2] = shift[0], shift[1], shift[2]
    for y in range(height):
        source, means = pixels[y].reshape(-1), mean[y if len(mean) > 1 else 0]
        for i in range(3 * width):
            row[i] = (np.float32(source[i]) + shifts[i] - means[i]) * inverse[i]
        _store(row, out[y].reshape(-1))


class Tail:
    """The colour tail for pictures of one size. Used by many threads."""

    def __init__(self, normalization: Normalization, width: int) -> None:
        """normalization: at the pictures' size. width: of the pictures."""
        mean = normalization.mean
        self._mean = np.tile(mean, width)[None] if mean.ndim == 1 else mean.reshape(len(mean), -1)
        self._inverse = np.tile(1 / normalization.std, width).astype(np.float32)

    def __call__(self, pixels: Any, shift: Floats, out: Any) -> None:
        """pixels: uint8 (H, W, 3). shift: float32 (3,), the lighting's. out: (H, W, 3) in `STORED`'s dtype, gets the picture."""
        _tail(pixels, shift, self._mean, self._inverse, out)

    def batch(self, pixels: Any, shift: Floats, out: Any) -> None:
        """The same for V pictures: uint8 (V, H, W, 3), float32 (V, 3), (V, H, W, 3)."""
        for one in range(len(pixels)):
            self(pixels[one], shift[one], out[one])
