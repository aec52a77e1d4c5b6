"""Decode a region of a region-addressable JPEG, compiled. The pixels equal libjpeg-turbo's bit for bit.

On a cut JPEG, libjpeg-turbo spends three quarters of the time on Huffman decoding, and a restart interval, which tiles need,
disables its fast path. This decoder looks up 11 bits at a time in a table that usually gives a whole symbol: run, value and
length. A 64-bit buffer is refilled once for up to five symbols, without a check in between. In each tile, it stops after the last
column that is needed. Inverse DCT, chroma upsampling and color conversion follow libjpeg-turbo, in LLVM vector instructions
(`idct`). docs/design.md lists what was tried without success.

Supported are YCbCr as JFIF defines it, with 4:4:4, 4:2:2, 4:4:0 or 4:2:0 subsampling, and grayscale. `decode` refuses other JPEGs
and damaged data; the caller then uses a general decoder.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..jit import Int, jit
from .entropy import refill, unstuff
from .huffman import DecodingTables, empty_tables, fill_decoding_table, lookup
from .idct import Planes, finish, idct_2, idct_4, idct_8
from .region import Bytes, Ints, TileLayout, big16, is_segment, open_tiles

REFUSED = -1

_LOOK = 11  # bits looked up at once in a table of whole symbols
_SYMBOLS = 5  # read between two refills, which give at least 56 bits
_LARGEST = 1 << 14  # of dequantized DC coefficients; those of an image are at most 1024, and what quantization adds
_END = 128  # the step of an end-of-block symbol, larger than any run
_ZIGZAG = np.array(
    [
        0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48,
        41, 34, 27, 20, 13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22,
        15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
    ],
    np.uint8,
)  # fmt: skip


class Header(NamedTuple):
    """The content of the segments before the entropy-coded data.

    quant: int32 (4, 64), quantization tables in zigzag order. components: int64 (3, 5), per component: horizontal and vertical
    sampling factor; index of the quantization, DC and AC table. tables: the Huffman tables. symbols: uint32 (8, 1 << _LOOK),
    tables of whole symbols for the Huffman tables, see `_fill_symbols`.
    """

    quant: npt.NDArray[np.int32]
    components: Ints
    tables: DecodingTables
    symbols: npt.NDArray[np.uint32]


class Area(NamedTuple):
    """The MCUs of rows [first_row, last_row) and columns [first_column, last_column)."""

    first_row: Int
    last_row: Int
    first_column: Int
    last_column: Int


class McuBlocks(NamedTuple):
    """The B blocks of an MCU.

    blocks: uint64 (B, 7): component; DC table; AC table; start of the quantization table; step from one MCU to the next, bytes;
    stride of the component's plane, bytes; start of the AC table of whole symbols. corners: int64 (B,), where the blocks of the
    first MCU start in the planes. downs: int64 (B,), step from one row of MCUs to the next, bytes.
    """

    blocks: npt.NDArray[np.uint64]
    corners: Ints
    downs: Ints


@jit
def _fill_symbols(bits: Any, symbols: Any, out: Bytes) -> None:
    """Fill the table of whole symbols of a Huffman table. Its index is the next `_LOOK` bits.

    If these contain a whole code with its extra bits, the entry is value << 16 | step << 8 | length. step, for AC: increment of
    the coefficient's index, `_END` at an end of block. length: bits of the code and its extra bits. Otherwise the entry is 0.
    bits, symbols: the Huffman table's BITS and HUFFVAL. out: uint32 (1 << _LOOK,).
    """
    out[:] = 0
    code, place = 0, 0
    for size in range(1, _LOOK + 1):
        for _ in range(bits[size - 1]):
            symbol = np.int64(symbols[place])
            run, extra = symbol >> 4, symbol & 15
            length = size + extra
            step = _END if symbol == 0 else run + 1
            if length <= _LOOK and (extra or run == 15 or symbol == 0):
                for tail in range(1 << extra):
                    value = tail if extra == 0 or tail >> (extra - 1) else tail + 1 - (1 << extra)
                    entry = np.uint32((value & 0xFFFF) << 16 | step << 8 | length)
                    first = (code << extra | tail) << (_LOOK - length)
                    for i in range(first, first + (1 << (_LOOK - length))):
                        out[i] = entry
            code += 1
            place += 1
        code <<= 1


@jit
def _extended(bits: Any, size: Int, count: Int) -> Any:
    """The value (T.81 F.2.2.1) of the last `count` of the `size` most significant bits."""
    value = np.int64((bits >> np.uint64(64 - size)) & np.uint64((1 << count) - 1))
    return value if count == 0 or value >> (count - 1) else value + 1 - (1 << count)


@jit
def _read_header(data: Bytes, layout: TileLayout, header: Header) -> Any:
    """Read the segments before the entropy-coded data into `header`. Returns the number of components, or REFUSED wherever
    libjpeg-turbo would raise an error."""
    position, frame, body = layout.header, layout.frame, layout.scan
    components = header.components
    count = np.int64(data[frame + 9])
    if data[frame + 4] != 8 or (count != 1 and count != 3):
        return REFUSED
    if count == 3 and data[frame + 10] == 82:  # the first component is named "R": RGB
        return REFUSED
    for i in range(count):
        at: Any = frame + 10 + 3 * i
        components[i, 0], components[i, 1], components[i, 2] = data[at + 1] >> 4, data[at + 1] & 15, data[at + 2]
    known: Any = 0  # a bit for each quantization table
    while position < body:
        marker, end = data[position + 1], position + 2 + big16(data, position + 2)
        at = position + 4
        if marker == 0xDB:
            found = _read_quantization(data, at, end, header.quant)
            if found < 0:
                return REFUSED
            known |= found
        elif marker == 0xC4:
            if not _read_huffman(data, at, end, header):
                return REFUSED
        elif marker == 0xEE:  # Adobe's: 0 means RGB
            if count == 3 and end - at >= 12 and data[at] == 65 and data[at + 11] != 1:
                return REFUSED
        elif marker == 0xDA:
            if end - at != 2 * count + 4 or data[at] != count:
                return REFUSED
            for i in range(count):
                tables = np.int64(data[at + 2 + 2 * i])
                if data[at + 1 + 2 * i] != data[frame + 10 + 3 * i] or tables >> 4 > 3 or tables & 15 > 3:
                    return REFUSED
                components[i, 3], components[i, 4] = tables >> 4, tables & 15
        position = end
    for i in range(count):
        if components[i, 2] > 3 or not known >> components[i, 2] & 1:
            return REFUSED
    return count


@jit
def _read_quantization(data: Bytes, at: Any, end: Int, quant: Any) -> Any:
    """Read a DQT segment, data[at:end]. Returns a number with a bit for each table in it, or -1 if it is damaged."""
    known: Any = 0
    while at < end:
        wide, table = np.int64(data[at] >> 4), np.int64(data[at] & 15)
        at += 1
        if wide > 1 or table > 3 or at + 64 * (1 + wide) > end:
            return -1
        for i in range(64):
            quant[table, i] = big16(data, at + 2 * i) if wide else np.int64(data[at + i])
        at += 64 * (1 + wide)
        known |= 1 << table
    return known


@jit
def _read_huffman(data: Bytes, at: Any, end: Int, header: Header) -> bool:
    """Read a DHT segment, data[at:end]. Returns False if it is damaged."""
    while at + 17 <= end:
        kind, table = np.int64(data[at] >> 4), np.int64(data[at] & 15)
        total, codes = np.int64(0), np.int64(0)
        for i in range(16):
            total += data[at + 1 + i]
            codes += np.int64(data[at + 1 + i]) << (15 - i)
        if kind > 1 or table > 3 or at + 17 + total > end or codes >= 1 << 16:  # T.81 C: no code is all ones
            return False
        coded = data[at + 1 : at + 17 + total]
        for i in range(16, len(coded)):
            if coded[i] & 15 > (10 if kind else 11) or (kind == 0 and coded[i] > 11):  # T.81 tables F.1 and F.2
                return False
        if not fill_decoding_table(coded, 4 * kind + table, header.tables):
            return False
        _fill_symbols(coded[:16], coded[16:], header.symbols[4 * kind + table])
        at += 17 + total
    return at == end


@jit
def decode_tiles(data: Bytes, layout: TileLayout, area: Area, header: Header, mcu: McuBlocks, planes: Bytes) -> bool:
    """Decode an area's MCUs into `planes`, flat uint8 of all components. Returns False if the data is damaged.

    It is a single long function because each call in numba updates the reference counts of all its arrays.
    """
    starts, tiles, interval = layout.starts, layout.tiles, layout.interval
    first_row, last_row, first_column, last_column = area
    blocks, corners, downs = mcu
    quant, symbols, tables = header.quant.reshape(-1), header.symbols.reshape(-1), header.tables
    block, dc = np.zeros(64, np.int32), np.zeros(3, np.int64)
    wide = np.int64(0)
    longest = 0
    for i in range(len(starts) - 1):
        longest = max(longest, starts[i + 1] - starts[i])
    unstuffed = np.empty(longest + 512 * len(blocks) + 64, np.uint8)  # damaged data can be read beyond its end, by one MCU
    for row in range(first_row, last_row):
        for tile in range(first_column // interval, -(-last_column // interval)):
            start, stop = layout.scan + starts[row * tiles + tile], layout.scan + starts[row * tiles + tile + 1] - 2
            if not is_segment(data, layout.scan, starts, row * tiles + tile):
                return False
            stopped, end = unstuff(data, start, stop, unstuffed)
            if stopped != stop:
                return False  # a marker inside the tile
            mcus = min(interval, last_column - tile * interval)
            skipped = first_column - tile * interval
            at, bits, have = np.uint64(0), np.uint64(0), 0
            dc[:] = 0
            for column in range(mcus):
                for place in range(np.uint64(len(blocks))):
                    component, dc_table, ac_table = blocks[place, 0], blocks[place, 1], blocks[place, 2]
                    whole, scale = blocks[place, 6], blocks[place, 3]
                    at, bits, have = refill(unstuffed, at, bits, have)
                    symbol = np.int32(symbols[(dc_table << np.uint64(_LOOK)) + (bits >> np.uint64(64 - _LOOK))])
                    if symbol:
                        dc[component] += np.int64(symbol >> np.int32(16))
                        bits <<= np.uint64(symbol & np.int32(63))
                        have -= np.int64(symbol & np.int32(63))
                    else:
                        entry = lookup(bits, dc_table, tables)
                        size, count = np.int64(entry & 255), np.int64(entry >> 16)
                        if entry == 0 or count > 15:
                            return False
                        dc[component] += _extended(bits, size, count)
                        bits <<= np.uint64(size)
                        have -= size
                    product = dc[component] * quant[scale]
                    wide |= product + _LARGEST
                    block[0] = product
                    k, last = np.uint64(0), np.uint64(0)
                    while k < np.uint64(63):
                        at, bits, have = refill(unstuffed, at, bits, have)
                        for _ in range(_SYMBOLS):
                            symbol = np.int32(symbols[whole + (bits >> np.uint64(64 - _LOOK))])
                            if symbol == 0:  # a longer one
                                at, bits, have = refill(unstuffed, at, bits, have)
                                entry = lookup(bits, ac_table, tables)
                                size, code = np.int64(entry & 255), np.int64(entry >> 16)
                                if entry == 0 or (code & 15 == 0 and code != 0 and code != 0xF0):
                                    return False
                                k += np.uint64((code >> 4) + 1 if code else _END)
                                if k <= np.uint64(63):
                                    block[_ZIGZAG[k]] = _extended(bits, size, code & 15) * quant[scale + k]
                                    last = k
                                bits <<= np.uint64(size)
                                have -= size
                                break
                            bits <<= np.uint64(symbol & np.int32(63))
                            have -= np.int64(symbol & np.int32(63))
                            k += np.uint64(symbol >> np.int32(8) & np.int32(255))
                            if k > np.uint64(63):
                                break
                            block[_ZIGZAG[k]] = np.int64(symbol >> np.int32(16)) * quant[scale + k]
                            last = k
                            if k == np.uint64(63):
                                break
                    if np.uint64(63) < k < np.uint64(_END):
                        return False
                    if column < skipped:
                        block[:] = 0
                    else:
                        across = (column - skipped) * np.int64(blocks[place, 4])
                        target, stride = corners[place] + (row - first_row) * downs[place] + across, np.int64(blocks[place, 5])
                        if last < np.uint64(3):
                            idct_2(block, planes, target, stride)
                        elif last < np.uint64(10):
                            idct_4(block, planes, target, stride)
                        else:
                            idct_8(block, planes, target, stride)
                if 8 * (end - np.int64(at)) + have < 0:
                    return False  # read beyond the tile's end
            if wide < 0 or wide >= 2 * _LARGEST:
                return False  # of damaged tables; libjpeg-turbo's inverse DCT overflows in 16 bits
    return True


@jit
def _blocks_of_mcu(components: Any, planes: Planes) -> McuBlocks:
    """The blocks of an MCU in stream order. components: as in `Header`."""
    wide, tall, count, bases, strides = planes.wide, planes.tall, planes.components, planes.bases, planes.strides
    lumas = wide * tall
    blocks, corners = np.zeros((lumas + count - 1, 7), np.uint64), np.empty(lumas + count - 1, np.int64)
    downs = np.empty(lumas + count - 1, np.int64)
    for i in range(len(blocks)):
        component = max(i - lumas + 1, 0)
        across, down = (wide, tall) if component == 0 else (1, 1)
        blocks[i, 0], blocks[i, 1], blocks[i, 2] = component, components[component, 3], 4 + components[component, 4]
        blocks[i, 3], blocks[i, 4], blocks[i, 5] = 64 * components[component, 2], 8 * across, strides[component]
        blocks[i, 6] = (4 + components[component, 4]) << _LOOK
        corners[i], downs[i] = bases[component], 8 * down * strides[component]
        if component == 0:
            corners[i] += i // wide * 8 * strides[0] + i % wide * 8
    return McuBlocks(blocks, corners, downs)


@jit
def decode(data: Bytes, top: Int, left: Int, bottom: Int, right: Int, scratch: Bytes, place: Ints) -> Int:
    """Decode a region of a region-addressable JPEG. Returns 0, REFUSED, or the number of bytes that `scratch` needs.

    data: uint8 (bytes,). top, left, bottom, right: the region, pixels. scratch: uint8 (bytes,), receives the pixels, RGB (height,
    width, 3), at its start. place: int64 (4,), receives top, left, height, width of these pixels, which contain the region.
    """
    layout = open_tiles(data)
    if layout.status < 0:
        return REFUSED
    mcu_width, mcu_height, height, width = layout.mcu_width, layout.mcu_height, layout.height, layout.width
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        return REFUSED
    header = Header(np.zeros((4, 64), np.int32), np.zeros((3, 5), np.int64), empty_tables(), np.zeros((8, 1 << _LOOK), np.uint32))
    count = _read_header(data, layout, header)
    if count < 0:
        return REFUSED
    components = header.components
    wide, tall = components[0, 0], components[0, 1]
    chroma = components[1, 0] * components[1, 1] * components[2, 0] * components[2, 1]
    if count == 1:
        wide, tall = 1, 1
    elif not (1 <= wide <= 2 and 1 <= tall <= 2 and chroma == 1):
        return REFUSED
    if mcu_width != 8 * wide or mcu_height != 8 * tall:
        return REFUSED
    if wide == 2 and width <= 4:
        return REFUSED  # libjpeg repeats the chroma of such narrow images instead of interpolating it

    # Chroma upsampling also needs the chroma of the neighbouring pixel.
    first_column, last_column = max(left - (wide - 1), 0) // mcu_width, -(-min(right + wide - 1, width) // mcu_width)
    first_row, last_row = max(top - (tall - 1), 0) // mcu_height, -(-min(bottom + tall - 1, height) // mcu_height)
    place[0], place[1] = first_row * mcu_height, first_column * mcu_width
    place[2] = min(last_row * mcu_height, height) - place[0]
    place[3] = min(last_column * mcu_width, width) - place[1]

    columns, rows = last_column - first_column, last_row - first_row
    strides = np.array([columns * mcu_width, columns * 8, columns * 8])
    bases = np.zeros(3, np.int64)
    bases[0] = 3 * place[2] * place[3]
    bases[1] = bases[0] + rows * mcu_height * strides[0]
    bases[2] = bases[1] + (rows * 8 * strides[1] if count == 3 else 0)
    needed = bases[2] + (rows * 8 * strides[2] if count == 3 else 0)
    if needed > len(scratch):
        return needed

    planes = Planes(bases, strides, count, wide, tall)
    area = Area(first_row, last_row, first_column, last_column)
    if not decode_tiles(data, layout, area, header, _blocks_of_mcu(components, planes), scratch):
        return REFUSED
    finish(scratch, planes, height, width, place)
    return 0
