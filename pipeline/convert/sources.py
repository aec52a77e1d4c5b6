"""The images to convert, as a `Listing`, and what all kinds of sources share: options, names of splits, keys, files to skip."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import UserError
from ..progress import progress_bar
from ..store import files


class RowGroup(NamedTuple):
    """A row group of a parquet file. column: with the encoded images, as a path such as "image.bytes"."""

    path: str
    group: int
    column: str


@dataclass(frozen=True, slots=True)
class Source:
    """One encoded image: bytes [start, start + bytes) of the file `path`, or the whole file if bytes is None; or row `start` of
    the row group `rows`.

    key: its name in the shard, unique in its split. name: its path below SRC, for reports. size: for the fingerprint; in bytes,
    or of its row group. image: if not empty, the range is that of all members of a sample in a tar, and the image is the one with
    this extension. json: further columns of a list.
    """

    path: str
    start: int
    bytes: int | None
    key: str
    label: int
    name: str
    size: int
    rows: RowGroup | None = None
    image: str = ""
    json: str = ""


@dataclass(frozen=True)
class Listing:
    """classes: folder names (wnids) in label order. splits: name -> sources, in an order that depends only on their names.
    names: class -> its name for people, where there is one. root: the folder that the sources' names are below, if it is not SRC.
    notes: lines to print before the conversion."""

    classes: list[str]
    splits: dict[str, list[Source]]
    names: dict[str, str] = field(default_factory=dict)
    root: str = ""
    notes: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        """A hash of every image's name, key, label, size and columns. Equal fingerprints and equal files give equal shards."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for split, sources in self.splits.items():
            for source in progress_bar(sources, desc=f"fingerprint of {split}", unit=" images"):
                digest.update(json.dumps([split, source.name, source.key, source.label, source.size]).encode())
                digest.update(source.json.encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source.

    - source: its kind, see `kinds.KINDS`; "" recognises it.
    - check_md5: verify the official tars first.
    - list: a file that lists the images, see `lists`.
    - image_column, label_column, split_column: columns of a list or of parquet files. Of WebDataset tars, label_column is a field
      of .json, or the extension of a text member, and image_column the extension of the images. "" chooses by the usual names.
    - field_column: further columns of a list or of parquet files, which are stored as a member .json of each sample.
    - val_labels: the labels of a flat folder of validation images, see `kaggle`.
    - val_share, val_per_class: without a validation split, take this fraction, or this many images, of each class for it. Which
      ones depends only on their names and on `seed`.
    """

    source: str = ""
    check_md5: bool = True
    list: str = ""
    image_column: str = ""
    label_column: str = ""
    split_column: str = ""
    val_labels: str = ""
    val_share: float = 0.0
    val_per_class: int = 0
    field_column: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.val_share < 1:
            raise UserError(f"`val_share` must be at least 0 and less than 1, not {self.val_share}")
        if self.val_per_class < 0 or (self.val_per_class and self.val_share):
            raise UserError("`val_per_class` is a number of images, instead of `val_share`")


def row_json(where: str, row: dict[str, Any], columns: Sequence[str]) -> str:
    """The content of .json with some columns of a row; "" without columns. Dates and decimals become text.

    Raises UserError for a missing column, or bytes.
    """

    def as_text(value: Any) -> str:
        if isinstance(value, bytes):
            raise UserError(f"{where}: a column of {', '.join(columns)} holds bytes", "store them as files of WebDataset tars")
        return str(value)

    for name in columns:
        if name not in row:
            raise UserError(f"{where}: has no column {name}", "choose another `field_column`")
    return json.dumps({name: row[name] for name in columns}, default=as_text) if columns else ""


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


PACKED = (".tar", ".parquet", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".rar", ".7z")
IMAGES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SPLITS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "valset", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "testset", "holdout"), "test"),  # never converted, so that nobody trains on it
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
    for entry in entries(src):
        split = SPLITS.get(entry.name.lower()) if entry.is_folder else None
        if split in found:
            raise UserError(f"{src}: {entry.name} and {found[split]} are both the split {split}", "move one of them elsewhere")
        if split:
            found[split] = entry.name
    return found


def files_by_split(src: str, suffix: str) -> dict[str, list[str]]:
    """The files of SRC with a suffix, by split: those in folders such as SRC/train and SRC/val, and SRC/* by the words in their
    names.

    If no file in SRC names a split, all of them are the training split. Raises UserError if only some do.
    """

    def inside(folder: str) -> list[str]:
        found = (entry for entry in entries(folder) if entry.name.lower().endswith(suffix) and not entry.is_folder)
        return [files.join(folder, entry.name) for entry in found]

    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for folder_split, name in sorted(split_folders(src).items()):
        splits[folder_split] += inside(files.join(src, name))
    named = {path: split_of(path.rsplit("/", 1)[1][: -len(suffix)]) for path in inside(src)}
    unnamed = [path for path, split in named.items() if split is None]
    if unnamed and (len(unnamed) < len(named) or any(splits.values())):
        raise UserError(f"{unnamed[0]}: is it for training or validation?", 'rename it, with the word "train" or "val"')
    for path, split in named.items():
        splits[split or "train"].append(path)
    return {name: paths for name, paths in splits.items() if paths}


_LITTER = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}


def is_litter(path: str) -> bool:
    """Whether a part of a path is hidden, or written by an operating system beside the user's files."""
    return any((part[:1] == "." and part not in (".", "..")) or part.lower() in _LITTER for part in path.split("/"))


class Skipped:
    """Counts the hidden files and system files that a listing skips. others: lines about other files."""

    def __init__(self) -> None:
        self._count, self._first = 0, ""
        self.others: list[str] = []

    def skips(self, path: str, below: str = "") -> bool:
        """Whether to skip a file or folder. below: where the path is."""
        if not is_litter(path):
            return False
        self._count += 1
        self._first = self._first or files.join(below, path)
        return True

    def notes(self) -> list[str]:
        """Lines to print, if there is something to say."""
        counted = [f"skipped {self._count} hidden or system files, such as {self._first}"] if self._count else []
        return counted + self.others


def entries(folder: str, skipped: Skipped | None = None) -> list[files.Entry]:
    """As `files.list_folder`, without system files. Raises UserError for a symbolic link that leads nowhere."""
    skipped = skipped or Skipped()
    found = [entry for entry in files.list_folder(folder, hidden=True) if not skipped.skips(entry.name, folder)]
    for entry in found:
        if entry.bytes == files.BROKEN:
            raise UserError(f"{files.join(folder, entry.name)}: is a symbolic link that leads nowhere", "restore its target")
    return found


def as_shown(path: str) -> Callable[[str], str]:
    """The function that makes names of files at `path` proper UTF-8."""
    return str if files.is_remote(path) else files.as_utf8


def number_labels(where: str, found: Iterable[str], known: list[str]) -> tuple[list[str], dict[str, int]]:
    """The classes, and a number for each label that was found, which is a class name or a number.

    known: the classes, if they are known; to equal names, the number is added. Otherwise the classes are the numbers up to the
    highest, or the sorted names.
    Raises UserError; its message begins with `where`.
    """
    labels = sorted(set(found))
    by_name = {name: label for label, name in enumerate(known)}
    unknown = [label for label in labels if label not in by_name]
    if known and not unknown:
        return known, {label: by_name[label] for label in labels}
    for label in labels:
        if re.fullmatch(r"-\d+", label):
            raise UserError(f"{where}: label {label}; labels begin at 0")
    if labels and all(re.fullmatch(r"\d+\.\d*", label) for label in labels):  # as names, "10.0" would come before "2.0"
        raise UserError(f"{where}: label {labels[0]} is a fraction", "write labels as integers from 0 on, or as names")
    if not all(re.fullmatch(r"\d+", label, re.ASCII) for label in labels):
        if known:
            raise UserError(f"{where}: label {unknown[0]!r} is none of the {len(known)} classes, such as {known[0]!r}")
        return labels, {label: number for number, label in enumerate(labels)}
    numbers = {label: int(label) for label in labels}
    highest = max(numbers.values(), default=-1)
    if known and highest >= len(known):
        raise UserError(f"{where}: labels go up to {highest}, but there are names for {len(known)} classes only")
    if highest > 10 * len(labels) + 1000:
        raise UserError(f"{where}: labels go up to {highest}, for {len(labels)} classes", "number them from 0 on")
    return _unique(known) or [str(number) for number in range(highest + 1)], numbers


def _unique(names: list[str]) -> list[str]:
    """Class names with their number where another class has the same name: ImageNet has two cranes."""
    count = Counter(names)
    return [f"{name} ({label})" if count[name] > 1 else name for label, name in enumerate(names)]


def renamed(known: list[str], classes: list[str]) -> list[str]:
    """A line to print if `number_labels` has changed names."""
    new = [name for name in classes if name not in known] if known else []
    return [f"{len(new)} classes have equal names, and are called {', '.join(new[:4])}"] if new else []


def check(src: str, listing: Listing) -> Iterator[str]:
    """Refuse a listing without images in a split or with equal class names; yields lines about what may not be intended."""
    classes = listing.classes
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise UserError(f"{src}: two classes are called {twice!r}", "give them different names")
    if not listing.splits:
        raise UserError(f"{src}: holds only a test split, or no images of this kind", "give a folder with training images")
    if len(classes) == 1:
        yield f"there is only one class, {classes[0]}"
    for split, sources in listing.splits.items():
        if not sources:
            raise UserError(f"{src}: the {split} split holds no images", "add its images, or leave it out")
        without = set(range(len(classes))) - {source.label for source in sources}
        if without:
            yield f"{split}: {len(without)} of {len(classes)} classes have no images, such as {classes[min(without)]}"


def split_off(listing: Listing, share: float, per_class: int, seed: int) -> Listing:
    """Move a part of each class of the training split to a new validation split, chosen by a hash of seed and name."""
    if list(listing.splits) != ["train"]:
        raise UserError("`val_share` and `val_per_class` are for sources with a training split alone")
    groups: dict[int, list[Source]] = {}
    for source in listing.splits["train"]:
        groups.setdefault(source.label, []).append(source)
    chosen: set[str] = set()
    for label, group in groups.items():
        count = per_class or max(round(share * len(group)), 1)
        if count >= len(group):
            raise UserError(
                f"class {listing.classes[label]}: has {len(group)} images, {count} of them for validation leave none",
                "add images, or take a smaller part (`val_share`, `val_per_class`)",
            )
        group.sort(key=lambda source: hashlib.sha256(f"{seed}/{source.name}".encode()).digest())
        chosen |= {source.key for source in group[:count]}
    splits: dict[str, list[Source]] = {"train": [], "val": []}
    for source in listing.splits["train"]:
        splits["val" if source.key in chosen else "train"].append(source)
    return Listing(listing.classes, splits, listing.names, listing.root, listing.notes)
