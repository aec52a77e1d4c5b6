"""Listing of the official ImageNet ILSVRC 2012 tars (https://image-net.org), and of the members of any tar.

ILSVRC2012_img_train.tar holds one tar per class, ILSVRC2012_img_val.tar the validation images
by number, and the devkit (ILSVRC2012_devkit_t12.tar.gz) their labels: one line per image in
ILSVRC2012_validation_ground_truth.txt, numbers that meta.mat's synsets map to wnids. Labels are the indices of the sorted wnids.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from typing import Any

from scipy.io import loadmat

from ..errors import UserError
from ..progress import BYTES, progress_bar
from ..store import files
from .sources import Keys, Listing, Skipped, Source, SourceOptions

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
MD5 = {
    TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
    VAL: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
}


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


def list_official(src: str, options: SourceOptions) -> Listing:
    """List the official tars in SRC. Images will be read from the tars without unpacking them."""
    present = official_files(src)
    for name in present if options.check_md5 else ():
        check_md5(src, name)
    splits: dict[str, list[Source]] = {}
    classes: list[str] = []
    if TRAIN in present:
        classes, splits["train"] = _train(files.join(src, TRAIN))
    if VAL in present:
        if DEVKIT not in present:
            raise UserError(f"{files.join(src, VAL)}: its labels are in {DEVKIT}", "put that beside it")
        wnids, truth = read_devkit(files.join(src, DEVKIT))
        classes = classes or sorted(wnids.values())
        splits["val"] = _val(files.join(src, VAL), classes, wnids, truth)
    if not splits:
        raise UserError(f"{src}: holds neither {TRAIN} nor {VAL}", "download one of them")
    return Listing(classes, splits)


def members(path: str, stream: Any, skipped: Skipped | None = None) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The regular files of an uncompressed tar but hidden and system files, each with the open tar."""
    skipped = skipped or Skipped()
    try:
        with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
            for member in tar:
                if skipped.skips(member.name, path) or member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(
                        f"{path}: {member.name} is a link, or no plain file", "pack it with tar -h --hard-dereference"
                    )
                yield tar, member
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # a tar that was cut between two members
                raise tarfile.ReadError("its end is missing")
    except tarfile.TarError as error:
        raise incomplete(path, error) from error


def incomplete(path: str, error: tarfile.TarError) -> UserError:
    return UserError(f"{path}: not a complete, uncompressed tar ({error})", "download it again")


def _shown(path: str, stream: Any) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The same with a bar, for large tars."""
    with progress_bar(total=files.size(path), desc=f"index of {path.rsplit('/', 1)[1]}", **BYTES) as bar:
        for tar, member in members(path, stream):
            yield tar, member
            bar.update(member.offset_data + member.size - bar.n)


def _train(path: str) -> tuple[list[str], list[Source]]:
    found: dict[str, list[tuple[str, int, int]]] = {}
    with files.open_binary(path) as stream:
        for outer, member in _shown(path, stream):
            inner = members(f"{path}/{member.name}", outer.extractfile(member))
            wnid = member.name.removesuffix(".tar")
            found[wnid] = sorted((image.name, member.offset_data + image.offset_data, image.size) for _, image in inner)
    classes, keys, sources = sorted(found), Keys(), []
    for label, wnid in enumerate(classes):
        for name, start, size in found[wnid]:
            key = keys.make(wnid, name.rsplit(".", 1)[0])
            sources.append(Source(path, start, size, key, label, f"{TRAIN}/{wnid}.tar/{name}", size))
    return classes, sources


def read_devkit(path: str) -> tuple[dict[int, str], list[int]]:
    """ILSVRC2012_ID -> wnid of the 1000 classes, and the validation images' IDs."""
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(files.read(path)), mode="r:gz") as tar:
            for member in tar:
                if member.isreg() and member.name.endswith(("/meta.mat", "/ILSVRC2012_validation_ground_truth.txt")):
                    members[member.name.rsplit("/", 1)[1]] = tar.extractfile(member).read()  # type: ignore[union-attr]
        return read_wnids(members["meta.mat"]), read_numbers(members["ILSVRC2012_validation_ground_truth.txt"])
    except (tarfile.TarError, EOFError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not the ILSVRC 2012 devkit ({type(error).__name__}: {error})", "download it again") from error


def read_wnids(meta: bytes) -> dict[int, str]:
    """ILSVRC2012_ID -> wnid of the classes without children, from meta.mat. Raises exceptions of several types."""
    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets[synsets["num_children"] == 0]}


def read_numbers(text: bytes) -> list[int]:
    """The ILSVRC2012_IDs in the devkit's ground truth. Raises ValueError."""
    return [int(line) for line in text.split()]


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
