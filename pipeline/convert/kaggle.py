"""Listing of class folders for training beside a flat folder of validation images, whose labels are in a file.

Kaggle's ImageNet is of this kind: ILSVRC/Data/CLS-LOC/train/<wnid>/*.JPEG and val/*.JPEG, with the labels in LOC_val_solution.csv
beside ILSVRC. Other files of labels have lines `file label`, or one label per line in the order of the sorted file names. A label
is a class folder's name, or its number in the sorted order of the class folders, from 0; in the devkit's ground truth, it is an
ILSVRC2012_ID.
"""

from __future__ import annotations

import csv
import re
from dataclasses import replace

from ..errors import UserError
from ..progress import progress_bar
from ..store import files
from .folders import class_folders, list_folders, list_splits
from .names import read_text
from .sources import IMAGES, Keys, Listing, Skipped, Source, SourceOptions, as_shown, entries, number_labels, split_folders
from .tars import DEVKIT, read_devkit, read_numbers, read_wnids

_BELOW = ("", "CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")  # where SRC, any folder of Kaggle's path, has the images
_ABOVE = 4  # folders above the validation images in which their labels are looked for
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
LABELS = (
    "LOC_val_solution.csv", "val_annotations.txt", "val.txt", "val_labels.txt", "val.csv", "validation.txt",
    "imagenet_2012_validation_synset_labels.txt", _TRUTH, f"ILSVRC2012_devkit_t12/data/{_TRUTH}", DEVKIT,
)  # fmt: skip
_HEADER = re.compile(r"(image|file|path|name|id)", re.IGNORECASE)


def find_root(src: str) -> str:
    """The folder with Kaggle's train/<class>/ and val/, or with any train/<class>/ and a flat val/; "" if there is none."""
    for below in _BELOW:
        folder = files.join(src, below) if below else src
        named = split_folders(folder)
        if "train" in named and class_folders(files.join(folder, named["train"])) and (below or _flat(folder, named)):
            return folder
    return ""


def _flat(root: str, named: dict[str, str]) -> str:
    """The flat folder of validation images below a folder, or ""."""
    for name in [named["val"], f"{named['val']}/images"] if "val" in named else []:
        inside = entries(files.join(root, name))
        if any(entry.name.lower().endswith(IMAGES) for entry in inside) and not any(entry.is_folder for entry in inside):
            return files.join(root, name)
    return ""


def list_kaggle(src: str, options: SourceOptions) -> Listing:
    """List class folders for training, and the validation images."""
    root = find_root(src)
    if not root:
        raise UserError(f"{src}: holds no train/<class>/*.JPEG with val/*.JPEG", "give a folder such as ILSVRC/Data/CLS-LOC")
    named = split_folders(root)
    flat = _flat(root, named)
    if not flat:
        return replace(list_folders(root, options), root=root)
    listing = list_splits(root, {"train": named["train"]})
    skipped = Skipped()
    images = [entry for entry in entries(flat, skipped) if entry.name.lower().endswith(IMAGES) and not entry.is_folder]
    path = options.val_labels or _find_labels(flat)
    labels = _read_labels(path, [entry.name for entry in images], listing.classes)
    keys, shown, below = Keys(), as_shown(flat), flat.removeprefix(root).lstrip("/")
    listing.splits["val"] = [
        Source(
            files.join(flat, entry.name), 0, None,
            keys.make(*listing.classes[label].split("/"), shown(entry.name).rsplit(".", 1)[0]),
            label, f"{below}/{shown(entry.name)}", entry.bytes,
        )
        for entry, label in zip(progress_bar(images, desc=f"listing {flat}", unit=" images"), labels, strict=True)
    ]  # fmt: skip
    return replace(listing, root=root, notes=[*listing.notes, *skipped.notes(), f"labels of val: {path}"])


def _find_labels(flat: str) -> str:
    """The file with the labels of a flat folder: in it, or in one of the folders above it."""
    folder = flat
    for _ in range(_ABOVE + 1):
        for name in LABELS:
            if files.exists(path := files.join(folder, name)):
                return path
        folder = folder.rpartition("/")[0]
        if not folder.strip("/") or folder.endswith(":/"):
            break
    raise UserError(
        f"{flat}: holds images without class folders, and no file with their labels is in it or above it",
        f"put {LABELS[0]} there, or name the file (`val_labels`)",
    )


def _read_labels(path: str, images: list[str], classes: list[str]) -> list[int]:
    """The label of each image, in the order of `images`. Raises UserError for images without one."""
    if path.endswith((_TRUTH, DEVKIT)):
        found: list[str] | dict[str, str] = _devkit_labels(path)
    else:
        found = _parse(path, {name.rsplit(".", 1)[0] for name in images}, set(classes))
    if isinstance(found, list):
        if len(found) != len(images):
            raise UserError(f"{path}: has {len(found)} labels for {len(images)} images", "give the file that belongs to them")
        labels = found
    else:
        for name in images:
            if name.rsplit(".", 1)[0] not in found:
                raise UserError(f"{path}: has no label for {name}", "give the file that belongs to the images (`val_labels`)")
        labels = [found[name.rsplit(".", 1)[0]] for name in images]
    if not path.endswith((_TRUTH, DEVKIT)) and not set(labels) & {*classes, "0"} and str(len(classes)) in labels:
        raise UserError(f"{path}: labels are numbers from 1 to {len(classes)}", "number the sorted class folders from 0")
    numbers = number_labels(path, labels, classes)[1]
    return [numbers[label] for label in labels]


def _devkit_labels(path: str) -> list[str]:
    """The wnids of the validation images, in their order."""
    if path.endswith(DEVKIT):
        wnids, truth = read_devkit(path)
    else:
        meta = files.join(path.rpartition("/")[0], "meta.mat")
        if not files.exists(meta):
            raise UserError(f"{path}: the meaning of its numbers is in meta.mat", "put that beside it")
        try:
            wnids, truth = read_wnids(files.read(meta)), read_numbers(files.read(path))
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not the devkit's, or meta.mat is not ({error})", "unpack the devkit again") from error
    return [wnids.get(number, f"number {number}") for number in truth]


def _parse(path: str, stems: set[str], classes: set[str]) -> list[str] | dict[str, str]:
    """The labels in a text file by image, without its extension, or in order."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    rows = [[field.strip() for field in (_cells(line) if re.search(r"[\t,]", line) else line.split(None, 1))] for line in lines]
    if rows and len(rows[0]) > 1 and _HEADER.search(rows[0][0]) and _stem(rows[0][0]) not in stems:
        rows = rows[1:]
    if not any(_stem(row[0]) in stems for row in rows[:100]):
        return lines
    found: dict[str, str] = {}
    for row in rows:
        label = row[1] if len(row) > 1 else ""
        if label not in classes:
            label = label.partition(" ")[0]  # Kaggle's has boxes after it
        if found.setdefault(_stem(row[0]), label) != label:
            raise UserError(f"{path}: {row[0]} has two labels, {found[_stem(row[0])]} and {label}", "leave one")
    return found


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter="\t" if "\t" in line else ","))
    except csv.Error:  # too long for a cell
        return [line]


def _stem(name: str) -> str:
    return re.sub(r"\.\w{3,4}$", "", name.rpartition("/")[2])
