"""Write region-addressable JPEGs from baseline JPEGs, losslessly. `region` describes the format.

`transcode` decodes the Huffman codes of a baseline JPEG, recomputes the DC differences at the start of each tile, and writes the
same coefficients with optimal Huffman tables (T.81 K.2). Metadata (EXIF, ICC, XMP, comments) is dropped, as the pixels do not
depend on it. This includes the orientation tag, which no published ImageNet result applies.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from . import entropy, huffman
from .region import APP11, MAGIC, TABLE, VERSION, Bytes, RegionError

TILE_WIDTH = 56  # target width of tiles, pixels: narrower tiles cost bytes, wider ones decode more outside the window
_MAX_TOKENS = 1 << 23  # read at once, 32 MB: the largest tile has 5,242,880, a file of about 8 MB this many
_MAX_LENGTHS = 65533 - TABLE.size  # bytes of lengths in one APP11 segment
Tokens = npt.NDArray[np.uint32]
Ints = npt.NDArray[np.int64]

_REASONS = {
    entropy.TRUNCATED: "the entropy-coded data ends too early",
    entropy.BAD_CODE: "an undefined Huffman code",
    entropy.BAD_VALUE: "a coefficient out of range",
    entropy.NO_ROOM: "the output does not fit",
}


_OTHER_FRAMES = {0xC1: "extended sequential", 0xC2: "progressive", 0xC3: "lossless"}  # T.81 table B.1; the rest is rarer


class NotBaselineError(RegionError):
    """A JPEG that is not 8-bit baseline with 1 or 3 interleaved components: it can be re-encoded, not transcoded."""


class Header(NamedTuple):
    """A baseline JPEG's header. Tables as in the file; components in scan order."""

    height: int
    width: int
    sampling: list[tuple[int, int]]  # horizontal and vertical factors
    frame: bytes  # SOF0's payload
    kept: bytes  # DQT and Adobe's APP14 segments, whole
    jfif: bytes  # the APP0 segment, whole, or nothing
    tables: dict[tuple[int, int], bytes]  # (class, id) -> BITS and HUFFVAL
    selectors: list[tuple[int, int]]  # DC and AC table ids
    sos: bytes  # SOS's payload
    interval: int  # the restart interval, or 0
    data: int  # where the entropy-coded data begins


def parse(data: bytes) -> Header:
    """The header of a baseline JPEG. Raises NotBaselineError for other kinds, RegionError for a damaged one."""
    if data[:2] != b"\xff\xd8":
        raise NotBaselineError("not a JPEG")
    frame = jfif = b""
    kept: list[bytes] = []
    tables: dict[tuple[int, int], bytes] = {}
    interval, position = 0, 2
    while True:
        marker, payload, after = segment(data, position)
        if marker == 0xC0:
            if frame:
                raise RegionError("two frame headers")
            frame = payload
        elif marker == 0xC4:
            _read_tables(payload, tables)
        elif marker == 0xDD:
            if len(payload) != 2:
                raise RegionError("a damaged DRI segment")
            interval = int.from_bytes(payload, "big")
        elif marker == 0xDA:
            return _header(frame, jfif, kept, tables, interval, payload, after)
        elif 0xC1 <= marker <= 0xCF:
            raise NotBaselineError(f"{_OTHER_FRAMES.get(marker, 'arithmetic')} coding")
        elif marker == 0xDB or (marker == 0xEE and is_sound(marker, payload)):
            kept.append(_marker(marker, payload))
        elif marker == 0xE0 and is_sound(marker, payload):
            jfif = jfif or _marker(marker, payload)
        elif marker < 0xC0 or 0xD0 <= marker <= 0xD9:  # no length follows these; a decoder would go on elsewhere
            raise RegionError("a marker in the header that cannot be there")
        position = after


def is_sound(marker: int, payload: bytes) -> bool:
    """Whether libjpeg reads a JFIF APP0 or Adobe APP14 segment. It ignores shorter ones, at which other readers fail."""
    return (marker == 0xE0 and payload[:5] == b"JFIF\0" and len(payload) >= 14) or (
        marker == 0xEE and payload[:5] == b"Adobe" and len(payload) >= 12
    )


def without_metadata(data: bytes) -> bytes:
    """A JPEG without its APPn and COM segments, except for the JFIF and Adobe segments that libjpeg reads. Raises RegionError
    for a damaged header."""
    kept, marker, position = [data[:2]], 0, 2
    while marker != 0xDA:
        marker, payload, after = segment(data, position)
        if is_sound(marker, payload) or marker < 0xE0:
            kept.append(data[position:after])
        position = after
    return b"".join((*kept, data[position:]))


def segment(data: bytes, position: int) -> tuple[int, bytes, int]:
    """Marker, payload and end of the marker segment at `position` (fill bytes allowed, T.81 B.1.1.2)."""
    while data[position : position + 2] == b"\xff\xff":
        position += 1
    if len(data) < position + 4 or data[position] != 0xFF:
        raise RegionError("a marker is missing in the header")
    length = int.from_bytes(data[position + 2 : position + 4], "big")
    after = position + 2 + length
    if length < 2 or after > len(data):
        raise RegionError("a header segment runs past the end")
    return data[position + 1], data[position + 4 : after], after


def _read_tables(payload: bytes, tables: dict[tuple[int, int], bytes]) -> None:
    while payload:
        if len(payload) < 17 or len(payload) < 17 + sum(payload[1:17]) or payload[0] >> 4 > 1 or payload[0] & 15 > 3:
            raise RegionError("a damaged DHT segment")
        end = 17 + sum(payload[1:17])
        tables[payload[0] >> 4, payload[0] & 15] = payload[1:end]
        payload = payload[end:]


def _header(
    frame: bytes,
    jfif: bytes,
    kept: list[bytes],
    tables: dict[tuple[int, int], bytes],
    interval: int,
    sos: bytes,
    after: int,
) -> Header:
    """Check that the frame and the scan can be transcoded."""
    if len(frame) < 6 or len(frame) != 6 + 3 * frame[5]:
        raise RegionError("a damaged or missing frame header")
    precision, height, width, count = struct.unpack(">BHHB", frame[:6])
    if precision != 8 or count not in (1, 3):
        raise NotBaselineError(f"{precision} bits, {count} components")
    if not height or not width:
        raise RegionError("no height or width in the frame header")
    if len(sos) != 4 + 2 * count or sos[0] != count or sos[-3:] != b"\0\x3f\0":
        raise NotBaselineError("components in scans of their own")
    components = [frame[6 + 3 * i : 9 + 3 * i] for i in range(count)]
    if [sos[1 + 2 * i] for i in range(count)] != [component[0] for component in components]:
        raise RegionError("the scan names other components than the frame")
    sampling = [(component[1] >> 4, component[1] & 15) for component in components]
    if not all(1 <= h <= 4 and 1 <= v <= 4 for h, v in sampling) or sum(h * v for h, v in sampling) > 10:
        raise RegionError("impossible sampling factors")
    if count == 1:
        sampling = [(1, 1)]  # T.81 A.2.2: a scan of one component is not interleaved, whatever its factors say
        frame = frame[:7] + b"\x11" + frame[8:]
    selectors = [(sos[2 + 2 * i] >> 4, sos[2 + 2 * i] & 15) for i in range(count)]
    for dc, ac in selectors:
        if (0, dc) not in tables or (1, ac) not in tables:
            raise RegionError("a Huffman table is missing")
    return Header(height, width, sampling, frame, b"".join(kept), jfif, tables, selectors, sos, interval, after)


def choose_interval(mcus: int, mcu_width: int) -> int:
    """MCUs in a tile: the divisor of a row's MCUs with the width nearest to TILE_WIDTH in ratio, and at least 0.4 of it.

    If there is no such divisor, a tile is a whole row: for a prime number of MCUs, and for narrow images.
    """
    target = TILE_WIDTH / mcu_width
    divisors = [d for d in range(1, mcus + 1) if mcus % d == 0 and d >= 0.4 * target]
    return min(divisors, key=lambda d: max(d / target, target / d), default=mcus)


def transcode(data: bytes) -> bytes:
    """A baseline JPEG as a region-addressable one with the same coefficients.

    Raises NotBaselineError where that needs re-encoding, RegionError for damaged data.
    """
    header = parse(data)
    if data.rfind(b"\xff\xd9") < header.data:
        raise RegionError("no end-of-image marker, so it is truncated")
    mcu_width, mcu_height = 8 * max(h for h, _ in header.sampling), 8 * max(v for _, v in header.sampling)
    columns, rows = -(-header.width // mcu_width), -(-header.height // mcu_height)
    interval = choose_interval(columns, mcu_width)
    tiles = columns // interval
    scan = _Scan.of(data, header, columns * rows, interval)
    counts = np.zeros(4 << 8, np.int64)
    pieces: Iterable[tuple[Tokens, Ints]] = [(scan.tokens, scan.starts)]
    if sum(1 for _ in scan.pieces(counts)) > 1:  # only the last piece is in memory: read the scan again
        pieces = scan.pieces(np.zeros_like(counts))
    coded = [huffman.optimal_table(counts[i << 8 : (i + 1) << 8]) for i in range(4 if len(header.sampling) == 3 else 2)]
    lengths = np.empty(tiles * rows, np.int64)
    capacity = min(2 * len(data), 8 * len(scan.tokens)) + 8 * len(lengths) + 4096  # a token takes at most 4 bytes, stuffed 8
    written = _write(pieces, coded, lengths, capacity)
    table = _length_table(lengths, interval, tiles, rows, mcu_width, mcu_height)
    return b"".join(
        (b"\xff\xd8", header.jfif, table, header.kept, _tail(header, coded, interval), *written)
    )  # `written` ends with EOI


class _Scan(NamedTuple):
    """A scan to read, and the memory for that. tile: MCUs in a tile. For the rest see `entropy.read_scan`."""

    stream: Bytes
    mcus: int
    interval: int
    tile: int
    blocks: Ints
    selectors: Ints
    decoding: huffman.DecodingTables
    data: Bytes
    tokens: Tokens
    starts: Ints

    @staticmethod
    def of(data: bytes, header: Header, mcus: int, tile: int) -> _Scan:
        decoding = huffman.decoding_tables(header.tables)
        if decoding is None:
            raise RegionError("an impossible Huffman table")
        blocks = np.array([c for c, (h, v) in enumerate(header.sampling) for _ in range(h * v)], np.int64)
        stream = np.frombuffer(data, np.uint8)[header.data :]
        most = 64 * tile * len(blocks)  # tokens of a tile
        room = min(8 * len(stream) + most, most * (mcus // tile), _MAX_TOKENS)  # a token takes at least a bit
        return _Scan(
            stream, mcus, header.interval, tile, blocks, np.array(header.selectors, np.int64), decoding,
            np.empty(len(stream) + entropy.PADDING, np.uint8), np.empty(room, np.uint32), np.empty(mcus // tile + 1, np.int64),
        )  # fmt: skip

    def pieces(self, counts: Ints) -> Iterator[tuple[Tokens, Ints]]:
        """Read the scan in pieces of at most `_MAX_TOKENS`: the tokens and the start of each tile, as returned by
        `entropy.read_scan`. Each piece overwrites the one before it. counts: the number of each symbol is added.
        """
        state = np.zeros(9, np.int64)
        while (first := int(state[0])) < self.mcus:
            total = entropy.read_scan(*self[:8], state, self.tokens, self.starts, counts)
            if total < 0:
                raise RegionError(_REASONS[total])
            yield self.tokens, self.starts[: (int(state[0]) - first) // self.tile + 1]


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
            raise RegionError(_REASONS[written])
        parts.append(out[:written].tobytes())
    return parts


def _length_table(lengths: Ints, interval: int, tiles: int, rows: int, mcu_width: int, mcu_height: int) -> bytes:
    size = 2 if lengths.max() < 1 << 16 else 4
    at_most = _MAX_LENGTHS // size
    parts = []
    for start in range(0, len(lengths), at_most):
        some = lengths[start : start + at_most].astype(f"<u{size}")
        payload = TABLE.pack(MAGIC, VERSION, size, interval, tiles, rows, mcu_width, mcu_height, len(some)) + some.tobytes()
        parts.append(_marker(APP11, payload))
    return b"".join(parts)


def _tail(header: Header, coded: list[tuple[Bytes, Bytes]], interval: int) -> bytes:
    """SOF0, DHT, DRI and SOS. The first component uses the tables with id 0, the others those with id 1."""
    tables = b"".join(
        bytes([(i % 2) << 4 | i // 2]) + bits.tobytes() + symbols.tobytes() for i, (bits, symbols) in enumerate(coded)
    )
    sos = bytearray(header.sos)
    for i in range(sos[0]):
        sos[2 + 2 * i] = 0x11 if i else 0x00
    return (
        _marker(0xC0, header.frame)
        + _marker(0xC4, tables)
        + _marker(0xDD, interval.to_bytes(2, "big"))
        + _marker(0xDA, bytes(sos))
    )


def _marker(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload
