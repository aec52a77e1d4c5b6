"""Listing of parquet files as Hugging Face has them, and unpacking of their row groups.

data/train-*.parquet and data/validation-*.parquet have a column `image` of structs {bytes, path}, and a column `label` of
numbers, whose names are in the schema's metadata. The listing reads the labels, and further columns that are asked for.

The training images of a shard come from all row groups, and a row group can only be read as a whole. So `unpack` first writes the
images of each row group to a file in OUT, from which single images can be read. These files are removed with the records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import UserError, install_command
from ..progress import progress_bar
from ..store import files
from ..store.waiting import DaemonPool
from .folders import class_folders
from .sources import (
    Keys,
    Listing,
    RowGroup,
    Source,
    SourceOptions,
    files_by_split,
    number_labels,
    renamed,
    row_json,
    split_folders,
)

_FOLDERS = ("data", "default", "")  # below SRC; the second is that of Hugging Face's own conversion
LABELS = ("label", "labels", "cls", "class", "class_name", "category", "target")
_BATCH, _BUFFER = 64, 1 << 20  # rows and bytes that are read at a time
_THREADS = 4  # each holds a page, which may be as large as a row group


def parquet_files(src: str) -> dict[str, list[str]]:
    """The parquet files of SRC/data or SRC by split. A table beside a tar of the same name is img2dataset's, without images."""
    for folder in _FOLDERS:
        base = files.join(src, folder) if folder else src
        tars = {path for paths in files_by_split(base, ".tar").values() for path in paths}
        found = {
            split: [path for path in paths if path.removesuffix(".parquet") + ".tar" not in tars]
            for split, paths in files_by_split(base, ".parquet").items()
        }
        if any(found.values()):
            return {split: paths for split, paths in found.items() if paths}
    return {}


def has_images(src: str) -> bool:
    """Whether SRC has parquet files with a column of images."""
    found = parquet_files(src)
    if not found:
        return False
    try:
        with open_parquet(next(iter(found.values()))[0]) as file:
            return bool(_image_columns(file.schema_arrow))
    except UserError:  # without pyarrow, or damaged: its message is better than that there are no images
        return not set(class_folders(src)) - {*_FOLDERS, *split_folders(src).values()}


@contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """A pyarrow ParquetFile. Raises UserError."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path}: pyarrow is not installed", f"install it: {install_command('parquet')}") from error
    with files.open_binary(path) as stream:
        try:
            yield ParquetFile(stream, buffer_size=_BUFFER, pre_buffer=False)
        except (ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read as parquet ({error})", "download it again") from error


def list_parquet(src: str, options: SourceOptions) -> Listing:
    """The rows of parquet files. Labels are those of the ClassLabel column, or numbers, or the sorted names."""
    splits: dict[str, list[_Labels]] = {}
    known: list[str] | None = None
    for split, paths in parquet_files(src).items():
        if split == "test":  # nobody shall train on it
            continue
        splits[split] = []
        for path in progress_bar(paths, desc=f"labels of {split}", unit=" files"):
            with open_parquet(path) as file:
                image, label, names = _columns(path, file.schema_arrow, options)
                if known not in (None, names):
                    raise UserError(f"{path}: has other class names than the files before it", "give files of one data set")
                known = names
                splits[split] += list(_labels(path, file, image, label, options.field_column))
    found = {label for groups in splits.values() for _, _, labels, _ in groups for label in labels}
    classes, numbers = number_labels(src, found, known or [])
    sources = {split: list(_rows(src, groups, numbers)) for split, groups in splits.items()}
    return Listing(classes, sources, notes=renamed(known or [], classes))


_Labels = tuple[RowGroup, int, list[str], list[str]]  # a row group, its size in bytes, its labels, further columns as JSON


def _labels(path: str, file: Any, image: str, column: str, others: Sequence[str]) -> Iterator[_Labels]:
    """The labels of each row group. others: further columns."""
    known: dict[Any, str] = {}
    for group in range(file.num_row_groups):
        rows = file.read_row_group(group, columns=[column, *others]).to_pylist()
        labels = [row[column] for row in rows]
        for row, label in enumerate(labels):
            if isinstance(label, bool) or not isinstance(label, int | str):
                raise UserError(
                    f"{path}: row {row} of row group {group} has the label {label!r}", "choose another `label_column`"
                )
        size = file.metadata.row_group(group).total_byte_size
        more = [row_json(path, row, others) for row in rows] if others else []
        yield RowGroup(path, group, image), size, [known.setdefault(label, str(label)) for label in labels], more


def _rows(src: str, groups: list[_Labels], numbers: dict[str, int]) -> Iterator[Source]:
    keys, path, row = Keys(), "", 0
    for rows, size, labels, more in groups:
        if rows.path != path:
            path, row = rows.path, 0
        below = path.removeprefix(src).lstrip("/")
        stem = below.removesuffix(".parquet").rpartition("/")[2]
        for place, label in enumerate(labels):
            key, name = keys.make(stem, f"{row:06d}"), f"{below}/{row:06d}"
            json = more[place] if more else ""
            yield Source(path, place, None, key, numbers[label], name, size, rows, json=json)
            row += 1


def _image_columns(schema: Any) -> list[str]:
    """The columns that may hold encoded images, as paths in the schema: struct columns with a field `bytes`, or else of bytes."""
    from pyarrow import types

    fields = [field for field in schema if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0]
    binary = [field.name for field in schema if types.is_binary(field.type) or types.is_large_binary(field.type)]
    return [f"{field.name}.bytes" for field in fields] or binary


def _columns(path: str, schema: Any, options: SourceOptions) -> tuple[str, str, list[str]]:
    """The paths of the columns of images and labels, and the names of the labels, if the schema has them."""
    images = _image_columns(schema)
    if options.image_column:
        images = [name for name in images if options.image_column in (name, name.removesuffix(".bytes"))]
    elif "image.bytes" in images:
        images = ["image.bytes"]
    if len(images) != 1:
        raise UserError(
            f"{path}: has {'several columns' if images else 'no column'} of encoded images, of {', '.join(schema.names)}",
            "choose one (`image_column`)",
        )
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        features = {}
    labels = [name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"]
    labels = labels or [name for name in schema.names if name.lower() in LABELS]
    if options.label_column:
        labels = [name for name in schema.names if name == options.label_column]
    if len(labels) != 1:
        raise UserError(
            f"{path}: has {'several columns' if labels else 'no column'} of labels, of {', '.join(schema.names)}",
            "choose one (`label_column`)",
        )
    return images[0], labels[0], list((features.get(labels[0]) or {}).get("names") or [])


def row_file(folder: str, rows: RowGroup) -> str:
    """The file of an unpacked row group: the offsets of its images and of the end, int64 (rows + 1), then the images."""
    name = hashlib.sha256(f"{rows.path} {rows.column}".encode()).hexdigest()[:16]
    return files.join(folder, "rows", f"{name}-{rows.group:06d}")


def read_row(folder: str, rows: RowGroup, row: int) -> bytes:
    """One image of an unpacked row group; empty if it is null."""
    path = row_file(folder, rows)
    start, end = np.frombuffer(files.read(path, 8 * row, 16), np.int64)
    return files.read(path, int(start), int(end - start)) if end > start else b""


def unpack(folder: str, groups: Iterable[RowGroup], workers: int, turn: float) -> None:
    """Write the files of those row groups that have none. turn: in [0, 1), where to begin, for several jobs."""
    every = sorted(set(groups))
    first = int(turn * len(every))

    def write(rows: RowGroup) -> None:
        if not files.exists(row_file(folder, rows)):
            _unpack(folder, rows)

    with DaemonPool(min(workers, _THREADS)) as pool:
        groups_written = [pool.submit(write, rows) for rows in every[first:] + every[:first]]
        for written in progress_bar(groups_written, desc="unpacking parquet", unit=" row groups"):
            written.result()


def _unpack(folder: str, rows: RowGroup) -> None:
    with open_parquet(rows.path) as file, files.atomic_write(row_file(folder, rows)) as scratch, scratch.open("wb") as out:
        count = file.metadata.row_group(rows.group).num_rows
        offsets = [8 * (count + 1)]
        out.seek(offsets[0])
        for batch in file.iter_batches(_BATCH, [rows.group], [rows.column]):
            column = batch.column(0)
            for name in rows.column.split(".")[1:]:
                column = column.field(name)
            for cell in column:
                data = cell.as_buffer() if cell.is_valid else b""
                out.write(data)
                offsets.append(offsets[-1] + len(data))
        out.seek(0)
        out.write(np.array(offsets, np.int64).tobytes())
