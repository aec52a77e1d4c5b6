"""Beton files, FFCV's format, written from one split of our shards.

A beton (https://docs.ffcv.io/file_format.html; `ffcv.types` has the records) is a header, a description of the fields, a metadata
record per sample, pages of data, and a table of what is allocated in them. Ours have two fields, as ffcv-imagenet's: `image`
(RGBImageField) and `label` (IntField). Sample i of the file is sample i of the split.

FFCV's DatasetWriter waits for ever once a sample raises or a worker dies, leaves a file that opens after a crash, and lays pages
out as its workers happen to race. So only its parts are used here. Worker processes run the stock field's `encode` into memory;
one process allocates and writes, in the split's order. Same split, same options: same bytes, for any number of workers: those of
DatasetWriter with one worker. Its speed in the same run (400 full-size ImageNet images, 2 busy x86 cores, our checks included):
jpg 0.9 to 1.3 of DatasetWriter's, raw 0.6 to 0.8; "region" writes 700 images/s.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..engines.ffcv_field import Stored, region_field, store_encoded
from ..errors import UserError
from ..store.files import atomic_write, sha256
from ..store.shards import ShardSet

MODES = ("jpg", "raw", "proportion", "region")
_INSTALL = "apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev && pip install 'cropfeed[ffcv]'"
_LEAST_PAGE = 1 << 23  # bytes; the stock writer's page
_CHUNK = 16  # samples that a worker sends at a time
_THREADS = "NUMBA_THREADING_LAYER"
Sizes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BetonSettings:
    """How an FFCV file stores images; part of the manifest.

    mode: "region": our JPEGs' bytes as they are, which stock FFCV decodes whole and `engines.ffcv_field` at the crop; or, by
    FFCV's RGBImageField from the RGB pixels that Pillow decodes, "jpg" (encoded anew at `quality`), "raw" (pixels),
    "proportion" (that share as jpg, drawn per sample, the rest raw). max_resolution: longest side in pixels, larger images are
    shrunk; not for "region". Raises UserError for a mode that does not exist.
    """

    mode: str = "region"
    max_resolution: int | None = None
    quality: int = 90
    proportion: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"{self.mode}: no mode of a beton", f"choose from {', '.join(MODES)}")


def write_beton(
    shards: ShardSet,
    path: Path,
    settings: BetonSettings,
    workers: int,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Write a split as a beton and check it; return the file's SHA-256. The file appears whole, or not at all.

    workers: processes; "region", which encodes nothing, needs none. progress: gets how many more samples are written.

    Raises UserError for an image that cannot be stored (named), a full disk, a killed worker.
    """
    if not len(shards):
        raise UserError(f"{path}: a split without samples makes no beton")
    require_ffcv()
    with atomic_write(str(path)) as scratch:
        try:
            with _encoded(shards, settings, workers) as images:
                checksums = _write(scratch, shards, settings, images, progress)
            _verify(scratch, shards, settings, checksums)
            return sha256(str(scratch))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def require_ffcv() -> None:
    """Import FFCV, which takes seconds. Raises UserError where that fails."""
    try:
        import ffcv.writer  # noqa: F401
    except ImportError as error:
        raise UserError(f"FFCV is not installed: {_INSTALL} ({error})") from error


# Encoding


@contextmanager
def _encoded(shards: ShardSet, settings: BetonSettings, workers: int) -> Iterator[Iterator[Stored]]:
    """The split's images in order, as the beton holds them. "region" here, other modes in worker processes, which end with it."""
    if settings.mode == "region":
        yield _encode(shards, settings, range(len(shards)))
        return
    context = multiprocessing.get_context("forkserver")  # FFCV takes 8 s to import: once, in the server, for all workers
    context.set_forkserver_preload(["ffcv.fields.rgb_image"])
    processes, receivers = [], []
    try:
        for first in range(min(workers, -(-len(shards) // _CHUNK))):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(sender, *_origin(shards), settings, first, workers), daemon=True)
            with _own_threads_in_numba():
                process.start()
            sender.close()  # now only the worker holds it: its death ends the stream
            processes.append(process)
            receivers.append(receiver)
        yield _received(receivers, len(shards))
    finally:
        for process, receiver in zip(processes, receivers, strict=False):
            process.kill()
            process.join()
            receiver.close()


@contextmanager
def _own_threads_in_numba() -> Iterator[None]:
    """The workers' server, which begins with the first of them, is not to load TBB, where OpenCV's packages brought it: that has
    been seen to wait for ever for its threads when a process that has forked ends. Nothing there computes in numba's threads.
    """
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "workqueue"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before


def _origin(shards: ShardSet) -> tuple[str, str, Path | None, float | None]:
    """What opens the same split in another process: the arguments of ShardSet."""
    split = shards.split
    if shards.cache is None:
        return shards.manifest.root, split, None, None
    return shards.manifest.root, split, shards.cache.folder, shards.cache.limit / 1e9


def _work(
    sender: Connection,
    root: str,
    split: str,
    cache: Path | None,
    cache_gb: float | None,
    settings: BetonSettings,
    first: int,
    step: int,
) -> None:
    """A worker: encode chunk `first` and every `step`-th after it. It sends a list per chunk, or what is wrong, as a string.

    It waits while nobody receives, and ends once nobody can: a dead parent leaves no workers behind.
    """
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    warnings.simplefilter("ignore")  # Pillow's, of broken EXIF
    cv2.setNumThreads(1)
    with suppress(BrokenPipeError):
        try:
            shards = ShardSet(root, split, cache, cache_gb)
            for start in range(first * _CHUNK, len(shards), step * _CHUNK):
                sender.send(list(_encode(shards, settings, range(start, min(start + _CHUNK, len(shards))))))
        except UserError as error:
            sender.send(str(error))


def _received(receivers: list[Any], count: int) -> Iterator[Stored]:
    """What the workers send, in the order of the samples."""
    for chunk in range(-(-count // _CHUNK)):
        try:
            received = receivers[chunk % len(receivers)].recv()
        except (EOFError, OSError) as error:
            some = f"samples {chunk * _CHUNK} to {min((chunk + 1) * _CHUNK, count) - 1}"
            raise UserError(
                f"a worker process died over {some}, killed from outside or for want of memory: try fewer --workers"
            ) from error
        if isinstance(received, str):
            raise UserError(received)
        yield from received


def _encode(shards: ShardSet, settings: BetonSettings, indices: range) -> Iterator[Stored]:
    """Some of the split's images, encoded by FFCV's field or ours. Raises UserError that names the image."""
    from ffcv.fields.rgb_image import RGBImageField

    if settings.mode == "region":
        field = region_field()
    else:
        field = RGBImageField(settings.mode, settings.max_resolution, None, settings.quality, settings.proportion)
    for index in indices:
        jpeg = shards.read(index).tobytes()
        try:
            if settings.mode == "proportion":
                np.random.seed(index)  # RGBImageField draws from NumPy's global generator, here a worker's
            stored = _capture(field, jpeg if settings.mode == "region" else Image.open(io.BytesIO(jpeg)).convert("RGB"))
        except Exception as error:  # Pillow and OpenCV raise a dozen kinds; each means that this image cannot be stored
            raise UserError(f"{shards.where(index)}: cannot be stored as {settings.mode} ({error})") from error
        yield stored


def _capture(field: Any, image: Any) -> Stored:
    """What a field writes for an image."""
    record, pieces = np.zeros(1, field.metadata_type), []

    def malloc(size: int) -> tuple[int, npt.NDArray[np.uint8]]:
        pieces.append(np.empty(size, np.uint8))
        return 0, pieces[-1]

    field.encode(record, image, malloc)
    data = pieces[0].tobytes()
    return Stored(int(record["mode"][0]), int(record["height"][0]), int(record["width"][0]), data, zlib.crc32(data))


# Writing


def _write(
    path: Path, shards: ShardSet, settings: BetonSettings, images: Iterator[Stored], progress: Callable[[int], None] | None
) -> npt.NDArray[np.uint32]:
    """Write all samples in order by the parts of FFCV's DatasetWriter. Returns the CRC-32 of each image's data: uint32 (N,)."""
    from ffcv.fields import IntField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter, handle_sample

    fields = {"image": _stored_field(), "label": IntField()}
    writer = DatasetWriter(str(path), fields, _page_size(shards, settings), num_workers=1)
    writer.num_samples = len(shards)
    checksums = np.empty(len(shards), np.uint32)
    metadata = np.zeros(len(shards), writer.metadata_type)
    writer.prepare()  # the headers, and shared memory for the metadata
    try:
        allocator = MemoryAllocator(str(path), writer.data_region_start, writer.page_size)
        allocator.__enter__()  # not by `with`: its exit waits for ever if Ctrl-C falls between two of its steps
        try:
            for index, image in enumerate(images):
                sample = (image, shards.samples["label"][index])
                handle_sample(sample, index, metadata.dtype.names, metadata, allocator, fields)
                checksums[index] = image.crc32
                if progress:
                    progress(1)
            allocator.flush_page()
        finally:
            allocator.fp.close()
        writer.metadata_sm.buf[: metadata.nbytes] = metadata.tobytes()
        writer.finalize(allocator.allocations)
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
    return checksums


def _stored_field() -> Any:
    """A field that stores what is encoded already. Its class is RGBImageField itself: DatasetWriter looks a field's type id up by
    its class, so the file says RGBImageField and stock FFCV opens it, whatever wrote the bytes."""
    from ffcv.fields.rgb_image import RGBImageField

    field: Any = RGBImageField()
    field.encode = store_encoded
    return field


def _page_size(shards: ShardSet, settings: BetonSettings) -> int:
    """Bytes of a page, a power of two: the stock writer's, or what holds the largest image (its pixels: a JPEG takes less)."""
    if settings.mode == "region":
        largest = int(shards.samples["bytes"].max())
    else:
        heights, widths = _stored_sizes(shards, settings)
        largest = int((3 * heights * widths).max())
    return max(_LEAST_PAGE, 1 << (largest - 1).bit_length())


def _stored_sizes(shards: ShardSet, settings: BetonSettings) -> tuple[Sizes, Sizes]:
    """Heights and widths in the beton: int64 (N,) each, as RGBImageField computes them."""
    heights, widths = shards.samples["height"].astype(np.int64), shards.samples["width"].astype(np.int64)
    if settings.max_resolution is None or settings.mode == "region":
        return heights, widths
    ratio = np.minimum(settings.max_resolution / np.maximum(heights, widths), 1)
    return (ratio * heights).astype(np.int64), (ratio * widths).astype(np.int64)


def _verify(path: Path, shards: ShardSet, settings: BetonSettings, checksums: npt.NDArray[np.uint32]) -> None:
    """Read the file by FFCV's Reader: every sample's label, size and data must be there. Raises UserError."""
    from ffcv.reader import Reader

    reader = Reader(str(path))
    images, labels = (reader.metadata[name] for name in reader.metadata.dtype.names)
    heights, widths = _stored_sizes(shards, settings)
    table = reader.alloc_table
    good = len(images) == len(table) == len(shards) and (
        np.array_equal(labels, shards.samples["label"])
        and np.array_equal(images["height"], heights)
        and np.array_equal(images["width"], widths)
        and np.array_equal(table["ptr"], images["data_ptr"])
    )
    if not good:
        raise UserError(f"{path}: what was written is not what the split holds; the disk may be full or faulty")
    compare = settings.mode == "region"
    content = np.memmap(path, np.uint8, "r")
    for index, (start, size) in enumerate(zip(table["ptr"].tolist(), table["size"].tolist(), strict=True)):
        data = content[start : start + size]
        if zlib.crc32(data.tobytes()) != checksums[index] or (compare and not np.array_equal(data, shards.read(index))):
            raise UserError(f"{path}: sample {index} reads otherwise than it was written; the disk may be full or faulty")
