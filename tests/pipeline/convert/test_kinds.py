"""The kinds of sources beside plain class folders and tars: what each of them lists."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.convert import kinds
from pipeline.convert.sources import Listing, SourceOptions
from pipeline.errors import UserError
from tests.helpers import jpeg, random_image
from tests.pipeline.convert.test_sources import WNIDS, devkit, listed, write_images


def kind_of(src: Path, **options: Any) -> tuple[str, Listing]:
    return kinds.list_sources(str(src), SourceOptions(**options))


def content(listing: Listing, split: str) -> dict[bytes, str]:
    """The bytes of each image of a split, with its class."""
    return {Path(image.path).read_bytes(): listing.classes[image.label] for image in listing.splits[split]}


# Kaggle's ImageNet, and other flat validation images

VAL = {f"ILSVRC2012_val_{i:08d}": WNIDS[(i - 1) % 3] for i in range(1, 8)}


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    """Kaggle's layout with 3 classes, 6 training and 7 validation images."""
    root = tmp_path / "kaggle"
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    write_images(images, *(f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in WNIDS for i in range(2)))
    for i, stem in enumerate(VAL):
        write_images(images, f"val/{stem}.JPEG")
        (images / "val" / f"{stem}.JPEG").write_bytes(jpeg(random_image(40, 50, seed=100 + i)))
    write_images(images, "test/ILSVRC2012_test_00000001.JPEG")
    write_images(root, "ILSVRC/Annotations/CLS-LOC/val/x.xml", "ILSVRC/ImageSets/CLS-LOC/val.txt")
    rows = [f"{stem},{VAL[stem]} 85 1 499 272 {VAL[stem]} 1 2 3 4 " for stem in sorted(VAL, reverse=True)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} a thing, some thing\n" for wnid in sorted(WNIDS)))
    return root


EXPECTED = {jpeg(random_image(40, 50, seed=100 + i)): wnid for i, wnid in enumerate(VAL.values())}


@pytest.mark.parametrize("below", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_imagenet_is_found_from_any_folder_of_its_path(kaggle: Path, below: str) -> None:
    kind, found = kind_of(kaggle / below)
    assert kind == "kaggle"
    assert found.classes == sorted(WNIDS)
    assert content(found, "val") == EXPECTED
    assert {image.key for image in found.splits["val"]} == {f"{wnid}/{stem}" for stem, wnid in VAL.items()}
    assert len(found.splits["train"]) == 6
    assert found.fingerprint() == kind_of(kaggle)[1].fingerprint()
    assert found.notes == [f"labels of val: {kaggle}/LOC_val_solution.csv"]


def labels_file(kaggle: Path, how: str) -> None:
    (kaggle / "LOC_val_solution.csv").unlink()
    images = kaggle / "ILSVRC" / "Data" / "CLS-LOC"
    numbers = [sorted(WNIDS).index(wnid) for wnid in VAL.values()]
    if how == "wnids in order":
        (images / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(VAL.values()))
    elif how == "numbers in order":
        (images / "val.txt").write_text("\n".join(map(str, numbers)))
    elif how == "names and numbers":  # Caffe's
        lines = [f"{stem}.JPEG {number}" for stem, number in zip(VAL, numbers, strict=True)]
        (images / "val.txt").write_text("\n".join(sorted(lines, reverse=True)))
    elif how == "Tiny ImageNet":
        lines = [f"{stem}.JPEG\t{wnid}\t0\t0\t62\t62" for stem, wnid in VAL.items()]
        (images / "val" / "val_annotations.txt").write_text("\n".join(lines))
    elif how == "devkit":
        (kaggle / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit())  # image i has number 1 + i % 3
    else:
        (kaggle / "devkit.tar.gz").write_bytes(devkit())
        shutil.unpack_archive(kaggle / "devkit.tar.gz", kaggle, filter="data")


@pytest.mark.parametrize(
    "how", ["wnids in order", "numbers in order", "names and numbers", "Tiny ImageNet", "devkit", "unpacked"]
)
def test_labels_of_flat_validation_images(kaggle: Path, how: str) -> None:
    labels_file(kaggle, how)
    assert content(listed(kaggle), "val") == EXPECTED


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no file with their labels is in it or above it"),
        ("n01000000\n" * 6, "has 6 labels for 7 images"),
        ("ILSVRC2012_val_00000001.JPEG n01000000\n", "has no label for ILSVRC2012_val_00000002.JPEG"),
        ("1\n2\n3\n1\n2\n3\n1\n", "labels are numbers from 1 to 3"),
        ("n01000000\n" * 6 + "n09999999", "label 'n09999999' is none of the 3 classes"),
        ("0\n" * 6 + "3\n", "labels go up to 3, but there are names for 3 classes only"),
        ("ILSVRC2012_val_00000001 0\nILSVRC2012_val_00000001 1\n", "has two labels, 0 and 1"),
    ],
)
def test_bad_labels_of_flat_validation_images_are_refused(kaggle: Path, content: str | None, words: str) -> None:
    (kaggle / "LOC_val_solution.csv").unlink()
    if content is not None:
        (kaggle / "ILSVRC" / "labels").write_text(content)
    with pytest.raises(UserError, match=words):
        listed(kaggle, val_labels=str(kaggle / "ILSVRC" / "labels") if content else "")


def test_tiny_imagenet(tmp_path: Path) -> None:
    names = [f"train/{wnid}/images/{wnid}_{i}.JPEG" for wnid in WNIDS for i in range(2)]
    write_images(tmp_path, *names, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "test/images/test_0.JPEG")
    for wnid in WNIDS:
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("n_0.JPEG\t0\t10\t63\t58\n")
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02000000\t0\t3\nval_1.JPEG\tn01000000\t5\t5\n")
    found = listed(tmp_path)
    assert content(found, "val") == {jpeg(random_image(40, 50, 6)): "n02000000", jpeg(random_image(40, 50, 7)): "n01000000"}
    assert content(found, "train") == {jpeg(random_image(40, 50, i)): name.split("/")[1] for i, name in enumerate(names)}


def test_images_beside_class_folders_are_named(tmp_path: Path) -> None:
    found = listed(write_images(tmp_path, "train/n1/a.jpg", "train/n2/a.jpg", "train/b.jpg", "train/c.jpg"))
    assert found.notes == [f"not used: 2 images beside the class folders, such as {tmp_path}/train/b.jpg"]
