"""From JPEG coefficients to pixels, compiled: inverse DCT, chroma upsampling, color conversion. Bit-exact with libjpeg-turbo.

Sources: jidctint.c, jdsample.c and jdcolor.c of libjpeg-turbo 3. The inverse DCT and the color conversion are written as LLVM
vector instructions, through numba. LLVM vectorizes the other loops by itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..jit import Int, jit
from .region import Bytes, Ints

_CHUNK = 32  # pixels converted at a time
_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_ROW = ir.VectorType(_I32, 8)


def _splat(value: int) -> Any:
    return ir.Constant(_ROW, [value] * 8)


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Transpose 8 vectors of 8, by interleaving row i with row i + 4, three times."""
    low, high = (
        ir.Constant(ir.VectorType(_I32, 8), [lane for i in range(start, start + 4) for lane in (i, 8 + i)]) for start in (0, 4)
    )
    for _ in range(3):
        rows = [builder.shuffle_vector(rows[i], rows[i + 4], lanes) for i in range(4) for lanes in (low, high)]
    return rows


def _idct_pass(builder: Any, rows: list[Any], shift: int) -> list[Any]:
    """One dimension of jidctint.c's inverse DCT (Loeffler, Ligtenberg, Moschytz 1989), in all 8 lanes at once."""
    add, sub = builder.add, builder.sub

    def times(value: Any, constant: int) -> Any:
        return builder.mul(value, _splat(constant))

    z1 = times(add(rows[2], rows[6]), 4433)
    even2, even3 = add(z1, times(rows[6], -15137)), add(z1, times(rows[2], 6270))
    even0, even1 = (builder.shl(combine(rows[0], rows[4]), _splat(13)) for combine in (add, sub))
    even = [add(even0, even3), add(even1, even2), sub(even1, even2), sub(even0, even3)]

    t0, t1, t2, t3 = rows[7], rows[5], rows[3], rows[1]
    z1, z2, z3, z4 = add(t0, t3), add(t1, t2), add(t0, t2), add(t1, t3)
    z5 = times(add(z3, z4), 9633)
    z1, z2 = times(z1, -7373), times(z2, -20995)
    z3, z4 = add(times(z3, -16069), z5), add(times(z4, -3196), z5)
    odd = [
        add(times(t3, 12299), add(z1, z4)),
        add(times(t2, 25172), add(z2, z3)),
        add(times(t1, 16819), add(z2, z4)),
        add(times(t0, 2446), add(z1, z3)),
    ]
    half = _splat(1 << (shift - 1))
    even = [add(value, half) for value in even]
    sums = [add(e, o) for e, o in zip(even, odd, strict=True)] + [
        sub(e, o) for e, o in zip(reversed(even), reversed(odd), strict=True)
    ]
    return [builder.ashr(value, _splat(shift)) for value in sums]


def _idct_of(size: int) -> Any:
    """An inverse DCT for blocks that have coefficients only in the first `size` rows and columns. LLVM drops the terms that are
    zero."""

    def idct(typing: Any, block: Any, plane: Any, at: Any, stride: Any) -> Any:
        """Transform a block to 8 x 8 samples of a plane, and set the block to zero.

        block: int32 (64,), dequantized. plane: flat uint8. at: index of the first sample. stride: bytes from one row to the next.
        """

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            block, plane, at, stride = arguments
            read = context.make_array(signature.args[0])(context, builder, block).data
            write = context.make_array(signature.args[1])(context, builder, plane).data
            zeros = [_splat(0)] * (8 - size)
            rows = []
            for i in range(size):
                place = builder.bitcast(builder.gep(read, [_I64(8 * i)]), _ROW.as_pointer())
                rows.append(builder.load(place, align=4))
                builder.store(_splat(0), place, align=4)
            rows = _transposed(builder, _idct_pass(builder, rows + zeros, 13 - 2))
            rows = _transposed(builder, _idct_pass(builder, rows[:size] + zeros, 13 + 2 + 3))
            samples = ir.VectorType(_I8, 8)
            for row in rows:
                value = builder.add(row, _splat(128))
                value = builder.select(builder.icmp_signed("<", value, _splat(0)), _splat(0), value)
                value = builder.select(builder.icmp_signed(">", value, _splat(255)), _splat(255), value)
                target = builder.bitcast(builder.gep(write, [at]), samples.as_pointer())
                builder.store(builder.trunc(value, samples), target, align=1)
                at = builder.add(at, stride)
            return context.get_dummy_value()

        return types.void(block, plane, types.int64, types.int64), codegen

    return intrinsic(idct)


idct_8, idct_4, idct_2 = _idct_of(8), _idct_of(4), _idct_of(2)


@jit
def _widen(sums: npt.NDArray[np.uint16], count: Int, tall: bool, out: Bytes) -> None:
    """libjpeg's horizontal chroma upsampling (h2v1 and h2v2_fancy_upsample), a triangle filter. out: uint8 (2 * count,).

    sums: uint16 (count,), samples or, if `tall`, four times an interpolated row.
    """
    low, high, shift = (np.uint16(8), np.uint16(7), np.uint16(4)) if tall else (np.uint16(1), np.uint16(2), np.uint16(2))
    out[0] = np.uint16(sums[0] * 4 + low) >> shift
    out[1] = np.uint16(3 * sums[0] + sums[min(1, count - 1)] + high) >> shift
    before, here, after = sums[: count - 2], sums[1 : count - 1], sums[2:count]
    pairs = out[2 : 2 * count - 2]
    for x in range(len(here)):
        pairs[2 * x] = np.uint16(3 * here[x] + before[x] + low) >> shift
        pairs[2 * x + 1] = np.uint16(3 * here[x] + after[x] + high) >> shift
    if count > 1:
        out[2 * count - 2] = np.uint16(3 * sums[count - 1] + sums[count - 2] + low) >> shift
    out[2 * count - 1] = np.uint16(sums[count - 1] * 4 + high) >> shift


@jit
def _chroma_row(
    plane: Bytes,
    start: Int,
    stride: Int,
    y: Int,
    rows: Int,
    count: Int,
    wide: bool,
    tall: bool,
    sums: npt.NDArray[np.uint16],
    out: Bytes,
) -> None:
    """Upsample a chroma component to full resolution, for row y of the image.

    rows, count: height and width of the component, samples. wide, tall: whether these are halved. sums: scratch. out: uint8.
    """
    near = start + (y >> 1 if tall else y) * stride
    one = plane[near : near + count]
    if tall:
        far = start + min(max((y >> 1) + (1 if y & 1 else -1), 0), rows - 1) * stride
        other = plane[far : far + count]
        if wide:
            for x in range(count):
                sums[x] = np.uint16(3 * one[x]) + np.uint16(other[x])
            _widen(sums, count, True, out)
        else:
            bias = np.uint16(2 if y & 1 else 1)
            for x in range(count):
                out[x] = np.uint16(3 * one[x] + other[x] + bias) >> np.uint16(2)
    else:
        for x in range(count):
            sums[x] = one[x]
        _widen(sums, count, False, out)


@intrinsic
def _rgb_chunk(typing: Any, luma: Any, luma_at: Any, cb: Any, cb_at: Any, cr: Any, cr_at: Any, out: Any, out_at: Any) -> Any:
    """Convert `_CHUNK` pixels from YCbCr, in three flat uint8 arrays, to RGB. Rounded as in jdcolor.c, computed as in
    jdcolext-avx2.asm."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        add, sub = builder.add, builder.sub
        wide, wider = ir.VectorType(ir.IntType(16), _CHUNK), ir.VectorType(_I32, _CHUNK)

        def splat(value: int, vector: Any = wide) -> Any:
            return ir.Constant(vector, [value] * _CHUNK)

        def read(number: int, at: Any) -> Any:
            base = context.make_array(signature.args[number])(context, builder, arguments[number]).data
            place = builder.bitcast(builder.gep(base, [at]), ir.VectorType(_I8, _CHUNK).as_pointer())
            return builder.zext(builder.load(place, align=1), wide)

        def scaled(value: Any, factor: int) -> Any:
            """value * factor / 65536, rounded: twice its high half, plus one, halved."""
            product = builder.mul(builder.sext(add(value, value), wider), splat(factor, wider))
            high = builder.trunc(builder.ashr(product, splat(16, wider)), wide)
            return builder.ashr(add(high, splat(1)), splat(1))

        y, b, r = read(0, arguments[1]), sub(read(2, arguments[3]), splat(128)), sub(read(4, arguments[5]), splat(128))
        weighed = add(
            builder.mul(builder.sext(b, wider), splat(-22554, wider)), builder.mul(builder.sext(r, wider), splat(18734, wider))
        )
        green = builder.trunc(builder.ashr(add(weighed, splat(32768, wider)), splat(16, wider)), wide)
        channels = []
        for value in (add(scaled(r, 26345), r), sub(green, r), add(scaled(b, -14942), add(b, b))):
            value = add(y, value)
            value = builder.select(builder.icmp_signed("<", value, splat(0)), splat(0), value)
            value = builder.select(builder.icmp_signed(">", value, splat(255)), splat(255), value)
            channels.append(builder.trunc(value, ir.VectorType(_I8, _CHUNK)))
        lanes = ir.VectorType(_I32, 2 * _CHUNK)
        both = ir.Constant(lanes, list(range(2 * _CHUNK)))
        red_green, blue = (builder.shuffle_vector(first, second, both) for first, second in (channels[:2], channels[2:] * 2))
        order = [lane for x in range(_CHUNK) for lane in (x, _CHUNK + x, 2 * _CHUNK + x)]
        pixels = builder.shuffle_vector(red_green, blue, ir.Constant(ir.VectorType(_I32, 3 * _CHUNK), order))
        base = context.make_array(signature.args[6])(context, builder, arguments[6]).data
        place = builder.bitcast(builder.gep(base, [arguments[7]]), ir.VectorType(_I8, 3 * _CHUNK).as_pointer())
        builder.store(pixels, place, align=1)
        return context.get_dummy_value()

    return types.void(luma, types.int64, cb, types.int64, cr, types.int64, out, types.int64), codegen


@jit
def _rgb_row(
    luma: Bytes, luma_at: Int, cb: Bytes, cb_at: Int, cr: Bytes, cr_at: Int, count: Int, out: Bytes, out_at: Int
) -> None:
    """Convert a row of `count` pixels from YCbCr to RGB. The arrays are flat uint8; `_at`: index of the first sample in each."""
    if count >= _CHUNK:
        for x in range(0, count, _CHUNK):
            x = min(x, count - _CHUNK)  # the last chunk may overlap the one before it
            _rgb_chunk(luma, luma_at + x, cb, cb_at + x, cr, cr_at + x, out, out_at + 3 * x)
        return
    for x in range(count):
        y: Any = np.int64(luma[luma_at + x])
        b, r = np.int64(cb[cb_at + x]) - 128, np.int64(cr[cr_at + x]) - 128
        out[out_at + 3 * x] = min(max(y + ((91881 * r + 32768) >> 16), 0), 255)
        out[out_at + 3 * x + 1] = min(max(y + ((-22554 * b - 46802 * r + 32768) >> 16), 0), 255)
        out[out_at + 3 * x + 2] = min(max(y + ((116130 * b + 32768) >> 16), 0), 255)


class Planes(NamedTuple):
    """The layout of the decoded components in one flat array of bytes.

    bases, strides: int64 (3,), start of each component, and bytes of its rows. components: their number, 1 or 3. wide, tall: 2 if
    chroma is halved along that axis, else 1.
    """

    bases: Ints
    strides: Ints
    components: Int
    wide: Int
    tall: Int


@jit
def finish(scratch: Bytes, planes: Planes, height: Int, width: Int, place: Ints) -> None:
    """Upsample and convert a region's components to RGB. Input and output are in `scratch`, uint8 (bytes,).

    planes: the layout of the components. The pixels, RGB, are written to the start of `scratch`. height, width: of the image; its
    last chroma samples are repeated beyond its border. place: int64 (4,), top, left, height, width of the region.
    """
    bases, strides, count, wide, tall = planes
    top, left, out_height, out_width = place[0], place[1], place[2], place[3]
    down, across = min(-(-out_height // tall), -(-height // tall) - top // tall), -(-width // wide) - left // wide
    across = min(-(-out_width // wide), across)
    sums = np.empty(out_width + 2, np.uint16)
    cb, cr = np.full(out_width + 2, 128, np.uint8), np.full(out_width + 2, 128, np.uint8)  # neutral chroma, for grayscale images
    for y in range(out_height):
        luma_at, out_at = bases[0] + y * strides[0], 3 * y * out_width
        if count == 3 and wide == 1 and tall == 1:
            at = y * strides[1]
            _rgb_row(scratch, luma_at, scratch, bases[1] + at, scratch, bases[2] + at, out_width, scratch, out_at)
            continue
        if count == 3:
            _chroma_row(scratch, bases[1], strides[1], y, down, across, wide == 2, tall == 2, sums, cb)
            _chroma_row(scratch, bases[2], strides[2], y, down, across, wide == 2, tall == 2, sums, cr)
        _rgb_row(scratch, luma_at, cb, 0, cr, 0, out_width, scratch, out_at)
