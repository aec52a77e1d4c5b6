"""Shards: WebDataset tars with an index and a manifest, read in place through memory maps, or through a cache of remote ones.

A data set is a folder, local or at an fsspec URL (s3://bucket/shards):

    manifest.json        classes, splits, shards with SHA-256, statistics (see `Manifest` below)
    mean_image.npy       float32 (224, 224, 3), 0..255: the mean of the training images' centre crops (short side 256)
    train/000000.tar     WebDataset: KEY.cls (the label, ASCII digits of fixed width) and KEY.jpg (the encoded image) per sample
    train/000000.idx     DALI's index of that tar, format v1.2: a line a sample, "EXT OFFSET BYTES NAME" per component
    train/samples.npy    one `SAMPLE` record per sample of the split, in the split's order; memory-mapped, never read whole

Labels are zero-padded to one width throughout a data set ("0007"), so that int() reads them (stock webdataset does) and DALI,
which has no operator to parse text, gets them from digits by arithmetic: sum((cls - 48) * [1000, 100, 10, 1]).

Formats: WebDataset (https://github.com/webdataset/webdataset), POSIX tar with GNU long names, DALI's wds2idx.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import sys
import tarfile
import threading
import warnings
import weakref
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..pixels.normalize import Floats, lighting_basis
from . import files
from .cache import ShardCache, choose_cache
from .prefetch import Fetch, Prefetcher

FORMAT = "cropfeed-shards"
VERSION = 2

# offset and bytes are of the encoded image inside its tar; height and width in pixels, as stored (orientation tags ignored).
# crc32 (zlib's) is of all that the sample takes in its tar: from the end of the sample before, tar headers and padding included.
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
Samples = npt.NDArray[Any]


class Encoded(NamedTuple):
    """One sample on its way into a shard. key: unique in the shard, without a dot after its last slash."""

    key: str
    jpeg: bytes
    label: int
    height: int
    width: int


def label_digits(classes: int) -> int:
    """The width that every label of a data set is padded to: at least four digits."""
    return max(4, len(str(classes - 1)))


def write_shard(tar_path: Path, idx_path: Path, shard: int, samples: Iterable[Encoded], digits: int) -> Samples:
    """Write a tar and its index; return the shard's `SAMPLE` records. Same samples, same bytes."""
    records, lines = [], []
    with tar_path.open("wb") as tar:
        for sample in samples:
            label = f"{sample.label:0{digits}d}".encode()
            cls, jpg = f"{sample.key}.cls", f"{sample.key}.jpg"
            cls_offset, jpg_offset = _add_file(tar, cls, label), _add_file(tar, jpg, sample.jpeg)
            lines.append(f"cls {cls_offset} {len(label)} {cls} jpg {jpg_offset} {len(sample.jpeg)} {jpg}")
            records.append((shard, jpg_offset, len(sample.jpeg), sample.height, sample.width, sample.label, 0))
        tar.write(bytes(2 * _BLOCK))  # ends a tar, whose size is a multiple of a record's
        tar.write(bytes(-tar.tell() % tarfile.RECORDSIZE))
    idx_path.write_text("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n")  # as DALI's wds2idx writes it
    written = np.array(records, SAMPLE)
    written["crc32"] = extent_checksums(np.memmap(tar_path, np.uint8, "r"), written)
    return written


def _add_file(tar: BinaryIO, name: str, content: bytes) -> int:
    """Append a file, without owner or time, which would make equal shards differ; return where its content begins.

    TarFile.addfile does the same in pieces of 16 KiB, which takes three times as long.
    """
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o444
    tar.write(member.tobuf(tarfile.GNU_FORMAT))
    start = tar.tell()
    tar.write(content)
    tar.write(bytes(-len(content) % _BLOCK))
    return start


def extent_checksums(tar: npt.NDArray[np.uint8], samples: Samples) -> npt.NDArray[np.uint32]:
    """The CRC-32 of what each sample of one shard takes in its tar: uint32 (N,). A tar cut short gives other numbers."""
    ends = (samples["offset"].astype(np.int64) + samples["bytes"] + _BLOCK - 1) // _BLOCK * _BLOCK
    starts = np.concatenate([[0], ends])[:-1]
    return np.array([zlib.crc32(tar[start:end].data) for start, end in zip(starts, ends, strict=True)], np.uint32)


class Manifest:
    """manifest.json, read and checked.

    format, version: "cropfeed-shards", 2. profile: how images are stored, see `convert.images`. conversion: its settings.
    classes: class folder names (wnids) in label order. label_digits: the width of .cls texts.
    splits: name -> {images, samples: file, samples_sha256, shards: [{file, images, bytes, sha256, idx_sha256}]}, and where there
    is an FFCV file, beton: {file, sha256, settings}.
    statistics: of the centre crops of training images, how many of them (images): channel_mean (3,) in 0..255, rgb_covariance
    (3, 3) in 0..1 squared, eigenvalues (3,) and eigenvectors (columns) of it, mean_image: file, mean_image_sha256.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = files.absolute(str(root))
        path = files.join(self.root, "manifest.json")
        try:
            content: dict[str, Any] = json.loads(files.read(path))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}); make the shards again") from error
        except UserError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            here = files.is_remote(path) or files.is_folder(self.root)
            missing = f"{path}: not found" if here else f"{self.root}: no such folder"
            raise UserError(f"{missing}; make shards first: python tools/make_shards.py SRC --out {self.root}") from error
        if content.get("format") != FORMAT or content.get("version") != VERSION:
            raise UserError(f"{path}: not {FORMAT} version {VERSION}; make the shards again with this version of Cropfeed")
        self.profile: str = content["profile"]
        self.classes: list[str] = content["classes"]
        self.splits: dict[str, dict[str, Any]] = content["splits"]
        self.statistics: dict[str, Any] = content["statistics"]
        samples = {name: split["samples_sha256"] for name, split in self.splits.items()}  # which holds a checksum of every sample
        self.fingerprint = hashlib.sha256(json.dumps(samples, sort_keys=True).encode()).hexdigest()[:16]

    def channel_mean(self) -> Floats:
        """float32 (3,), 0..255."""
        return np.array(self.statistics["channel_mean"], np.float32)

    def mean_image(self) -> Floats:
        """float32 (224, 224, 3), 0..255."""
        path = files.join(self.root, self.statistics["mean_image"])
        content = files.read(path)
        if hashlib.sha256(content).hexdigest() != self.statistics["mean_image_sha256"]:
            raise UserError(f"{path}: its SHA-256 is not the one in manifest.json; make the shards again")
        image: Floats = np.load(io.BytesIO(content))
        return image

    def lighting_basis(self) -> Floats:
        """float32 (3, 3), as `pipeline.pixels.reference.lighting_basis` defines it."""
        return lighting_basis(self.statistics["rgb_covariance"])


class ShardSet:
    """One split of a data set: random access to encoded images. Start-up and memory do not grow with the number of samples.

    root: folder or URL. Local shards are mapped in place when first touched. Remote ones are downloaded then into a cache (see
    `choose_cache` for cache and cache_gb) and read from there; local ones too, from slow disks, if either option is given.
    samples: one `SAMPLE` record each, mapped; a shard's are together, shard after shard. sizes: images in each shard.
    shards: the local file of each shard, there once it is touched.
    """

    def __init__(
        self, root: str | Path, split: str, cache: str | Path | None = None, cache_gb: float | None = None, tars: bool = True
    ) -> None:
        """tars: whether images are to be read; False also opens a data set that holds FFCV files only."""
        self.manifest = Manifest(root)
        root = self.manifest.root
        if split not in self.manifest.splits:
            raise UserError(f"{root}: has no split {split!r}, only {', '.join(self.manifest.splits)}")
        self.split = split
        if tars and not self.manifest.splits[split]["shards"]:
            raise UserError(f"{root}: holds FFCV files only; make the shards again with --format both")
        cached = files.is_remote(root) or cache is not None or cache_gb is not None
        self.cache = choose_cache(cache, cache_gb) if cached else None
        self._entry = self.manifest.splits[split]
        self._urls = [files.join(root, shard["file"]) for shard in self._entry["shards"]]
        if self.cache:
            for url, shard in zip(self._urls, self._entry["shards"], strict=True):
                self.cache.check(url, shard["bytes"])
            self.shards = [self.cache.path(shard["sha256"]) for shard in self._entry["shards"]]
        else:
            self.shards = [Path(url) for url in self._urls]
        self.sizes = [int(shard["images"]) for shard in self._entry["shards"]]
        self._maps: dict[int, npt.NDArray[np.uint8]] = {}
        self._prefetcher = Prefetcher(_fetcher(self.cache, self._urls, self._entry["shards"]))
        weakref.finalize(self, self._prefetcher.close)
        self.samples = self._open_samples(files.join(root, self._entry["samples"]))

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """The encoded image of one sample: uint8 (bytes,), a view of the mapped shard, or read from the cached one."""
        record = self.samples[index]
        shard, offset, count = int(record["shard"]), int(record["offset"]), int(record["bytes"])
        if self.cache:
            return self._read_cached(self.cache, shard, offset, count)
        return self._map(shard)[offset : offset + count]

    def prefetch(self, shards: Iterable[int]) -> None:
        """A hint that shards are wanted soon, in this order: they are downloaded, or read ahead from a local disk, in background
        threads; no more of them than the cache holds together. What goes wrong is left for `read` to meet.
        """
        room = self.cache.limit - self.samples.nbytes if self.cache else sys.maxsize
        wanted = []
        for shard in shards:
            room -= self._entry["shards"][shard]["bytes"]
            if room < 0:
                break
            wanted.append(shard)
        self._prefetcher.hint(wanted)

    def close(self) -> None:
        """End the background threads. What was read stays valid, and more can be read."""
        self._prefetcher.close()

    def key(self, index: int) -> str:
        """The sample's name in its tar, read from the index file: for messages, not for speed."""
        record = self.samples[index]
        offset = str(record["offset"])
        for line in files.read(self._urls[int(record["shard"])].removesuffix(".tar") + ".idx").decode().splitlines():
            fields = line.split()
            if offset in fields[1::4]:
                return fields[3].rsplit(".", 1)[0]
        return f"sample {index}"

    def where(self, index: int) -> str:
        """Shard file or URL and key of a sample, for messages."""
        return f"{self._urls[int(self.samples[index]['shard'])]}: {self.key(index)}"

    def check_cache(self) -> None:
        """Warn if the cache cannot hold the split: then random order downloads shards over and over."""
        total = sum(shard["bytes"] for shard in self._entry["shards"]) + self.samples.nbytes
        if self.cache and total > self.cache.limit:
            warnings.warn(
                f"{self.manifest.root}: the split's {total / 1e9:.3g} GB exceed the cache {self.cache.folder} of "
                f"{self.cache.limit / 1e9:.3g} GB; in random order its shards will be downloaded over and over: "
                "raise --cache-gb (CROPFEED_CACHE_GB)",
                stacklevel=2,
            )

    def _open_samples(self, path: str) -> Samples:
        local, sha256 = Path(path), self._entry["samples_sha256"]
        if self.cache:
            pin = self.cache.pinned(path, files.size(path), sha256)  # it stays mapped: evicting it would free nothing
            weakref.finalize(self, pin.close)
            local = self.cache.path(sha256)
        try:
            samples: Samples = np.load(local, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); make the shards again") from error
        if samples.dtype != SAMPLE or len(samples) != self._entry["images"]:
            raise UserError(f"{path}: does not match manifest.json; make the shards again")
        return samples

    def _read_cached(self, cache: ShardCache, shard: int, offset: int, count: int) -> npt.NDArray[np.uint8]:
        """A copy, not a map: maps would keep the disk space of evicted files from being freed."""
        entry = self._entry["shards"][shard]
        image = np.empty(count, np.uint8)
        with cache.open(self._urls[shard], entry["bytes"], entry["sha256"]) as stream:
            stream.seek(offset)
            if stream.readinto(image.data) != count:
                raise UserError(f"{self._urls[shard]}: ends before its last sample; make the shards again")
        return image

    def _map(self, shard: int) -> npt.NDArray[np.uint8]:
        mapped = self._maps.get(shard)
        if mapped is None:
            path, size = self.shards[shard], self._entry["shards"][shard]["bytes"]
            try:
                with path.open("rb") as stream:
                    mapped = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: cannot be read ({error}); make the shards again") from error
            if len(mapped) != size:
                raise UserError(f"{path}: has {len(mapped)} bytes, manifest.json says {size}; make the shards again")
            self._maps[shard] = mapped
        return mapped


def _fetcher(cache: ShardCache | None, urls: list[str], entries: list[dict[str, Any]]) -> Fetch:
    """What brings a shard near: into the cache or, where there is none, from the disk into the page cache."""

    def download(shard: int, stop: threading.Event) -> None:
        assert cache is not None
        cache.open(urls[shard], entries[shard]["bytes"], entries[shard]["sha256"], stop).close()

    def read_ahead(shard: int, stop: threading.Event) -> None:
        with open(urls[shard], "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    return download if cache else read_ahead
