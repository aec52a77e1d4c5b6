"""FFCV's .beton files, written from one split of shards.

A beton (https://docs.ffcv.io/file_format.html; `ffcv.types` has the records) is a header, a description of the fields, a metadata
record per sample, pages of data, and an allocation table. Files written here have two fields, as in ffcv-imagenet: `image`
(RGBImageField) and `label` (IntField). Sample i of the file is sample i of the split.

FFCV's DatasetWriter hangs if a sample raises or a worker dies. After a crash it leaves a readable but incomplete file. And the
order of its pages depends on the timing of its workers. So only parts of it are used here. Worker processes encode images in
memory with the stock field's `encode`; one process allocates and writes, in the split's order. The same split and options give
the same bytes with any number of workers: those of DatasetWriter with one worker. Speed relative to DatasetWriter in the same run
(400 full-size ImageNet images, 2 busy x86 cores, verification included): jpg 0.9 to 1.3, raw 0.6 to 0.8; "region" writes 700
images/s.
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
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..engines.ffcv_field import JPEG, StoredImage, jpeg_size, region_field, store_encoded
from ..errors import UserError, install_command, storage_error
from ..progress import announce_if_slow, progress_bar
from ..store.files import atomic_write, sha256
from ..store.shards import ShardSet

MODES = ("jpg", "raw", "proportion", "region")
_INSTALL = f"apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev && {install_command('ffcv')}"
_MIN_PAGE = 1 << 23  # bytes; the default of FFCV's writer
_CHUNK = 16  # samples that a worker sends at a time
_THREADING_LAYER = "NUMBA_THREADING_LAYER"


@dataclass(frozen=True)
class BetonSettings:
    """How an FFCV file stores images; part of the manifest.

    mode: "region" stores the bytes of the shards' JPEGs unchanged, and the pixels of other images. Stock FFCV decodes JPEGs as a
    whole, `engines.ffcv_field` only the crop. The other modes are those of FFCV's RGBImageField, applied to the RGB pixels that
    Pillow decodes: "jpg" (re-encoded with `quality`), "raw" (pixels), "proportion" (the fraction `proportion` of images, drawn
    per sample, as jpg, the others raw). max_resolution: larger images are shrunk to this longest side, pixels; not for "region".
    Raises UserError for an unknown mode, or other values outside their ranges.
    """

    mode: str = "region"
    max_resolution: int | None = None
    quality: int = 90
    proportion: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"`mode` {self.mode}: not a mode of .beton files", f"choose from {', '.join(MODES)}")
        if not 1 <= self.quality <= 100 or not 0 <= self.proportion <= 1:
            raise UserError("`quality` must lie in [1, 100], and `proportion` in [0, 1]")


def write_beton(
    shards: ShardSet, path: Path, settings: BetonSettings, workers: int, progress: Callable[[int], None] | None = None
) -> str:
    """Write a split as a .beton file and verify it; return the SHA-256 of the file. The write is atomic.

    workers: number of processes; "region" encodes nothing and uses none. progress: called with the number of newly written
    samples. Raises UserError if an image cannot be stored (the message names it), the disk is full, or a worker was killed.
    """
    if not len(shards):
        raise UserError(f"{path}: the split has no samples")
    require_ffcv()
    with atomic_write(str(path)) as scratch:
        try:
            with _encoded(shards, settings, workers) as images:
                checksums = _write(scratch, shards, settings, images, progress)
            _verify(scratch, path.name, shards, settings, checksums)
            return sha256(str(scratch), f"SHA-256 of {path.name}")
        except OSError as error:
            raise storage_error(error, path) or UserError(f"{path}: cannot be written ({error})") from error


def require_ffcv() -> None:
    """Import FFCV, which takes seconds. Raises UserError if that fails."""
    try:
        with announce_if_slow("importing FFCV, which takes about 10 seconds"):
            import ffcv.writer  # noqa: F401
    except ImportError as error:
        raise UserError(f"FFCV is not installed ({error})", f"install it: {_INSTALL}") from error


# Encoding


@contextmanager
def _encoded(shards: ShardSet, settings: BetonSettings, workers: int) -> Iterator[Iterator[StoredImage]]:
    """The split's encoded images, in order. "region" runs in this process, other modes in workers, which end with the block."""
    if settings.mode == "region":
        yield _encode(shards, settings, range(len(shards)))
        return
    context = multiprocessing.get_context("forkserver")  # importing FFCV takes 8 s; the server does it once for all workers
    context.set_forkserver_preload(["ffcv.fields.rgb_image"])
    processes, receivers = [], []
    cache = (shards.cache.folder, shards.cache.limit / 1e9) if shards.cache else (None, None)
    origin = (shards.manifest.root, shards.split, *cache)  # opens the same split in another process
    try:
        for first in range(min(workers, -(-len(shards) // _CHUNK))):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(sender, *origin, settings, first, workers), daemon=True)
            with _without_tbb():
                process.start()
            sender.close()  # now only the worker has it open, so that its death closes the pipe
            processes.append(process)
            receivers.append(receiver)
        yield _received(receivers, len(shards))
    finally:
        for process, receiver in zip(processes, receivers, strict=False):
            process.kill()
            process.join()
            receiver.close()


@contextmanager
def _without_tbb() -> Iterator[None]:
    """Keep the fork server, which starts with the first worker, from loading TBB, which may be installed with OpenCV.

    TBB can hang at the exit of a process that has forked. Workers do not use numba's threads.
    """
    before = os.environ.get(_THREADING_LAYER)
    os.environ[_THREADING_LAYER] = "workqueue"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADING_LAYER]
        else:
            os.environ[_THREADING_LAYER] = before


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
    """A worker: encode chunk `first` and every `step`-th after it. It sends a list per chunk, or a UserError.

    It blocks until the parent receives, and ends when the pipe breaks: a killed parent leaves no workers behind.
    """
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    warnings.simplefilter("ignore")  # Pillow's, about broken EXIF
    cv2.setNumThreads(1)
    with suppress(BrokenPipeError):
        try:
            shards = ShardSet(root, split, cache, cache_gb)
            for start in range(first * _CHUNK, len(shards), step * _CHUNK):
                sender.send(list(_encode(shards, settings, range(start, min(start + _CHUNK, len(shards))))))
        except UserError as error:
            sender.send(error)


def _received(receivers: list[Any], count: int) -> Iterator[StoredImage]:
    """The images that the workers send, in the order of the samples."""
    for chunk in range(-(-count // _CHUNK)):
        try:
            received = receivers[chunk % len(receivers)].recv()
        except (EOFError, OSError) as error:
            some = f"samples {chunk * _CHUNK} to {min((chunk + 1) * _CHUNK, count) - 1}"
            raise UserError(
                f"a worker process was killed at {some}, perhaps because memory ran out", "try fewer `workers`"
            ) from error
        if isinstance(received, UserError):
            raise received
        yield from received


def _encode(shards: ShardSet, settings: BetonSettings, indices: range) -> Iterator[StoredImage]:
    """Some of the split's images, encoded by FFCV's field or by RegionField. Raises UserError that names the image."""
    from ffcv.fields.rgb_image import RGBImageField

    if settings.mode == "region":
        field = region_field()
    else:
        field = RGBImageField(settings.mode, settings.max_resolution, None, settings.quality, settings.proportion)
    for index in indices:
        jpeg = shards.read(index).tobytes()
        try:
            if settings.mode == "proportion":
                np.random.seed(index)  # RGBImageField draws from NumPy's global generator
            stored = _capture(field, jpeg if settings.mode == "region" else Image.open(io.BytesIO(jpeg)).convert("RGB"))
        except Exception as error:  # Pillow and OpenCV raise a dozen types; each means that this image cannot be stored
            raise UserError(f"{shards.locate(index)}: cannot be stored as {settings.mode} ({error})") from error
        yield stored


def _capture(field: Any, image: Any) -> StoredImage:
    """Run a field's `encode` and return what it writes."""
    record, allocated = np.zeros(1, field.metadata_type), []

    def malloc(size: int) -> tuple[int, npt.NDArray[np.uint8]]:
        allocated.append(np.empty(size, np.uint8))
        return 0, allocated[-1]

    field.encode(record, image, malloc)
    data = allocated[0].tobytes()
    return StoredImage(int(record["mode"][0]), int(record["height"][0]), int(record["width"][0]), data, zlib.crc32(data))


# Writing


def _write(
    path: Path, shards: ShardSet, settings: BetonSettings, images: Iterator[StoredImage], progress: Callable[[int], None] | None
) -> npt.NDArray[np.uint32]:
    """Write all samples in order with the parts of FFCV's DatasetWriter. Returns the CRC-32 of each image's data: uint32 (N,)."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter, handle_sample

    # Not a subclass: DatasetWriter looks up a field's type id by its class, and stock FFCV opens RGBImageField.
    image: Any = RGBImageField()
    image.encode = store_encoded
    fields = {"image": image, "label": IntField()}
    writer = DatasetWriter(str(path), fields, _page_size(shards, settings), num_workers=1)
    writer.num_samples = len(shards)
    checksums = np.empty(len(shards), np.uint32)
    metadata = np.zeros(len(shards), writer.metadata_type)
    writer.prepare()  # the headers, and shared memory for the metadata
    try:
        allocator = MemoryAllocator(str(path), writer.data_region_start, writer.page_size)
        allocator.__enter__()  # without `with`: its exit hangs if Ctrl-C comes between two of its steps
        try:
            for index, stored in enumerate(images):
                sample = (stored, shards.samples["label"][index])
                handle_sample(sample, index, metadata.dtype.names, metadata, allocator, fields)
                checksums[index] = stored.crc32
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


def _page_size(shards: ShardSet, settings: BetonSettings) -> int:
    """Bytes of a page, a power of two: FFCV's default, or enough for the pixels of the largest image (a JPEG takes less)."""
    from ..engines.ffcv_file import stored_sizes

    heights, widths = stored_sizes(shards.samples, asdict(settings))
    sizes = 3 * heights * widths
    if settings.mode == "region":
        largest = max(_MIN_PAGE, int(shards.samples["bytes"].max()))
        for index in np.flatnonzero(sizes > largest).tolist():
            if sizes[index] > largest and not jpeg_size(shards.read(index).tobytes()):
                largest = int(sizes[index])
    else:
        largest = int(sizes.max())
    return max(_MIN_PAGE, 1 << (largest - 1).bit_length())


def _verify(path: Path, name: str, shards: ShardSet, settings: BetonSettings, checksums: npt.NDArray[np.uint32]) -> None:
    """Open the file as the loader does, and compare every sample's data. name: for the bar. Raises UserError."""
    from ..engines.ffcv_file import open_beton

    content, images, sizes = open_beton(path, shards.samples, asdict(settings))
    compare = (images["mode"] == JPEG) & (settings.mode == "region")
    places = list(zip(images["data_ptr"].tolist(), sizes.tolist(), strict=True))
    for index, (start, size) in enumerate(progress_bar(places, unit=" images", desc=f"verifying {name}")):
        data = content[start : start + size]
        if zlib.crc32(data.tobytes()) != checksums[index] or (compare[index] and not np.array_equal(data, shards.read(index))):
            raise UserError(f"{path}: sample {index} differs from what was written", "the disk may be full or faulty")
