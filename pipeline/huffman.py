"""Huffman coding of JPEG's entropy-coded data (ITU-T T.81), compiled: what `pipeline.transcode` needs, without the GIL.

The functions take and return arrays and whole numbers; a negative number is one of the reasons below.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

TRUNCATED, BAD_CODE, BAD_VALUE, NO_ROOM = -1, -2, -3, -4

_LOOK = 10  # bits looked up at once; longer codes are rare and take the slow way


def decoding_tables(tables: dict[tuple[int, int], bytes]) -> tuple[Any, Any, Any, Any] | None:
    """The decoder's form of DHT's tables, (class, id) -> BITS and HUFFVAL; None if one of them is no Huffman code.

    Table 4 * class + id holds codes of up to 10 bits for lookup (`_entry`, or 0), longer ones as T.81 F.2.2.3's limits.
    """
    luts = np.zeros((8, 1 << _LOOK), np.uint32)
    limits = np.full((8, 18), -1, np.int32)  # the largest code of each size
    offsets = np.zeros((8, 18), np.int32)  # a code of that size plus this is its symbol's place
    values = np.zeros((8, 256), np.uint8)
    for (kind, number), table in tables.items():
        if not _fill_decoding_table(np.frombuffer(table, np.uint8), 4 * kind + number, luts, limits, offsets, values):
            return None
    return luts, limits, offsets, values


@njit(cache=True, nogil=True)
def _entry(size: Any, symbol: Any) -> Any:
    """What a decoder needs of a code: symbol << 16 | size with the extra bits, which the symbol's low four bits count."""
    return np.uint32(symbol) << 16 | (size + (symbol & 15))


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
                    luts[index, first : first + (1 << (_LOOK - size))] = _entry(size, table[16 + place + i])
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
def assign_codes(bits: Any, symbols: Any, codes: Any) -> None:
    """T.81 C.2: codes by size, then in the symbols' order; each << its count of extra bits << 8 | size with them."""
    code, place = 0, 0
    for size in range(1, 17):
        for _ in range(bits[size - 1]):
            extra = np.int64(symbols[place] & 15)
            codes[symbols[place]] = code << extra << 8 | (size + extra)
            code += 1
            place += 1
        code <<= 1


# A token is one Huffman symbol on its way from the old code to the new: table << 24 | symbol << 16 | its extra bits.
# Tables are numbered DC 0, AC 0, DC 1, AC 1.

# The category of a DC difference (T.81 F.1.2.1), by its absolute value.
_CATEGORIES = np.array([value.bit_length() for value in range(1 << 11)], np.uint8)

# Unstuffed data goes on in memory for an MCU of 10 blocks, whose symbols take 31 bits at most, and for the reader's words.
_PADDING = 10 * 64 * 31 // 8 + 16


@njit(cache=True, nogil=True)
def _word(data: Any, at: Any) -> Any:
    """8 bytes. `at` is unsigned, which spares numba's handling of negative indices: all is one load."""
    word = np.uint64(0)
    for i in range(np.uint64(8)):
        word = word << np.uint64(8) | np.uint64(data[at + i])
    return word


@njit(cache=True, nogil=True)
def _has_ff(word: Any) -> Any:
    """Whether one of a word's 8 bytes is 0xFF: inverted it is 0, and 1 less sets its top bit."""
    return (~word - np.uint64(0x0101010101010101)) & word & np.uint64(0x8080808080808080) != 0


@njit(cache=True, nogil=True)
def _unstuff(stream: Any, position: Any, data: Any) -> Any:
    """Copy to `data` the bytes before the next marker or the end, less stuffed zeros, and 8 zeros. Returns where, how many."""
    count = 0
    while position < len(stream):
        if position + 8 <= len(stream) and not _has_ff(_word(stream, np.uint64(position))):
            for i in range(np.uint64(8)):
                data[np.uint64(count) + i] = stream[np.uint64(position) + i]
            position += 8
            count += 8
            continue
        byte = stream[position]
        if byte == 0xFF:
            if position + 1 >= len(stream) or stream[position + 1] != 0:
                break
            position += 1
        position += 1
        data[count] = byte
        count += 1
    data[count : count + 8] = 0
    return position, count


@njit(cache=True, nogil=True)
def _refill(data: Any, at: Any, bits: Any, have: Any) -> Any:
    """Read whole bytes to have 56 bits or more at the top of `bits`. Below may be some of the next byte's, the same each time."""
    return at + np.uint64((63 - have) >> 3), bits | _word(data, at) >> np.uint64(have), have | 56


@njit(cache=True, nogil=True)
def _lookup(bits: Any, table: Any, luts: Any, limits: Any, offsets: Any, values: Any) -> Any:
    """The `_entry` of the code at the top of `bits`; 0 where no code fits."""
    entry = luts[table, bits >> np.uint64(64 - _LOOK)]
    if entry:
        return entry
    for size in range(_LOOK + 1, 17):
        code = np.int64(bits >> np.uint64(64 - size))
        if code <= limits[table, size]:
            return _entry(size, values[table, (code + offsets[table, size]) & 255])
    return np.uint32(0)


@njit(cache=True, nogil=True)
def _extra(bits: Any, size: Any, count: Any) -> Any:
    """The last `count` of the `size` bits at the top."""
    return np.int64((bits >> np.uint64(64 - size)) & np.uint64((1 << count) - 1))


@njit(cache=True, nogil=True)
def _after_restart(stream: Any, position: Any) -> Any:
    """Where data goes on behind the restart marker that must stand at `position` (fill bytes allowed), or a reason."""
    while position + 1 < len(stream) and stream[position] == 0xFF and stream[position + 1] == 0xFF:
        position += 1
    if position + 1 >= len(stream) or stream[position] != 0xFF or stream[position + 1] & 0xF8 != 0xD0:
        return TRUNCATED
    return position + 2


@njit(cache=True, nogil=True)
def _left(end: Any, at: Any, have: Any) -> Any:
    """Bits not yet taken of the data that ends at byte `end`; negative where more were taken than there are."""
    return 8 * (end - np.int64(at)) + have


@njit(cache=True, nogil=True)
def _reason(reason: Any, left: Any) -> Any:
    """Why to refuse: what was read beyond the data's end is no data, whatever it seems to be."""
    return reason if left >= 0 else TRUNCATED


@njit(cache=True, nogil=True)
def read_scan(
    stream: Any, mcus: Any, interval: Any, blocks: Any, selectors: Any,
    luts: Any, limits: Any, offsets: Any, values: Any, tokens: Any, starts: Any, counts: Any,
) -> Any:  # fmt: skip
    """Parse a scan into tokens, block by block; a block's first token holds its DC coefficient, 16 bits, instead of a symbol.

    interval: the scan's restart interval or 0. blocks: the component of each block of an MCU. starts: gets where each block's
    tokens begin and the last one's end. counts: of AC symbols, added to. Returns the number of tokens, or a negative reason.
    """
    data = np.empty(len(stream) + _PADDING, np.uint8)
    position, end = _unstuff(stream, 0, data)
    at, bits, have = np.uint64(0), np.uint64(0), 0
    total, block = np.uint64(0), 0
    dc = np.zeros(3, np.int64)
    for mcu in range(mcus):
        if interval and mcu and mcu % interval == 0:
            position = _after_restart(stream, position)
            if position < 0 or _left(end, at, have) > 56:  # up to 7 bytes too many are let pass
                return TRUNCATED
            position, end = _unstuff(stream, position, data)
            at, bits, have = np.uint64(0), np.uint64(0), 0
            dc[:] = 0
        for place in range(len(blocks)):
            component = blocks[place]
            table = 2 if component else 0
            dc_row, ac_row = np.uint64(selectors[component, 0]), np.uint64(4 + selectors[component, 1])
            at, bits, have = _refill(data, at, bits, have)
            entry = _lookup(bits, dc_row, luts, limits, offsets, values)
            size, count = np.int64(entry & 255), np.int64(entry >> 16)
            have -= size
            if entry == 0:
                return _reason(BAD_CODE, _left(end, at, have))
            if count > 11:
                return _reason(BAD_VALUE, _left(end, at, have))
            difference = _extra(bits, size, count)
            bits <<= np.uint64(size)
            if difference < (1 << count) >> 1:
                difference += 1 - (1 << count)
            dc[component] += difference
            if abs(dc[component]) > 0x7FFF:
                return _reason(BAD_VALUE, _left(end, at, have))
            starts[block] = total
            block += 1
            tokens[total] = table << 24 | (dc[component] & 0xFFFF)
            total += np.uint64(1)

            k: Any = 1
            while k < 64:
                at, bits, have = _refill(data, at, bits, have)
                entry = _lookup(bits, ac_row, luts, limits, offsets, values)
                size, symbol = np.int64(entry & 255), np.int64(entry >> 16)
                have -= size
                if entry == 0:
                    return _reason(BAD_CODE, _left(end, at, have))
                count = symbol & 15
                tokens[total] = (table + 1) << 24 | symbol << 16 | _extra(bits, size, count)
                bits <<= np.uint64(size)
                counts[(table + 1) << 8 | symbol] += 1
                total += np.uint64(1)
                if count == 0:
                    if symbol == 0:  # end of block
                        break
                    if symbol != 0xF0:
                        return _reason(BAD_VALUE, _left(end, at, have))
                k += (symbol >> 4) + 1
            if k > 64:
                return _reason(BAD_VALUE, _left(end, at, have))
        if _left(end, at, have) < 0:
            return TRUNCATED
    starts[block] = total
    return np.int64(total)


@njit(cache=True, nogil=True)
def arrange(
    tokens: Any, starts: Any, columns: Any, rows: Any, merged: Any, interval: Any, blocks: Any, order: Any, counts: Any
) -> Any:
    """Find the `order` of blocks for tiles of `interval` MCUs; make symbols of DC coefficients; count these and what is added.

    columns, rows: MCUs of the scan as read. merged: how many of them, side by side, make one MCU now; more than 1 only where each
    component has one block in an MCU. The last MCU of a row is filled up with blocks that cost least: the DC coefficient before,
    nothing else; one for luma and one for chroma follow the scan's in `tokens` and `starts`. DC differences start anew in each
    tile. Returns the number of blocks, or a negative reason.
    """
    last = columns * rows * len(blocks)
    for i in range(4):
        tokens[starts[last] + i] = i << 24
    starts[last + 1], starts[last + 2] = starts[last] + 2, starts[last] + 4
    total = 0
    dc = np.zeros(3, np.int64)
    for row in range(rows):
        for first in range(0, columns, merged):
            if first % (merged * interval) == 0:
                dc[:] = 0
            for place in range(len(blocks)):
                component = blocks[place]
                table = 2 if component else 0
                for column in range(first, first + merged):
                    if column >= columns:
                        order[total] = last + (table >> 1)
                        counts[table << 8] += 1
                        counts[(table + 1) << 8] += 1
                        total += 1
                        continue
                    block = (row * columns + column) * len(blocks) + place
                    order[total] = block
                    total += 1
                    value = np.int64(np.int16(tokens[starts[block]] & 0xFFFF))
                    difference = value - dc[component]
                    dc[component] = value
                    if abs(difference) >= len(_CATEGORIES):
                        return BAD_VALUE
                    count = np.int64(_CATEGORIES[abs(difference)])
                    if difference < 0:
                        difference += (1 << count) - 1
                    tokens[starts[block]] = table << 24 | count << 16 | difference
                    counts[table << 8 | count] += 1
    return total


@njit(cache=True, nogil=True)
def _pack(tokens: Any, starts: Any, blocks: Any, codes: Any, words: Any) -> Any:
    """A tile's codes in words of 32 bits from the second on, the last one filled up with ones. Returns the number of bytes."""
    bits, have = np.uint64(0), np.uint64(0)
    place = 0
    while place < len(blocks):
        start, end = starts[blocks[place]], starts[blocks[place] + 1]
        place += 1
        while place < len(blocks) and starts[blocks[place]] == end:  # its tokens follow: one loop for both
            end = starts[blocks[place] + 1]
            place += 1
        for i in range(np.uint64(start), np.uint64(end)):
            token = tokens[i]
            code = codes[token >> 16]
            size = code & np.uint64(255)
            bits = bits << size | (code >> np.uint64(8) | np.uint64(token & 0xFFFF))
            have += size
            words[have >> np.uint64(5)] = bits >> (have & np.uint64(31))  # the last full word, again or for the first time
    pad = -have & np.uint64(31)
    words[(have + pad) >> np.uint64(5)] = ((bits + np.uint64(1)) << pad) - np.uint64(1)
    return (np.int64(have) + 7) >> 3


@njit(cache=True, nogil=True)
def _stuff(words: Any, count: Any, out: Any, written: Any) -> Any:
    """Put `count` bytes of `words` into `out`, a zero after each 0xFF. Returns bytes written, or a reason."""
    for place in range(np.uint64((count + 3) >> 2)):
        if written + 8 > len(out):
            return NO_ROOM
        word = np.int64(words[place + np.uint64(1)])
        some = min(4, count - 4 * np.int64(place))
        if some == 4 and not _has_ff(np.uint64(word)):
            at = np.uint64(written)
            out[at] = word >> 24
            out[at + np.uint64(1)] = word >> 16 & 255
            out[at + np.uint64(2)] = word >> 8 & 255
            out[at + np.uint64(3)] = word & 255
            written += 4
            continue
        for i in range(some):
            byte = word >> (24 - 8 * i) & 255
            out[written] = byte
            written += 1
            if byte == 0xFF:
                out[written] = 0
                written += 1
    return written


@njit(cache=True, nogil=True)
def write_scan(tokens: Any, starts: Any, order: Any, codes: Any, lengths: Any, out: Any) -> Any:
    """Code blocks into `out` in `order`, a marker after each tile and EOI after the last; fill `lengths`. Bytes, or a reason."""
    tiles = len(lengths)
    size = len(order) // tiles
    words = np.empty(64 * size + 2, np.uint32)
    written = 0
    for tile in range(tiles):
        start = written
        count = _pack(tokens, starts, order[tile * size : (tile + 1) * size], codes, words)
        written = _stuff(words, count, out, written)
        if written < 0 or written + 2 > len(out):
            return NO_ROOM
        out[written] = 0xFF
        out[written + 1] = 0xD9 if tile == tiles - 1 else 0xD0 + (tile & 7)
        written += 2
        lengths[tile] = written - start
    return written
