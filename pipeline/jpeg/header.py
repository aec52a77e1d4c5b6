"""JPEG's marker segments (ITU-T T.81 annex B): the header of a file, read and checked."""

from __future__ import annotations

import struct
from typing import NamedTuple

from .region import RegionError

# Frames (T.81 table B.1): Huffman-coded, and arithmetic-coded ones
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_ARITHMETIC, _ARITHMETIC_PROGRESSIVE = 0xC9, 0xCA
MAX_BLOCKS = 10  # of an MCU (T.81 B.2.3)


class NotBaselineError(RegionError):
    """A JPEG whose coefficients baseline cannot hold, or cannot be read here: it can be re-encoded, not transcoded."""


class Header(NamedTuple):
    """What a JPEG says before its first scan. Tables as in the file; components in the order of the frame."""

    height: int
    width: int
    sampling: list[tuple[int, int]]  # horizontal and vertical factors
    frame: bytes  # SOF's payload
    kept: bytes  # DQT and Adobe's APP14 segments, whole
    jfif: bytes  # the APP0 segment, whole, or nothing
    tables: dict[tuple[int, int], bytes]  # (class, id) -> BITS and HUFFVAL
    sos: bytes  # the payload of the first SOS
    interval: int  # the restart interval, or 0
    data: int  # where the entropy-coded data begins
    progressive: bool
    arithmetic: bool
    conditioning: dict[tuple[int, int], int]  # of arithmetic coding: (class, id) -> the value in DAC

    @property
    def selectors(self) -> list[tuple[int, int]]:
        """The DC and AC table ids of the components in the first scan."""
        return [(table >> 4 & 3, table & 3) for table in self.sos[2:-3:2]]

    @property
    def is_one_scan(self) -> bool:
        """Whether the first scan has everything, as in a baseline JPEG with interleaved components."""
        return not self.progressive and not self.arithmetic and self.sos[0] == len(self.sampling)


def parse(data: bytes) -> Header:
    """Read the header of a DCT-based JPEG with 8 bits and 1, 3 or 4 components. Raises NotBaselineError for other kinds,
    RegionError for a damaged one."""
    if data[:2] != b"\xff\xd8":
        raise NotBaselineError("not a JPEG")
    frame = jfif = b""
    kind, wide = 0, False
    kept: list[bytes] = []
    tables: dict[tuple[int, int], bytes] = {}
    conditioning: dict[tuple[int, int], int] = {}
    interval, position = 0, 2
    while True:
        marker, payload, after = read_segment(data, position)
        if marker in (_BASELINE, _EXTENDED, _PROGRESSIVE, _ARITHMETIC, _ARITHMETIC_PROGRESSIVE):
            if frame:
                raise RegionError("two frame headers")
            frame, kind = payload, marker
        elif marker == 0xC4:
            read_tables(payload, tables)
        elif marker == 0xCC:
            read_conditioning(payload, conditioning)
        elif marker == 0xDD:
            if len(payload) != 2:
                raise RegionError("a damaged DRI segment")
            interval = int.from_bytes(payload, "big")
        elif marker == 0xDA:
            if wide and kind != _BASELINE:
                raise NotBaselineError("quantization tables of 16 bits")
            height, width, sampling, frame = _read_frame(frame, payload, kind, tables)
            return Header(
                height, width, sampling, frame, b"".join(kept), jfif, tables, payload, interval, after,
                kind in (_PROGRESSIVE, _ARITHMETIC_PROGRESSIVE), kind >= _ARITHMETIC, conditioning,
            )  # fmt: skip
        elif 0xC3 <= marker <= 0xCF:
            raise NotBaselineError("lossless coding" if marker in (0xC3, 0xCB) else "hierarchical coding")
        elif marker == 0xDB or (marker == 0xEE and is_sound(marker, payload)):
            wide |= marker == 0xDB and any(entry >> 4 for entry in payload[::65])
            kept.append(write_segment(marker, payload))
        elif marker == 0xE0 and is_sound(marker, payload):
            jfif = jfif or write_segment(marker, payload)
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
        marker, payload, after = read_segment(data, position)
        if is_sound(marker, payload) or marker < 0xE0:
            kept.append(data[position:after])
        position = after
    return b"".join((*kept, data[position:]))


def read_segment(data: bytes, position: int) -> tuple[int, bytes, int]:
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


def read_tables(payload: bytes, tables: dict[tuple[int, int], bytes]) -> None:
    while payload:
        if len(payload) < 17 or len(payload) < 17 + sum(payload[1:17]) or payload[0] >> 4 > 1 or payload[0] & 15 > 3:
            raise RegionError("a damaged DHT segment")
        end = 17 + sum(payload[1:17])
        tables[payload[0] >> 4, payload[0] & 15] = payload[1:end]
        payload = payload[end:]


def read_conditioning(payload: bytes, conditioning: dict[tuple[int, int], int]) -> None:
    """Read a DAC segment (T.81 B.2.4.3)."""
    pairs = list(zip(payload[::2], payload[1::2], strict=False))
    if len(payload) % 2 or any(key >> 4 > 1 or (key >> 4 == 0 and value & 15 > value >> 4) for key, value in pairs):
        raise RegionError("a damaged DAC segment")
    conditioning |= {(key >> 4, key & 15): value for key, value in pairs}


def _read_frame(
    frame: bytes, sos: bytes, kind: int, tables: dict[tuple[int, int], bytes]
) -> tuple[int, int, list[tuple[int, int]], bytes]:
    """Height, width, sampling factors and, for a single component without factors, SOF's payload. Checks the first SOS, too."""
    if len(frame) < 6 or len(frame) != 6 + 3 * frame[5]:
        raise RegionError("a damaged or missing frame header")
    precision, height, width, count = struct.unpack(">BHHB", frame[:6])
    if precision != 8 or count not in (1, 3, 4):
        raise NotBaselineError(f"{precision} bits, {count} components")
    if not height or not width:
        raise RegionError("no height or width in the frame header")
    components = [frame[6 + 3 * i : 9 + 3 * i] for i in range(count)]
    sampling = [(component[1] >> 4, component[1] & 15) for component in components]
    if not all(1 <= h <= 4 and 1 <= v <= 4 for h, v in sampling):
        raise RegionError("impossible sampling factors")
    if count == 1:
        sampling = [(1, 1)]  # T.81 A.2.2: a scan of one component is not interleaved, whatever its factors say
        frame = frame[:7] + b"\x11" + frame[8:]
    if (blocks := sum(h * v for h, v in sampling)) > MAX_BLOCKS:
        raise NotBaselineError(f"sampling factors of {blocks} blocks in an MCU, of which baseline allows {MAX_BLOCKS}")
    if len(sos) < 6 or len(sos) != 4 + 2 * sos[0]:
        raise RegionError("a damaged scan header")
    if kind in (_BASELINE, _EXTENDED) and sos[0] == count:
        if sos[-3:] != b"\0\x3f\0" or any(sos[1 + 2 * i] != components[i][0] for i in range(count)):
            raise RegionError("the scan names other components than the frame")
        if any((0, sos[2 + 2 * i] >> 4) not in tables or (1, sos[2 + 2 * i] & 15) not in tables for i in range(count)):
            raise RegionError("a Huffman table is missing")
    return height, width, sampling, frame


def write_segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload
