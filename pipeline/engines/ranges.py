"""For remote shards that the cache cannot hold: only the parts of images that crops need, read ahead of the decoding threads.

An image is read in two ranges. The first one has the header and the table of segments. The second one has the rows of tiles under
the crop, from the first tile that is needed to the last one, with the tiles between them that are not needed. On ImageNet images
and with scale jitter, the two ranges are 65 % of the bytes. The needed tiles alone would be 42 %, but in 11 ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import numpy as np

from ..batch import BatchPlan
from ..jpeg.region import Bytes, tile_bytes
from ..loader import Loader
from ..pixels.decoder import CorruptImageError, Decoder, Pixels, joint_window, region_of
from ..store.waiting import REQUESTS, DaemonPool

WHOLE = 32 << 10  # bytes up to which an image is read in one range: a second request takes 0.7 ms of CPU time
HEAD = 4096  # bytes of the first range: 99 % of ImageNet's headers with their tables have less than 3,500


class Piece(NamedTuple):
    """data: uint8 (bytes,), an encoded image. is_part: whether it has only the bytes that a crop needs, and zeros elsewhere."""

    data: Bytes
    is_part: bool


def read_piece(read: Callable[[int, int], Bytes], size: int, region: tuple[int, int, int, int]) -> Piece:
    """Read what a crop needs of an encoded image: all of it, if it is small or has no table of segments.

    read: (start, count) -> uint8 (count,), bytes of the image. size: of the image, bytes. region: top, left, bottom, right of
    what is decoded, pixels.
    """
    if size <= WHOLE:
        return Piece(read(0, size), False)
    head = read(0, HEAD)
    data = np.zeros(size, np.uint8)
    data[: len(head)] = head
    content = data.view()
    content.setflags(write=False)  # as `ShardSet.read` returns it, so that compiled functions need no other version
    first, last = (int(end) for end in tile_bytes(content, len(head), *region))
    start, stop = (max(first, len(head)), last) if first >= 0 else (len(head), size)
    if start < stop:
        data[start:stop] = read(start, stop - start)
    return Piece(content, first >= 0)


class RangeReader:
    """Reads the images of planned batches in threads, as many at a time as there may be requests."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._threads: DaemonPool | None = None

    def start(self, plan: BatchPlan) -> list[Future[Piece]]:
        """Begin to read all images of a plan."""
        self._threads = self._threads or DaemonPool(REQUESTS, "cropfeed-ranges")
        return [self._threads.submit(self._read, plan, index) for index in range(len(plan.ids))]

    def make_views(self, decoder: Decoder, plan: BatchPlan, index: int, reading: Future[Piece], out: Sequence[Pixels]) -> bool:
        """Like `Loader.make_views`, from what was read. Returns False if it cannot be decoded, which the whole image may be."""
        try:
            piece = reading.result()
            decoder.is_part = piece.is_part
            self._loader.decode_views(decoder, plan, index, piece.data, out)
        except CorruptImageError:
            return False
        finally:
            decoder.is_part = False
        return True

    def close(self) -> None:
        """End the threads. `start` begins new ones."""
        threads, self._threads = self._threads, None
        if threads:
            threads.close()

    def _read(self, plan: BatchPlan, index: int) -> Piece:
        """Runs in a thread. Checksums and fields need the whole sample."""
        loader = self._loader
        if loader.spec.verify or loader.spec.fields:
            return Piece(loader.read_planned(plan, index), False)
        height, width = int(plan.heights[index]), int(plan.widths[index])
        windows = plan.views.windows[index * loader.crops : (index + 1) * loader.crops]
        window, size = joint_window(height, width, windows, plan.groups, loader.kernel)
        region = region_of(height, width, window, *size, loader.kernel.support)
        sample = int(plan.ids[index])
        return read_piece(partial(loader.shards.read_part, sample), int(loader.shards.samples["bytes"][sample]), region)
