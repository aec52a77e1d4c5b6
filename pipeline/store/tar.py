"""One shard: a WebDataset tar with its index, and the records of its samples."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import CorruptImageError

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
Samples = npt.NDArray[Any]


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


def read_fields(head: bytes) -> dict[str, bytes]:
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
            data, start = head[content : content + size], sample_end(content, size)
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
    ends = sample_end(samples["offset"].astype(np.int64), samples["bytes"])
    starts = np.concatenate([[0], ends])[:-1]
    return np.array([zlib.crc32(tar[start:end].data) for start, end in zip(starts, ends, strict=True)], np.uint32)


def sample_end(offset: Any, count: Any) -> Any:
    """Where the range of a sample with an image of `count` bytes at `offset` ends in its tar."""
    return (offset + count + _BLOCK - 1) // _BLOCK * _BLOCK
