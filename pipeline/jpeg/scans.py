"""Read the coefficients of other JPEGs than those of a single Huffman-coded scan: progressive ones, those with a scan for each
component, and arithmetic-coded ones (`arithmetic`).

ITU-T T.81: B.2.3 (scan headers), F.2 (Huffman decoding), annex G (progressive coding). Each scan of a progressive JPEG has
some of the 64 coefficients of each block ("spectral selection"), and of these some bits ("successive approximation").
"""

from __future__ import annotations

from typing import Any

import numpy as np
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

_AC_LIMIT = 1 << 10  # baseline has no code for larger AC coefficients (T.81 table F.2)


def read_coefficients(data: bytes, header: Header) -> Coefficients:
    """The coefficients of a JPEG.

    Raises RegionError for damaged data, and where scans are missing: decoders smooth such an image.
    """
    components = components_of(header)
    count = components[-1].first + components[-1].columns * components[-1].rows
    coefficients = Coefficients(np.zeros((count, 64), np.int16), np.zeros(count, np.uint64))
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
    if header.arithmetic:
        coefficients.find_nonzero()
    for one in components:
        fill_edges(coefficients, one)
    return coefficients


class _Scans:
    """Reads scan after scan. known: (components, 64), the lowest bit that was read of each coefficient, or -1."""

    def __init__(self, data: bytes, header: Header, components: list[Component], coefficients: Coefficients) -> None:
        self.tables, self.conditioning, self.interval = dict(header.tables), dict(header.conditioning), header.interval
        self.known = [[-1] * 64 for _ in components]
        self._orders: dict[tuple[int, ...], tuple[Blocks, Ints]] = {}
        self._progressive, self._arithmetic, self._components = header.progressive, header.arithmetic, components
        self._ids = list(header.frame[6::3])
        self._stream = np.frombuffer(data, np.uint8)
        self._decoding_tables = empty_tables()
        self._buffer = np.empty(len(data) + PADDING, np.uint8)
        self._coefficients = coefficients

    def read(self, sos: bytes, position: int) -> int:
        """Read the entropy-coded data at `position`. Returns its end."""
        chosen, selectors, bounds = self._parse(sos)
        numbers = tuple(one.number for one in chosen)
        if numbers not in self._orders:
            self._orders[numbers] = scan_order(chosen)
        begin = (self._stream, position, self.interval, *self._orders[numbers], np.array(selectors), *bounds)
        end: int
        if self._arithmetic:
            end = arithmetic.read_scan(*begin, self._conditioning(), self._buffer, self._coefficients)
        else:
            decoding = self._decoding(selectors, bounds)
            end = read_scan(*begin, self._progressive, decoding, self._buffer, self._coefficients)
        if end < 0:
            raise RegionError(REASONS[end])
        return end

    def _decoding(self, selectors: list[tuple[int, int]], bounds: tuple[int, int, int, int]) -> DecodingTables:
        """The tables that a scan uses. Others in the result are those of earlier scans."""
        start, end, high, _ = bounds
        kinds = [kind for kind, used in enumerate((start == 0 and not high, end > 0)) if used]
        for kind, number in {(kind, pair[kind]) for pair in selectors for kind in kinds}:
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

    def _parse(self, sos: bytes) -> tuple[list[Component], list[tuple[int, int]], tuple[int, int, int, int]]:
        """The components of a scan, their DC and AC tables, and Ss, Se, Ah, Al (T.81 B.2.3)."""
        if len(sos) < 6 or len(sos) != 4 + 2 * sos[0] or not set(sos[1:-3:2]) <= set(self._ids):
            raise RegionError("a damaged scan header")
        chosen = [self._components[self._ids.index(number)] for number in sos[1:-3:2]]
        selectors = [(table >> 4, table & 15) for table in sos[2:-3:2]]
        start, end, high, low = sos[-3], sos[-2], sos[-1] >> 4, sos[-1] & 15
        if not self._progressive:
            start, end, high, low = 0, 63, 0, 0  # as decoders assume
        count = end + 1 - start
        valid = len({one.number for one in chosen}) == len(chosen) and start <= end <= 63 and low <= 13
        valid &= all(self.known[one.number][start : end + 1] == [high or -1] * count for one in chosen)
        if self._progressive:
            valid &= end == 0 if start == 0 else len(chosen) == 1 and self.known[chosen[0].number][0] >= 0
        if not valid or (high and low != high - 1):
            raise RegionError("an impossible sequence of scans")
        for one, (dc, ac) in zip(chosen, selectors, strict=True):
            lacking = (start == 0 and not high and (0, dc) not in self.tables) or (end > 0 and (1, ac) not in self.tables)
            if lacking and not self._arithmetic:
                raise RegionError("a Huffman table is missing")
            self.known[one.number][start : end + 1] = [low] * count
        return chosen, selectors, (start, end, high, low)


@jit
def _sign(value: Any, count: Any) -> Any:
    """The number that `count` extra bits mean (T.81 F.2.2.1, EXTEND)."""
    return value if value >= (1 << count) >> 1 else value + 1 - (1 << count)


@jit
def read_scan(
    stream: Bytes, position: Int, interval: Int, order: Blocks, places: Ints, selectors: Ints, start: Int, end: Int, high: Int,
    low: Int, progressive: bool, tables: DecodingTables, data: Bytes, coefficients: Coefficients,
) -> Any:  # fmt: skip
    """Add a scan to the coefficients. Returns the position after its entropy-coded data, or an error code.

    order, places: from `scan_order`. selectors: int64 (components, 2), their DC and AC tables. start, end, high, low: Ss, Se, Ah,
    Al: the first and last coefficient, and the lowest bit that was known, or 0, and that this scan has. data: scratch, uint8
    (len(stream) + PADDING,).
    """
    step = interval or len(order)
    for first in range(0, len(order), step):
        if first:
            position = after_restart(stream, position, first // step - 1 & 7)
            if position < 0:
                return TRUNCATED
        position, stop = unstuff(stream, position, len(stream), data)
        some = order[first : first + step]
        if high and end:
            row = np.uint64(4 + selectors[0, 1])
            error, left = _refine_ac(data, stop, some, row, start, end, low, tables, coefficients)
        elif high:
            error, left = _refine_dc(data, stop, some, low, coefficients)
        else:
            error, left = _read_first(data, stop, some, places, selectors, start, end, low, progressive, tables, coefficients)
        if left < 0:
            return TRUNCATED
        if error:
            return error
    return position


# These are long functions over many blocks, because each call in numba updates the reference counts of all its arrays.


@jit
def _read_first(
    data: Bytes, stop: Int, order: Blocks, places: Ints, selectors: Ints, start: Int, end: Int, low: Int, progressive: bool,
    tables: DecodingTables, coefficients: Coefficients,
) -> Any:  # fmt: skip
    """Read the bits from `low` on of coefficients. Returns 0 or an error code, and the number of unread bits."""
    values, nonzero = coefficients
    at, bits = np.uint64(0), np.uint64(0)
    have: Any = 0
    dc = np.zeros(4, np.int64)
    run: Any = 0  # blocks that have ended already (EOBRUN)
    for mcu in range(len(order)):
        for place in range(len(places)):
            index, component = np.uint64(order[mcu, place]), places[place]
            if start == 0:
                at, bits, have = refill(data, at, bits, have)
                entry = lookup(bits, np.uint64(selectors[component, 0]), tables)
                size, count = np.int64(entry & 255), np.int64(entry >> 16)
                if entry == 0 or count > 11:
                    return BAD_CODE, bits_left(stop, at, have)
                dc[component] += _sign(extra(bits, size, count), count)
                if not -(1 << 15) <= dc[component] << low < 1 << 15:
                    return BAD_VALUE, bits_left(stop, at, have)
                values[index, 0] = dc[component] << low
                bits <<= np.uint64(size)
                have -= size
            if run:
                run -= 1
                continue
            row, found = np.uint64(4 + selectors[component, 1]), nonzero[index]
            k: Any = max(start, 1)
            while k <= end:
                if have < 32:
                    at, bits, have = refill(data, at, bits, have)
                entry = lookup(bits, row, tables)
                size, zeros, count = np.int64(entry & 255), np.int64(entry >> 20), np.int64(entry >> 16 & 15)
                if entry == 0 or (count == 0 and 0 < zeros < 15 and not progressive):
                    return BAD_CODE, bits_left(stop, at, have)
                value = _sign(extra(bits, size, count), count) << low
                bits <<= np.uint64(size)
                have -= size
                if count == 0 and zeros < 15:
                    at, bits, have, run = _end_of_band(data, at, bits, have, zeros)
                    run -= 1
                    break
                k += zeros
                if count:
                    if k > end or abs(value) >= _AC_LIMIT:
                        return BAD_VALUE, bits_left(stop, at, have)
                    values[index, np.uint64(k)] = value
                    found |= np.uint64(1) << np.uint64(k)
                k += 1
            if k > end + 1:
                return BAD_VALUE, bits_left(stop, at, have)
            nonzero[index] = found
        if bits_left(stop, at, have) < 0:
            break
    return 0, bits_left(stop, at, have)


@jit
def _end_of_band(data: Bytes, at: Any, bits: Any, have: Any, log: Any) -> Any:
    """The number of blocks that end here, this one included: 1 << log plus the next `log` bits (T.81 G.1.2.2)."""
    if log == 0:
        return at, bits, have, 1
    at, bits, have = refill(data, at, bits, have)
    return at, bits << np.uint64(log), have - log, (1 << log) + extra(bits, log, log)


@jit
def _refine_dc(data: Bytes, stop: Int, order: Blocks, low: Int, coefficients: Coefficients) -> Any:
    """Read the next lower bit of DC coefficients. Returns as `_read_first`."""
    values = coefficients.values
    at, bits, have = np.uint64(0), np.uint64(0), 0
    for mcu in range(len(order)):
        at, bits, have = refill(data, at, bits, have)
        for place in range(order.shape[1]):
            values[np.uint64(order[mcu, place]), 0] |= np.int64(bits >> np.uint64(63)) << low
            bits <<= np.uint64(1)
        have -= order.shape[1]
        if bits_left(stop, at, have) < 0:
            break
    return 0, bits_left(stop, at, have)


@jit
def _refine_ac(
    data: Bytes, stop: Int, order: Blocks, row: Any, start: Int, end: Int, low: Int, tables: DecodingTables,
    coefficients: Coefficients,
) -> Any:  # fmt: skip
    """Read the next lower bit of a component's AC coefficients (T.81 G.1.2.3). Returns as `_read_first`.

    Between the codes for new nonzero coefficients are single bits, one for each coefficient that was not zero before.
    """
    values, nonzero = coefficients
    at, bits = np.uint64(0), np.uint64(0)
    have: Any = 0
    one = np.uint64(1)
    band = (np.uint64(2) << np.uint64(end)) - (one << np.uint64(start))
    run: Any = 0
    for mcu in range(len(order)):
        index = np.uint64(order[mcu, 0])
        found = nonzero[index]
        old = found & band  # those that are still to be refined
        k: Any = start
        while k <= end:
            zeros: Any = 64
            value: Any = 0
            if not run:
                if have < 32:
                    at, bits, have = refill(data, at, bits, have)
                entry = lookup(bits, row, tables)
                size, symbol = np.int64(entry & 255), np.int64(entry >> 16)
                if entry == 0 or symbol & 15 > 1:
                    return BAD_CODE, bits_left(stop, at, have)
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
                before = np.int64(values[index, place])
                sign = before >> 63
                values[index, place] = before + ((np.int64(bits >> np.uint64(63)) << low) ^ sign) - sign
                bits <<= one
                have -= 1
            if run:
                run -= 1
                break
            k += zeros
            if value:
                if k > end:
                    return BAD_VALUE, bits_left(stop, at, have)
                values[index, np.uint64(k)] = value
                found |= one << np.uint64(k)
            k += 1
        nonzero[index] = found
        if bits_left(stop, at, have) < 0:
            break
    return 0, bits_left(stop, at, have)
