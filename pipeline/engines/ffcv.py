"""The FFCV engine: FFCV's loader over .beton files, with the samples and draws of the plan.

FFCV reads the file and runs a compiled decoder in its threads. The plan decides which samples and windows are decoded. (FFCV's
own random numbers come from one randomly seeded generator per thread, and its orders cannot be resumed.) JPEGs are decoded with
libjpeg-turbo's exact inverse DCT; FFCV's own decoder uses the fast one, which is off by 1 of 255 on average. Only the crop is
decoded if the JPEG has a table of segments (mode "region"), else the whole image. Raw images are resampled directly. Views of
several sizes (`MultiCrop`) are made one after the other by FFCV's thread, without its compiled code, which is slower.

The engine works around three problems of FFCV:
- After an exception in FFCV's thread, the consumer would wait forever. Here the exception is raised in the consumer.
- FFCV's batches are views of memory that it overwrites. Here they are recycled buffers, which stay valid while referenced.
- Creating FFCV's Loader makes numba's type of byte arrays read-only for all code compiled later. `_Storage` prevents that.
"""

from __future__ import annotations

import atexit
import ctypes
import ctypes.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import FileIO
from pathlib import Path
from queue import Empty, Full
from typing import Any

import numba
import numpy as np
import torch
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader as StockLoader
from ffcv.loader import loader as loader_module
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers import OSCacheManager
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.state import State
from ffcv.utils import cast_int_to_byte_ptr
from llvmlite.binding import load_library_permanently
from numba import carray, prange, types

from ..batch import Batch, BatchPlan, BatchRange, check_in_order
from ..buffers import split
from ..errors import UserError
from ..jit import jit
from ..jpeg.decode import REFUSED, decode
from ..jpeg.region import Bytes
from ..loader import Loader
from ..pixels.decoder import Decoder, Pixels, has_size, region_of, resample_groups, resample_windows
from ..plan.sampling import Ints
from ..spec import LoaderSpec
from ..store import files
from ..store.prefetch import Ranges, ReadAhead
from ..store.shards import ShardSet
from .ffcv_field import RAW
from .ffcv_file import open_beton

# An "order" is the work on one sample as 7 integers, in memory that FFCV passes to its compiled code. Its fields:
_STATUS, _WINDOWS, _FLIP, _OUT, _CROPS, _ROWS, _COLUMNS = range(7)
_ORDER = 7

# libjpeg-turbo, which FFCV links to. Called by name: numba cannot cache code that calls ctypes functions by their address.
load_library_permanently(ctypes.util.find_library("turbojpeg") or "libturbojpeg.so.0")
_begin = types.ExternalFunction("tjInitDecompress", types.intp())
_decompress = types.ExternalFunction(
    "tjDecompress2",
    types.intc(types.intp, types.intp, types.ulong, types.intp, types.intc, types.intc, types.intc, types.intc, types.intc),
)
_end = types.ExternalFunction("tjDestroy", types.intc(types.intp))


def open(spec: LoaderSpec) -> FfcvLoader:
    """A loader of `spec` over the split's .beton. Raises UserError for a bad spec, or without such a file."""
    return FfcvLoader(spec)


@jit
def _decode_whole(jpeg: Any, pixels: Any) -> Any:
    """Decode a whole JPEG. Returns 0 or libjpeg-turbo's error status.

    It must be a function of its own. numba frees an array after its last use, and taking its address does not count as a use.
    Arguments stay alive until the function returns.
    """
    decoder = _begin()
    rgb, exact = 0, 0
    status = _decompress(
        decoder, jpeg.ctypes.data, len(jpeg), pixels.ctypes.data, pixels.shape[1], 0, pixels.shape[0], rgb, exact
    )
    _end(decoder)
    return status


@jit
def _make_views(order: Any, field: Any, size: Any, content: Any, kernel: Any) -> Any:
    """Make the views of one image, as its `order` says. Returns 0, or another number if it cannot be decoded.

    order: int64 (7,): a field for the status, which the caller fills; the addresses of the windows, float64 (C, 4), of flip,
    uint8 (C,), and of the views, uint8 (C, H, W, 3); then C, H, W. field, size, content: of the image, as in `Beton`. They must
    have been checked, because addresses are not.
    """
    height, width = np.int64(field["height"]), np.int64(field["width"])
    crops, rows, columns = order[_CROPS], order[_ROWS], order[_COLUMNS]
    windows = carray(cast_int_to_byte_ptr(order[_WINDOWS]), (crops * 32,)).view(np.float64).reshape(crops, 4)
    flip = carray(cast_int_to_byte_ptr(order[_FLIP]), (crops,))
    out = carray(cast_int_to_byte_ptr(order[_OUT]), (crops * rows * columns * 3,)).reshape(crops, rows, columns, 3)
    stored = carray(cast_int_to_byte_ptr(content.ctypes.data + np.int64(field["data_ptr"])), (size,))
    whole = np.array([0, 0, height, width])
    if field["mode"] == RAW:
        resample_windows(stored.reshape(height, width, 3), whole, windows, flip, kernel, out)
        return 0
    if not has_size(stored, height, width):
        return REFUSED
    top, left, bottom, right = region_of(height, width, windows, rows, columns, kernel.support)
    scratch = np.empty(6 * (bottom - top + 64) * (right - left + 64), np.uint8)  # for whole MCUs and their samples
    place = np.empty(4, np.int64)
    if decode(stored, top, left, bottom, right, scratch, place) == 0:
        decoded = scratch[: 3 * place[2] * place[3]].reshape(place[2], place[3], 3)
        resample_windows(decoded, place, windows, flip, kernel, out)
        return 0
    pixels = np.empty((height, width, 3), np.uint8)
    status = _decode_whole(stored, pixels)
    if status == 0:
        resample_windows(pixels, whole, windows, flip, kernel, out)
    return status


@jit
def _make_batch(samples: Any, orders: Any, images: Any, sizes: Any, content: Any, kernel: Any) -> None:
    """Make a batch. orders: int64 (samples, 7). images, sizes, content: as in `Beton`."""
    for i in range(len(samples)):
        orders[i, _STATUS] = _make_views(orders[i], images[samples[i]], sizes[samples[i]], content, kernel)


@jit(parallel=True)
def _make_batch_in_threads(samples: Any, orders: Any, images: Any, sizes: Any, content: Any, kernel: Any) -> None:
    """`_make_batch` in numba's threads. The status is a field of the order because numba drops a parallel loop that writes to no
    argument.
    """
    for i in prange(len(samples)):
        orders[i, _STATUS] = _make_views(orders[i], images[samples[i]], sizes[samples[i]], content, kernel)


class _PlannedDecoder(SimpleRGBImageDecoder):
    """The first operation of FFCV's image field. Its memory holds the batch's orders, and is also its output."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        dtype = np.dtype(np.int64)
        return replace(previous_state, shape=(_ORDER,), dtype=dtype), AllocationQuery((_ORDER,), dtype)

    def generate_code(self) -> Callable[..., Any]:
        """A placeholder. FFCV would take seconds to compile the real code in each Loader; `_open_stock` inserts cached code."""

        def decode(batch_indices: Any, destination: Any, metadata: Any, storage_state: Any) -> Any:
            return destination[: len(batch_indices)]

        return decode


class _Storage(OSCacheManager):
    """FFCV's storage without its compiled reader, which the decoder here does not use.

    Compiling the reader takes 0.4 s. And because memory maps are read-only, it sets `mutable` to False on numba's shared type of
    byte arrays, so that code compiled later could not write to any byte array.
    """

    def compile_reader(self) -> None:
        return None


@contextmanager
def _without_reader() -> Iterator[None]:
    """Make FFCV's Loader use `_Storage`. It has no option for that, so its module is patched."""
    stock, loader_module.OSCacheManager = loader_module.OSCacheManager, _Storage
    try:
        yield
    finally:
        loader_module.OSCacheManager = stock


class _PlannedBatches(EpochIterator):
    """FFCV's thread, which runs compiled code for batch after batch: here for the batch ranges of the plan, across epochs.

    It puts (plan, pixels) into its queue, or the exception that ended it.
    """

    def __init__(self, owner: FfcvLoader, stock: StockLoader, schedule: Iterator[BatchRange]) -> None:
        self._owner, self._schedule, self._decoder = owner, schedule, Decoder()
        # It is a daemon thread. Python ends those during finalization, which aborts the process if compiled code runs in them.
        atexit.register(self.stop)
        super().__init__(stock, np.empty(0, np.uint64))  # starts the thread

    def run(self) -> None:
        threads = torch.get_num_threads()
        Compiler.set_num_threads(self.loader.num_workers)  # of numba in this thread, but also of torch in all threads
        torch.set_num_threads(threads)
        for batch_range in self._schedule:
            try:
                result: Any = self._make_batch(batch_range)
            except BaseException as error:  # passed on to the consumer
                result = error
            self._put(result)
            if self.terminate_event.is_set() or isinstance(result, BaseException):
                return

    def next(self) -> tuple[BatchPlan, torch.Tensor]:
        result = self.output_queue.get()
        if isinstance(result, BaseException):
            raise result
        made: tuple[BatchPlan, torch.Tensor] = result
        return made

    def stop(self) -> None:
        """End the thread and wait until it has ended."""
        atexit.unregister(self.stop)
        self.close()
        while self.is_alive():
            with suppress(Empty):
                self.output_queue.get_nowait()
            self.join(0.01)

    def _put(self, result: Any) -> None:
        while not self.terminate_event.is_set():
            with suppress(Full):
                self.output_queue.put(result, timeout=0.1)
                return

    def _make_batch(self, batch_range: BatchRange) -> tuple[BatchPlan, torch.Tensor]:
        owner = self._owner
        plan = owner.plan(batch_range)
        images, tensor = owner.buffers.acquire_parts(plan.shapes, np.uint8)
        for index in self._failing(plan, images[0]) if len(images) == 1 else range(len(plan.ids)):
            owner.make_or_replace(self._decoder, plan, index, plan.images_of(index, images))
        return plan, tensor

    def _failing(self, plan: BatchPlan, images: Pixels) -> list[int]:
        """Make views of one size with the compiled code. Returns which images it could not decode."""
        owner = self._owner
        (orders,) = self.memory_allocations["operation"].values()
        orders = orders[0][: len(plan.ids)]
        windows, flip = np.ascontiguousarray(plan.views.windows), np.ascontiguousarray(plan.views.flip)
        for column, array in ((_WINDOWS, windows), (_FLIP, flip), (_OUT, images)):
            stride = array.strides[0] * owner.crops
            orders[:, column] = array.ctypes.data + stride * np.arange(len(orders))
        orders[:, _CROPS:] = owner.crops, *plan.size
        (made,) = self.run_pipeline(0, plan.ids.astype(np.uint64), 0, None)
        failing: list[int] = np.flatnonzero(made[:, _STATUS]).tolist()
        return failing


class FfcvLoader(Loader):
    """Makes the plan's batches with compiled code in FFCV's thread. Start-up reads the metadata of all samples, as FFCV does."""

    engine = "ffcv"

    shards: BetonSet

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec)
        self._stock: StockLoader | None = None
        self._batches: _PlannedBatches | None = None

    def close(self) -> None:
        super().close()
        if self._batches:
            self._batches.stop()
            self._batches = None

    def ready(self) -> int:
        return self._batches.output_queue.qsize() if self._batches else 0

    def make_views(self, decoder: Decoder, plan: BatchPlan, index: int, out: Sequence[Pixels]) -> None:
        sample = int(plan.ids[index])
        if self.shards.beton.images["mode"][sample] != RAW:
            super().make_views(decoder, plan, index, out)
            return
        views = slice(index * self.crops, (index + 1) * self.crops)
        size = int(plan.heights[index]), int(plan.widths[index])
        pixels = self.read(sample).reshape(*size, 3).copy()  # numba miscompiles the bicubic filter of read-only arrays
        resample_groups(pixels, np.array([0, 0, *size]), plan.views.windows[views], plan.views.flip[views], self.kernel, out)

    def _make_batch(self, batch_range: BatchRange) -> Batch:
        self._batches = self._batches or _PlannedBatches(self, self._open_stock(), self.upcoming(batch_range))
        plan, pixels = self._batches.next()
        check_in_order(plan, batch_range)
        return self.finish(split(self.buffers.to_device(pixels), plan.shapes), plan)

    def _open_stock(self) -> StockLoader:
        if self._stock is None:
            threads = torch.get_num_threads()
            with _without_reader():
                self._stock = StockLoader(
                    str(self.shards.path),
                    batch_size=-(-self.spec.batch_size // self.spec.world_size),
                    num_workers=min(self.spec.threads, numba.config.NUMBA_NUM_THREADS),
                    os_cache=True,
                    pipelines={"image": [_PlannedDecoder()], "label": None},
                    batches_ahead=self.spec.prefetch,
                    drop_last=False,
                )
            make_batch = _make_batch_in_threads if self._stock.num_workers > 1 else _make_batch
            stages, outputs = self._stock.code
            torch.set_num_threads(threads)  # undo FFCV's setting, which is global

            # They are checked, unlike those that FFCV would pass.
            kernel, (content, images, sizes) = self.kernel, self.shards.beton

            def stage(batch_indices: Any, **memory: Any) -> tuple[Any]:
                orders = next(array for name, array in memory.items() if name.startswith("memory_") and array is not None)
                make_batch(batch_indices, orders, images, sizes, content, kernel)
                return (orders,)

            self._stock.code = [(stage, defined) for _, defined in stages], outputs
        return self._stock

    def _open_shards(self) -> BetonSet:
        return BetonSet(self.spec.data, self.spec.split)


class BetonSet(ShardSet):
    """The images of a split in its .beton file. Raises UserError without such a file, or if it is damaged."""

    def __init__(self, root: str | Path, split: str) -> None:
        if files.is_remote(str(root)):
            raise UserError(f"{root}: FFCV reads local files", "copy the .beton file, or use `engine` cpu or dali")
        super().__init__(root, split, tars=False)
        entry = self._entry.get("beton")
        if entry is None:
            raise UserError(f"{self.manifest.root}: has no FFCV file of {split}", "make the shards again with `format` both")
        self.path, self._settings, self._sha256 = Path(self.manifest.root) / entry["file"], entry["settings"], entry["sha256"]
        self.beton = open_beton(self.path, self.samples, self._settings)
        stream = FileIO(self.path)
        self._reader = ReadAhead(lambda _: stream)

    @property
    def fingerprint(self) -> str:
        """That of the shards if the file holds the same bytes, so that a run can continue with another engine."""
        of_shards = self.manifest.fingerprint
        return of_shards if self._settings["mode"] == "region" else f"{of_shards} {self._sha256}"

    def read(self, index: int) -> Bytes:
        content, images, sizes = self.beton
        start = int(images["data_ptr"][index])
        return np.asarray(content[start : start + int(sizes[index])])

    def locate(self, index: int) -> str:
        return f"{self.path}: sample {index}"

    def image_sizes(self, ids: Ints) -> tuple[Ints, Ints]:
        records = self.beton.images[ids]  # not the shards' sizes: the file may have smaller images
        return records["height"].astype(np.int64), records["width"].astype(np.int64)

    def _ranges(self, ids: Ints, whole: bool) -> Ranges:
        starts, sizes = self.beton.images["data_ptr"][ids].tolist(), self.beton.sizes[ids].tolist()
        return ((0, start, size) for start, size in zip(starts, sizes, strict=True))
