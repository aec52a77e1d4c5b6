"""Listing of tars: the official ImageNet ILSVRC 2012 tars, and any WebDataset tars.

Official (https://image-net.org): ILSVRC2012_img_train.tar holds one tar per class, ILSVRC2012_img_val.tar the validation images
by number, and the devkit (ILSVRC2012_devkit_t12.tar.gz) their labels: one line per image in
ILSVRC2012_validation_ground_truth.txt, numbers that meta.mat's synsets map to wnids. Labels are the indices of the sorted wnids.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from typing import Any

from scipy.io import loadmat

from ..errors import UserError
from ..progress import BYTES, progress_bar
from ..store import files
from .names import read_text
from .sources import Keys, Listing, Source, split_folders, split_of

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
MD5 = {
    TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
    VAL: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
}
_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "gif", "tif", "tiff")


def official_files(src: str) -> dict[str, int]:
    """The official files that SRC holds, with their sizes in bytes."""
    return {entry.name: entry.bytes for entry in files.list_folder(src) if entry.name in MD5}


def check_md5(src: str, name: str) -> None:
    """Raise UserError unless a file has the MD5 of the official one. Reads the whole file."""
    path = files.join(src, name)
    digest = hashlib.md5(usedforsecurity=False)
    with files.open_binary(path) as stream, progress_bar(total=files.size(path), desc=f"MD5 of {name}", **BYTES) as bar:
        while block := stream.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != MD5[name]:
        raise UserError(
            f"{path}: its MD5 is {digest.hexdigest()}, the official file's {MD5[name]}",
            "download it again, or trust it (`check_md5`)",
        )


def list_official(src: str, present: dict[str, int]) -> Listing:
    """List the official tars in SRC. Images will be read from the tars without unpacking them."""
    splits: dict[str, list[Source]] = {}
    classes: list[str] = []
    if TRAIN in present:
        classes, splits["train"] = _train(files.join(src, TRAIN))
    if VAL in present:
        if DEVKIT not in present:
            raise UserError(f"{files.join(src, VAL)}: its labels are in {DEVKIT}", "put that beside it")
        wnids, truth = _devkit(files.join(src, DEVKIT))
        classes = classes or sorted(wnids.values())
        splits["val"] = _val(files.join(src, VAL), classes, wnids, truth)
    if not splits:
        raise UserError(f"{src}: holds {DEVKIT} but neither {TRAIN} nor {VAL}")
    return Listing(classes, splits)


def _members(path: str, stream: Any) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The regular files of an uncompressed tar, each with the open tar."""
    try:
        with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
            for member in tar:
                if member.isreg():
                    yield tar, member
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # a tar that was cut between two members
                raise tarfile.ReadError("its end is missing")
    except tarfile.TarError as error:
        raise _incomplete(path, error) from error


def _incomplete(path: str, error: tarfile.TarError) -> UserError:
    return UserError(f"{path}: not a complete, uncompressed tar ({error})", "download it again")


def _shown(path: str, stream: Any) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The same with a bar, for large tars."""
    with progress_bar(total=files.size(path), desc=f"index of {path.rsplit('/', 1)[1]}", **BYTES) as bar:
        for tar, member in _members(path, stream):
            yield tar, member
            bar.update(member.offset_data + member.size - bar.n)


def _train(path: str) -> tuple[list[str], list[Source]]:
    found: dict[str, list[tuple[str, int, int]]] = {}
    with files.open_binary(path) as stream:
        for outer, member in _shown(path, stream):
            inner = _members(f"{path}/{member.name}", outer.extractfile(member))
            wnid = member.name.removesuffix(".tar")
            found[wnid] = sorted((image.name, member.offset_data + image.offset_data, image.size) for _, image in inner)
    classes, keys, sources = sorted(found), Keys(), []
    for label, wnid in enumerate(classes):
        for name, start, size in found[wnid]:
            key = keys.make(wnid, name.rsplit(".", 1)[0])
            sources.append(Source(path, start, size, key, label, f"{TRAIN}/{wnid}.tar/{name}", size))
    return classes, sources


def _devkit(path: str) -> tuple[dict[int, str], list[int]]:
    """ILSVRC2012_ID -> wnid of the 1000 classes, and the validation images' IDs."""
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(files.read(path)), mode="r:gz") as tar:
            for member in tar:
                if member.isreg() and member.name.endswith(("/meta.mat", "/ILSVRC2012_validation_ground_truth.txt")):
                    members[member.name.rsplit("/", 1)[1]] = tar.extractfile(member).read()  # type: ignore[union-attr]
        synsets = loadmat(io.BytesIO(members["meta.mat"]), squeeze_me=True)["synsets"]
        truth = [int(line) for line in members["ILSVRC2012_validation_ground_truth.txt"].split()]
    except (tarfile.TarError, EOFError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not the ILSVRC 2012 devkit ({type(error).__name__}: {error})", "download it again") from error
    leaves = synsets[synsets["num_children"] == 0]
    return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}, truth


def _val(path: str, classes: list[str], wnids: dict[int, str], truth: list[int]) -> list[Source]:
    labels = {wnid: label for label, wnid in enumerate(classes)}
    with files.open_binary(path) as stream:
        found = sorted((member.name, member.offset_data, member.size) for _, member in _shown(path, stream))
    if len(found) != len(truth):
        raise UserError(f"{path}: holds {len(found)} images, the devkit labels {len(truth)}", "download both again")
    keys, sources = Keys(), []
    for (name, start, size), number in zip(found, truth, strict=True):
        wnid = wnids.get(number, f"number {number}")
        if wnid not in labels:
            raise UserError(f"{path}/{name}: its class {wnid} is not among the training tar's classes")
        key = keys.make(wnid, name.rsplit(".", 1)[0])
        sources.append(Source(path, start, size, key, labels[wnid], f"{VAL}/{name}", size))
    return sources


def find_webdataset(src: str) -> dict[str, list[str]]:
    """The tars of SRC by split: those in folders such as SRC/train and SRC/val, and SRC/*.tar by the words in their names.

    If no tar in SRC names a split, all of them are the training split. Raises UserError if only some do.
    """
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for folder_split, name in sorted(split_folders(src).items()):
        splits[folder_split] += _tars(files.join(src, name))
    found = {path: split_of(path.rsplit("/", 1)[1].removesuffix(".tar")) for path in _tars(src)}
    unnamed = [path for path, split in found.items() if split is None]
    if unnamed and (len(unnamed) < len(found) or any(splits.values())):
        raise UserError(f"{unnamed[0]}: is it for training or validation?", 'rename it, with the word "train" or "val"')
    for path, split in found.items():
        splits[split or "train"].append(path)
    return {name: paths for name, paths in splits.items() if paths}


def _tars(folder: str) -> list[str]:
    entries = files.list_folder(folder)
    return [files.join(folder, entry.name) for entry in entries if entry.name.endswith(".tar") and not entry.is_folder]


def list_webdataset(src: str, tars: dict[str, list[str]]) -> Listing:
    """Samples KEY.jpg (or another image) with KEY.cls, the label as a number.

    Class names come from SRC/manifest.json (Cropfeed's shards) or SRC/classes.txt (one per line), else they are the numbers.
    """
    splits: dict[str, list[Source]] = {}
    for name, paths in tars.items():
        if name == "test":  # nobody shall train on it
            continue
        keys = Keys()
        shown = progress_bar(paths, unit=" tars", desc=f"index of {name}")
        splits[name] = [source for path in shown for source in _samples(src, path, keys)]
        if not splits[name]:
            raise UserError(f"{paths[0]}: the {name} tars hold no samples", "expected KEY.jpg and KEY.cls")
    if not splits:
        raise UserError(f"{src}: holds only a test split", "give a folder with training or validation images")
    highest = max(source.label for sources in splits.values() for source in sources)
    classes, names = _classes(src)
    classes = classes or [str(label) for label in range(highest + 1)]
    if highest >= len(classes):
        raise UserError(f"{src}: labels go up to {highest}, but there are names for {len(classes)} classes only")
    return Listing(classes, splits, names)


def _classes(src: str) -> tuple[list[str], dict[str, str]]:
    """The classes in label order, and their readable names. Either may be empty."""
    if files.exists(files.join(src, "manifest.json")):
        content = json.loads(files.read(files.join(src, "manifest.json")))
        return content["classes"], content.get("class_names", {})
    if files.exists(files.join(src, "classes.txt")):
        return read_text(files.join(src, "classes.txt")).splitlines(), {}
    return [], {}


def _samples(src: str, path: str, keys: Keys) -> Iterator[Source]:
    """The samples of one tar, in stored order. The members of a sample are adjacent, as WebDataset requires."""
    below = path.removeprefix(src).lstrip("/")
    with files.open_binary(path) as stream:
        for key, group in itertools.groupby(_members(path, stream), lambda found: _key(found[1].name)):
            image = label = None
            for tar, member in group:
                extension = member.name[len(key) + 1 :].lower()
                if extension == "cls":
                    try:
                        text = tar.extractfile(member).read()  # type: ignore[union-attr]
                    except tarfile.TarError as error:
                        raise _incomplete(path, error) from error
                    label = _label(path, key, text)
                elif extension in _IMAGES:
                    image = member
            if image is None or label is None:
                raise UserError(
                    f"{path}: sample {key} has no {'image' if image is None else '.cls'}", "expected KEY.jpg and KEY.cls"
                )
            name = f"{below}/{image.name}"
            yield Source(path, image.offset_data, image.size, keys.make(*key.split("/")), label, name, image.size)


def _key(name: str) -> str:
    """A member's key: its name up to the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _label(path: str, key: str, text: bytes) -> int:
    try:
        label = int(text)
    except ValueError as error:
        raise UserError(f"{path}: {key}.cls is {text[:20]!r}, not a number") from error
    if label < 0:
        raise UserError(f"{path}: {key}.cls is {label}; labels begin at 0")
    return label
