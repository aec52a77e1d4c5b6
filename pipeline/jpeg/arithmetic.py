"""Read a scan of an arithmetic-coded JPEG (ITU-T T.81 annex D, F.1.4, F.2.4 and G.1.3), compiled. `scans` reads the whole JPEG.

A scan is a sequence of binary decisions. Each is decoded with the estimated probability of its context, a "statistics bin", which
the decision then updates. `_decide` decodes one; the other functions are the contexts of coefficients.

Unlike Huffman-coded data, this ends without notice: the encoder omits zeros at the end, and the decoder appends them. So a stream
that lacks bytes can only be noticed by a coefficient that is impossible.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..jit import Int, jit
from .blocks import Blocks, Coefficients
from .entropy import BAD_VALUE, TRUNCATED, after_restart, unstuff
from .region import Bytes, Ints

TABLES = 16  # statistics areas for DC, and for AC: libjpeg accepts ids up to 15, T.81 up to 3
_AC_LIMIT = 1 << 10  # baseline has no code for larger AC coefficients (T.81 table F.2)
_MOST = 1 << 15  # a magnitude that no coefficient has

# T.81 table D.3, the estimates: Qe, and the next index after a less and a more probable symbol. Index 113, which never changes,
# is for decisions of probability 1/2.
_QE = """
5a1d 2586 1114 080b 03d8 01da 00e5 006f 0036 001a 000d 0006 0003 0001 5a7f 3f25 2cf2 207c 17b9 1182 0cef 09a1 072f 055c 0406 0303
0240 01b1 0144 00f5 00b7 008a 0068 004e 003b 002c 5ae1 484c 3a0d 2ef1 261f 1f33 19a8 1518 1177 0e74 0bfb 09f8 0861 0706 05cd 04de
040f 0363 02d4 025c 01f8 01a4 0160 0125 00f6 00cb 00ab 008f 5b12 4d04 412c 37d8 2fe8 293c 2379 1edf 1aa9 174e 1424 119c 0f6b 0d51
0bb6 0a40 5832 4d1c 438e 3bdd 34ee 2eae 299a 2516 5570 4ca9 44d9 3e22 3824 32b4 2e17 56a8 4f46 47e5 41cf 3c3d 375e 5231 4c0f 4639
415e 5627 50e7 4b85 5597 504f 5a10 5522 59eb 5a1d
"""
_AFTER_LESS = """
1 14 16 18 20 23 25 28 30 33 35 9 10 12 15 36 38 39 40 42 43 45 46 48 49 51 52 54 56 57 59 60 62 63 32 33 37 64 65 67 68 69 70
72 73 74 75 77 78 79 48 50 50 51 52 53 54 55 56 57 58 59 61 61 65 80 81 82 83 84 86 87 87 72 72 74 74 75 77 77 80 88 89 90 91 92
93 86 88 95 96 97 99 99 93 95 101 102 103 104 99 105 106 107 103 105 108 109 110 111 110 112 112 113
"""
_AFTER_MORE = {13: 13, 35: 9, 63: 32, 79: 48, 87: 71, 94: 86, 100: 93, 104: 99, 107: 103, 109: 107, 111: 109, 112: 111, 113: 113}
_SWITCH = (0, 14, 36, 64, 80, 88, 95, 105, 110, 112)  # a less probable symbol here makes it the more probable one
_FIXED = 113


def _tables() -> tuple[npt.NDArray[np.uint64], Bytes, Bytes]:
    """Qe, and the next state after a less and a more probable symbol, for each state: index | more probable symbol << 7."""
    qe, less, more = np.zeros(256, np.uint64), np.zeros(256, np.uint8), np.zeros(256, np.uint8)
    for index, (estimate, after) in enumerate(zip(_QE.split(), _AFTER_LESS.split(), strict=True)):
        for symbol in (0, 1):
            state = index | symbol << 7
            qe[state] = int(estimate, 16)
            less[state] = int(after) | (symbol ^ (index in _SWITCH)) << 7
            more[state] = _AFTER_MORE.get(index, index + 1) | symbol << 7
    return qe, less, more


_ESTIMATES, _LESS, _MORE = _tables()
_AC = 64 * TABLES  # where the AC areas of 256 bins begin; those for DC have 64 bins
_HALF = _AC + 256 * TABLES  # the bin of probability 1/2


class Coder(NamedTuple):
    """The state of decoding. data: uint8, bytes without stuffing. bins: uint8 (_HALF + 1,), the states of all statistics bins.

    registers: uint64 (5,): A; Cx << 32 and the next bits; how many of these bits are valid; the next byte; the number of bytes.
    """

    data: Bytes
    bins: Bytes
    registers: npt.NDArray[np.uint64]


@jit
def _start(coder: Coder, stop: Int) -> None:
    """Begin a scan, or an interval after a restart marker, of `stop` bytes (INITDEC, T.81 D.2.7)."""
    registers = coder.registers
    registers[0], registers[1], registers[2] = 1 << 16, 0, 0
    registers[3], registers[4] = 0, stop
    for _ in range(6):
        registers[1] = registers[1] << np.uint64(8) | _next(coder)
    registers[2] = 32
    coder.bins[:] = 0
    coder.bins[_HALF] = _FIXED


@jit
def _next(coder: Coder) -> Any:
    """The next byte; zero after the last."""
    at = coder.registers[3]
    if at >= coder.registers[4]:
        return np.uint64(0)
    coder.registers[3] = at + np.uint64(1)
    return np.uint64(coder.data[at])


@jit
def _decide(coder: Coder, place: Int) -> Any:
    """The next decision, 0 or 1, by the bin at `place`, which is updated (DECODE, T.81 D.2.4 to D.2.6)."""
    bins, registers = coder.bins, coder.registers
    state = bins[np.uint64(place)]
    qe, code = _ESTIMATES[state], registers[1]
    a = registers[0] - qe
    symbol = np.int64(state >> 7)
    if code >> np.uint64(32) < a:
        if a >= np.uint64(0x8000):
            registers[0] = a
            return symbol
        likely = a >= qe
    else:
        code -= a << np.uint64(32)
        likely = a < qe
        a = qe
    if likely:
        bins[np.uint64(place)] = _MORE[state]
    else:
        bins[np.uint64(place)] = _LESS[state]
        symbol ^= 1
    have = registers[2]
    while a < np.uint64(0x8000):
        if have == 0:
            for i in range(4):
                code |= _next(coder) << np.uint64(24 - 8 * i)
            have = np.uint64(32)
        a <<= np.uint64(1)
        code <<= np.uint64(1)
        have -= np.uint64(1)
    registers[0], registers[1], registers[2] = a, code, have
    return symbol


@jit
def _magnitude(coder: Coder, place: Any, most: Any) -> Any:
    """The magnitude category of a value, from the bins at `place` on: a power of two, and the last bin (T.81 figure F.23)."""
    while _decide(coder, place):
        most <<= 1
        if most == _MOST:
            break
        place += 1
    return most, place


@jit
def _bits(coder: Coder, place: Any, most: Any) -> Any:
    """The absolute value: one more than `most` and the lower bits that follow (T.81 figure F.24)."""
    value = most
    most >>= 1
    while most:
        if _decide(coder, place + 14):
            value |= most
        most >>= 1
    return value + 1


@jit
def _read_difference(coder: Coder, area: Any, context: Any, low: Any, high: Any) -> Any:
    """A DC difference, and the context of the next one (T.81 F.1.4.4.1). area: the table's first bin. low, high: the bounds of
    small differences. Returns `_MOST` for an impossible one."""
    place = area + context
    if not _decide(coder, place):
        return 0, 0
    negative = _decide(coder, place + 1)
    place += 2 + negative
    most = _decide(coder, place)
    if most:
        most, place = _magnitude(coder, area + 20, most)
        if most == _MOST:
            return _MOST, 0
    context = 0 if most < (1 << low) >> 1 else 4 + 4 * negative
    if most > (1 << high) >> 1:
        context = 12 + 4 * negative
    value = _bits(coder, place, most)
    return -value if negative else value, context


@jit
def _read_ac(coder: Coder, area: Any, bound: Any, block: Any, k: Any, end: Int, low: Int) -> Any:
    """The AC coefficients [k, end] of a block for the first time (T.81 F.1.4.4.2). area: the table's first bin. bound: the last
    coefficient that is "low". Returns 0 or an error code."""
    while k <= end:
        place = area + 3 * (k - 1)
        if _decide(coder, place):  # end of block
            return 0
        while not _decide(coder, place + 1):
            place += 3
            k += 1
            if k > end:
                return BAD_VALUE
        negative = _decide(coder, _HALF)
        place += 2
        most = _decide(coder, place)
        if most and _decide(coder, place):
            most, place = _magnitude(coder, area + (189 if k <= bound else 217), 2)
            if most == _MOST:
                return BAD_VALUE
        value = _bits(coder, place, most) << low
        if value >= _AC_LIMIT:
            return BAD_VALUE
        block[np.uint64(k)] = -value if negative else value
        k += 1
    return 0


@jit
def _refine(coder: Coder, area: Any, block: Any, k: Any, end: Int, low: Int) -> Any:
    """The next lower bit of the AC coefficients [k, end] of a block (T.81 G.1.3.3). Returns 0 or an error code."""
    last = end  # of the coefficients that are not zero so far
    while last >= k and block[np.uint64(last)] == 0:
        last -= 1
    while k <= end:
        place = area + 3 * (k - 1)
        if k > last and _decide(coder, place):  # end of block
            return 0
        while block[np.uint64(k)] == 0 and not _decide(coder, place + 1):
            place += 3
            k += 1
            if k > end:
                return BAD_VALUE
        old = np.int64(block[np.uint64(k)])
        if old == 0:
            block[np.uint64(k)] = -(1 << low) if _decide(coder, _HALF) else 1 << low
        elif _decide(coder, place + 2):
            if abs(old) + (1 << low) >= _AC_LIMIT:
                return BAD_VALUE
            block[np.uint64(k)] = old + (1 << low) if old > 0 else old - (1 << low)
        k += 1
    return 0


@jit
def read_scan(
    stream: Bytes, position: Int, interval: Int, order: Blocks, places: Ints, selectors: Ints, start: Int, end: Int, high: Int,
    low: Int, conditioning: Ints, data: Bytes, coefficients: Coefficients,
) -> Any:  # fmt: skip
    """Add a scan to the coefficients' values, as `scans.read_scan`, which describes the other arguments. Returns the position
    after its entropy-coded data, or an error code.

    conditioning: int64 (TABLES, 3), L and U of each DC table, and K of each AC table (T.81 B.2.4.3).
    """
    values = coefficients.values
    coder = Coder(data, np.empty(_HALF + 1, np.uint8), np.empty(5, np.uint64))
    position, stop = unstuff(stream, position, len(stream), data)
    _start(coder, stop)
    dc, contexts = np.zeros(4, np.int64), np.zeros(4, np.int64)
    for mcu in range(len(order)):
        if interval and mcu and mcu % interval == 0:
            position = after_restart(stream, position, mcu // interval - 1 & 7)
            if position < 0:
                return TRUNCATED
            position, stop = unstuff(stream, position, len(stream), data)
            _start(coder, stop)
            dc[:] = 0
            contexts[:] = 0
        for place in range(len(places)):
            block = values[np.uint64(order[mcu, place])]
            component = places[place]
            table, ac_table = selectors[component, 0], selectors[component, 1]
            if start == 0 and high:
                block[0] |= _decide(coder, _HALF) << low
            elif start == 0:
                difference, contexts[component] = _read_difference(
                    coder, 64 * table, contexts[component], conditioning[table, 0], conditioning[table, 1]
                )
                dc[component] += difference
                if difference == _MOST:
                    return BAD_VALUE
                if not -(1 << 15) <= dc[component] << low < 1 << 15:
                    return BAD_VALUE
                block[0] = dc[component] << low
            if end:
                area, first = _AC + 256 * ac_table, max(start, 1)
                if high:
                    error = _refine(coder, area, block, first, end, low)
                else:
                    error = _read_ac(coder, area, conditioning[ac_table, 2], block, first, end, low)
                if error:
                    return error
    return position
