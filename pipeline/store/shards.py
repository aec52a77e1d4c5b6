"""Shards: WebDataset tars with an index and a manifest. Remote shards are read through a cache.

A data set is a folder, local or at an fsspec URL (s3://bucket/shards):

    manifest.json        classes, splits, shards with SHA-256, statistics, see `Manifest`
    mean_image.npy       float32 (224, 224, 3), 0..255: the mean of the training images' centre crops (short side 256)
    train/000000.tar     WebDataset: KEY.cls (the label, ASCII digits of fixed width) and KEY.jpg (the encoded image) per sample;
                         between them its fields, if the source has any: other members of the sample, such as KEY.json
    train/000000.idx     DALI's index of that tar, format v1.2: one line per sample, "EXT OFFSET BYTES NAME" per component
    train/samples.npy    one `SAMPLE` record per sample of the split, in the split's order

Labels are zero-padded to the same width throughout a data set ("0007"). Stock webdataset reads them with int(). DALI cannot parse
text, but can compute them from the digits: sum((cls - 48) * [1000, 100, 10, 1]).

Formats: WebDataset (https://github.com/webdataset/webdataset), POSIX tar with GNU long names, DALI's wds2idx.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import sys
import tarfile
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, TypeVar, overload

import numpy as np
import numpy.typing as npt

from ..errors import CorruptImageError, UserError
from ..progress import BYTES, progress_bar
from . import files
from .cache import choose_cache
from .checks import BackgroundCheck, hash_problem, samples_problem
from .entries import column
from .manifest import Manifest as Manifest
from .prefetch import Prefetcher, Ranges, ReadAhead, download_bar, fetcher
from .waiting import answer

# offset, bytes: of the encoded image in its tar. height, width: pixels, as stored (orientation tags are ignored). crc32: zlib's,
# of the sample's whole range in its tar, from the end of the previous sample on, including tar headers and padding.
SAMPLE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("bytes", "<u4"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("label", "<i4"),
        ("crc32", "<u4"),
    ]
)
_BLOCK = 512  # a tar's headers and contents begin at multiples of this
_KEPT_OPEN = 1 << 14  # local shards
_READ = 64 << 20  # bytes of the largest samples.npy that is read. A larger one is mapped; ImageNet's has 41 MB
_CHECKED_AT_ONCE = 256 << 20  # bytes of samples.npy that are checked before the first batch, in less than a second
Samples = npt.NDArray[Any]
T = TypeVar("T")
log = logging.getLogger("cropfeed")


class ChecksumError(CorruptImageError):
    """A sample whose bytes differ from those that were written."""


class EncodedSample(NamedTuple):
    """One sample to write into a shard. key: unique in the shard, without a dot after its last slash. fields: by extension."""

    key: str
    jpeg: bytes
    label: int
    height: int
    width: int
    fields: Mapping[str, bytes] = MappingProxyType({})


def label_digits(classes: int) -> int:
    """The number of digits to which all labels of a data set are padded; at least four."""
    return max(4, len(str(classes - 1)))


def write_shard(tar_path: Path, idx_path: Path, shard: int, samples: Iterable[EncodedSample], digits: int) -> Samples:
    """Write a tar and its index; return the shard's `SAMPLE` records. The same samples give the same bytes."""
    records, lines = [], []
    with tar_path.open("wb") as tar:
        for sample in samples:
            # The image is the last, so that a sample's range ends with it.
            members = {"cls": f"{sample.label:0{digits}d}".encode(), **sample.fields, "jpg": sample.jpeg}
            checksum, components = 0, []
            for extension, content in members.items():
                name = f"{sample.key}.{extension}"
                offset, checksum = _add_file(tar, name, content, checksum)
                components.append(f"{extension} {offset} {len(content)} {name}")
            lines.append(" ".join(components))
            records.append((shard, offset, len(sample.jpeg), sample.height, sample.width, sample.label, checksum))
        tar.write(bytes(2 * _BLOCK))  # the end of a tar; its size is a multiple of RECORDSIZE
        tar.write(bytes(-tar.tell() % tarfile.RECORDSIZE))
    idx_path.write_text("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n", "utf-8")  # as DALI's wds2idx writes it
    return np.array(records, SAMPLE)


def _add_file(tar: BinaryIO, name: str, content: bytes, checksum: int) -> tuple[int, int]:
    """Append a file. Returns the offset of its content, and the CRC-32 that continues `checksum` with what was written.

    The file has no owner and no time, so that equal shards have equal bytes.

    TarFile.addfile does the same in chunks of 16 KiB, which takes three times as long.
    """
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o444
    header, padding = member.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict"), bytes(-len(content) % _BLOCK)
    start = tar.tell() + len(header)
    for part in (header, content, padding):
        tar.write(part)
        checksum = zlib.crc32(part, checksum)
    return start, checksum


def _fields(head: bytes) -> dict[str, bytes]:
    """The members of a sample but its image, by extension. head: of the sample's range in its tar, all that precedes the image.

    TarFile does the same in ten times as long. Raises ChecksumError if they are damaged.
    """
    found: dict[str, bytes] = {}
    long_name, start = b"", 0
    with suppress(ValueError):  # of a damaged header
        while (content := start + _BLOCK) < len(head):
            name, size, kind = head[start : start + 100], int(head[start + 124 : start + 135], 8), head[start + 156 : start + 157]
            if not 0 <= size <= len(head) - content:
                break
            data, start = head[content : content + size], _end(content, size)
            if kind == tarfile.GNUTYPE_LONGNAME:  # of the next file
                long_name = data
                continue
            name, long_name = long_name or name, b""
            found[name.rstrip(b"\0").decode().rpartition("/")[2].partition(".")[2]] = data
        if content == len(head):  # what is left is the header of the image
            return found
    raise ChecksumError("its fields are damaged")


def sample_checksums(tar: npt.NDArray[np.uint8], samples: Samples) -> npt.NDArray[np.uint32]:
    """The CRC-32 of each sample's range in the tar of one shard: uint32 (N,). In a truncated tar, the values differ."""
    ends = _end(samples["offset"].astype(np.int64), samples["bytes"])
    starts = np.concatenate([[0], ends])[:-1]
    return np.array([zlib.crc32(tar[start:end].data) for start, end in zip(starts, ends, strict=True)], np.uint32)


def _end(offset: Any, count: Any) -> Any:
    """Where the range of a sample with an image of `count` bytes at `offset` ends in its tar."""
    return (offset + count + _BLOCK - 1) // _BLOCK * _BLOCK


class ShardSet:
    """One split of a data set: random access to encoded images. Start-up and memory do not grow with the number of samples beyond
    two million.

    root: folder or URL. A local shard is opened when it is first read. A remote shard is downloaded into a cache when it is first
    read, see `choose_cache` for cache and cache_gb. With either option, local shards use the cache, too, for slow disks.
    samples: one `SAMPLE` record per sample, shard after shard. sizes: number of images in each shard, int64.
    shards: path of each shard's local file. With a cache, the file exists once the shard was read.
    by_ranges: whether images are read by range requests, without a copy of their shard in the cache, see `check_cache`.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        cache: str | Path | None = None,
        cache_gb: float | None = None,
        tars: bool = True,
        verify: bool = False,
    ) -> None:
        """tars: whether images will be read; False also opens a data set that has only FFCV files. verify: compare the CRC-32 of
        each sample that is read."""
        self.manifest = Manifest(root)
        root = self.manifest.root
        if split not in self.manifest.splits:
            raise UserError(f"{root}: has no split {split!r}, only {', '.join(self.manifest.splits)}")
        self.split, self._verify = split, verify
        if tars and not self.manifest.splits[split]["shards"]:
            raise UserError(f"{root}: holds only FFCV files", "make the shards again with `format` both")
        cached = files.is_remote(root) or cache is not None or cache_gb is not None
        self.cache = choose_cache(cache, cache_gb) if cached else None
        self.by_ranges = False
        self._entry = self.manifest.splits[split]
        entries, store = self._entry["shards"], self.cache
        self.sizes, self._bytes = column(entries, "images"), column(entries, "bytes")
        self._ends = np.cumsum(self.sizes)
        self._urls = urls = _Lazy(len(entries), lambda shard: files.join(root, entries[shard]["file"]))
        if store:
            if len(entries):
                largest = int(self._bytes.argmax())
                store.check(urls[largest], int(self._bytes[largest]))
            self.shards = _Lazy(len(entries), lambda shard: store.path(entries[shard]["sha256"]))
        else:
            self.shards = _Lazy(len(entries), lambda shard: Path(urls[shard]))
        self._downloads = download_bar(split, self.shards, self._entry["shards"])
        self._prefetcher = Prefetcher(fetcher(self.cache, self._urls, self._entry["shards"], self._downloads))
        weakref.finalize(self, self._prefetcher.close)
        self._local = _OpenFiles(self._urls)
        paths = self.shards
        self._reader = ReadAhead((lambda shard: FileIO(paths[shard])) if self.cache else self._local.open)
        self._samples_file = files.join(root, self._entry["samples"])
        self.samples: Samples = self._open_samples(self._samples_file)
        self._check = self._start_check()
        if self.samples.nbytes <= _CHECKED_AT_ONCE:
            self._check.wait()

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """The encoded image of one sample: uint8 (bytes,).

        Shards are read, not mapped: if a mapped file is shortened or its disk fails, the kernel kills the process without a word.
        Raises UserError for damaged shards, for storage that does not answer (see `waiting`), or once samples.npy was found to be
        damaged; ChecksumError if `verify` is set.
        """
        return self._read(index, self._verify)[1]

    def read_with_fields(self, index: int) -> tuple[npt.NDArray[np.uint8], dict[str, bytes]]:
        """One sample's encoded image, as `read` returns it, and its fields by extension.

        It is one read of the shard, as they are adjacent. Raises as `read`, and ChecksumError for damaged fields.
        """
        head, image = self._read(index, whole=True)
        return image, _fields(head.tobytes())

    def read_part(self, index: int, start: int, count: int) -> npt.NDArray[np.uint8]:
        """Some bytes of one encoded image: uint8 (count,). Raises as `read`, but checksums are not compared."""
        self._check_record(index)
        record = self.samples[index]
        return self._read_range(int(record["shard"]), int(record["offset"]) + start, count)

    def check_fields(self, names: Iterable[str]) -> None:
        """Raise UserError if the samples have no fields of these names."""
        known = self._entry.get("fields", [])
        if unknown := [name for name in names if name not in known]:
            problem = f"{self.manifest.root}: the samples of {self.split} have no field {unknown[0]!r}"
            raise UserError(problem, f"they have {', '.join(known)}" if known else "convert a source that has it")

    def _read(self, index: int, whole: bool) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """A sample's range in its tar, divided at its image; the first part is empty unless `whole`."""
        self._check_record(index)
        record = self.samples[index]
        shard, offset, count = int(record["shard"]), int(record["offset"]), int(record["bytes"])
        if not whole:
            return np.empty(0, np.uint8), self._read_range(shard, offset, count)
        before = self.samples[index - 1]
        start = _end(int(before["offset"]), int(before["bytes"])) if index and before["shard"] == shard else 0
        if start > offset:
            raise UserError(f"{self._samples_file}: the offset of sample {index} is out of range", "make the shards again")
        content = self._read_range(shard, start, _end(offset, count) - start)
        if self._verify and zlib.crc32(content.data) != record["crc32"]:
            raise ChecksumError("its checksum is not the one in samples.npy")
        return content[: offset - start], content[offset - start : offset - start + count]

    def _check_record(self, index: int) -> None:
        if self._check.is_running and (problem := self._problem(self.samples[index : index + 1], index)):
            raise UserError(f"{self._samples_file}: {problem}", "make the shards again")
        if self._check.problem:
            self._check.wait()

    def prefetch(self, shards: Iterable[int]) -> None:
        """Download shards in background threads, in this order. Without a cache, read them ahead into the page cache.

        No more shards are prefetched than fit into the cache together. Errors are ignored here; `read` raises them.
        """
        free = self.cache.limit - self.samples.nbytes if self.cache else sys.maxsize
        fitting = []
        for shard in shards:
            free -= int(self._bytes[shard])
            if free < 0:
                break
            fitting.append(shard)
        self._prefetcher.request(fitting)

    def read_ahead(self, ids: npt.NDArray[np.int64], fields: bool = False) -> Future[None]:
        """Have the kernel read samples into the page cache, in this order, in a background thread: what `read` will read, or
        `read_with_fields` if `fields`. Samples of shards that are still to be downloaded are left out. ids: (N,)."""
        return self._reader.request(lambda: self._ranges(ids, fields or self._verify))

    def _ranges(self, ids: npt.NDArray[np.int64], whole: bool) -> Ranges:
        """The ranges of samples in their shards; with their fields if `whole`."""
        records, before = self.samples[ids], self.samples[ids - 1]
        starts = offsets = records["offset"].astype(np.int64)
        if whole:
            follows = (ids > 0) & (before["shard"] == records["shard"])
            starts = np.where(follows, _end(before["offset"].astype(np.int64), before["bytes"]), 0)
        counts = offsets + records["bytes"] - starts
        return zip(records["shard"].tolist(), starts.tolist(), counts.tolist(), strict=True)

    def close(self) -> None:
        """End the background threads. Images that were read stay valid, and `read` still works."""
        self._prefetcher.close()
        self._reader.close()
        self._downloads.close()

    def key(self, index: int) -> str:
        """The sample's name in its tar, from the index file; its number if that is damaged. Slow; use it only for messages."""
        record = self.samples[index]
        offset = str(record["offset"])
        with suppress(UserError):
            content = files.read(self._urls[int(record["shard"])].removesuffix(".tar") + ".idx")
            for line in content.decode("utf-8", "replace").splitlines():
                fields = line.split()
                if offset in fields[1::4] and len(fields) > 3:
                    return fields[3].rsplit(".", 1)[0]
        return f"sample {index}"

    def locate(self, index: int) -> str:
        """Shard (path or URL) and key of a sample, for messages."""
        return f"{self._urls[int(self.samples[index]['shard'])]}: {self.key(index)}"

    def check_cache(self, warns: bool = True) -> None:
        """Read images by ranges if the cache cannot hold the split: a random order would download shards again and again.

        warns: whether to log a warning then, as each image takes requests of its own.
        """
        total = int(self._bytes.sum()) + self.samples.nbytes
        self.by_ranges = self.cache is not None and total > self.cache.limit
        if self.cache and self.by_ranges and warns:
            log.warning(
                "%s: the split's %.3g GB exceed the cache %s of %.3g GB, so in a random order each image is requested by itself; "
                "raise `cache_gb` (CROPFEED_CACHE_GB), or choose `order` blocks",
                self.manifest.root, total / 1e9, self.cache.folder, self.cache.limit / 1e9,
            )  # fmt: skip

    def _open_samples(self, path: str) -> Samples:
        local = Path(path)
        if self.cache:
            size = files.size(path)
            with progress_bar(total=size, desc=f"downloading {self._entry['samples']}", **BYTES) as bar:
                # It stays mapped: evicting it would free no space.
                pin = self.cache.open_pinned(path, size, self._entry["samples_sha256"], bar.update)
            weakref.finalize(self, pin.close)
            local = self.cache.path(self._entry["samples_sha256"])
        samples = load_samples(path, local)
        if len(samples) != self._entry["images"]:
            raise UserError(f"{path}: does not match manifest.json", "make the shards again")
        return samples

    def _start_check(self) -> BackgroundCheck:
        """Check samples.npy. The cache has compared the hash of what it downloaded."""
        samples, path, sha256 = self.samples, self._samples_file, self._entry["samples_sha256"]
        checks = [lambda: self._problem(samples)]
        if not self.cache:
            checks.insert(0, lambda: hash_problem(path, sha256))
        return BackgroundCheck(path, checks)

    def _problem(self, samples: Samples, first: int = 0) -> str:
        return samples_problem(samples, len(self.manifest.classes), self._ends, self._bytes, first)

    def _read_range(self, shard: int, start: int, count: int) -> npt.NDArray[np.uint8]:
        """Bytes of a shard: uint8 (count,). With a cache, the file is closed again, to free the disk space of evicted files."""
        if not self.cache:
            url, size = self._urls[shard], int(self._bytes[shard])
            ready = _read_ready(self._local.opened(shard), size, start, count)
            return answer(url, lambda: _read_from(self._local.open(shard), url, size, start, count)) if ready is None else ready
        if self.by_ranges:
            return _downloaded(self._urls[shard], start, count)
        entry, report = self._entry["shards"][shard], self._downloads.update
        with self.cache.open(self._urls[shard], entry["bytes"], entry["sha256"], report=report) as stream:
            return _read_from(stream, self._urls[shard], entry["bytes"], start, count)


class _Lazy(Sequence[T]):
    """A sequence whose items are made when they are asked for: names of a million shards take 1 s and 0.1 GB."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._numbers, self._make = range(count), make

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> list[T]: ...
    def __getitem__(self, at: int | slice) -> T | list[T]:
        found = self._numbers[at]
        return self._make(found) if isinstance(found, int) else [self._make(number) for number in found]


class _OpenFiles:
    """Local shards. Thousands stay open, as opening takes longer than reading on network file systems. Thread-safe."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._open: dict[int, FileIO] = {}
        self._lock = threading.Lock()  # guards changes
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        self._most = _KEPT_OPEN if hard == resource.RLIM_INFINITY else min(_KEPT_OPEN, hard // 2)

    def opened(self, shard: int) -> FileIO | None:
        return self._open.get(shard)

    def open(self, shard: int) -> FileIO:
        stream = self._open.get(shard)
        if stream is None:
            with files.explained(self._paths[shard]):
                stream = _open_file(self._paths[shard])
            with self._lock:
                stream = self._open.setdefault(shard, stream)
                if len(self._open) > self._most:  # a reader of the oldest one holds it open
                    del self._open[next(iter(self._open))]
        return stream


def load_samples(path: str, local: Path) -> Samples:
    """The records in samples.npy. path: its name in messages. local: the file."""
    with files.explained(path):
        try:
            samples = answer(path, lambda: _read_or_map(local))
        except (OSError, UserError):
            raise
        except Exception as error:  # NumPy's reader of headers raises many types
            raise UserError(f"{path}: cannot be read ({error})", "make the shards again") from error
    if samples.dtype != SAMPLE or samples.ndim != 1:
        raise UserError(f"{path}: does not hold records of samples", "make the shards again")
    return samples


def _read_or_map(file: Path) -> Samples:
    """An array in a .npy file: read, as the kernel kills the process if a mapped file is shortened. A large one is mapped if its
    file system allows that."""
    if file.stat().st_size > _READ:
        with suppress(OSError):
            return np.lib.format.open_memmap(file, mode="r")
    with file.open("rb") as stream:
        samples: Samples = np.lib.format.read_array(stream, allow_pickle=False)
        return samples


def _open_file(path: str) -> FileIO:
    """Open one more file. The usual limit of a process, 1024, is less than ImageNet's 1282 shards, and is raised if need be."""
    try:
        return FileIO(path)
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return FileIO(path)


def _downloaded(url: str, start: int, count: int) -> npt.NDArray[np.uint8]:
    """A range of a file's bytes, without a copy in the cache: uint8 (count,)."""
    content = np.frombuffer(files.read(url, start, count), np.uint8)
    if len(content) < count:
        raise UserError(f"{url}: ends at {start + len(content)} bytes, before an image does", "make the shards again")
    return content


def _read_ready(stream: FileIO | None, size: int, start: int, count: int) -> npt.NDArray[np.uint8] | None:
    """`_read_from` if the page cache has all the bytes; else None, without waiting for storage that may not answer."""
    flags = getattr(os, "RWF_NOWAIT", None)
    if stream is None or flags is None:
        return None
    content = np.empty(count, np.uint8)
    try:
        got = os.preadv(stream.fileno(), [content.data], start, flags)
    except OSError:  # not there, or a file system that cannot tell, such as NFS
        return None
    if got < count or os.fstat(stream.fileno()).st_size != size:
        return None
    content.setflags(write=False)  # as in `_read_from`
    return content


def _read_from(stream: FileIO, path: str, size: int, start: int, count: int) -> npt.NDArray[np.uint8]:
    """Read `count` bytes of a local file from `start` on. size: the size that it must have. path: its name in messages."""
    content, done = np.empty(count, np.uint8), 0
    with files.explained(path):
        found = os.fstat(stream.fileno()).st_size
        while found == size and done < count:
            got = os.preadv(stream.fileno(), [content.data[done:]], start + done)
            done, found = done + got, found if got else start + done
    if found != size:
        raise UserError(f"{path}: has {found} bytes, manifest.json says {size}", "restore the file, or make the shards again")
    content.setflags(write=False)  # numba compiles code for read-only arrays anew: here it is always that code, as in `warm_up`
    return content
