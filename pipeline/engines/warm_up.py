"""Compile the CPU engine's kernels before the first batch.

They take 25 s of one core, and numba compiles one function at a time in a process. So a second process compiles some of them, and
this process loads these from numba's cache. Later starts load all kernels from there.
"""

from __future__ import annotations

import numpy as np

from ..jit import compiling_beside, is_cached
from ..jpeg.decode import Area, Header, McuBlocks, decode_tiles
from ..jpeg.huffman import empty_tables
from ..jpeg.idct import Planes, finish
from ..jpeg.region import TileLayout, open_tiles
from ..pixels.decoder import decode_views, resample_windows
from ..pixels.normalize import Normalization, Normalizer
from ..pixels.resample import BILINEAR, Kernel
from ..plan import sampling
from ..progress import announce_if_slow
from ..store.local import read_descriptors


def warm_up(kernel: Kernel = BILINEAR) -> None:
    """Compile the kernels unless they are in numba's cache."""
    if not is_cached(decode_views):
        with (
            announce_if_slow("compiling the image decoder, once on this machine, which takes about 15 seconds on two cores"),
            compiling_beside(compile_others),
        ):
            compile_decoding()
    if kernel is not BILINEAR:
        with announce_if_slow("compiling the bicubic filter, once on this machine, which takes about 5 seconds"):
            compile_resampling(kernel)


def compile_decoding() -> None:
    """Compile `decode_tiles` by giving it no tiles, and `decode_views` by giving it bytes that it refuses."""
    data, scratch, ints = np.zeros(4, np.uint8), np.zeros(1, np.uint8), np.zeros(4, np.int64)
    data.setflags(write=False)  # as `ShardSet.read` returns it
    layout = TileLayout(0, ints, 0, 0, 0, 0, 1, 1, 8, 8, 8, 8)
    header = Header(np.zeros((4, 64), np.int32), np.zeros((3, 5), np.int64), empty_tables(), np.zeros((4, 1), np.uint32))
    decode_tiles(data, layout, Area(0, 0, 0, 0), header, McuBlocks(np.zeros((1, 7), np.uint64), ints, ints), scratch)
    one, yes, out = np.ones(1, np.int64), np.ones(1, np.bool_), np.zeros((1, 8, 8, 3), np.uint8)
    decode_views(data, 4 * one, one, one, np.zeros((1, 4)), yes, out, yes, scratch, ints)


def compile_others() -> None:
    """Compile other parts of `decode_views`, in the order in which it needs them, then the plan and normalization.

    Runs in a process of its own.
    """
    data = np.zeros(4, np.uint8)
    data.setflags(write=False)
    open_tiles(data)
    place, out = np.array([0, 0, 8, 8]), np.zeros((1, 8, 8, 3), np.uint8)
    finish(np.zeros(1024, np.uint8), Planes(np.zeros(3, np.int64), np.full(3, 8), 1, 1, 1), 8, 8, place)
    compile_resampling(BILINEAR)
    sampling.order(0, 0, [0], 1)
    sampling.draw(0, 0, [0], [8], [8], (8, 8), 8)
    one = np.ones(1, np.int64)
    read_descriptors(-one, one, one, one, 0, out.reshape(-1), np.zeros(1, np.bool_))
    Normalizer(Normalization.of(np.zeros(3)), 8)(out, np.zeros((1, 3), np.float32), np.zeros((1, 8, 8, 3), np.float32))


def compile_resampling(kernel: Kernel) -> None:
    out = np.zeros((1, 8, 8, 3), np.uint8)
    resample_windows(out[0], np.array([0, 0, 8, 8]), np.array([[0.0, 0.0, 8.0, 8.0]]), np.zeros(1, np.bool_), kernel, out)
