"""The images to convert, as a `Listing`, and listing of image folders. `tars` lists tars."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..errors import UserError
from ..progress import progress_bar
from ..store import files


@dataclass(frozen=True)
class Source:
    """One encoded image: bytes [start, start + bytes) of the file `path`, or the whole file if bytes is None.

    key: its name in the shard, unique in its split. name: its path below SRC, for reports. size: in bytes, for the fingerprint.
    """

    path: str
    start: int
    bytes: int | None
    key: str
    label: int
    name: str
    size: int


@dataclass(frozen=True)
class Listing:
    """classes: folder names (wnids) in label order. splits: name -> sources, in an order that depends only on their names.
    names: class -> its name for people, where there is one."""

    classes: list[str]
    splits: dict[str, list[Source]]
    names: dict[str, str] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """A hash of every image's name, key, label and size. Equal fingerprints and equal files give equal shards."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for split, sources in self.splits.items():
            for source in progress_bar(sources, desc=f"fingerprint of {split}", unit=" images"):
                digest.update(json.dumps([split, source.name, source.key, source.label, source.size]).encode())
        return digest.hexdigest()


class Keys:
    """Makes unique WebDataset keys. Dots are replaced, as they end a key, and so is white space, which separates fields in DALI's
    index."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def make(self, *parts: str) -> str:
        """A key from the parts of a path, the last one without its extension. A number is appended if the key exists already."""
        key = base = "/".join(re.sub(r"[.\s]", "_", part) for part in parts)
        copy = 1
        while key in self._taken:
            key, copy = f"{base}-{copy}", copy + 1
        self._taken.add(key)
        return key


SPLITS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "valset"), "val"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),  # never converted, so that nobody trains on it
}


def split_of(name: str) -> str | None:
    """The split that a file or folder belongs to, by the words in its name, in any case: "train", "val", "test" or None.

    Raises UserError for a name with the words of two splits.
    """
    found = {SPLITS[word]: None for word in re.split("[^a-z]+", name.lower()) if word in SPLITS}
    if len(found) > 1:
        raise UserError(f"{name}: names two splits, {' and '.join(found)}", "rename it")
    return next(iter(found), None)


def split_folders(src: str) -> dict[str, str]:
    """The folders of SRC whose whole name is a split's, such as "train" or "Validation", by split.

    Raises UserError for two folders of one split.
    """
    found: dict[str, str] = {}
    for entry in _entries(src):
        split = SPLITS.get(entry.name.lower()) if entry.is_folder else None
        if split in found:
            raise UserError(f"{src}: {entry.name} and {found[split]} are both the split {split}", "move one of them elsewhere")
        if split:
            found[split] = entry.name
    return found


def class_folders(folder: str) -> list[str]:
    """The names of the folders in a folder, in label order."""
    return [entry.name for entry in _entries(folder) if entry.is_folder]


def has_class_folders(src: str) -> bool:
    """Whether SRC/train/<class>/ or SRC/<class>/ exist, with no tars beside them or only those that they were unpacked from."""
    named = split_folders(src)
    if any(class_folders(files.join(src, name)) for split, name in named.items() if split != "test"):
        return True
    entries = files.list_folder(src)
    folders = {entry.name for entry in entries if entry.is_folder} - set(named.values())
    tars = {entry.name.removesuffix(".tar") for entry in entries if entry.name.endswith(".tar")}
    return bool(folders) and tars <= folders


def list_image_folder(src: str) -> Listing:
    """SRC/train/<class>/* and SRC/val/<class>/*, or SRC/<class>/* alone as the training split; labels by sorted class names.

    See `split_folders` for other names of the splits. A test split is not listed.
    """
    named = {split: name for split, name in sorted(split_folders(src).items()) if split != "test"}
    folders = {split: files.join(src, name) for split, name in named.items()} or {"train": src}
    found = {split: class_folders(folder) for split, folder in folders.items()}
    first = next(iter(folders))
    classes = found[first]
    if not classes:
        raise UserError(
            f"{folders[first]}: holds no class folders",
            f"give the folder above {folders[first]}/<class>/*.JPEG, or the one above train/ and val/",
        )
    for split, names in found.items():
        for name in sorted(set(names) - set(classes)):
            raise UserError(
                f"{files.join(folders[split], name)}: class {name} is not in the training split",
                "add its training images, or convert a folder without this class",
            )
    labels = {name: label for label, name in enumerate(classes)}
    as_utf8 = str if files.is_remote(src) else files.as_utf8
    return Listing(
        [as_utf8(name) for name in classes],
        {split: list(_image_files(folder, named.get(split, ""), found[split], labels)) for split, folder in folders.items()},
    )


def _entries(folder: str) -> list[files.Entry]:
    """As `files.list_folder`. Raises UserError for a symbolic link that leads nowhere."""
    entries = files.list_folder(folder)
    for entry in entries:
        if entry.bytes == files.BROKEN:
            raise UserError(f"{files.join(folder, entry.name)}: is a symbolic link that leads nowhere", "restore its target")
    return entries


def _image_files(folder: str, split: str, classes: Iterable[str], labels: dict[str, int]) -> Iterator[Source]:
    keys = Keys()
    as_utf8 = str if files.is_remote(folder) else files.as_utf8
    for name in progress_bar(classes, desc=f"listing {folder}", unit=" classes"):
        entries = _entries(files.join(folder, name))
        if not entries:
            raise UserError(
                f"{files.join(folder, name)}: class folder without images", "add its images, or convert a folder without it"
            )
        for file in entries:
            path = files.join(folder, name, file.name)
            if file.is_folder:
                raise UserError(
                    f"{path}: is a folder, but only images are expected here",
                    "give the folder of the class folders, or the one above train/ and val/",
                )
            shown_class, shown = as_utf8(name), as_utf8(file.name)
            key = keys.make(shown_class, shown.rsplit(".", 1)[0])
            yield Source(path, 0, None, key, labels[name], "/".join(filter(None, (split, shown_class, shown))), file.bytes)
