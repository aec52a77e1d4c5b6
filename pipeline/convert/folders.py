"""Listing of folders of images: a folder for each class, perhaps nested (Places365: `a/abbey`), in a folder for each split."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from ..errors import UserError
from ..progress import progress_bar
from ..store import files
from .sources import (
    IMAGES,
    PACKED,
    SPLITS,
    Keys,
    Listing,
    Skipped,
    Source,
    SourceOptions,
    as_shown,
    entries,
    split_folders,
    split_of,
)

Found = dict[str, list[files.Entry]]  # class, as a path below its split -> its images


def class_folders(folder: str) -> list[str]:
    """The names of the folders in a folder, in label order."""
    return [entry.name for entry in entries(folder) if entry.is_folder]


def image_splits(src: str) -> dict[str, str]:
    """The folders of the splits, by split. None if they are class folders themselves, such as a class "train" of vehicles."""
    named = split_folders(src)
    named |= _splits_by_words(src, set(named))
    others = set(class_folders(src)) - set(named.values())
    if len(others) > 1 and not any(class_folders(files.join(src, name)) for name in named.values()):
        return {}
    return dict(sorted(named.items()))


def _splits_by_words(src: str, known: set[str]) -> dict[str, str]:
    """The folders of class folders with a split's word in their names, such as train2012, by split, but those of `known`."""
    found: dict[str, str] = {}
    for name in class_folders(src):
        split = split_of(name) if set(re.split("[^a-z]+", name.lower())) & SPLITS.keys() else None
        if split and split not in known and class_folders(files.join(src, name)):  # a class may be called "test tube"
            if split in found:
                raise UserError(f"{src}: {name} and {found[split]} are both the split {split}", "move one of them elsewhere")
            found[split] = name
    return found


def has_class_folders(src: str) -> bool:
    """Whether SRC/train/<class>/ or SRC/<class>/ exist. Tars beside them are those that they were unpacked from, if they have the
    same names or if the folders hold images."""
    named = image_splits(src)
    if any(class_folders(files.join(src, name)) for split, name in named.items() if split != "test"):
        return True
    inside = entries(src)
    folders = {entry.name for entry in inside if entry.is_folder} - set(named.values())
    tars = {entry.name[:-4] for entry in inside if entry.name.lower().endswith(".tar")}
    return bool(folders) and (tars <= folders or sum(_holds_images(src, name) for name in sorted(folders)[:3]) > 1)


def _holds_images(src: str, name: str) -> bool:
    return any(entry.name.lower().endswith(IMAGES) for entry in entries(files.join(src, name)))


def list_folders(src: str, options: SourceOptions) -> Listing:
    """SRC/train/<class>/* and SRC/val/<class>/*, or SRC/<class>/* alone as the training split; labels by sorted class names.

    See `split_folders` for other names of the splits. A test split is not listed.
    """
    named = image_splits(src)
    used = {split: name for split, name in named.items() if split != "test"}
    if named and not used:
        raise UserError(f"{src}: holds only a test split", "give a folder with training or validation images")
    listing = list_splits(src, used or {"train": ""})
    above, _, name = src.rpartition("/")
    if not named and name.lower() in SPLITS:
        if SPLITS[name.lower()] != "train":
            listing.notes.append(f"the images of this {SPLITS[name.lower()]} folder become the training split")
        elif others := sorted(set(split_folders(above).values()) - {name}):
            listing.notes.append(f"only the training images; to use {', '.join(others)} beside it, give {above}")
    return listing


def list_splits(src: str, named: dict[str, str]) -> Listing:
    """The class folders of splits; the first of them has all classes. named: split -> its folder below SRC, or "" for SRC."""
    skipped = Skipped()
    folders = {split: files.join(src, name) if name else src for split, name in named.items()}
    listed = {
        split: find_images(folder, skipped, (*IMAGES, *PACKED) if named[split] else IMAGES) for split, folder in folders.items()
    }
    first = next(iter(folders))
    classes = sorted(listed[first], key=os.fsencode)
    for split, found in listed.items():
        for name in sorted(set(found) - set(classes)):
            raise UserError(
                f"{files.join(folders[split], name)}: class {name} is not in the training split",
                "add its training images, or convert a folder without this class",
            )
    labels = {name: label for label, name in enumerate(classes)}
    splits = {split: list(sources_of(listed[split], folder, named[split], labels)) for split, folder in folders.items()}
    return Listing([as_shown(src)(name) for name in classes], splits, notes=skipped.notes())


def find_images(folder: str, skipped: Skipped, told: tuple[str, ...]) -> Found:
    """The images of each class below a folder. told: extensions of files beside the class folders that are told of.

    Raises UserError for a folder that is neither a class nor holds any.
    """
    found: Found = {}
    inside = entries(folder, skipped)
    if beside := [entry.name for entry in inside if entry.name.lower().endswith(told) and not entry.is_folder]:
        skipped.others.append(f"not used: {len(beside)} files beside the class folders, such as {files.join(folder, beside[0])}")
    for entry in progress_bar([entry for entry in inside if entry.is_folder], desc=f"listing {folder}", unit=" classes"):
        _walk(folder, entry.name, (os.path.realpath(folder),), skipped, found)
    if not inside:
        raise UserError(f"{folder}: is empty", "add its images, or convert a folder without it")
    if not found:
        raise UserError(
            f"{folder}: holds no class folders",
            f"give the folder above {folder}/<class>/*.JPEG, or the one above train/ and val/; or list the images (`list`)",
        )
    top = {name.partition("/")[0] for name in found}
    if len(top) == 1 and len(found) > 1:
        raise UserError(f"{folder}: all class folders are in {next(iter(top))}", f"give {files.join(folder, *top)}")
    return found


def _walk(folder: str, name: str, above: tuple[str, ...], skipped: Skipped, found: Found) -> None:
    """Add the class folder `name` below `folder`, or those in it, to `found`. above: the real paths of the folders above it."""
    path = files.join(folder, name)
    real = path if files.is_remote(path) else os.path.realpath(path)
    if real in above:
        raise UserError(f"{path}: is a symbolic link to a folder above it", "give a folder without this link")
    inside = entries(path, skipped)
    nested = [entry for entry in inside if entry.is_folder]
    if not inside:
        raise UserError(f"{path}: class folder without images", "add its images, or convert a folder without it")
    packed = [entry.name for entry in inside if entry.name.lower().endswith(PACKED) and not entry.is_folder]
    if packed and len(packed) == len(inside):
        raise UserError(f"{path}: holds {packed[0]}, no images", f"give {path} if these are all, or unpack them")
    if packed:
        skipped.others.append(f"not used: {packed[0]} among the images in {path}")
        inside = [entry for entry in inside if entry.name not in packed]
    if not nested:
        found[name] = inside
        return
    if [entry.name for entry in nested] == ["images"] and not any(entry.name.lower().endswith(IMAGES) for entry in inside):
        found[name] = [entry._replace(name=f"images/{entry.name}") for entry in entries(files.join(path, "images"), skipped)]
        return  # Tiny ImageNet has a text file beside the folder `images` of each class
    if len(nested) < len(inside):
        raise UserError(
            f"{files.join(path, nested[0].name)}: is a folder, but only images are expected here, as beside it",
            "give the folder of the class folders, or the one above train/ and val/; or list the images (`list`)",
        )
    for entry in nested:
        if entry.name.lower() in SPLITS:
            raise UserError(
                f"{files.join(path, entry.name)}: is a {SPLITS[entry.name.lower()]} split, in a class folder of {folder}",
                f"give {path}, the folder above train/ and val/; or list the images (`list`)",
            )
        _walk(folder, files.join(name, entry.name), (*above, real), skipped, found)


def sources_of(found: Found, folder: str, split: str, labels: dict[str, int]) -> Iterator[Source]:
    """The images of all classes in the order of their names, which empties `found`. split: its folder's name below SRC, or ""."""
    keys, shown = Keys(), as_shown(folder)
    for name in sorted(found, key=os.fsencode):
        shown_class = shown(name)
        for file in found.pop(name):
            shown_file = shown(file.name)
            key = keys.make(*shown_class.split("/"), shown_file.rsplit(".", 1)[0])
            path = files.join(folder, name, file.name)
            yield Source(path, 0, None, key, labels[name], "/".join(filter(None, (split, shown_class, shown_file))), file.bytes)
