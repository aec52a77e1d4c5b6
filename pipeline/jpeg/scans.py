"""Read the coefficients of other JPEGs than those of a single Huffman-coded scan: progressive ones, those with a scan for each
component, and arithmetic-coded ones (`arithmetic`).

ITU-T T.81: B.2.3 (scan headers), F.2 (Huffman decoding), annex G (progressive coding). Each scan of a progressive JPEG has
some of the 64 coefficients of each block ("spectral selection"), and of these some bits ("successive approximation").
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba.cpython.unsafe.numbers import trailing_zeros

from ..jit import Int, jit
from . import arithmetic
from .blocks import Blocks, Coefficients, Component, components_of, fill_edges, scan_order
from .entropy import (
    BAD_CODE,
    BAD_VALUE,
    PADDING,
    REASONS,
    TRUNCATED,
    after_restart,
    bits_left,
    extra,
    refill,
    unstuff,
)
from .header import Header, read_conditioning, read_segment, read_tables
from .huffman import DecodingTables, empty_tables, fill_decoding_table, lookup
from .region import Bytes, Ints, RegionError

Masks = npt.NDArray[np.uint64]  # of each block: bit k is set if coefficient k is not zero

_AC_LIMIT = 1 << 10  # baseline has no code for larger AC coefficients (T.81 table F.2)


def read_coefficients(data: bytes, header: Header) -> Coefficients:
    """The coefficients of a JPEG, quantized: int16 (blocks, 64), each block in zigzag order, the blocks as in `components_of`.

    Raises RegionError for damaged data, and where scans are missing: decoders smooth such an image.
    """
    components = components_of(header)
    coefficients = np.zeros((components[-1].first + components[-1].columns * components[-1].rows, 64), np.int16)
    scans = _Scans(data, header, components, coefficients)
    position = scans.read(header.sos, header.data)
    while not data.startswith(b"\xff\xd9", position):
        marker, payload, position = read_segment(data, position)
        if marker == 0xDA:
            position = scans.read(payload, position)
        elif marker == 0xC4:
            read_tables(payload, scans.tables)
        elif marker == 0xCC:
            read_conditioning(payload, scans.conditioning)
        elif marker == 0xDD and len(payload) == 2:
            scans.interval = int.from_bytes(payload, "big")
        elif not 0xE0 <= marker <= 0xEF and marker != 0xFE:  # APPn and COM
            raise RegionError(f"a marker FF{marker:02X} between scans")
    if any(any(bits) for bits in scans.known):
        raise RegionError("scans are missing")
    for one in components:
        fill_edges(coefficients[one.first :][: one.rows * one.columns].reshape(one.rows, one.columns, 64), one)
    return coefficients


class _Scans:
    """Reads scan after scan. known: (components, 64), the lowest bit that was read of each coefficient, or -1."""

    def __init__(self, data: bytes, header: Header, components: list[Component], coefficients: Coefficients) -> None:
        self.tables, self.conditioning, self.interval = dict(header.tables), dict(header.conditioning), header.interval
        self.known = [[-1] * 64 for _ in components]
        self._orders: dict[tuple[int, ...], Blocks] = {}
        self._progressive, self._arithmetic, self._components = header.progressive, header.arithmetic, components
        self._ids = list(header.frame[6::3])
        self._stream = np.frombuffer(data, np.uint8)
        self._decoding_tables = empty_tables()
        self._buffer = np.empty(len(data) + PADDING, np.uint8)
        self._coefficients, self._nonzero = coefficients, np.zeros(len(coefficients), np.uint64)

    def read(self, sos: bytes, position: int) -> int:
        """Read the entropy-coded data at `position`. Returns its end."""
        chosen, selectors, bounds = self._parse(sos)
        numbers = tuple(one.number for one in chosen)
        if numbers not in self._orders:
            self._orders[numbers] = scan_order(chosen)
        places = np.array([i for i, one in enumerate(chosen) for _ in range(one.h * one.v if len(chosen) > 1 else 1)])
        begin = (self._stream, position, self.interval, self._orders[numbers], places, selectors, *bounds)
        end: int
        if self._arithmetic:
            end = arithmetic.read_scan(*begin, self._conditioning(), self._buffer, self._coefficients)
        else:
            decoding = self._decoding(selectors, bounds)
            end = read_scan(*begin, self._progressive, decoding, self._buffer, self._coefficients, self._nonzero)
        if end < 0:
            raise RegionError(REASONS[end])
        return end

    def _decoding(self, selectors: Ints, bounds: tuple[int, int, int, int]) -> DecodingTables:
        """The tables that a scan uses. Others in the result are those of earlier scans."""
        start, end, high, _ = bounds
        kinds = [kind for kind, used in enumerate((start == 0 and not high, end > 0)) if used]
        for kind, number in {(kind, int(pair[kind])) for pair in selectors for kind in kinds}:
            row = 4 * kind + number
            self._decoding_tables.lookup[row], self._decoding_tables.limits[row] = 0, -1
            if not fill_decoding_table(np.frombuffer(self.tables[kind, number], np.uint8), row, self._decoding_tables):
                raise RegionError("an impossible Huffman table")
        return self._decoding_tables

    def _conditioning(self) -> Ints:
        """L and U of each DC table, and K of each AC table (T.81 F.1.4.4.1.4, F.1.4.4.2.1): int64 (arithmetic.TABLES, 3)."""
        found = np.full((arithmetic.TABLES, 3), (0, 1, 5), np.int64)
        for (kind, number), value in self.conditioning.items():
            if kind:
                found[number, 2] = value
            else:
                found[number, :2] = value & 15, value >> 4
        return found

    def _parse(self, sos: bytes) -> tuple[list[Component], Ints, tuple[int, int, int, int]]:
        """The components of a scan, their DC and AC tables, int64 (components, 2), and Ss, Se, Ah, Al (T.81 B.2.3)."""
        if len(sos) < 6 or len(sos) != 4 + 2 * sos[0] or not set(sos[1:-3:2]) <= set(self._ids):
            raise RegionError("a damaged scan header")
        chosen = [self._components[self._ids.index(number)] for number in sos[1:-3:2]]
        selectors = np.array([(table >> 4, table & 15) for table in sos[2:-3:2]], np.int64)
        start, end, high, low = sos[-3], sos[-2], sos[-1] >> 4, sos[-1] & 15
        if not self._progressive:
            start, end, high, low = 0, 63, 0, 0  # as decoders assume
        known = set().union(*(self.known[one.number][start : end + 1] for one in chosen))
        valid = len({one.number for one in chosen}) == len(chosen) and start <= end <= 63 and low <= 13
        if self._progressive:
            valid &= end == 0 if start == 0 else len(chosen) == 1 and self.known[chosen[0].number][0] >= 0
        if not valid or known != {high or -1} or (high and low != high - 1):
            raise RegionError("an impossible sequence of scans")
        for one, (dc, ac) in zip(chosen, selectors.tolist(), strict=True):
            lacking = (start == 0 and not high and (0, dc) not in self.tables) or (end > 0 and (1, ac) not in self.tables)
            if lacking and not self._arithmetic:
                raise RegionError("a Huffman table is missing")
            self.known[one.number][start : end + 1] = [low] * (end + 1 - start)
        return chosen, selectors, (start, end, high, low)


@jit
def _sign(value: Any, count: Any) -> Any:
    """The number that `count` extra bits mean (T.81 F.2.2.1, EXTEND)."""
    return value if value >= (1 << count) >> 1 else value + 1 - (1 << count)


@jit
def read_scan(
    stream: Bytes, position: Int, interval: Int, order: Blocks, places: Ints, selectors: Ints, start: Int, end: Int, high: Int,
    low: Int, progressive: bool, tables: DecodingTables, data: Bytes, coefficients: Coefficients, nonzero: Masks,
) -> Any:  # fmt: skip
    """Add a scan to the coefficients. Returns the position after its entropy-coded data, or an error code.

    order: from `scan_order`. places: the number in the scan of the component of each block of an MCU. start, end, high, low: Ss,
    Se, Ah, Al: the first and last coefficient, and the lowest bit that was known, or 0, and that this scan has. data: scratch,
    uint8 (len(stream) + PADDING,). nonzero: the AC coefficients that are not zero so far.
    """
    position, stop = unstuff(stream, position, len(stream), data)
    at, bits, have = np.uint64(0), np.uint64(0), 0
    dc = np.zeros(4, np.int64)
    run: Any = 0  # blocks that have ended already (EOBRUN)
    for mcu in range(len(order)):
        if interval and mcu and mcu % interval == 0:
            position = after_restart(stream, position, mcu // interval - 1 & 7)
            if position < 0:
                return TRUNCATED
            position, stop = unstuff(stream, position, len(stream), data)
            at, bits, have = np.uint64(0), np.uint64(0), 0
            dc[:] = 0
            run = 0
        for place in range(len(places)):
            index = np.uint64(order[mcu, place])
            block = coefficients[index]
            component = places[place]
            k: Any = start
            if start == 0:
                at, bits, have = refill(data, at, bits, have)
                if high:
                    block[0] |= np.int64(bits >> np.uint64(63)) << low
                    bits <<= np.uint64(1)
                    have -= 1
                else:
                    entry = lookup(bits, np.uint64(selectors[component, 0]), tables)
                    size, count = np.int64(entry & 255), np.int64(entry >> 16)
                    if entry == 0 or count > 11:
                        return BAD_CODE
                    dc[component] += _sign(extra(bits, size, count), count)
                    if not -(1 << 15) <= dc[component] << low < 1 << 15:
                        return BAD_VALUE
                    block[0] = dc[component] << low
                    bits <<= np.uint64(size)
                    have -= size
                k = 1
            if end == 0:
                continue
            row = np.uint64(4 + selectors[component, 1])
            if high:
                at, bits, have, run, nonzero[index] = _refine(
                    data, at, bits, have, row, tables, block, k, end, low, run, nonzero[index]
                )
            elif run:
                run -= 1
                continue
            else:
                at, bits, have, run, nonzero[index] = _read_ac(
                    data, at, bits, have, row, tables, block, k, end, low, nonzero[index]
                )
            if run < 0:
                return run if bits_left(stop, at, have) >= 0 else TRUNCATED
            if run > 0 and not progressive:
                return BAD_CODE
        if bits_left(stop, at, have) < 0:
            return TRUNCATED
    return position


@jit
def _end_of_band(data: Bytes, at: Any, bits: Any, have: Any, log: Any) -> Any:
    """The number of blocks that end here, this one included: 1 << log plus the next `log` bits (T.81 G.1.2.2)."""
    at, bits, have = refill(data, at, bits, have)
    run = (1 << log) + extra(bits, log, log) if log else 1
    return at, bits << np.uint64(log), have - log, run


@jit
def _read_ac(
    data: Bytes, at: Any, bits: Any, have: Any, row: Any, tables: DecodingTables, block: Any, k: Any, end: Int, low: Int,
    nonzero: Any,
) -> Any:  # fmt: skip
    """The AC coefficients [k, end] of a block for the first time. Returns at, bits, have, run (or an error code), and nonzero."""
    while k <= end:
        at, bits, have = refill(data, at, bits, have)
        entry = lookup(bits, row, tables)
        size, symbol = np.int64(entry & 255), np.int64(entry >> 16)
        if entry == 0:
            return at, bits, have, BAD_CODE, nonzero
        zeros, count = symbol >> 4, symbol & 15
        value = extra(bits, size, count)
        bits <<= np.uint64(size)
        have -= size
        if count == 0:
            if zeros < 15:
                at, bits, have, run = _end_of_band(data, at, bits, have, zeros)
                return at, bits, have, run - 1, nonzero
            k += 16
            continue
        k += zeros
        value = _sign(value, count) << low
        if k > end or abs(value) >= _AC_LIMIT:
            return at, bits, have, BAD_VALUE, nonzero
        block[np.uint64(k)] = value
        nonzero |= np.uint64(1) << np.uint64(k)
        k += 1
    return at, bits, have, 0 if k == end + 1 else BAD_VALUE, nonzero


@jit
def _refine(
    data: Bytes, at: Any, bits: Any, have: Any, row: Any, tables: DecodingTables, block: Any, k: Any, end: Int, low: Int,
    run: Any, nonzero: Any,
) -> Any:  # fmt: skip
    """The next lower bit of the AC coefficients [k, end] of a block (T.81 G.1.2.3). Returns as `_read_ac`.

    Between the codes for new nonzero coefficients are single bits, one for each coefficient that was not zero before.
    """
    one = np.uint64(1)
    old = nonzero & (np.uint64(2) << np.uint64(end)) - one & ~((one << np.uint64(k)) - one)  # those that are still to be refined
    while k <= end:
        zeros: Any = 64
        value: Any = 0
        if not run:
            at, bits, have = refill(data, at, bits, have)
            entry = lookup(bits, row, tables)
            size, symbol = np.int64(entry & 255), np.int64(entry >> 16)
            if entry == 0 or symbol & 15 > 1:
                return at, bits, have, BAD_CODE, nonzero
            zeros = symbol >> 4
            if symbol & 15:
                value = (2 * extra(bits, size, 1) - 1) << low
            bits <<= np.uint64(size)
            have -= size
            if value == 0 and zeros < 15:
                at, bits, have, run = _end_of_band(data, at, bits, have, zeros)
                zeros = 64
        while old:
            place = np.uint64(trailing_zeros(old))
            between = np.int64(place) - k
            if between > zeros:
                break
            zeros -= between
            k += between + 1
            old &= old - one
            if have == 0:
                at, bits, have = refill(data, at, bits, have)
            # It stays in range: by `_parse`, all its bits from this one down are 0 so far.
            sign = np.int64(block[place]) >> 63
            block[place] += ((np.int64(bits >> np.uint64(63)) << low) ^ sign) - sign
            bits <<= one
            have -= 1
        if run:
            return at, bits, have, run - 1, nonzero
        k += zeros
        if value:
            if k > end:
                return at, bits, have, BAD_VALUE, nonzero
            block[np.uint64(k)] = value
            nonzero |= one << np.uint64(k)
        k += 1
    return at, bits, have, run, nonzero
