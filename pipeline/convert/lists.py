"""Listing of the images in a list: a CSV, TSV, JSON-lines or parquet file with columns of paths, labels and perhaps splits."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from typing import Any

from ..errors import UserError
from ..progress import progress_bar
from ..store import files
from .names import read_text
from .parquet import LABELS, open_parquet
from .sources import SPLITS, Keys, Listing, Source, SourceOptions, number_labels, row_json

_PATHS = ("path", "file", "file_name", "filename", "filepath", "image_path", "image", "url")
_SPLITS = ("split", "subset", "partition")
_FORMATS = "a list is a .csv, .tsv, .jsonl or .parquet file with columns such as path and label"
_Row = tuple[str, str, str, str]  # path, label, split, and further columns as JSON


def list_file(src: str, options: SourceOptions) -> Listing:
    """The images of `options.list`, in its order. Paths are absolute, relative to SRC, or URLs. Without a column of splits, all
    images are for training; those of a test split are not listed. `options.field_column` are stored with each image."""
    if not options.list:
        raise UserError("the source list needs a file that lists the images (`list`)", _FORMATS)
    path = files.absolute(options.list)
    splits: dict[str, dict[str, str]] = {}  # split -> path -> label
    fields: dict[str, dict[str, str]] = {}  # split -> path -> further columns
    unused = repeated = 0
    for row, (image, label, split, more) in enumerate(_rows(path, options), 1):
        known_split = SPLITS.get(split.lower())
        if not known_split:
            raise UserError(f"{path}: row {row} has the split {split!r}", "splits are train, val and test")
        if not image or not label:
            raise UserError(f"{path}: row {row} has no {'label' if image else 'path'}", "complete it")
        if known_split == "test":
            unused += 1
            continue
        found = splits.setdefault(known_split, {})
        repeated += image in found
        if found.setdefault(image, label) != label:
            raise UserError(f"{path}: row {row}: {image} has two labels, {found[image]} and {label}", "leave one")
        if more and fields.setdefault(known_split, {}).setdefault(image, more) != more:
            others = " or ".join(options.field_column)
            raise UserError(f"{path}: row {row}: {image} is listed before with another {others}", "list each image once")
    if not splits:
        raise UserError(f"{path}: lists no images for training or validation", _FORMATS)
    both = splits.get("train", {}).keys() & splits.get("val", {}).keys()
    counts = ((unused, "images of the test split are not used"), (repeated, "images are listed twice"))
    notes = [f"{path}: {count} {what}" for count, what in counts if count]
    if both:
        notes.append(f"{path}: {len(both)} images are in both splits, such as {min(both)}")
    classes, numbers = number_labels(path, {label for found in splits.values() for label in found.values()}, [])
    sources: dict[str, list[Source]] = {
        split: list(_sources(src, path, splits[split], numbers, fields.get(split, {})))
        for split in ("train", "val") if split in splits
    }  # fmt: skip
    return Listing(classes, sources, notes=notes)


def _sources(src: str, path: str, found: dict[str, str], numbers: dict[str, int], fields: dict[str, str]) -> Iterator[Source]:
    keys, missing = Keys(), []
    for image, label in progress_bar(found.items(), desc=f"files of {path}", unit=" images"):
        place = image if "://" in image or image.startswith("/") else files.join(src, image)
        size = 0  # of remote files it is not known without a request for each
        if not files.is_remote(place):
            try:
                status = os.stat(files.absolute(place))
                size = status.st_size
                if stat.S_ISDIR(status.st_mode):
                    missing.append(place)
            except (OSError, ValueError):  # the latter for a null byte
                missing.append(place)
        name = place.removeprefix(f"{src}/")
        parts = [part for part in re.sub(r"^\w+://", "", name).split("/") if part not in ("", ".", "..")] or [""]
        key = keys.make(*parts[:-1], parts[-1].rsplit(".", 1)[0])
        yield Source(place, 0, None, key, numbers[label], name, size, json=fields.get(image, ""))
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(found)} images do not exist or are folders, such as {missing[0]}",
            f"paths are relative to {src}",
        )


def _rows(path: str, options: SourceOptions) -> Iterator[_Row]:
    extension = path.lower().rpartition(".")[2]
    if extension not in ("csv", "tsv", "txt", "jsonl", "ndjson", "json", "parquet"):
        raise UserError(f"{path}: is a list of an unknown format", _FORMATS)
    if extension == "parquet":
        rows = _parquet_rows(path, options)
    else:
        text = read_text(path)
        rows = _json_rows(path, text) if "json" in extension else _text_rows(path, text)
    columns: list[str | None] | None = None
    for number, row in enumerate(rows, 1):
        columns = columns or _columns(path, list(row), options)
        try:
            image, label, split = ("train" if name is None else _text(row[name]) for name in columns)
            yield image, label, split, row_json(f"{path}: row {number}", row, options.field_column)
        except KeyError as error:
            raise UserError(f"{path}: row {number} has no column {error}", "complete it") from error
    if columns is None:
        raise UserError(f"{path}: lists no images", _FORMATS)


def _text(value: Any) -> str:
    """A cell as text; "" for what is no text or integer."""
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _text_rows(path: str, text: str) -> Iterator[dict[str, Any]]:
    header = text.partition("\n")[0]
    try:
        yield from csv.DictReader(
            io.StringIO(text, newline=""), delimiter="\t" if "\t" in header else ";" if ";" in header else ","
        )
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as a table ({error})", _FORMATS) from error


def _json_rows(path: str, text: str) -> Iterator[dict[str, Any]]:
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else map(json.loads, filter(str.strip, text.split("\n")))
        for number, row in enumerate(found, 1):
            if not isinstance(row, dict):
                raise UserError(f"{path}: row {number} is no object", 'expected {"path": ..., "label": ...}')
            yield row
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON lines ({error})", 'expected {"path": ..., "label": ...} in each line') from error


def _parquet_rows(path: str, options: SourceOptions) -> Iterator[dict[str, Any]]:
    with open_parquet(path) as file:
        columns = _columns(path, file.schema_arrow.names, options)
        for batch in file.iter_batches(columns=list(dict.fromkeys(filter(None, [*columns, *options.field_column])))):
            yield from batch.to_pylist()


def _columns(path: str, names: list[str], options: SourceOptions) -> list[str | None]:
    """The columns of paths, labels and splits; the last may be None. Raises UserError for a missing one."""
    found: list[str | None] = []
    for what, wanted, usual in (
        ("image_column", options.image_column, _PATHS),
        ("label_column", options.label_column, LABELS),
        ("split_column", options.split_column, _SPLITS),
    ):
        fitting = [name for name in names if name == wanted] if wanted else [
            name for usual_name in usual for name in names if str(name).strip().lower() == usual_name
        ]  # fmt: skip
        if not fitting and (wanted or what != "split_column"):
            columns = ", ".join(map(str, names))
            raise UserError(f"{path}: has no column {wanted or usual[0]}, only {columns}", f"name it (`{what}`)")
        found.append(fitting[0] if fitting else None)
    return found
