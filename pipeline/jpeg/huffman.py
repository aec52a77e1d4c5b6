"""JPEG's Huffman tables (ITU-T T.81), compiled: tables for decoding, and optimal tables for encoding from symbol counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..jit import jit

_LOOK = 10  # bits looked up at once; longer codes are rare, and are found by comparison with limits


class DecodingTables(NamedTuple):
    """Eight Huffman tables for decoding; the index of a table is 4 * class + id. Codes of up to 10 bits are looked up, longer
    ones are compared with limits (T.81 F.2.2.3).

    lookup: uint32 (8, 1024), the `_entry` for the next 10 bits, or 0. limits: int32 (8, 18), the largest code of each size.
    offsets: int32 (8, 18); code + offset of its size is the index of its symbol. values: uint8 (8, 256), the symbols.
    """

    lookup: npt.NDArray[np.uint32]
    limits: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]
    values: npt.NDArray[np.uint8]


@jit
def empty_tables() -> DecodingTables:
    return DecodingTables(
        np.zeros((8, 1 << _LOOK), np.uint32),
        np.full((8, 18), -1, np.int32),
        np.zeros((8, 18), np.int32),
        np.zeros((8, 256), np.uint8),
    )


def decoding_tables(tables: dict[tuple[int, int], bytes]) -> DecodingTables | None:
    """Tables for decoding, from those of a file: (class, id) -> BITS and HUFFVAL. None if one of them is not a Huffman code."""
    found = empty_tables()
    for (kind, number), table in tables.items():
        if not fill_decoding_table(np.frombuffer(table, np.uint8), 4 * kind + number, found):
            return None
    return found


@jit
def _entry(size: Any, symbol: Any) -> Any:
    """An entry for a code: symbol << 16 | number of bits of the code and its extra bits (the symbol's low four bits)."""
    return np.uint32(symbol) << 16 | (size + (symbol & 15))


@jit
def fill_decoding_table(table: Any, index: Any, tables: DecodingTables) -> bool:
    """Store a DHT table, uint8 BITS and HUFFVAL, at `index` of `tables`. Returns False if it is not a Huffman code."""
    luts, limits, offsets, values = tables
    if len(table) - 16 > 256:
        return False
    for i in range(len(table) - 16):
        values[index, i] = table[16 + i]
    code: Any = 0
    place: Any = 0
    for size in range(1, 17):
        count = np.int64(table[size - 1])
        if code + count > 1 << size:
            return False
        if count:
            offsets[index, size] = place - code
            if size <= _LOOK:
                for i in range(count):
                    first = (code + i) << (_LOOK - size)
                    luts[index, first : first + (1 << (_LOOK - size))] = _entry(size, table[16 + place + i])
            code += count
            place += count
            limits[index, size] = code - 1
        code <<= 1
    return True


@jit
def lookup(bits: Any, table: Any, tables: DecodingTables) -> Any:
    """The `_entry` of the code in the most significant of `bits`; 0 if there is none."""
    entry = tables.lookup[table, bits >> np.uint64(64 - _LOOK)]
    if entry:
        return entry
    for size in range(_LOOK + 1, 17):
        code = np.int64(bits >> np.uint64(64 - size))
        if code <= tables.limits[table, size]:
            return _entry(size, tables.values[table, (code + tables.offsets[table, size]) & 255])
    return np.uint32(0)


@jit
def optimal_table(counts: Any) -> tuple[Any, Any]:
    """BITS (16) and HUFFVAL of the optimal code for `counts`, with codes of at most 16 bits (T.81 K.2)."""
    used = np.nonzero(counts[:256])[0]
    n = len(used) + 1  # and a reserved symbol, the rarest one: it gets the code of all ones, which T.81 forbids
    weights = np.empty(n, np.int64)
    for i in range(n - 1):  # numba takes seconds to compile assignments of arrays to slices
        weights[i] = counts[used[i]]
    weights[n - 1] = 0 if n > 1 else 1
    sizes = np.zeros(n, np.int64)
    link = np.full(n, -1, np.int64)
    alive = np.arange(n)
    left = n
    while left > 1:
        a = b = -1  # indices in `alive` of the two smallest weights; of equal ones the later symbol, as in K.2
        for i in range(left):
            if a < 0 or weights[alive[i]] <= weights[alive[a]]:
                b = a
                a = i
            elif b < 0 or weights[alive[i]] <= weights[alive[b]]:
                b = i
        keep, gone = alive[b], alive[a]
        weights[keep] += weights[gone]
        alive[a] = alive[left - 1]
        left -= 1
        tail = keep
        while True:
            sizes[tail] += 1
            if link[tail] < 0:
                break
            tail = link[tail]
        link[tail] = gone
        tail = gone
        while tail >= 0:
            sizes[tail] += 1
            tail = link[tail]
    if n == 1:
        sizes[0] = 1
    bits = np.zeros(n + 2, np.int64)
    for each in sizes:
        bits[each] += 1
    for size in range(len(bits) - 1, 16, -1):  # K.2's Adjust_BITS
        while bits[size] > 0:
            shorter = size - 2
            while bits[shorter] == 0:
                shorter -= 1
            bits[size] -= 2
            bits[size - 1] += 1
            bits[shorter + 1] += 2
            bits[shorter] -= 1
    longest = min(16, len(bits) - 1)
    while bits[longest] == 0:
        longest -= 1
    bits[longest] -= 1  # the reserved symbol's
    out = np.zeros(16, np.uint8)
    for size in range(1, min(17, len(bits))):
        out[size - 1] = bits[size]
    symbols = np.empty(n - 1, np.uint8)
    place = 0
    for size in range(1, len(bits)):  # symbols in the order of their sizes; np.argsort would take 2 s to compile
        for i in range(n - 1):
            if sizes[i] == size:
                symbols[place] = used[i]
                place += 1
    return out, symbols


@jit
def assign_codes(bits: Any, symbols: Any, codes: Any) -> None:
    """Assign codes by size, then in the order of `symbols` (T.81 C.2).

    codes[symbol] becomes code << extra << 8 | size + extra, where extra is the number of the symbol's extra bits.
    """
    code, place = 0, 0
    for size in range(1, 17):
        for _ in range(bits[size - 1]):
            extra = np.int64(symbols[place] & 15)
            codes[symbols[place]] = code << extra << 8 | (size + extra)
            code += 1
            place += 1
        code <<= 1
