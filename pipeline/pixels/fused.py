"""Lighting and normalization of a batch as one Triton kernel. Importing this module needs Triton, which torch for CUDA brings.

As separate operations of torch, they write and read the batch in float32 several times. Memory limits them all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # values of one program: 8 for each thread of 4 warps


@triton.jit
def _kernel(
    pixels: tl.tensor, shift: tl.tensor, mean: tl.tensor, std: tl.tensor, out: tl.tensor, per_image: tl.tensor,
    mean_image: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Normalize block consecutive values of one image. The arrays are contiguous. per_image: values of an image.

    Arrays may have more than 2**31 values. Integers of 64 bits, and divisions of integers, are slow, so they are of scalars only.
    out: int16 receives the bits of bfloat16.
    """
    blocks = tl.cdiv(per_image.to(tl.int64), block).to(tl.int32)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * block
    at = tl.arange(0, block)
    inside = at < tl.minimum(per_image - first, block).to(tl.int32)
    channel = ((first % 3).to(tl.int32) + at) % 3
    start = image * per_image + first
    value = tl.load(pixels + start + at, inside).to(tl.float32) + tl.load(shift + image * 3 + channel, inside)
    value -= tl.load(mean + first + at, inside) if mean_image else tl.load(mean + channel, inside)
    value = tl.div_rn(value, tl.load(std + channel, inside))  # the operator / is not exact on GPUs
    if out.dtype.element_ty == tl.int16:  # rounded here to nearest even: Triton's interpreter truncates
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        tl.store(out + start + at, tl.where(value == value, bits >> 16, 0x7FC0).to(tl.int16), inside)
    else:
        tl.store(out + start + at, value.to(out.dtype.element_ty), inside)


def normalize_fused(
    pixels: torch.Tensor, shift: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`normalize_tensor` in one kernel, with the same result to the bit. Raises what Triton raises where it does not work."""
    count, height, width, _ = pixels.shape
    mean_image = mean.ndim > 1
    arrays = (
        pixels, shift.expand(count, 3), mean.expand(height, width, 3) if mean_image else mean.expand(3), std.expand(3)
    )  # fmt: skip
    out = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
    per_image = height * width * 3
    with torch.cuda.device_of(pixels):  # Triton takes the current device; on a CPU (interpreted), this does nothing
        _kernel[(count * triton.cdiv(per_image, _BLOCK),)](
            *(array.contiguous() for array in arrays), out.view(torch.int16) if dtype == torch.bfloat16 else out, per_image,
            mean_image, _BLOCK,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2)
