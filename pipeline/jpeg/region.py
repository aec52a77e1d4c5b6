"""Region-addressable JPEGs: ordinary baseline JPEGs in which a region can be decoded without the rest.

Format, version 1 (T.81 is ITU-T T.81, the JPEG standard)
----------------------------------------------------------
A region-addressable JPEG is a baseline sequential Huffman JPEG (T.81 SOF0, 8 bit, one interleaved scan of 1, 3 or 4 components).
Any JPEG reader can open it. It has two additional properties:

1. A restart interval (T.81 B.2.4.4) that divides the number of MCUs in a row of MCUs. The entropy-coded data between two restart
   markers, a *segment*, is therefore a *tile*: `interval` MCUs wide, one MCU high. Segments come row by row, left to right.
   A segment can be decoded without its neighbours, because DC prediction is reset at each restart marker.
2. A table of the segments' lengths, in APP11 segments (FF EB) of its own, after SOI and, if present, the JFIF APP0.

The table, numbers little-endian:

    offset  bytes
    0       8    "CROPFEED"
    8       1    version, 1
    9       1    bytes of a length: 2 or 4
    10      2    interval: MCUs in a tile
    12      2    tiles in a row
    14      2    rows
    16      1    width of an MCU, pixels
    17      1    height of an MCU, pixels
    18      4    number of lengths in this APP11 segment
    22      ...  lengths

A length counts a segment's entropy-coded bytes (including stuffing) and the two bytes of the marker that ends it (RSTm; EOI after
the last segment). Lengths that do not fit into one APP11 segment continue in the next one, which repeats the first 22 bytes with
its own count. The APP11 segments are adjacent. The header between them and the entropy-coded data (DQT, SOF0, DHT, DRI, SOS and,
if present, Adobe's APP14) is also the header of a cut, except for SOF0's height and width.

Cutting
-------
A *cut* is a region as a JPEG of its own. It consists of the header, with the cut's height and width, and a copy of the tiles that
cover a window. Their restart markers are renumbered from 0, modulo 8. The restart interval remains valid, since every tile has
`interval` MCUs. A cut that reaches the image's right or bottom edge ends where the image ends, so the decoder treats the edge as
in the whole image. libjpeg's chroma upsampling interpolates between a pixel's own chroma sample and its neighbour's. So along an
axis with subsampled chroma, the window is widened by a pixel before the tiles are chosen. Every pixel in the window then equals
that of the whole image.

Why cuts keep restart markers
-----------------------------
A restart interval disables libjpeg-turbo's fast Huffman decoding. A cut without restart markers would need its bits shifted and
its bytes stuffed again, and the DC predictors of every tile in the table (5 bytes). This was measured on one EPYC core with
libjpeg-turbo 2.1.5 and 64 pixel tiles, on 400 ImageNet images and, in brackets, on the same images at half the bytes. Decoding a
cut takes 713 us (424) with markers and 672 us (406) without. Copying its 48 KB (25) takes 3 us (2). Shifting and stuffing takes
153 us (71) in a plain numba loop, 89 us (33) in a loop over 8 bytes at a time, and 27 us (14) in C. So at most 2 % could be
gained, and encoding DC differences again would take part of that.

`pipeline.jpeg.transcode` writes these files.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..jit import Int, jit

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

MAGIC = b"CROPFEED"
VERSION = 1
APP11 = 0xEB
TABLE = struct.Struct("<8sBBHHHBBI")  # the first 22 bytes of an APP11 segment of the table


class RegionError(ValueError):
    """The JPEG cannot be transcoded or cut; the message says why, in one line."""


class Cut(NamedTuple):
    """A region as a JPEG of its own.

    jpeg: uint8 (bytes,). top, left: where its first pixel lies in the whole image. height, width: its size, pixels.
    """

    jpeg: Bytes
    top: Int
    left: Int
    height: Int
    width: Int


class LengthTable(NamedTuple):
    """The content of the table of segments, except for the lengths.

    status: 0, or a negative error code. position: where the table begins. entry_bytes: bytes of a length. interval: MCUs in a
    tile. tiles: tiles in a row. rows: rows of tiles. mcu_width, mcu_height: pixels.
    """

    status: Int
    position: Int
    entry_bytes: Int
    interval: Int
    tiles: Int
    rows: Int
    mcu_width: Int
    mcu_height: Int


class TileLayout(NamedTuple):
    """The layout of a region-addressable JPEG. If status is 0, it is consistent and lies within the data.

    status: 0, or a negative error code. starts: int64 (T + 1,), where each tile begins, relative to `scan`. table, header, frame,
    scan: where the table, the header after it, SOF0 and the entropy-coded data begin. interval: MCUs in a tile. tiles: tiles in a
    row. mcu_width, mcu_height, height, width: pixels.
    """

    status: Int
    starts: Ints
    table: Int
    header: Int
    frame: Int
    scan: Int
    interval: Int
    tiles: Int
    mcu_width: Int
    mcu_height: Int
    height: Int
    width: Int


NO_TABLE, DAMAGED_TABLE, DAMAGED_HEADER, DAMAGED_DATA, BAD_WINDOW, NO_SPACE = -11, -12, -13, -14, -15, -16
_REASONS = {
    NO_TABLE: "not a region-addressable JPEG: it has no table of segments",
    DAMAGED_TABLE: "the table of segments is damaged",
    DAMAGED_HEADER: "the header is damaged",
    DAMAGED_DATA: "the data does not match the table of segments",
    BAD_WINDOW: "the window lies outside the image",
    NO_SPACE: "the output is too small for the cut",
}


def cut(data: Bytes, top: int, left: int, bottom: int, right: int) -> Cut:
    """Cut out the window of rows [top, bottom) and columns [left, right), with as few whole tiles as possible. Within the window,
    the pixels of the cut equal those of the whole image.

    data: uint8 (bytes,), a region-addressable JPEG. Raises RegionError if it is another or a damaged file, or if the window is
    not inside the image.
    """
    out = np.empty(len(data), np.uint8)
    place = np.empty(4, np.int64)
    length = cut_into(data, top, left, bottom, right, out, place)
    if length < 0:
        raise RegionError(_REASONS[length])
    return Cut(out[:length], *place.tolist())


@jit
def _little16(data: Bytes, position: Int) -> Any:
    return np.int64(data[position]) | np.int64(data[position + 1]) << 8


@jit
def _little32(data: Bytes, position: Int) -> Any:
    return _little16(data, position) | _little16(data, position + 2) << 16


@jit
def big16(data: Bytes, position: Int) -> Any:
    return np.int64(data[position]) << 8 | np.int64(data[position + 1])


@jit
def _copy(data: Bytes, start: Int, end: Int, out: Bytes, at: Int) -> Any:
    """Copy data[start:end] to `at` in `out`. Returns the end of the copy. In numba, a slice assignment is 10 times slower."""
    source, target = data[start:end], out[at : at + end - start]
    for i in range(len(target)):
        target[i] = source[i]
    return at + end - start


@jit
def _is_table(data: Bytes, position: Int) -> bool:
    """Whether a complete APP11 segment of the table is at `position`."""
    if position + 4 + 22 > len(data) or data[position] != 0xFF or data[position + 1] != 0xEB:
        return False
    name = (67, 82, 79, 80, 70, 69, 69, 68)  # CROPFEED
    for i in range(8):
        if data[position + 4 + i] != name[i]:
            return False
    return data[position + 12] == 1 and position + 2 + big16(data, position + 2) <= len(data)


@jit
def is_segment(data: Bytes, scan: Int, starts: Ints, number: Int) -> bool:
    """Whether segment `number` begins and ends at the markers that it should have: RSTm with m = number modulo 8, at last EOI.

    Otherwise the table of lengths is damaged, or the data is. starts: relative to `scan`.
    """
    start, end = scan + starts[number], scan + starts[number + 1]
    marker = 0xD9 if number == len(starts) - 2 else 0xD0 | (number & 7)
    if end - start < 2 or data[end - 2] != 0xFF or data[end - 1] != marker:
        return False
    return number == 0 or (data[start - 2] == 0xFF and data[start - 1] == 0xD0 | (number - 1 & 7))


@jit
def cut_into(data: Bytes, top: Int, left: Int, bottom: Int, right: Int, out: Bytes, place: Ints) -> Any:
    """`cut` for compiled callers, without the GIL. Returns the JPEG's size in bytes, or a negative error code such as NO_TABLE.

    out: uint8, receives the JPEG; len(data) is always enough. place: int64 (4,), receives top, left, height, width.
    """
    layout = open_tiles(data)
    if layout.status < 0:
        return layout.status
    starts, interval, tiles = layout.starts, layout.interval, layout.tiles
    mcu_width, mcu_height, height, width = layout.mcu_width, layout.mcu_height, layout.height, layout.width
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        return BAD_WINDOW

    first_column, last_column = _tiles_over(left, right, width, mcu_width, interval * mcu_width)
    first_row, last_row = _tiles_over(top, bottom, height, mcu_height, mcu_height)
    place[0], place[1] = first_row * mcu_height, first_column * interval * mcu_width
    place[2] = min(last_row * mcu_height, height) - place[0]
    place[3] = min(last_column * interval * mcu_width, width) - place[1]

    needed = layout.table + layout.scan - layout.header
    for row in range(first_row, last_row):
        needed += starts[row * tiles + last_column] - starts[row * tiles + first_column]
    if needed > len(out):
        return NO_SPACE
    start = _copy(data, 0, layout.table, out, 0)  # SOI and JFIF's APP0
    written = _copy(data, layout.header, layout.scan, out, start)
    size_at = start + layout.frame - layout.header + 5
    out[size_at], out[size_at + 1] = place[2] >> 8, place[2] & 255
    out[size_at + 2], out[size_at + 3] = place[3] >> 8, place[3] & 255
    number = 0
    for row in range(first_row, last_row):
        first, last = row * tiles + first_column, row * tiles + last_column
        end = _copy(data, layout.scan + starts[first], layout.scan + starts[last], out, written)
        for segment in range(first, last):
            if not is_segment(data, layout.scan, starts, segment):
                return DAMAGED_DATA
            written += starts[segment + 1] - starts[segment]
            out[written - 1] = 0xD0 + (number & 7)
            number += 1
        written = end
    out[written - 1] = 0xD9  # EOI in place of the last restart marker
    return written


@jit
def tile_bytes(data: Bytes, known: Int, top: Int, left: Int, bottom: Int, right: Int) -> tuple[Int, Int]:
    """The range [first, last) of the bytes with all tiles that a window needs, and the marker before them.

    data: of which only the first `known` bytes must be filled in. Returns (-1, -1) unless they are the beginning of a
    region-addressable JPEG up to its entropy-coded data, and the window lies in the image.
    """
    layout = open_tiles(data)
    if layout.status < 0 or layout.scan > known or not (0 <= top < bottom <= layout.height and 0 <= left < right <= layout.width):
        return -1, -1
    first_column, last_column = _tiles_over(left, right, layout.width, layout.mcu_width, layout.interval * layout.mcu_width)
    first_row, last_row = _tiles_over(top, bottom, layout.height, layout.mcu_height, layout.mcu_height)
    first = layout.scan + layout.starts[first_row * layout.tiles + first_column]
    return max(first - 2, layout.scan), layout.scan + layout.starts[(last_row - 1) * layout.tiles + last_column]


@jit
def open_tiles(data: Bytes) -> TileLayout:
    """Read the table of segments and the header, and check that they are consistent: length and number of segments, restart
    interval, and size of an MCU."""
    table = read_table(data)
    status, tiles = table.status, table.tiles * table.rows
    starts = np.empty(tiles + 1 if status == 0 else 1, np.int64)
    frame: Int
    scan: Int
    header, frame, scan, height, width = np.int64(0), np.int64(-1), np.int64(0), np.int64(0), np.int64(0)
    interval: Int
    if status == 0:
        header = read_lengths(data, table.position, table.entry_bytes, starts)
        status = min(header, 0)
    if status == 0:
        frame, scan, interval = find_frame(data, header)
        status = DAMAGED_HEADER if frame < 0 else 0
    if status == 0:
        height, width = big16(data, frame + 5), big16(data, frame + 7)
        if interval != table.interval or not _is_grid(data, frame, table):
            status = DAMAGED_TABLE
        elif scan + starts[tiles] > len(data):
            status = DAMAGED_DATA
    return TileLayout(
        status, starts, table.position, header, frame, scan, table.interval, table.tiles, table.mcu_width, table.mcu_height,
        height, width,
    )  # fmt: skip


@jit
def _is_grid(data: Bytes, frame: Int, table: LengthTable) -> bool:
    """Whether the table's tiles cover the image of SOF0, whose marker is at `frame`, and have its MCUs."""
    height, width, count = big16(data, frame + 5), big16(data, frame + 7), np.int64(data[frame + 9])
    wide: Any = 1
    tall: Any = 1
    if count > 1:  # T.81 A.2.2: the MCU of a single component is one block, whatever its sampling factors
        for i in range(count):
            factors = np.int64(data[frame + 11 + 3 * i])
            wide, tall = max(wide, factors >> 4), max(tall, factors & 15)
    if table.mcu_width != 8 * wide or table.mcu_height != 8 * tall:
        return False
    return -(-width // (8 * wide)) == table.interval * table.tiles and -(-height // (8 * tall)) == table.rows


@jit
def _tiles_over(low: Int, high: Int, side: Int, mcu: Int, tile: Int) -> Any:
    """The range [first, last) of tiles that pixels [low, high) of an axis need. side, mcu, tile: sizes, pixels."""
    # If chroma is subsampled, a pixel is interpolated with the nearest other chroma sample, that of a neighbouring pixel.
    beyond = 1 if mcu > 8 else 0
    return max(low - beyond, 0) // tile, -(-min(high + beyond, side) // tile)


@jit
def read_table(data: Bytes) -> LengthTable:
    """Read and check the first 22 bytes of the table of segments."""
    none = np.int64(0)
    if len(data) < 6 or data[0] != 0xFF or data[1] != 0xD8:
        return LengthTable(np.int64(NO_TABLE), none, none, none, none, none, none, none)
    at = np.int64(2)
    if data[2] == 0xFF and data[3] == 0xE0:
        at = 4 + big16(data, 4)
    if not _is_table(data, at):
        return LengthTable(np.int64(NO_TABLE), none, none, none, none, none, none, none)
    size, interval = np.int64(data[at + 13]), _little16(data, at + 14)
    tiles, rows = _little16(data, at + 16), _little16(data, at + 18)
    mcu_width, mcu_height = np.int64(data[at + 20]), np.int64(data[at + 21])
    good = (size == 2 or size == 4) and interval > 0 and tiles > 0 and rows > 0 and mcu_width >= 8 and mcu_height >= 8
    status = np.int64(0 if good and tiles * rows * size <= len(data) else DAMAGED_TABLE)
    return LengthTable(status, at, size, interval, tiles, rows, mcu_width, mcu_height)


@jit
def read_lengths(data: Bytes, position: Int, size: Int, starts: Ints) -> Any:
    """Fill `starts` with the start of each segment, relative to the first one. Returns the end of the table, or an error code."""
    starts[0] = 0
    known = 0
    while known < len(starts) - 1:
        if not _is_table(data, position):
            return DAMAGED_TABLE
        count = _little32(data, position + 22)
        end = position + 2 + big16(data, position + 2)
        if count == 0 or known + count > len(starts) - 1 or position + 26 + count * size != end:
            return DAMAGED_TABLE
        start = starts[known]
        for i in range(count):
            at = position + 26 + i * size
            start += _little16(data, at) if size == 2 else _little32(data, at)
            starts[known + 1 + i] = start
        known += count
        position = end
    return position


@jit
def find_frame(data: Bytes, position: Int) -> tuple[Int, Int, Int]:
    """The positions of SOF0's marker and of the entropy-coded data, and DRI's interval; -1 each if the header is damaged."""
    frame: Int = -1
    interval: Int = -1
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        end = position + 2 + big16(data, position + 2)
        if end < position + 4 or end > len(data):
            break
        if marker == 0xC0:
            if frame >= 0 or end < position + 10 or end != position + 10 + 3 * np.int64(data[position + 9]):
                break
            frame = position
        elif marker == 0xDD:
            if end != position + 6:
                break
            interval = big16(data, position + 4)
        elif not (marker == 0xC4 or marker == 0xDA or marker == 0xDB or marker >= 0xE0):  # not in a header of this format
            break
        position = end
        if marker == 0xDA:
            return (frame, position, interval) if frame >= 0 else (-1, -1, -1)
    return -1, -1, -1
