"""Write region-addressable JPEGs from other JPEGs, losslessly. `region` describes the format.

`transcode` decodes the entropy coding of a JPEG, recomputes the DC differences at the start of each tile, and writes the same
coefficients with optimal Huffman tables (T.81 K.2). From a single interleaved scan, it copies tokens. Other JPEGs, such as
progressive and arithmetic-coded ones, are first read into coefficients, see `scans`. Metadata (EXIF, ICC, XMP, comments) is
dropped, as the pixels do not depend on it. This includes the orientation tag, which no published ImageNet result applies.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..jit import Int
from . import blocks, entropy, huffman
from .header import Header, parse, write_segment
from .region import APP11, MAGIC, TABLE, VERSION, Bytes, Ints, RegionError
from .scans import read_coefficients

TILE_WIDTH = 56  # target width of tiles, pixels: narrower tiles cost bytes, wider ones decode more outside the window
_MAX_TOKENS = 1 << 23  # read at once, 32 MB: the largest tile has 5,242,880, a file of about 8 MB this many
_MAX_LENGTHS = 65533 - TABLE.size  # bytes of lengths in one APP11 segment
Tokens = npt.NDArray[np.uint32]


def choose_interval(mcus: int, mcu_width: int, least: int = 1) -> int:
    """MCUs in a tile: the divisor of a row's MCUs with the width nearest to TILE_WIDTH in ratio, at least 0.4 of it and `least`.

    If there is no such divisor, a tile is a whole row: for a prime number of MCUs, and for narrow images.
    """
    target = TILE_WIDTH / mcu_width
    divisors = [d for d in range(1, mcus + 1) if mcus % d == 0 and d >= max(0.4 * target, least)]
    return min(divisors, key=lambda d: max(d / target, target / d), default=mcus)


def transcode(data: bytes, check: Callable[[bytes], object] | None = None) -> bytes:
    """A DCT-based JPEG with 8 bits and 1, 3 or 4 components as a region-addressable one with the same coefficients.

    check: is called with the first tile, as a JPEG of its own with the header of the result, so that a decoder can try it.
    Raises NotBaselineError for other JPEGs, which need re-encoding, RegionError for damaged data, and what `check` raises.
    """
    header = parse(data)
    if data.rfind(b"\xff\xd9") < header.data:
        raise RegionError("no end-of-image marker, so it is truncated")
    mcu_width, mcu_height = 8 * max(h for h, _ in header.sampling), 8 * max(v for _, v in header.sampling)
    columns, rows = -(-header.width // mcu_width), -(-header.height // mcu_height)
    # libjpeg interpolates halved chroma only if it is wider than 2 samples. So must be the cut of an image's last tile.
    interval = choose_interval(columns, mcu_width, least=2 if mcu_width == 32 and any(h == 2 for h, _ in header.sampling) else 1)
    tiles = columns // interval
    scan = (_OneScan if header.is_one_scan else _ManyScans).of(data, header, columns * rows, interval)
    counts = np.zeros(4 << 8, np.int64)
    pieces: Iterable[tuple[Tokens, Ints]] = [(scan.tokens, scan.starts)]
    if sum(1 for _ in scan.pieces(counts)) > 1:  # only the last piece is in memory: read the scan again
        pieces = scan.pieces(np.zeros_like(counts))
    coded = [huffman.optimal_table(counts[i << 8 : (i + 1) << 8]) for i in range(4 if len(header.sampling) > 1 else 2)]
    lengths = np.empty(tiles * rows, np.int64)
    capacity = 8 * len(scan.tokens)  # a token takes at most 4 bytes, stuffed 8
    if header.is_one_scan:
        capacity = min(capacity, 2 * len(data))
    capacity += 8 * len(lengths) + 4096
    written = _write(pieces, coded, lengths, capacity)
    tail = _tail(header, coded, interval)
    if check is not None:
        size = struct.pack(">HH", min(mcu_height, header.height), min(mcu_width * interval, header.width))
        segment = written[0][: lengths[0] - 2]
        check(b"".join((b"\xff\xd8", header.jfif, header.kept, tail[:5], size, tail[9:], segment, b"\xff\xd9")))
    table = _length_table(lengths, interval, tiles, rows, mcu_width, mcu_height)
    return b"".join((b"\xff\xd8", header.jfif, table, header.kept, tail, *written))  # `written` ends with EOI


class _OneScan(NamedTuple):
    """A single scan to read, and the memory for that. tile: MCUs in a tile. places: the component of each block of an
    MCU. For the rest see `entropy.read_scan`."""

    stream: Bytes
    mcus: int
    interval: int
    tile: int
    places: Ints
    selectors: Ints
    decoding: huffman.DecodingTables
    data: Bytes
    tokens: Tokens
    starts: Ints

    @staticmethod
    def of(data: bytes, header: Header, mcus: int, tile: int) -> _OneScan:
        decoding = huffman.decoding_tables(header.tables)
        used = {(kind, pair[kind]) for pair in header.selectors for kind in (0, 1)}
        if decoding is None or not all(_is_usable(kind, header.tables[kind, number]) for kind, number in used):
            raise RegionError("an impossible Huffman table")
        places = _components_of_blocks(header)
        stream = np.frombuffer(data, np.uint8)[header.data :]
        most = 64 * tile * len(places)  # tokens of a tile
        room = min(8 * len(stream) + most, most * (mcus // tile), _MAX_TOKENS)  # a token takes at least a bit
        return _OneScan(
            stream, mcus, header.interval, tile, places, np.array(header.selectors, np.int64), decoding,
            np.empty(len(stream) + entropy.PADDING, np.uint8), np.empty(room, np.uint32), np.empty(mcus // tile + 1, np.int64),
        )  # fmt: skip

    def pieces(self, counts: Ints) -> Iterator[tuple[Tokens, Ints]]:
        """Read the scan in pieces of at most `_MAX_TOKENS`: the tokens and the start of each tile, as returned by
        `entropy.read_scan`. Each piece overwrites the one before it. counts: the number of each symbol is added.
        """
        state = np.zeros(10, np.int64)
        while (first := int(state[0])) < self.mcus:
            total = entropy.read_scan(*self[:8], state, self.tokens, self.starts, counts)
            if total < 0:
                raise RegionError(entropy.REASONS[total])
            yield self.tokens, self.starts[: (int(state[0]) - first) // self.tile + 1]


class _ManyScans(NamedTuple):
    """The coefficients of all scans, and the memory for their tokens. For the names see `blocks.tokenize`."""

    coefficients: blocks.Coefficients
    order: blocks.Blocks
    places: Ints
    tile: int
    tokens: Tokens
    starts: Ints

    @staticmethod
    def of(data: bytes, header: Header, mcus: int, tile: int) -> _ManyScans:
        coefficients = read_coefficients(data, header)
        order, places = blocks.scan_order(blocks.components_of(header))
        most = 64 * tile * len(places)  # tokens of a tile
        beside = 5 * len(coefficients.nonzero)  # a block's DC, at most 3 runs of 16 zeros, and its end
        room = min(int(np.bitwise_count(coefficients.nonzero).sum()) + beside + most, most * (mcus // tile), _MAX_TOKENS)
        return _ManyScans(coefficients, order, places, tile, np.empty(room, np.uint32), np.empty(mcus // tile + 1, np.int64))

    def pieces(self, counts: Ints) -> Iterator[tuple[Tokens, Ints]]:
        """As `_OneScan.pieces`."""
        done: Int = 0
        while (first := done) < len(self.order):
            total, done = blocks.tokenize(*self[:3], first, self.tile, self.tokens, self.starts, counts)
            if total < 0:
                raise RegionError(entropy.REASONS[total])
            yield self.tokens, self.starts[: (done - first) // self.tile + 1]


def _is_usable(kind: int, table: bytes) -> bool:
    """Whether libjpeg decodes with a Huffman table. It refuses codes of ones only, and DC differences of more than 15 bits."""
    taken = sum(count << (15 - i) for i, count in enumerate(table[:16]))  # of 1 << 16 codes of 16 bits
    return taken < 1 << 16 and (kind == 1 or max(table[16:], default=0) <= 15)


def _components_of_blocks(header: Header) -> Ints:
    """The component of each block of an MCU."""
    return np.array([c for c, (h, v) in enumerate(header.sampling) for _ in range(h * v)], np.int64)


def _write(pieces: Iterable[tuple[Tokens, Ints]], coded: list[tuple[Bytes, Bytes]], lengths: Ints, capacity: int) -> list[bytes]:
    """The entropy-coded data in parts of at most `capacity` bytes; fills `lengths`."""
    codes = np.zeros(4 << 8, np.uint64)
    for i, (bits, symbols) in enumerate(coded):
        huffman.assign_codes(bits, symbols, codes[i << 8 :])
    out = np.empty(capacity, np.uint8)
    parts: list[bytes] = []
    done = 0
    for tokens, starts in pieces:
        first, done = done, done + len(starts) - 1
        written = entropy.write_scan(tokens, starts, codes, first, done == len(lengths), lengths[first:done], out)
        if written < 0:
            raise RegionError(entropy.REASONS[written])
        parts.append(out[:written].tobytes())
    return parts


def _length_table(lengths: Ints, interval: int, tiles: int, rows: int, mcu_width: int, mcu_height: int) -> bytes:
    size = 2 if lengths.max() < 1 << 16 else 4
    at_most = _MAX_LENGTHS // size
    parts = []
    for start in range(0, len(lengths), at_most):
        some = lengths[start : start + at_most].astype(f"<u{size}")
        payload = TABLE.pack(MAGIC, VERSION, size, interval, tiles, rows, mcu_width, mcu_height, len(some)) + some.tobytes()
        parts.append(write_segment(APP11, payload))
    return b"".join(parts)


def _tail(header: Header, coded: list[tuple[Bytes, Bytes]], interval: int) -> bytes:
    """SOF0, DHT, DRI and SOS. The first component uses the tables with id 0, the others those with id 1."""
    tables = b"".join(
        bytes([(i % 2) << 4 | i // 2]) + bits.tobytes() + symbols.tobytes() for i, (bits, symbols) in enumerate(coded)
    )
    components = header.frame[6::3]
    sos = b"".join(bytes([component, 0x11 if i else 0]) for i, component in enumerate(components))
    return (
        write_segment(0xC0, header.frame)
        + write_segment(0xC4, tables)
        + write_segment(0xDD, interval.to_bytes(2, "big"))
        + write_segment(0xDA, bytes([len(components)]) + sos + b"\0\x3f\0")
    )
