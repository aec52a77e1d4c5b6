"""The task of making one shard. It depends only on its sources, is idempotent, and can be killed at any time.

It writes SPLIT/NUMBER.idx, then SPLIT/NUMBER.tar, then its record, conversion/SPLIT-NUMBER.npz, each atomically. The record marks
the shard as finished, and contains its part of the manifest and the report. If a task is run again, it verifies the files against
the record, and keeps them if they match.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..store import files
from ..store.tar import SAMPLE, EncodedSample, Samples, write_shard
from . import parquet, webdataset
from .images import UnreadableError, convert_image
from .sources import Source
from .statistics import Statistics

RECORDS = "conversion"  # the folder below OUT with the records of an unfinished conversion


@dataclass(frozen=True)
class ShardTask:
    """One shard to write.

    digits: of the padded label. strict: an unreadable image stops the run. statistics: the first so many of its images are part
    of the data set's statistics. profile, reencode: see `convert_image`.
    """

    out: str
    split: str
    shard: int
    sources: list[Source]
    profile: str
    digits: int
    strict: bool
    statistics: int
    reencode: bool = False

    @property
    def file(self) -> str:
        """The name of the tar in the manifest."""
        return f"{self.split}/{self.shard:06d}.tar"

    @property
    def tar(self) -> str:
        return files.join(self.out, self.file)

    @property
    def idx(self) -> str:
        return files.join(self.out, self.split, f"{self.shard:06d}.idx")

    @property
    def record(self) -> str:
        return files.join(self.out, RECORDS, f"{self.split}-{self.shard:06d}.npz")


@dataclass
class Record:
    """A finished shard's part of the manifest and the report.

    samples: `SAMPLE` (N,). digests: uint8 (N, 32), SHA-256 of each source image. names: of the source images.
    entry: in the manifest: file, images, bytes, sha256, idx_sha256. read_bytes, stored_bytes: size of the encoded images before
    and after conversion. fields: names of its samples' fields. facts: fact -> names of the images that it applies to. left_out:
    name -> reason. statistics: sums over its images.
    """

    samples: Samples
    digests: npt.NDArray[np.uint8]
    names: list[str]
    entry: dict[str, Any]
    read_bytes: int = 0
    stored_bytes: int = 0
    fields: list[str] = field(default_factory=list)
    facts: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=Statistics.empty)

    def to_bytes(self) -> bytes:
        texts = {name: value for name, value in asdict(self).items() if name not in ("samples", "digests", "statistics")}
        stream = io.BytesIO()
        np.savez(
            stream,
            samples=self.samples,
            digests=self.digests,
            texts=np.frombuffer(json.dumps(texts).encode(), np.uint8),
            images=self.statistics.images,
            image=self.statistics.image if self.statistics.images else np.empty(0),
            products=self.statistics.products,
        )
        return stream.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> Record:
        """Raises an exception of any type for damaged content."""
        with np.load(io.BytesIO(content)) as stored:
            texts = json.loads(stored["texts"].tobytes())
            statistics = Statistics.empty()
            if stored["images"]:
                statistics = Statistics(int(stored["images"]), stored["image"], stored["products"])
            return Record(samples=stored["samples"], digests=stored["digests"], statistics=statistics, **texts)


def read_record(task: ShardTask) -> Record | None:
    """The record of a finished shard, or None if it is missing or damaged."""
    try:
        return Record.from_bytes(files.read(task.record))
    except Exception:  # missing, or truncated by a crash: the shard is made again
        return None


def is_intact(task: ShardTask, entry: dict[str, Any]) -> bool:
    """Whether the files of a finished shard match its entry in the manifest. Reads them completely."""
    try:
        tar, idx = files.sha256(task.tar), files.sha256(task.idx)
    except UserError:
        return False
    return bool(tar == entry["sha256"] and idx == entry["idx_sha256"])


def run(task: ShardTask, progress: Callable[[], object] = lambda: None) -> None:
    """Make the shard, unless it is finished already. `progress` is called after each image. Raises UserError with `strict`."""
    record = read_record(task)
    if record is not None and is_intact(task, record.entry):
        for _ in task.sources:
            progress()
        return
    record = Record(np.empty(0, SAMPLE), np.empty((0, 32), np.uint8), [], {})
    digests: list[bytes] = []
    with files.atomic_write(task.tar) as tar, files.atomic_write(task.idx) as idx:
        record.samples = write_shard(tar, idx, task.shard, _encoded(task, record, digests, progress), task.digits)
        record.entry = {
            "file": task.file,
            "images": len(record.samples),
            "bytes": tar.stat().st_size,
            "sha256": files.sha256(str(tar)),
            "idx_sha256": files.sha256(str(idx)),
        }
    record.digests = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    files.write(task.record, record.to_bytes())


def _encoded(task: ShardTask, record: Record, digests: list[bytes], progress: Callable[[], object]) -> Iterator[EncodedSample]:
    """The shard's samples in order. Also fills `record` and `digests`."""
    for number, source in enumerate(task.sources):
        try:
            data, fields = _read(task, source)
            stored = convert_image(data, task.profile, task.reencode)
        except UnreadableError as error:
            if task.strict:
                location = source.path if source.bytes is None else f"{source.path}: {source.name}"
                raise UserError(f"{location}: no usable image ({error})", "repair it, or convert without `strict`") from error
            record.left_out[source.name] = str(error)
            progress()
            continue
        if number < task.statistics:
            record.statistics.add_image(stored.image())
        for fact in stored.facts:
            record.facts.setdefault(fact, []).append(source.name)
        record.names.append(source.name)
        record.read_bytes += len(data)
        record.stored_bytes += len(stored.data)
        digests.append(hashlib.sha256(data).digest())
        progress()
        record.fields = sorted({*record.fields, *fields})
        yield EncodedSample(source.key, stored.data, source.label, stored.height, stored.width, fields)


def _read(task: ShardTask, source: Source) -> tuple[bytes, dict[str, bytes]]:
    """A source's encoded image, and the fields of its sample. Raises UnreadableError for a URL without a file."""
    if source.rows:
        data = parquet.read_row(files.join(task.out, RECORDS), source.rows, source.start)
    else:
        try:
            data = files.read(source.path, source.start, source.bytes)
        except UserError as error:
            if source.bytes is None and files.is_remote(source.path) and isinstance(error.__cause__, FileNotFoundError):
                raise UnreadableError("not found") from error  # lists of URLs outlive some of their images
            raise
    if source.image:
        return webdataset.divide(source.path, data, source.image)
    return data, {"json": source.json.encode()} if source.json else {}
