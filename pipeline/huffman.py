"""Huffman coding of JPEG's entropy-coded data (ITU-T T.81), compiled: what `pipeline.transcode` needs, without the GIL.

The functions take and return arrays and whole numbers; a negative number is one of the reasons below.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

TRUNCATED, BAD_CODE, BAD_VALUE, NO_ROOM = -1, -2, -3, -4

_LOOK = 9  # bits looked up at once; longer codes are rare and take the slow way


def decoding_tables(tables: dict[tuple[int, int], bytes]) -> tuple[Any, Any, Any, Any] | None:
    """The decoder's form of DHT's tables, (class, id) -> BITS and HUFFVAL; None if one of them is no Huffman code.

    Row 4 * class + id holds codes of up to 9 bits for lookup (size << 8 | symbol), longer ones as T.81 F.2.2.3's limits.
    """
    luts = np.zeros((8, 1 << _LOOK), np.uint16)
    limits = np.full((8, 18), -1, np.int32)  # the largest code of each size
    offsets = np.zeros((8, 18), np.int32)  # a code of that size plus this is its symbol's place
    values = np.zeros((8, 256), np.uint8)
    for (kind, number), table in tables.items():
        if not _fill_decoding_table(np.frombuffer(table, np.uint8), 4 * kind + number, luts, limits, offsets, values):
            return None
    return luts, limits, offsets, values


@njit(cache=True, nogil=True)
def _fill_decoding_table(table: Any, index: Any, luts: Any, limits: Any, offsets: Any, values: Any) -> bool:
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
                    for j in range(1 << (_LOOK - size)):
                        luts[index, first + j] = (size << 8) | table[16 + place + i]
            code += count
            place += count
            limits[index, size] = code - 1
        code <<= 1
    return True


@njit(cache=True, nogil=True)
def optimal_table(counts: Any) -> tuple[Any, Any]:
    """BITS (16) and HUFFVAL of a code optimal for `counts` (257; the last is reserved), T.81 K.2, codes of 16 bits at most."""
    used = np.nonzero(counts[:256])[0]
    n = len(used) + 1  # and one more symbol, the rarest, which takes the code of all ones that T.81 forbids
    weights = np.empty(n, np.int64)
    weights[: n - 1] = counts[used]
    weights[n - 1] = 0 if n > 1 else 1
    sizes = np.zeros(n, np.int64)
    link = np.full(n, -1, np.int64)
    alive = np.arange(n)
    left = n
    while left > 1:
        a = b = -1  # places in `alive` of the two lightest; among equals the later symbol, as K.2 has it
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
    order = np.argsort(sizes[: n - 1], kind="mergesort")  # stable: by size, then by symbol
    return out, used[order].astype(np.uint8)


@njit(cache=True, nogil=True)
def assign_codes(bits: Any, symbols: Any, codes: Any, sizes: Any) -> None:
    """T.81 C.2: codes by size, then in the symbols' order."""
    code, place = 0, 0
    for size in range(1, 17):
        for _ in range(bits[size - 1]):
            codes[symbols[place]] = code
            sizes[symbols[place]] = size
            code += 1
            place += 1
        code <<= 1


# A token is one Huffman symbol on its way from the old code to the new: table << 24 | symbol << 16 | its extra bits.
# Tables are numbered DC 0, AC 0, DC 1, AC 1.
_TILE_END = 0xFF << 24


@njit(cache=True, nogil=True)
def _fill(stream: Any, position: Any, bits: Any, have: Any) -> Any:
    """Take bytes until `bits` holds more than 48, a marker is next or the data ends. Higher bits of `bits` are stale."""
    while have <= 48 and position < len(stream):
        byte = stream[position]
        if byte == 0xFF:
            if position + 1 >= len(stream) or stream[position + 1] != 0:
                break
            position += 1
        position += 1
        bits = (bits << np.uint64(8)) | np.uint64(byte)
        have += 8
    return position, bits, have


@njit(cache=True, nogil=True)
def _symbol(bits: Any, have: Any, table: Any, luts: Any, limits: Any, offsets: Any, values: Any) -> Any:
    """The next symbol's size and value; size 0 where no code fits. Bits beyond `have` read as zero."""
    if have >= 16:
        look = np.int64((bits >> np.uint64(have - 16)) & np.uint64(0xFFFF))
    else:
        look = np.int64((bits << np.uint64(16 - have)) & np.uint64(0xFFFF))
    entry = np.int64(luts[table, look >> (16 - _LOOK)])
    if entry:
        return entry >> 8, entry & 255
    for size in range(_LOOK + 1, 17):
        code = look >> (16 - size)
        if code <= limits[table, size]:
            return np.int64(size), np.int64(values[table, (code + offsets[table, size]) & 255])
    return np.int64(0), np.int64(0)


@njit(cache=True, nogil=True)
def _extra(bits: Any, have: Any, count: Any) -> Any:
    """The `count` bits above the lowest `have`: what follows a symbol that was just taken."""
    return np.int64((bits >> np.uint64(have)) & ((np.uint64(1) << np.uint64(count)) - np.uint64(1)))


@njit(cache=True, nogil=True)
def _after_restart(stream: Any, position: Any) -> Any:
    """Where data goes on behind the restart marker that must stand at `position` (fill bytes allowed), or a reason."""
    while position + 1 < len(stream) and stream[position] == 0xFF and stream[position + 1] == 0xFF:
        position += 1
    if position + 1 >= len(stream) or stream[position] != 0xFF or stream[position + 1] & 0xF8 != 0xD0:
        return TRUNCATED
    return position + 2


@njit(cache=True, nogil=True)
def _magnitude(value: Any) -> Any:
    """A DC difference's category and extra bits (T.81 F.1.2.1)."""
    count = 0
    while abs(value) >> count:
        count += 1
    return count, value if value >= 0 else value + (1 << count) - 1


@njit(cache=True, nogil=True)
def read_scan(
    stream: Any, mcus: Any, interval: Any, blocks: Any, selectors: Any,
    luts: Any, limits: Any, offsets: Any, values: Any, tokens: Any, starts: Any, counts: Any,
) -> Any:  # fmt: skip
    """Parse a scan into tokens, block by block; a block's first token holds its DC coefficient, 16 bits, instead of a symbol.

    interval: the scan's restart interval or 0. blocks: the component of each block of an MCU. starts: gets where each block's
    tokens begin and the last one's end. counts: of AC symbols, added to. Returns the number of tokens, or a negative reason.
    """
    position, have, bits = 0, 0, np.uint64(0)
    total, block = 0, 0
    dc = np.zeros(3, np.int64)
    for mcu in range(mcus):
        if interval and mcu and mcu % interval == 0:
            have = 0
            position = _after_restart(stream, position)
            if position < 0:
                return position
            dc[:] = 0
        for component in blocks:
            table = 2 if component else 0
            if have < 32:
                position, bits, have = _fill(stream, position, bits, have)
            size, count = _symbol(bits, have, selectors[component, 0], luts, limits, offsets, values)
            if size == 0:
                return BAD_CODE
            have -= size + count
            if have < 0:
                return TRUNCATED
            if count > 11:
                return BAD_VALUE
            if count:
                difference = _extra(bits, have, count)
                if difference < 1 << (count - 1):
                    difference += 1 - (1 << count)
                dc[component] += difference
            if abs(dc[component]) > 0x7FFF:
                return BAD_VALUE
            starts[block] = total
            block += 1
            tokens[total] = table << 24 | (dc[component] & 0xFFFF)
            total += 1

            k = 1
            while k < 64:
                if have < 32:
                    position, bits, have = _fill(stream, position, bits, have)
                size, symbol = _symbol(bits, have, 4 + selectors[component, 1], luts, limits, offsets, values)
                if size == 0:
                    return BAD_CODE
                count = symbol & 15
                have -= size + count
                if have < 0:
                    return TRUNCATED
                tokens[total] = (table + 1) << 24 | symbol << 16 | _extra(bits, have, count)
                counts[table + 1, symbol] += 1
                total += 1
                if symbol == 0:  # end of block
                    break
                if count == 0 and symbol != 0xF0:
                    return BAD_VALUE
                k += (symbol >> 4) + 1
                if k > 64:
                    return BAD_VALUE
    starts[block] = total
    return total


@njit(cache=True, nogil=True)
def arrange(
    tokens: Any, starts: Any, columns: Any, rows: Any, merged: Any, interval: Any, blocks: Any, out: Any, counts: Any
) -> Any:
    """Put a scan's tokens in order for tiles of `interval` MCUs; count the symbols that this adds, those of DC among them.

    columns, rows: MCUs of the scan as read. merged: how many of them, side by side, make one MCU now; more than 1 only where each
    component has one block in an MCU. The last MCU of a row is filled up with blocks that cost least: the DC coefficient before,
    nothing else. DC differences start anew in each tile. Returns the number of tokens, or a negative reason.
    """
    total = 0
    dc = np.zeros(3, np.int64)
    for row in range(rows):
        for first in range(0, columns, merged):
            if first % (merged * interval) == 0:
                if total:
                    out[total] = _TILE_END
                    total += 1
                dc[:] = 0
            for place in range(len(blocks)):
                component = blocks[place]
                table = 2 if component else 0
                for column in range(first, first + merged):
                    if column >= columns:
                        out[total], out[total + 1] = table << 24, (table + 1) << 24
                        counts[table, 0] += 1
                        counts[table + 1, 0] += 1
                        total += 2
                        continue
                    block = (row * columns + column) * len(blocks) + place
                    value = np.int64(np.int16(tokens[starts[block]] & 0xFFFF))
                    count, extra = _magnitude(value - dc[component])
                    if count > 11:
                        return BAD_VALUE
                    dc[component] = value
                    out[total] = table << 24 | count << 16 | extra
                    counts[table, count] += 1
                    total += 1
                    coefficients = tokens[starts[block] + 1 : starts[block + 1]]
                    for i in range(len(coefficients)):
                        out[total + i] = coefficients[i]
                    total += len(coefficients)
    out[total] = _TILE_END
    return total + 1


@njit(cache=True, nogil=True)
def write_scan(tokens: Any, total: Any, codes: Any, sizes: Any, lengths: Any, out: Any) -> Any:
    """Code tokens into `out`, a marker after each tile and EOI after the last; fill `lengths`. Returns bytes, or a reason."""
    bits: Any = np.uint64(0)
    have: Any = 0
    written, start, tile = 0, 0, 0
    for i in range(total):
        if written + 16 > len(out):
            return NO_ROOM
        token = np.int64(tokens[i])
        if token == _TILE_END:
            pad = -have & 7
            bits = (bits << np.uint64(pad)) | ((np.uint64(1) << np.uint64(pad)) - np.uint64(1))
            have += pad
        else:
            table, symbol = token >> 24, (token >> 16) & 255
            count = symbol & 15
            size = np.int64(sizes[table, symbol]) + count
            code = np.uint64(codes[table, symbol]) << np.uint64(count) | np.uint64(token & 0xFFFF)
            bits = (bits << np.uint64(size)) | code
            have += size
            if have < 32:
                continue
        while have >= 8:
            have -= 8
            byte = np.uint8((bits >> np.uint64(have)) & np.uint64(0xFF))
            out[written] = byte
            written += 1
            if byte == 0xFF:
                out[written] = 0
                written += 1
        if token == _TILE_END:
            out[written] = 0xFF
            out[written + 1] = 0xD9 if i == total - 1 else 0xD0 + (tile & 7)
            written += 2
            lengths[tile] = written - start
            start = written
            tile += 1
    return written
