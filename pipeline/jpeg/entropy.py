"""JPEG's entropy coding (ITU-T T.81 annex F), compiled, without the GIL. `read_scan` parses a scan into tokens, `write_scan`
encodes tokens tile by tile.

Both return a count, or one of the negative error codes below.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..jit import Int, jit
from .huffman import DecodingTables, lookup
from .region import Bytes, Ints

TRUNCATED, BAD_CODE, BAD_VALUE, NO_ROOM = -1, -2, -3, -4

REASONS = {
    TRUNCATED: "the entropy-coded data ends too early",
    BAD_CODE: "an undefined Huffman code",
    BAD_VALUE: "a coefficient out of range",
    NO_ROOM: "the output does not fit",
}

# A token is a decoded Huffman symbol, to be encoded again: table << 24 | symbol << 16 | its extra bits.
# Tables are numbered DC 0, AC 0, DC 1, AC 1.

# The category of a DC difference (T.81 F.1.2.1), by its absolute value.
CATEGORIES = np.array([value.bit_length() for value in range(1 << 11)], np.uint8)

# Damaged data is read beyond its end, by at most one MCU (10 blocks of symbols of at most 31 bits) and the last word of `refill`.
PADDING = 10 * 64 * 31 // 8 + 16


@jit
def _word(data: Bytes, at: Int) -> Any:
    """8 bytes, big-endian. `at` is unsigned: without numba's handling of negative indices this compiles to one load."""
    word = np.uint64(0)
    for i in range(np.uint64(8)):
        word = word << np.uint64(8) | np.uint64(data[at + i])
    return word


@jit
def _has_ff(word: Any) -> Any:
    """Whether one of a word's 8 bytes is 0xFF. The inverse of such a byte is 0; subtracting 1 from that sets its top bit."""
    return (~word - np.uint64(0x0101010101010101)) & word & np.uint64(0x8080808080808080) != 0


@jit
def unstuff(stream: Bytes, position: Int, stop: Int, data: Bytes) -> Any:
    """Copy the bytes before the next marker or `stop` to `data`, without stuffed zeros, and append 8 zeros.

    Returns the position in the stream where it stopped, and the number of bytes copied.
    """
    count = 0
    while position < stop:
        if position + 8 <= stop and not _has_ff(_word(stream, np.uint64(position))):
            for i in range(np.uint64(8)):
                data[np.uint64(count) + i] = stream[np.uint64(position) + i]
            position += 8
            count += 8
            continue
        byte = stream[position]
        if byte == 0xFF:
            if position + 1 >= stop or stream[position + 1] != 0:
                break
            position += 1
        position += 1
        data[count] = byte
        count += 1
    data[count : count + 8] = 0
    return position, count


@jit
def refill(data: Bytes, at: Int, bits: Any, have: Any) -> Any:
    """Read whole bytes until at least the 56 most significant of `bits` are valid. The bits below are those of the next byte."""
    return at + np.uint64((63 - have) >> 3), bits | _word(data, at) >> np.uint64(have), have | 56


@jit
def extra(bits: Any, size: Int, count: Int) -> Any:
    """The last `count` of the `size` most significant bits."""
    return np.int64((bits >> np.uint64(64 - size)) & np.uint64((1 << count) - 1))


@jit
def after_restart(stream: Bytes, position: Int, number: Int) -> Any:
    """The position after the restart marker that is expected at `position` (fill bytes allowed), or an error code.

    number: the expected number of the marker, modulo 8. At any other, decoders would resynchronize by guessing.
    """
    while position + 1 < len(stream) and stream[position] == 0xFF and stream[position + 1] == 0xFF:
        position += 1
    if position + 1 >= len(stream) or stream[position] != 0xFF or stream[position + 1] != 0xD0 + number:
        return TRUNCATED
    return position + 2


@jit
def bits_left(end: Int, at: Int, have: Any) -> Any:
    """The number of unread bits before byte `end`; negative if bits beyond it were read."""
    return 8 * (end - np.int64(at)) + have


@jit
def _reason(reason: Int, left: Int) -> Any:
    """The error code `reason`, or TRUNCATED if the data had ended before the error."""
    return reason if left >= 0 else TRUNCATED


@jit
def read_scan(
    stream: Bytes, mcus: Int, interval: Int, tile: Int, blocks: Any, selectors: Ints, tables: DecodingTables,
    data: Bytes, state: Ints, tokens: Any, starts: Ints, counts: Ints,
) -> Any:  # fmt: skip
    """Parse a scan into tokens, with the DC prediction reset at the start of each tile of `tile` MCUs. Stops before a tile for
    which `tokens` may be too small. The next call continues there.

    interval: the scan's restart interval, or 0. blocks: the component of each block of an MCU. selectors: the DC and AC table of
    each component. data: scratch, uint8 (len(stream) + PADDING,). state: int64 (10,), zeros at the first call; state[0] is the
    number of MCUs read so far. starts: receives the index of each tile's first token, then the number of tokens. counts: the
    number of each symbol is added, 256 entries per table. Returns the number of tokens, or an error code.
    """
    first, position, end = state[0], state[1], state[2]
    at, bits, have = np.uint64(state[3]), np.uint64(state[4]), state[5]
    if first == 0:
        position, end = unstuff(stream, 0, len(stream), data)
    total = np.uint64(0)
    old_dc, new_dc = np.zeros(4, np.int64), np.zeros(4, np.int64)
    for i in range(4):  # not as a slice, see `optimal_table`
        old_dc[i] = state[6 + i]
    most = 64 * tile * len(blocks)
    done = mcus
    for mcu in range(first, mcus):
        if mcu % tile == 0:
            if np.int64(total) + most > len(tokens):
                done = mcu
                break
            starts[(mcu - first) // tile] = total
            new_dc[:] = 0
        if interval and mcu and mcu % interval == 0:
            position = after_restart(stream, position, mcu // interval - 1 & 7)  # leftover bytes are skipped, as decoders do
            if position < 0:
                return TRUNCATED
            position, end = unstuff(stream, position, len(stream), data)
            at, bits, have = np.uint64(0), np.uint64(0), 0
            old_dc[:] = 0
        for place in range(len(blocks)):
            component = blocks[place]
            table = 2 if component else 0
            dc_row, ac_row = np.uint64(selectors[component, 0]), np.uint64(4 + selectors[component, 1])
            at, bits, have = refill(data, at, bits, have)
            entry = lookup(bits, dc_row, tables)
            size, count = np.int64(entry & 255), np.int64(entry >> 16)
            have -= size
            if entry == 0:
                return _reason(BAD_CODE, bits_left(end, at, have))
            if count > 11:
                return _reason(BAD_VALUE, bits_left(end, at, have))
            difference = extra(bits, size, count)
            bits <<= np.uint64(size)
            if difference < (1 << count) >> 1:
                difference += 1 - (1 << count)
            old_dc[component] += difference
            difference = old_dc[component] - new_dc[component]
            new_dc[component] = old_dc[component]
            if abs(difference) >= len(CATEGORIES):
                return _reason(BAD_VALUE, bits_left(end, at, have))
            count = np.int64(CATEGORIES[abs(difference)])
            if difference < 0:
                difference += (1 << count) - 1
            tokens[total] = table << 24 | count << 16 | difference
            counts[table << 8 | count] += 1
            total += np.uint64(1)

            k: Any = 1
            while k < 64:
                at, bits, have = refill(data, at, bits, have)
                entry = lookup(bits, ac_row, tables)
                size, symbol = np.int64(entry & 255), np.int64(entry >> 16)
                have -= size
                if entry == 0:
                    return _reason(BAD_CODE, bits_left(end, at, have))
                count = symbol & 15
                tokens[total] = (table + 1) << 24 | symbol << 16 | extra(bits, size, count)
                bits <<= np.uint64(size)
                counts[(table + 1) << 8 | symbol] += 1
                total += np.uint64(1)
                if count == 0:
                    if symbol == 0:  # end of block
                        break
                    if symbol != 0xF0:
                        return _reason(BAD_VALUE, bits_left(end, at, have))
                k += (symbol >> 4) + 1
            if k > 64:
                return _reason(BAD_VALUE, bits_left(end, at, have))
        if bits_left(end, at, have) < 0:
            return TRUNCATED
    starts[(done - first) // tile] = total
    state[0], state[1], state[2], state[3], state[4], state[5] = done, position, end, at, bits, have
    for i in range(4):
        state[6 + i] = old_dc[i]
    return np.int64(total)


@jit
def _pack(tokens: Any, start: Int, end: Int, codes: Any, words: Any) -> Any:
    """Write a tile's codes to 32-bit words, from words[1] on, padded with ones. Returns the number of bytes."""
    bits, have = np.uint64(0), np.uint64(0)
    for i in range(np.uint64(start), np.uint64(end)):
        token = tokens[i]
        code = codes[token >> 16]
        size = code & np.uint64(255)
        bits = bits << size | (code >> np.uint64(8) | np.uint64(token & 0xFFFF))
        have += size
        words[have >> np.uint64(5)] = bits >> (have & np.uint64(31))  # the last full word; it may be written again
    pad = -have & np.uint64(31)
    words[(have + pad) >> np.uint64(5)] = ((bits + np.uint64(1)) << pad) - np.uint64(1)
    return (np.int64(have) + 7) >> 3


@jit
def _stuff(words: Any, count: Int, out: Bytes, written: Int) -> Any:
    """Copy `count` bytes of `words` to `out`, with a zero after each 0xFF. Returns the end of the written bytes, or an error
    code."""
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


@jit
def write_scan(tokens: Any, starts: Ints, codes: Any, number: Int, last: bool, lengths: Ints, out: Bytes) -> Any:
    """Encode tiles into `out`, with a restart marker after each, and fill `lengths`. Returns the number of bytes, or an error
    code.

    tokens, starts: from `read_scan`. codes: uint64 (4 * 256,), from `huffman.assign_codes`. number: of the first tile in the
    scan. last: whether the scan ends with these tiles, so with EOI.
    """
    tiles = len(lengths)
    most = np.int64(0)
    for tile in range(tiles):
        most = max(most, starts[tile + 1] - starts[tile])
    words = np.empty(most + 2, np.uint32)
    written = 0
    for tile in range(tiles):
        start = written
        count = _pack(tokens, starts[tile], starts[tile + 1], codes, words)
        written = _stuff(words, count, out, written)
        if written < 0 or written + 2 > len(out):
            return NO_ROOM
        out[written] = 0xFF
        out[written + 1] = 0xD9 if last and tile == tiles - 1 else 0xD0 + (number + tile & 7)
        written += 2
        lengths[tile] = written - start
    return written
