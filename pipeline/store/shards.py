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

import logging
import sys
import weakref
import zlib
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..progress import BYTES, progress_bar
from . import files
from .cache import choose_cache
from .checks import BackgroundCheck, hash_problem, load_samples, samples_problem
from .entries import Lazy, column
from .local import Bytes, LocalFiles, Parts, read_part
from .manifest import Manifest as Manifest
from .prefetch import Prefetcher, Ranges, ReadAhead, download_bar, fetcher
from .tar import SAMPLE as SAMPLE
from .tar import ChecksumError, Samples, read_fields, sample_end

_CHECKED_AT_ONCE = 256 << 20  # bytes of samples.npy that are checked before the first batch, in less than a second
log = logging.getLogger("cropfeed")


class ShardSet:
    """One split of a data set: random access to encoded images. Start-up and memory do not grow with the number of samples beyond
    two million.

    root: folder or URL. A local shard is opened when it is first read. A remote shard is then downloaded into a cache,
    see `choose_cache` for cache and cache_gb. With either option, local shards use the cache, too, for slow disks.
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
        self._urls = urls = Lazy(len(entries), lambda shard: files.join(root, entries[shard]["file"]))
        if store:
            if len(entries):
                largest = int(self._bytes.argmax())
                store.check(urls[largest], int(self._bytes[largest]))
            self.shards = Lazy(len(entries), lambda shard: store.path(entries[shard]["sha256"]))
        else:
            self.shards = Lazy(len(entries), lambda shard: Path(urls[shard]))
        self._downloads = download_bar(split, self.shards, entries)
        self._prefetcher = Prefetcher(fetcher(store, urls, entries, self._downloads))
        weakref.finalize(self, self._prefetcher.close)
        self._local, paths = LocalFiles(urls), self.shards
        self._reader = ReadAhead((lambda shard: FileIO(paths[shard])) if store else self._local.open)
        self._samples_file = files.join(root, self._entry["samples"])
        self.samples: Samples = self._open_samples(self._samples_file)
        self._check = self._start_check()
        if self.samples.nbytes <= _CHECKED_AT_ONCE:
            self._check.wait()

    @property
    def fingerprint(self) -> str:
        """A hash of the stored bytes and image sizes."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> Bytes:
        """The encoded image of one sample: uint8 (bytes,).

        Raises UserError for damaged shards, for storage that does not answer (see `waiting`), or once samples.npy was found to be
        damaged; ChecksumError if `verify` is set.
        """
        return self._read(index, self._verify)[1]

    def read_cached(self, ids: npt.NDArray[np.int64]) -> Parts | None:
        """The encoded images that are in the page cache, in one call without the GIL. Raises as `read`. ids: (N,).

        None if each has to be read by itself: from a cache of shards, with checksums, or before samples.npy has been checked.
        """
        if self.cache or self._verify or self._check.is_running:
            return None
        self._check_record(0)
        records = self.samples[ids]
        shards, starts, counts = (records[name].astype(np.int64) for name in ("shard", "offset", "bytes"))
        return self._local.read_cached(shards, self._bytes[shards], starts, counts)

    def read_with_fields(self, index: int) -> tuple[Bytes, dict[str, bytes]]:
        """One sample's encoded image, as `read` returns it, and its fields by extension.

        It is one read of the shard, as they are adjacent. Raises as `read`, and ChecksumError for damaged fields.
        """
        head, image = self._read(index, whole=True)
        return image, read_fields(head.tobytes())

    def read_part(self, index: int, start: int, count: int) -> Bytes:
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

    def _read(self, index: int, whole: bool) -> tuple[Bytes, Bytes]:
        """A sample's range in its tar, divided at its image; the first part is empty unless `whole`."""
        self._check_record(index)
        record = self.samples[index]
        shard, offset, count = int(record["shard"]), int(record["offset"]), int(record["bytes"])
        if not whole:
            return np.empty(0, np.uint8), self._read_range(shard, offset, count)
        before = self.samples[index - 1]
        start = sample_end(int(before["offset"]), int(before["bytes"])) if index and before["shard"] == shard else 0
        if start > offset:
            raise UserError(f"{self._samples_file}: the offset of sample {index} is out of range", "make the shards again")
        content = self._read_range(shard, start, sample_end(offset, count) - start)
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

    def image_sizes(self, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Heights and widths of stored images, int64 (N,) each. ids: (N,)."""
        records = self.samples[ids]
        return records["height"].astype(np.int64), records["width"].astype(np.int64)

    def _ranges(self, ids: npt.NDArray[np.int64], whole: bool) -> Ranges:
        """The ranges of samples in their shards; with their fields if `whole`."""
        records, before = self.samples[ids], self.samples[ids - 1]
        starts = offsets = records["offset"].astype(np.int64)
        if whole:
            follows = (ids > 0) & (before["shard"] == records["shard"])
            starts = np.where(follows, sample_end(before["offset"].astype(np.int64), before["bytes"]), 0)
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

    def _read_range(self, shard: int, start: int, count: int) -> Bytes:
        """Bytes of a shard: uint8 (count,). With a cache, the file is closed again, to free the disk space of evicted files."""
        if not self.cache:
            return self._local.read(shard, int(self._bytes[shard]), start, count)
        url, entry = self._urls[shard], self._entry["shards"][shard]
        if self.by_ranges:
            content = np.frombuffer(files.read(url, start, count), np.uint8)
            if len(content) < count:
                raise UserError(f"{url}: ends at {start + len(content)} bytes, before an image does", "make the shards again")
            return content
        with self.cache.open(url, entry["bytes"], entry["sha256"], report=self._downloads.update) as stream:
            return read_part(stream, url, entry["bytes"], start, count)
