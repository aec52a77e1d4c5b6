"""Shards: WebDataset tars with an index and a manifest, read through memory maps.

A data set is a folder:

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
import json
import mmap
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.augment import Floats, lighting_basis
from pipeline.errors import UserError

FORMAT = "cropfeed-shards"
VERSION = 2

# offset and bytes are of the encoded image inside its tar; height and width in pixels, as stored (orientation tags ignored).
# crc32 (zlib's) is of all that the sample takes in its tar: from the end of the sample before, tar headers and padding included.
SAMPLE = np.dtype(
    [("shard", "<u4"), ("offset", "<u8"), ("bytes", "<u4"), ("height", "<u4"), ("width", "<u4"), ("label", "<i4"), ("crc32", "<u4")]
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
    from webdataset import TarWriter

    records = []
    with tar_path.open("wb") as stream, TarWriter(stream, encoder=False, mtime=0, format="GNU_FORMAT") as tar:
        for sample in samples:
            tar.write({"__key__": sample.key, "jpg": sample.jpeg, "cls": f"{sample.label:0{digits}d}".encode()})
            records.append((shard, 0, len(sample.jpeg), sample.height, sample.width, sample.label, 0))
    written = np.array(records, SAMPLE)
    members = _tar_members(tar_path)
    written["offset"] = [offset for name, offset, _ in members if name.endswith(".jpg")]
    written["crc32"] = extent_checksums(np.memmap(tar_path, np.uint8, "r"), written)
    _write_index(idx_path, members)
    return written


def extent_checksums(tar: npt.NDArray[np.uint8], samples: Samples) -> npt.NDArray[np.uint32]:
    """The CRC-32 of what each sample of one shard takes in its tar: uint32 (N,). A tar cut short gives other numbers."""
    ends = (samples["offset"].astype(np.int64) + samples["bytes"] + _BLOCK - 1) // _BLOCK * _BLOCK
    starts = np.concatenate([[0], ends])[:-1]
    return np.array([zlib.crc32(tar[start:end]) for start, end in zip(starts, ends, strict=True)], np.uint32)


def _tar_members(path: Path) -> list[tuple[str, int, int]]:
    """Name, data offset and bytes of each file in a tar."""
    with tarfile.open(path) as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


def _write_index(path: Path, members: Sequence[tuple[str, int, int]]) -> None:
    """DALI's index (wds2idx, v1.2) of a tar whose samples are two consecutive members each, .cls and .jpg."""
    parts = [f"{name.rsplit('.', 1)[1]} {offset} {size} {name}" for name, offset, size in members]
    lines = [f"v1.2 {len(parts) // 2}", *(f"{cls} {jpg}" for cls, jpg in zip(parts[::2], parts[1::2], strict=True))]
    path.write_text("\n".join(lines) + "\n")


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Manifest:
    """manifest.json, read and checked.

    format, version: "cropfeed-shards", 1. profile: how images are stored ("original": the source's bytes).
    classes: class folder names (wnids) in label order. label_digits: the width of .cls texts.
    splits: name -> {images, samples: file, samples_sha256, shards: [{file, images, bytes, sha256}]}.
    statistics: of the training images' centre crops: channel_mean (3,) in 0..255, rgb_covariance (3, 3) in 0..1 squared,
    eigenvalues (3,) and eigenvectors (columns) of it, mean_image: file, mean_image_sha256.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        path = root / "manifest.json"
        if not path.is_file():
            hint = f"make shards first: python tools/make_shards.py SRC --out {root}"
            raise UserError(f"{path}: not found; {hint}" if root.is_dir() else f"{root}: no such folder; {hint}")
        try:
            content: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}); make the shards again") from error
        if content.get("format") != FORMAT or content.get("version") != VERSION:
            raise UserError(f"{path}: not {FORMAT} version {VERSION}; make the shards again with this version of Cropfeed")
        self.classes: list[str] = content["classes"]
        self.splits: dict[str, dict[str, Any]] = content["splits"]
        self.statistics: dict[str, Any] = content["statistics"]
        self.fingerprint = hashlib.sha256(json.dumps(self.splits, sort_keys=True).encode()).hexdigest()[:16]

    def channel_mean(self) -> Floats:
        """float32 (3,), 0..255."""
        return np.array(self.statistics["channel_mean"], np.float32)

    def mean_image(self) -> Floats:
        """float32 (224, 224, 3), 0..255."""
        image: Floats = np.load(self.root / self.statistics["mean_image"])
        return image

    def lighting_basis(self) -> Floats:
        """float32 (3, 3), as `pipeline.augment.lighting_basis` defines it."""
        return lighting_basis(self.statistics["rgb_covariance"])


class ShardSet:
    """One split of a data set: random access to encoded images through memory maps, opened when first touched.

    Start-up and memory do not grow with the number of samples. `samples` holds one `SAMPLE` record each.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        self.manifest = Manifest(Path(root))
        if split not in self.manifest.splits:
            raise UserError(f"{root}: has no split {split!r}, only {', '.join(self.manifest.splits)}")
        entry = self.manifest.splits[split]
        self.shards = [self.manifest.root / shard["file"] for shard in entry["shards"]]
        self._sizes = [shard["bytes"] for shard in entry["shards"]]
        self._maps: dict[int, npt.NDArray[np.uint8]] = {}
        path = self.manifest.root / entry["samples"]
        try:
            self.samples: Samples = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); make the shards again") from error
        if self.samples.dtype != SAMPLE or len(self.samples) != entry["images"]:
            raise UserError(f"{path}: does not match manifest.json; make the shards again")

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """The encoded image of one sample: uint8 (bytes,), a view of the mapped shard."""
        record = self.samples[index]
        offset = int(record["offset"])
        return self._map(int(record["shard"]))[offset : offset + int(record["bytes"])]

    def key(self, index: int) -> str:
        """The sample's name in its tar, read from the index file: for messages, not for speed."""
        record = self.samples[index]
        offset = str(record["offset"])
        with self.shards[int(record["shard"])].with_suffix(".idx").open() as lines:
            for line in lines:
                fields = line.split()
                if offset in fields[1::4]:
                    return fields[3].rsplit(".", 1)[0]
        return f"sample {index}"

    def where(self, index: int) -> str:
        """Shard file and key of a sample, for messages."""
        return f"{self.shards[int(self.samples[index]['shard'])]}: {self.key(index)}"

    def _map(self, shard: int) -> npt.NDArray[np.uint8]:
        mapped = self._maps.get(shard)
        if mapped is None:
            path = self.shards[shard]
            try:
                with path.open("rb") as stream:
                    mapped = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: cannot be read ({error}); make the shards again") from error
            if len(mapped) != self._sizes[shard]:
                raise UserError(
                    f"{path}: has {len(mapped)} bytes, manifest.json says {self._sizes[shard]}; make the shards again"
                )
            self._maps[shard] = mapped
        return mapped
