"""Listing of WebDataset tars. The members of a sample have one key: KEY.jpg or another image, KEY.cls with its label, and fields.

Fields are all other members, such as KEY.json. They are stored beside the image.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections import Counter
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
_OURS = {"cls", "jpg"}  # the names of label and image in shards, which no field can have
_EXPECTED = "expected KEY.jpg and KEY.cls; `label_column` names another text member, such as txt, or a field of KEY.json"


def has_tars(src: str) -> bool:
    """Whether SRC/*.tar or SRC/train/*.tar exist."""
    return bool(files_by_split(src, ".tar"))


def list_webdataset(src: str, options: SourceOptions) -> Listing:
    """Samples KEY.jpg (or another image) with KEY.cls, the label: a number, or a class name.

    Class names come from SRC/manifest.json (Cropfeed's shards) or SRC/classes.txt (one per line), else they are the numbers.
    """
    skipped, fields, labels = Skipped(), Counter[str](), dict[str, str]()
    found: dict[str, list[tuple[Source, str]]] = {}
    for split, paths in files_by_split(src, ".tar").items():
        if split == "test":  # nobody shall train on it
            continue
        keys = Keys()
        shown = progress_bar(paths, unit=" tars", desc=f"index of {split}")
        samples = (sample for path in shown for sample in _samples(src, path, keys, options, skipped, fields))
        found[split] = [(source, labels.setdefault(label, label)) for source, label in samples]
        if not found[split]:
            raise UserError(f"{paths[0]}: the {split} tars hold no samples", _EXPECTED)
    if not found:
        raise UserError(f"{src}: holds only a test split, or no images of this kind", "give a folder with training images")
    known, names = _classes(src)
    classes, numbers = number_labels(src, labels, known)
    splits = {split: [replace(source, label=numbers[label]) for source, label in samples] for split, samples in found.items()}
    return Listing(classes, splits, names, notes=[*skipped.notes(), *renamed(known, classes), *_notes(fields)])


def _notes(fields: Counter[str]) -> Iterator[str]:
    """Lines to print about the fields. fields: how many samples have each."""
    for what, names in (
        ("stored beside the images", fields.keys() - _OURS),
        ("not stored, as shards use these names for label and image", fields.keys() & _OURS),
    ):
        if names:
            yield f"{what}: {', '.join(f'.{name} ({fields[name]} samples)' for name in sorted(names))}"


def divide(path: str, sample: bytes, image: str) -> tuple[bytes, dict[str, bytes]]:
    """The image and the fields of a sample. sample: its range in the tar at `path`. image: the extension of the image.

    The image is empty if there is none: the tar has changed since it was listed.
    """
    stream = io.BytesIO(sample + bytes(2 * tarfile.BLOCKSIZE))
    found = {_extension(member.name): _content(path, tar, member) for tar, member in members(path, stream)}
    return found.pop(image, b""), {name: found[name] for name in sorted(found.keys() - _OURS) if name}


def _classes(src: str) -> tuple[list[str], dict[str, str]]:
    """The classes in label order, and their readable names. Either may be empty."""
    if files.exists(files.join(src, "manifest.json")):
        with suppress(ValueError, KeyError, TypeError):  # another program's
            content = json.loads(files.read(files.join(src, "manifest.json")))
            return list(content["classes"]), dict(content.get("class_names", {}))
    if files.exists(files.join(src, "classes.txt")):
        return [line.strip() for line in read_text(files.join(src, "classes.txt")).splitlines() if line.strip()], {}
    return [], {}


def _samples(
    src: str, path: str, keys: Keys, options: SourceOptions, skipped: Skipped, fields: Counter[str]
) -> Iterator[tuple[Source, str]]:
    """The samples of one tar with their labels, in stored order. The members of a sample are adjacent, as WebDataset requires.

    fields: counts the fields.
    """
    below, label_column = path.removeprefix(src).lstrip("/"), options.label_column
    with files.open_binary(path) as stream:
        for key, group in itertools.groupby(members(path, stream, skipped), lambda found: _key(found[1].name)):
            label, found = None, dict[str, tarfile.TarInfo]()
            for tar, member in group:
                extension = _extension(member.name)
                if found.setdefault(extension, member) is not member:
                    raise UserError(f"{path}: sample {key} has two members .{extension}", "leave one")
                if extension == (label_column.lower() or "cls") or (label_column and extension == "json" and label is None):
                    label = _label(f"{path}: {key}", extension, _content(path, tar, member), label_column)
            image = _image(f"{path}: sample {key}", list(found), options.image_column.lower())
            if label is None:
                lacks = f"field {label_column}" if label_column else ".cls"
                raise UserError(f"{path}: sample {key} has no {lacks}, only {', '.join(found)}", _EXPECTED)
            others = found.keys() - {image, "" if label_column else "cls", ""}
            fields.update(others)
            name, start, size = f"{below}/{found[image].name}", found[image].offset_data, found[image].size
            if others - _OURS:  # read all members
                start = next(iter(found.values())).offset
                size = member.offset_data + member.size - start
            part = image if others - _OURS else ""
            yield Source(path, start, size, keys.make(*key.split("/")), -1, name, size, image=part), label


def _image(where: str, extensions: list[str], wanted: str) -> str:
    """The extension of a sample's image. wanted: the one that was asked for, if any."""
    images = [extension for extension in extensions if (extension == wanted if wanted else extension in _IMAGES)]
    if not images:
        raise UserError(f"{where} has no {f'.{wanted}' if wanted else 'image'}, only {', '.join(extensions)}", _EXPECTED)
    if len(images) > 1:
        raise UserError(f"{where} has two images, .{images[0]} and .{images[1]}", "choose one (`image_column`)")
    return images[0]


def _key(name: str) -> str:
    """A member's key: its name up to the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _extension(name: str) -> str:
    """What follows a member's key, in lower case as in stock webdataset. White space would separate fields in DALI's index."""
    return re.sub(r"\s", "_", name[len(_key(name)) + 1 :].lower())


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
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}.{extension} cannot be read ({error})", _EXPECTED) from error
    if not text or "\n" in text or re.fullmatch(r"-\d+", text):
        raise UserError(f"{where}.{extension}: {text[:20]!r} is not a label", "labels are names, or numbers that begin at 0")
    return text
