"""The blocks of a JPEG's coefficients: their orders (ITU-T T.81 A.2), and the tokens that encode them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba.cpython.unsafe.numbers import trailing_zeros

from ..jit import Int, jit
from .entropy import BAD_VALUE, CATEGORIES
from .header import Header
from .region import Ints

Blocks = npt.NDArray[np.int32]  # indices of blocks


class Coefficients(NamedTuple):
    """The quantized coefficients of all blocks, in the order of `components_of`.

    values: int16 (blocks, 64), each block in zigzag order. nonzero: uint64 (blocks,), bit k is set if AC coefficient k is not 0.
    """

    values: npt.NDArray[np.int16]
    nonzero: npt.NDArray[np.uint64]

    def find_nonzero(self) -> None:
        """Fill `nonzero`, from the values."""
        self.nonzero[:] = np.packbits(self.values != 0, axis=1, bitorder="little").view("<u8")[:, 0] & ~np.uint64(1)


class Component(NamedTuple):
    """A component's blocks: those of whole MCUs, in rows. Some at the right and bottom edge may contain no pixels.

    number: the component's number in the frame. first: the index of its first block. columns, rows: blocks. width, height: blocks
    that contain pixels. h, v: the sampling factors.
    """

    number: int
    first: int
    columns: int
    rows: int
    width: int
    height: int
    h: int
    v: int


def components_of(header: Header) -> list[Component]:
    """The components' blocks, one component after the other (T.81 A.1.1, A.2.4)."""
    widest, highest = (max(factors) for factors in zip(*header.sampling, strict=True))
    columns, rows = -(-header.width // (8 * widest)), -(-header.height // (8 * highest))
    found: list[Component] = []
    first = 0
    for number, (h, v) in enumerate(header.sampling):
        width, height = -(-header.width * h // (8 * widest)), -(-header.height * v // (8 * highest))
        found.append(Component(number, first, columns * h, rows * v, width, height, h, v))
        first += columns * h * rows * v
    return found


def scan_order(components: list[Component]) -> tuple[Blocks, Ints]:
    """The indices of the blocks in the order of a scan of these components: int32 (MCUs, blocks of an MCU) (T.81 A.2). And the
    number in the scan of the component of each block of an MCU: int64 (blocks of an MCU,).

    The scan of a single component leaves out blocks without pixels, and its MCU is a block.
    """
    if len(components) == 1:
        (one,) = components
        columns = np.arange(one.first, one.first + one.width, dtype=np.int32)
        order = (np.arange(one.height, dtype=np.int32)[:, None] * one.columns + columns).reshape(-1, 1)
        return order, np.zeros(1, np.int64)
    parts = []
    for one in components:
        blocks = np.arange(one.first, one.first + one.columns * one.rows, dtype=np.int32)
        grid = blocks.reshape(one.rows // one.v, one.v, one.columns // one.h, one.h)
        parts.append(grid.transpose(0, 2, 1, 3).reshape(-1, one.h * one.v))
    return np.concatenate(parts, axis=1), np.repeat(np.arange(len(parts)), [part.shape[1] for part in parts])


def fill_edges(coefficients: Coefficients, component: Component) -> None:
    """Give each block without pixels the DC coefficient of the block before it in the MCU, as libjpeg does. It costs the fewest
    bits."""
    width, height, h = component.width, component.height, component.h
    shape = (component.rows, component.columns)
    values, nonzero = (part[component.first :][: shape[0] * shape[1]].reshape(*shape, -1) for part in coefficients)
    for part in (values, nonzero):
        part[:, width:] = 0
        part[height:] = 0
    values[:, width:, 0] = values[:, width - 1, 0, None]
    values[height:, :, 0] = np.repeat(values[height - 1, h - 1 :: h, 0], h)


@jit
def tokenize(
    coefficients: Coefficients, order: Blocks, places: Ints, first: Int, tile: Int, tokens: Any, starts: Ints, counts: Ints
) -> tuple[Any, Int]:
    """Make the tokens of the MCUs from `first` on, as `entropy.read_scan` does. Stops before a tile for which `tokens` may be
    too small. Returns the number of tokens, or an error code, and the MCU where it stopped.

    order, places: from `scan_order`, of all components.
    """
    values, nonzero = coefficients
    total = np.uint64(0)
    dc = np.zeros(4, np.int64)
    most = 64 * tile * len(places)
    done = len(order)
    for mcu in range(first, len(order)):
        if mcu % tile == 0:
            if np.int64(total) + most > len(tokens):
                done = mcu
                break
            starts[(mcu - first) // tile] = total
            dc[:] = 0
        for place in range(len(places)):
            component = places[place]
            table = 2 if component else 0
            index = np.uint64(order[mcu, place])
            value = np.int64(values[index, 0])
            difference = value - dc[component]
            dc[component] = value
            if abs(difference) >= len(CATEGORIES):
                return np.int64(BAD_VALUE), mcu
            total = _add(tokens, total, counts, table, 0, difference)
            left = nonzero[index]
            last: Any = 0
            while left:
                k = trailing_zeros(left)
                left &= left - np.uint64(1)
                zeros = np.int64(k) - last - 1
                last = np.int64(k)
                while zeros > 15:
                    total = _add(tokens, total, counts, table + 1, 15, 0)
                    zeros -= 16
                total = _add(tokens, total, counts, table + 1, zeros, np.int64(values[index, np.uint64(k)]))
            if last < 63:  # end of block
                total = _add(tokens, total, counts, table + 1, 0, 0)
    starts[(done - first) // tile] = total
    return np.int64(total), done


@jit
def _add(tokens: Any, total: Any, counts: Ints, table: Int, zeros: Int, value: Any) -> Any:
    """Append the token of a value after some zeros. Returns the number of tokens."""
    count = np.int64(CATEGORIES[abs(value)])
    symbol = zeros << 4 | count
    tokens[total] = table << 24 | symbol << 16 | (value + (value >> 63) & (1 << count) - 1)
    counts[table << 8 | symbol] += 1
    return total + np.uint64(1)
