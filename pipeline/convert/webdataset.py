"""Listing of WebDataset tars: the members of a sample have one key, the image's extension, and their labels' in `.cls`."""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from ..errors import UserError
from ..progress import progress_bar
from ..store import files
from .names import read_text
from .sources import Keys, Listing, Skipped, Source, SourceOptions, files_by_split, number_labels, renamed
from .tars import incomplete, members

_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "gif", "tif", "tiff")
_EXPECTED = "expected KEY.jpg and KEY.cls; `label_column` names another text member, such as txt, or a field of KEY.json"


def has_tars(src: str) -> bool:
    """Whether SRC/*.tar or SRC/train/*.tar exist."""
    return bool(files_by_split(src, ".tar"))


def list_webdataset(src: str, options: SourceOptions) -> Listing:
    """Samples KEY.jpg (or another image) with KEY.cls, the label: a number, or a class name.

    Class names come from SRC/manifest.json (Cropfeed's shards) or SRC/classes.txt (one per line), else they are the numbers.
    """
    skipped, labels = Skipped(), dict[str, str]()
    found: dict[str, list[tuple[Source, str]]] = {}
    for split, paths in files_by_split(src, ".tar").items():
        if split == "test":  # nobody shall train on it
            continue
        keys = Keys()
        shown = progress_bar(paths, unit=" tars", desc=f"index of {split}")
        samples = (sample for path in shown for sample in _samples(src, path, keys, options.label_column, skipped))
        found[split] = [(source, labels.setdefault(label, label)) for source, label in samples]
        if not found[split]:
            raise UserError(f"{paths[0]}: the {split} tars hold no samples", _EXPECTED)
    if not found:
        raise UserError(f"{src}: holds only a test split, or no images of this kind", "give a folder with training images")
    known, names = _classes(src)
    classes, numbers = number_labels(src, labels, known)
    splits = {split: [replace(source, label=numbers[label]) for source, label in samples] for split, samples in found.items()}
    return Listing(classes, splits, names, notes=[*skipped.notes(), *renamed(known, classes)])


def _classes(src: str) -> tuple[list[str], dict[str, str]]:
    """The classes in label order, and their readable names. Either may be empty."""
    if files.exists(files.join(src, "manifest.json")):
        with suppress(ValueError, KeyError, TypeError):  # another program's
            content = json.loads(files.read(files.join(src, "manifest.json")))
            return list(content["classes"]), dict(content.get("class_names", {}))
    if files.exists(files.join(src, "classes.txt")):
        return [line.strip() for line in read_text(files.join(src, "classes.txt")).splitlines() if line.strip()], {}
    return [], {}


def _samples(src: str, path: str, keys: Keys, label_column: str, skipped: Skipped) -> Iterator[tuple[Source, str]]:
    """The samples of one tar with their labels, in stored order. The members of a sample are adjacent, as WebDataset requires."""
    below = path.removeprefix(src).lstrip("/")
    with files.open_binary(path) as stream:
        for key, group in itertools.groupby(members(path, stream, skipped), lambda found: _key(found[1].name)):
            image = label = None
            extensions = []
            for tar, member in group:
                extension = member.name[len(key) + 1 :].lower()
                extensions.append(extension)
                if extension in _IMAGES:
                    image = member
                elif extension == (label_column.lower() or "cls") or (label_column and extension == "json" and label is None):
                    label = _label(f"{path}: {key}", extension, _content(path, tar, member), label_column)
            if image is None or label is None:
                lacks = "image" if image is None else f"field {label_column}" if label_column else ".cls"
                raise UserError(f"{path}: sample {key} has no {lacks}, only {', '.join(extensions)}", _EXPECTED)
            name = f"{below}/{image.name}"
            source = Source(path, image.offset_data, image.size, keys.make(*key.split("/")), -1, name, image.size)
            yield source, label


def _key(name: str) -> str:
    """A member's key: its name up to the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _content(path: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        return tar.extractfile(member).read()  # type: ignore[union-attr]
    except tarfile.TarError as error:
        raise incomplete(path, error) from error


def _label(where: str, extension: str, content: bytes, label_column: str) -> str | None:
    """A sample's label in a text member, or in a field of a .json member; None if the field is missing."""
    try:
        text = content.decode("utf-8-sig").strip()
        if extension == "json" and label_column.lower() != "json":
            value = json.loads(text).get(label_column)
            text = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""
            if value is None:
                return None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{where}.{extension} cannot be read ({error})", _EXPECTED) from error
    if not text or "\n" in text or re.fullmatch(r"-\d+", text):
        raise UserError(f"{where}.{extension}: {text[:20]!r} is not a label", "labels are names, or numbers that begin at 0")
    return text
