"""Shards: WebDataset tars with an index and a manifest. Local shards are memory-mapped, remote ones are read through a cache.

A data set is a folder, local or at an fsspec URL (s3://bucket/shards):

    manifest.json        classes, splits, shards with SHA-256, statistics (see `Manifest` below)
    mean_image.npy       float32 (224, 224, 3), 0..255: the mean of the training images' centre crops (short side 256)
    train/000000.tar     WebDataset: KEY.cls (the label, ASCII digits of fixed width) and KEY.jpg (the encoded image) per sample
    train/000000.idx     DALI's index of that tar, format v1.2: one line per sample, "EXT OFFSET BYTES NAME" per component
    train/samples.npy    one `SAMPLE` record per sample of the split, in the split's order; memory-mapped

Labels are zero-padded to the same width throughout a data set ("0007"). Stock webdataset reads them with int(). DALI cannot parse
text, but can compute them from the digits: sum((cls - 48) * [1000, 100, 10, 1]).

Formats: WebDataset (https://github.com/webdataset/webdataset), POSIX tar with GNU long names, DALI's wds2idx.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import mmap
import os
import sys
import tarfile
import threading
import weakref
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..pixels.normalize import Floats, lighting_basis
from ..progress import BYTES, SharedBar, progress_bar
from . import files
from .cache import ShardCache, choose_cache
from .prefetch import Fetch, Prefetcher

FORMAT = "cropfeed-shards"
VERSION = 2

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
_CHECKED_AT_ONCE = 256 << 20  # bytes of samples.npy that are checked before the first batch, in less than a second
Samples = npt.NDArray[Any]
log = logging.getLogger("cropfeed")


class EncodedSample(NamedTuple):
    """One sample to write into a shard. key: unique in the shard, without a dot after its last slash."""

    key: str
    jpeg: bytes
    label: int
    height: int
    width: int


def label_digits(classes: int) -> int:
    """The number of digits to which all labels of a data set are padded; at least four."""
    return max(4, len(str(classes - 1)))


def write_shard(tar_path: Path, idx_path: Path, shard: int, samples: Iterable[EncodedSample], digits: int) -> Samples:
    """Write a tar and its index; return the shard's `SAMPLE` records. The same samples give the same bytes."""
    records, lines = [], []
    with tar_path.open("wb") as tar:
        for sample in samples:
            label = f"{sample.label:0{digits}d}".encode()
            cls, jpg = f"{sample.key}.cls", f"{sample.key}.jpg"
            cls_offset, jpg_offset = _add_file(tar, cls, label), _add_file(tar, jpg, sample.jpeg)
            lines.append(f"cls {cls_offset} {len(label)} {cls} jpg {jpg_offset} {len(sample.jpeg)} {jpg}")
            records.append((shard, jpg_offset, len(sample.jpeg), sample.height, sample.width, sample.label, 0))
        tar.write(bytes(2 * _BLOCK))  # the end of a tar; its size is a multiple of RECORDSIZE
        tar.write(bytes(-tar.tell() % tarfile.RECORDSIZE))
    idx_path.write_text("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n", "utf-8")  # as DALI's wds2idx writes it
    written = np.array(records, SAMPLE)
    written["crc32"] = sample_checksums(np.memmap(tar_path, np.uint8, "r"), written)
    return written


def _add_file(tar: BinaryIO, name: str, content: bytes) -> int:
    """Append a file and return the offset of its content. It has no owner and no time, so that equal shards have equal bytes.

    TarFile.addfile does the same in chunks of 16 KiB, which takes three times as long.
    """
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o444
    tar.write(member.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict"))
    start = tar.tell()
    tar.write(content)
    tar.write(bytes(-len(content) % _BLOCK))
    return start


def sample_checksums(tar: npt.NDArray[np.uint8], samples: Samples) -> npt.NDArray[np.uint32]:
    """The CRC-32 of each sample's range in the tar of one shard: uint32 (N,). In a truncated tar, the values differ."""
    ends = (samples["offset"].astype(np.int64) + samples["bytes"] + _BLOCK - 1) // _BLOCK * _BLOCK
    starts = np.concatenate([[0], ends])[:-1]
    return np.array([zlib.crc32(tar[start:end].data) for start, end in zip(starts, ends, strict=True)], np.uint32)


class Manifest:
    """manifest.json, read and validated.

    format, version: "cropfeed-shards", 2. profile: how images are stored, see `convert.images`. conversion: the settings.
    classes: class folder names (wnids) in label order. class_names: class -> its name for people, only if the source has names
    (see `convert.names`). label_digits: number of digits in .cls files.
    splits: name -> {images, samples: file, samples_sha256, shards: [{file, images, bytes, sha256, idx_sha256}]}, and beton:
    {file, sha256, settings} if there is an FFCV file.
    statistics: of centre crops of training images: images (their number), channel_mean (3,) in 0..255, rgb_covariance (3, 3) for
    RGB in 0..1, its eigenvalues (3,) and eigenvectors (columns), mean_image: file, mean_image_sha256.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = files.absolute(str(root))
        path = files.join(self.root, "manifest.json")
        try:
            content: dict[str, Any] = json.loads(files.read(path))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})", "make the shards again") from error
        except UserError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            has_folder = files.is_remote(path) or files.is_folder(self.root)
            problem = f"{path}: not found" if has_folder else f"{self.root}: no such folder"
            raise UserError(problem, f"make shards first: cropfeed shards SRC --out {self.root}") from error
        if content.get("format") != FORMAT or content.get("version") != VERSION:
            raise UserError(f"{path}: not {FORMAT} version {VERSION}", "make the shards again with this version of Cropfeed")
        self.profile: str = content["profile"]
        self.classes: list[str] = content["classes"]
        self.class_names: dict[str, str] = content.get("class_names", {})
        self.splits: dict[str, dict[str, Any]] = content["splits"]
        self.statistics: dict[str, Any] = content["statistics"]
        hashes = {
            name: split["samples_sha256"] for name, split in self.splits.items()
        }  # samples.npy has checksums of all samples
        self.fingerprint = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]

    def channel_mean(self) -> Floats:
        """float32 (3,), 0..255."""
        return np.array(self.statistics["channel_mean"], np.float32)

    def mean_image(self) -> Floats:
        """float32 (224, 224, 3), 0..255."""
        path = files.join(self.root, self.statistics["mean_image"])
        content = files.read(path)
        if hashlib.sha256(content).hexdigest() != self.statistics["mean_image_sha256"]:
            raise UserError(f"{path}: its SHA-256 is not the one in manifest.json", "make the shards again")
        image: Floats = np.load(io.BytesIO(content))
        return image

    def lighting_basis(self) -> Floats:
        """float32 (3, 3), see `pixels.normalize.lighting_basis`."""
        return lighting_basis(self.statistics["rgb_covariance"])


class BackgroundCheck:
    """Compares a file's SHA-256 with the expected one, in a thread. problem: what is wrong with it, if anything was found.

    samples.npy has the labels and the places of the images: with one flipped bit, a training would learn something else.
    """

    def __init__(self, path: Path, sha256: str) -> None:
        self.problem = ""
        self._thread = threading.Thread(target=self._run, args=(path, sha256), name="cropfeed-check", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Raise UserError if the file is damaged."""
        self._thread.join()
        if self.problem:
            raise UserError(self.problem, "make the shards again")

    def _run(self, path: Path, sha256: str) -> None:
        try:
            if files.sha256(str(path)) != sha256:
                self.problem = f"{path}: its SHA-256 is not the one in manifest.json"
        except UserError as error:
            self.problem = str(error)


class ShardSet:
    """One split of a data set: random access to encoded images. Start-up and memory do not grow with the number of samples.

    root: folder or URL. A local shard is memory-mapped when it is first read. A remote shard is downloaded into a cache when it
    is first read, see `choose_cache` for cache and cache_gb. With either option, local shards use the cache, too, for slow disks.
    samples: one `SAMPLE` record per sample, memory-mapped, shard after shard. sizes: number of images in each shard.
    shards: path of each shard's local file. With a cache, the file exists once the shard was read.
    """

    def __init__(
        self, root: str | Path, split: str, cache: str | Path | None = None, cache_gb: float | None = None, tars: bool = True
    ) -> None:
        """tars: whether images will be read; False also opens a data set that has only FFCV files."""
        self.manifest = Manifest(root)
        root = self.manifest.root
        if split not in self.manifest.splits:
            raise UserError(f"{root}: has no split {split!r}, only {', '.join(self.manifest.splits)}")
        self.split = split
        if tars and not self.manifest.splits[split]["shards"]:
            raise UserError(f"{root}: holds only FFCV files", "make the shards again with `format` both")
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
        self._downloads = _download_bar(split, self.shards, self._entry["shards"])
        self._prefetcher = Prefetcher(_fetcher(self.cache, self._urls, self._entry["shards"], self._downloads))
        weakref.finalize(self, self._prefetcher.close)
        self._check: BackgroundCheck | None = None
        self.samples = self._open_samples(files.join(root, self._entry["samples"]))

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """The encoded image of one sample: uint8 (bytes,), a view of the mapped shard, or a copy from the cache.

        Raises UserError for damaged shards, or once samples.npy was found to be damaged, see `BackgroundCheck`.
        """
        if self._check and self._check.problem:
            self._check.wait()
        record = self.samples[index]
        shard, offset, count = int(record["shard"]), int(record["offset"]), int(record["bytes"])
        if self.cache:
            return self._read_cached(self.cache, shard, offset, count)
        return self._map(shard)[offset : offset + count]

    def prefetch(self, shards: Iterable[int]) -> None:
        """Download shards in background threads, in this order. Without a cache, read them ahead into the page cache.

        No more shards are prefetched than fit into the cache together. Errors are ignored here; `read` raises them.
        """
        free = self.cache.limit - self.samples.nbytes if self.cache else sys.maxsize
        fitting = []
        for shard in shards:
            free -= self._entry["shards"][shard]["bytes"]
            if free < 0:
                break
            fitting.append(shard)
        self._prefetcher.request(fitting)

    def close(self) -> None:
        """End the background threads. Images that were read stay valid, and `read` still works."""
        self._prefetcher.close()
        self._downloads.close()

    def key(self, index: int) -> str:
        """The sample's name in its tar, read from the index file. Slow; use it only for messages."""
        record = self.samples[index]
        offset = str(record["offset"])
        for line in files.read(self._urls[int(record["shard"])].removesuffix(".tar") + ".idx").decode().splitlines():
            fields = line.split()
            if offset in fields[1::4]:
                return fields[3].rsplit(".", 1)[0]
        return f"sample {index}"

    def locate(self, index: int) -> str:
        """Shard (path or URL) and key of a sample, for messages."""
        return f"{self._urls[int(self.samples[index]['shard'])]}: {self.key(index)}"

    def check_cache(self) -> None:
        """Warn if the cache cannot hold the split: a random order then downloads shards again and again."""
        total = sum(shard["bytes"] for shard in self._entry["shards"]) + self.samples.nbytes
        if self.cache and total > self.cache.limit:
            log.warning(
                "%s: the split's %.3g GB exceed the cache %s of %.3g GB, so a random order downloads its shards again and again; "
                "raise `cache_gb` (CROPFEED_CACHE_GB)",
                self.manifest.root, total / 1e9, self.cache.folder, self.cache.limit / 1e9,
            )  # fmt: skip

    def _open_samples(self, path: str) -> Samples:
        local, sha256 = Path(path), self._entry["samples_sha256"]
        if self.cache:
            size = files.size(path)
            with progress_bar(total=size, desc=f"downloading {self._entry['samples']}", **BYTES) as bar:
                pin = self.cache.open_pinned(path, size, sha256, bar.update)  # it stays mapped: evicting it would free no space
            weakref.finalize(self, pin.close)
            local = self.cache.path(sha256)
        try:
            samples: Samples = np.load(local, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error})", "make the shards again") from error
        if samples.dtype != SAMPLE or len(samples) != self._entry["images"]:
            raise UserError(f"{path}: does not match manifest.json", "make the shards again")
        if not self.cache:  # the cache checks what it downloads
            self._check = BackgroundCheck(local, sha256)
            if samples.nbytes <= _CHECKED_AT_ONCE:
                self._check.wait()
        return samples

    def _read_cached(self, cache: ShardCache, shard: int, offset: int, count: int) -> npt.NDArray[np.uint8]:
        """Read from the cache. Returns a copy, as a memory map would keep the disk space of an evicted file in use."""
        entry = self._entry["shards"][shard]
        image = np.empty(count, np.uint8)
        report = self._downloads.update
        with cache.open(self._urls[shard], entry["bytes"], entry["sha256"], report=report) as stream:
            stream.seek(offset)
            if stream.readinto(image.data) != count:
                raise UserError(f"{self._urls[shard]}: ends before its last sample", "make the shards again")
        return image

    def _map(self, shard: int) -> npt.NDArray[np.uint8]:
        mapped = self._maps.get(shard)
        if mapped is None:
            path, size = self.shards[shard], self._entry["shards"][shard]["bytes"]
            try:
                with path.open("rb") as stream:
                    mapped = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: cannot be read ({error})", "make the shards again") from error
            if len(mapped) != size:
                raise UserError(f"{path}: has {len(mapped)} bytes, manifest.json says {size}", "make the shards again")
            self._maps[shard] = mapped
        return mapped


def _download_bar(split: str, shards: list[Path], entries: list[dict[str, Any]]) -> SharedBar:
    """The bar of the shards that the cache lacks. Each process of the machine downloads about an equal share of them."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    found = list(zip(shards, entries, strict=True))
    return SharedBar(
        f"downloading {split}", lambda: sum(entry["bytes"] for path, entry in found if not path.exists()) // processes
    )


def _fetcher(cache: ShardCache | None, urls: list[str], entries: list[dict[str, Any]], bar: SharedBar) -> Fetch:
    """A function that downloads a shard into the cache or, without one, reads it into the page cache."""

    def download(shard: int, stop: threading.Event) -> None:
        assert cache is not None
        cache.open(urls[shard], entries[shard]["bytes"], entries[shard]["sha256"], stop, bar.update).close()

    def read_ahead(shard: int, stop: threading.Event) -> None:
        with open(urls[shard], "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    return download if cache else read_ahead
