"""Sources end to end: make_shards.py finds all images in folders, official tars and WebDataset tars."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from scipy.io import savemat

from pipeline.cli import Parser
from pipeline.convert import kinds, tars
from pipeline.convert.make import ConvertOptions, check_places, make_shards
from pipeline.convert.sources import Listing, SourceOptions
from pipeline.errors import UserError
from pipeline.store.shards import ShardSet
from tests.helpers import assert_refused, jpeg, random_image, run_script, without_progress


def listed(src: Path, **options: Any) -> Listing:
    return kinds.list_sources(str(src), SourceOptions(**options))[1]


WNIDS = ("n03000000", "n01000000", "n02000000")  # in the order of their ILSVRC2012_ID, which is not sorted


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def packed(files: dict[str, bytes], mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            add(tar, name, data)
    return stream.getvalue()


def devkit(truth: Sequence[int]) -> bytes:
    """A devkit like the official one: 3 classes and their parent node. Their numbers are not in the order of the wnids.

    truth: the class numbers, from 1 on, of the validation images.
    """
    kind = [("ILSVRC2012_ID", float), ("WNID", object), ("words", object), ("num_children", float)]
    rows = [(i + 1, wnid, "a thing, some thing", 0) for i, wnid in enumerate(WNIDS)] + [(4, "n00001740", "entity", 3)]
    stream = io.BytesIO()
    savemat(stream, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    root = "ILSVRC2012_devkit_t12/data"
    return packed(
        {
            f"{root}/meta.mat": stream.getvalue(),
            f"{root}/ILSVRC2012_validation_ground_truth.txt": "".join(f"{number}\n" for number in truth).encode(),
        },
        "w:gz",
    )


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars with the official layout: 4 training images per class, 7 validation images."""
    root = tmp_path_factory.mktemp("official")
    inner = {
        f"{wnid}.tar": packed({f"{wnid}_{i}.JPEG": jpeg(random_image(60, 70, seed=10 * c + i)) for i in (3, 20, 1, 100)})
        for c, wnid in enumerate(WNIDS)
    }
    (root / tars.TRAIN).write_bytes(packed(inner))
    val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(random_image(50, 40, seed=100 + i)) for i in reversed(range(7))}
    (root / tars.VAL).write_bytes(packed(val))
    (root / tars.DEVKIT).write_bytes(devkit([1 + i % 3 for i in range(7)]))
    return root


def stored(root: Path, split: str) -> dict[str, tuple[int, bytes]]:
    shards = ShardSet(root, split)
    return {shards.key(i): (int(shards.samples[i]["label"]), shards.read(i).tobytes()) for i in range(len(shards))}


def convert(src: Path | str, out: Path, *options: object) -> None:
    result = run_script("tools/make_shards.py", src, "--out", out, "--profile", "original", "--workers", 1, *options)
    assert result.returncode == 0, result.stderr


def test_official_tars_are_read_without_unpacking(official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "out", "--skip-md5", "--shard-size", 5)
    wnids = sorted(WNIDS)
    assert ShardSet(tmp_path / "out", "train").manifest.classes == wnids
    expected = {
        f"{wnid}/{wnid}_{i}": (wnids.index(wnid), jpeg(random_image(60, 70, seed=10 * c + i)))
        for c, wnid in enumerate(WNIDS) for i in (3, 20, 1, 100)
    }  # fmt: skip
    assert stored(tmp_path / "out", "train") == expected
    expected = {}
    for i in range(7):  # image i has class number 1 + i % 3
        wnid = WNIDS[i % 3]
        expected[f"{wnid}/ILSVRC2012_val_{i + 1:08d}"] = (wnids.index(wnid), jpeg(random_image(50, 40, seed=100 + i)))
    assert stored(tmp_path / "out", "val") == expected


def test_without_training_images_classes_come_from_the_devkit(official: Path, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for name in (tars.VAL, tars.DEVKIT):
        (tmp_path / "src" / name).symlink_to(official / name)
    convert(tmp_path / "src", tmp_path / "out", "--skip-md5")
    assert ShardSet(tmp_path / "out", "val").manifest.classes == sorted(WNIDS)
    assert len(ShardSet(tmp_path / "out", "val")) == 7


def test_other_files_under_the_official_names_are_refused(official: Path, tmp_path: Path) -> None:
    result = run_script("tools/make_shards.py", official, "--out", tmp_path / "out")
    assert_refused(without_progress(result), "MD5", "--skip-md5", "ILSVRC2012")
    assert not (tmp_path / "out").exists()


def test_md5_of_the_right_file_passes(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tars.MD5:
        monkeypatch.setitem(tars.MD5, name, hashlib.md5((official / name).read_bytes()).hexdigest())
        tars.check_md5(str(official), name)
    assert {len(digest) for digest in tars.MD5.values()} == {32}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no devkit", "its labels are in"),
        ("junk devkit", "not the ILSVRC 2012 devkit"),
        ("short val", "holds 6 images, the devkit labels 7"),
        ("truncated train", "not a complete, uncompressed tar"),
        ("junk train", "not a complete, uncompressed tar"),
        ("devkit alone", "neither"),
    ],
)
def test_damaged_official_tars_are_named(official: Path, tmp_path: Path, how: str, words: str) -> None:
    files = {name: (official / name).read_bytes() for name in tars.MD5}
    if how == "no devkit":
        del files[tars.DEVKIT]
    elif how == "junk devkit":
        files[tars.DEVKIT] = b"junk"
    elif how == "short val":
        files[tars.VAL] = packed({f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(random_image(50, 40)) for i in range(6)})
    elif how == "truncated train":
        files[tars.TRAIN] = files[tars.TRAIN][: len(files[tars.TRAIN]) // 2 // 512 * 512 + 100]
    elif how == "junk train":
        files[tars.TRAIN] = b"junk" * 1000
    else:
        files = {tars.DEVKIT: files[tars.DEVKIT]}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        listed(tmp_path, check_md5=False)


def test_foreign_webdataset_tars(tmp_path: Path) -> None:
    """The tars come from webdataset's own writer, with its keys and labels, and additional .json files."""
    src = tmp_path / "src"
    src.mkdir()
    expected: dict[str, dict[str, tuple[int, bytes]]] = {"train": {}, "val": {}}
    for split, pattern in (("train", "imagenet1k-train-%04d.tar"), ("val", "imagenet1k-validation-%02d.tar")):
        with webdataset.ShardWriter(str(src / pattern), maxcount=4, verbose=0) as writer:
            for i in range(10):
                data = jpeg(random_image(40, 50, seed=i))
                writer.write({"__key__": f"n{i % 3}/{split}{i}", "jpg": data, "cls": i % 3, "json": {"label": i % 3}})
                expected[split][f"n{i % 3}/{split}{i}"] = (i % 3, data)
    (src / "classes.txt").write_text("cat\ndog\nbird\n")
    convert(src, tmp_path / "out")
    assert ShardSet(tmp_path / "out", "train").manifest.classes == ["cat", "dog", "bird"]
    for split in ("train", "val"):
        assert stored(tmp_path / "out", split) == expected[split]


@pytest.mark.slow
def test_cropfeeds_own_shards_are_a_source(small_shards: Path, tmp_path: Path) -> None:
    """Conversion of original shards to lossless ones keeps classes, labels and keys."""
    result = run_script("tools/make_shards.py", small_shards, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert ShardSet(tmp_path / "out", "train").manifest.classes == ShardSet(small_shards, "train").manifest.classes
    before, after = stored(small_shards, "val"), stored(tmp_path / "out", "val")
    assert {key: label for key, (label, _) in before.items()} == {key: label for key, (label, _) in after.items()}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.jpg": jpeg(random_image(9, 9))}, "sample a has no .cls"),
        ({"a.cls": b"3"}, "sample a has no image"),
        ({"a.cls": b"-1", "a.jpg": jpeg(random_image(9, 9))}, "begin at 0"),
        ({"a.cls": b"", "a.jpg": jpeg(random_image(9, 9))}, "is not a label"),
        ({"a.cls": b"\xff\x00", "a.jpg": jpeg(random_image(9, 9))}, "cannot be read"),
        ({}, "hold no samples"),
    ],
)
def test_bad_webdataset_tars_are_named(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    (tmp_path / "some.tar").write_bytes(packed(files))
    with pytest.raises(UserError, match=words) as caught:
        listed(tmp_path)
    assert "some.tar" in str(caught.value)


def test_too_few_class_names(tmp_path: Path) -> None:
    (tmp_path / "some.tar").write_bytes(packed({"a.cls": b"5", "a.jpg": jpeg(random_image(9, 9))}))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match="up to 5, but there are names for 2"):
        listed(tmp_path)


def test_the_fingerprint_of_a_listing_detects_changed_sources(image_folder: Path, tmp_path: Path) -> None:
    """The fingerprint depends on names, labels and sizes, but not on the location of the folder."""
    first = listed(image_folder).fingerprint()
    shutil.copytree(image_folder, tmp_path / "copy")
    assert listed(tmp_path / "copy").fingerprint() == first
    victim = next(iter(sorted((tmp_path / "copy" / "train" / "n00000001").iterdir())))
    victim.write_bytes(victim.read_bytes() + b"x")
    assert listed(tmp_path / "copy").fingerprint() != first


def test_symbolic_links_are_followed(image_folder: Path, tmp_path: Path) -> None:
    """A class, an image and a split that are links give the same listing, apart from the images' paths."""
    train, val = tmp_path / "train", tmp_path / "val"
    train.mkdir()
    val.symlink_to(image_folder / "val")
    first, *others = sorted((image_folder / "train").iterdir())
    (train / first.name).mkdir()
    for image in first.iterdir():
        (train / first.name / image.name).symlink_to(image)
    for folder in others:
        (train / folder.name).symlink_to(folder)
    found, expected = listed(tmp_path), listed(image_folder)
    assert found.classes == expected.classes
    assert found.fingerprint() == expected.fingerprint()


@pytest.mark.parametrize("name", ["train/missing", "train/n00000001/missing.JPEG", "train/n00000001/loop.JPEG"])
def test_links_that_lead_nowhere_are_named(image_folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(image_folder, tmp_path / "copy")
    link = tmp_path / "copy" / name
    link.symlink_to(link if "loop" in name else tmp_path / "nothing")
    with pytest.raises(UserError, match=f"{name}: is a symbolic link that leads nowhere"):
        listed(tmp_path / "copy")


def test_manifest_and_report_describe_the_source(official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "out", "--skip-md5")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["splits"]["train"]["listed"] == report["splits"]["train"]["stored"] == 12
    assert report["splits"]["val"]["stored"] == 7


# Names of splits


def tar_of(labels: range) -> bytes:
    members: dict[str, bytes] = {}
    for label in labels:
        members |= {f"s{label}.jpg": jpeg(random_image(40, 50, seed=label)), f"s{label}.cls": str(label % 3).encode()}
    return packed(members)


@pytest.mark.parametrize(
    ("train", "val"),
    [("train", "validation"), ("Train", "Val"), ("training", "valid"), ("TRAIN", "VALIDATION"), ("training_set", "dev")],
)
def test_split_folders_have_many_names(image_folder: Path, tmp_path: Path, train: str, val: str) -> None:
    shutil.copytree(image_folder / "train", tmp_path / train)
    shutil.copytree(image_folder / "val", tmp_path / val)
    found, expected = listed(tmp_path), listed(image_folder)
    assert {split: len(images) for split, images in found.splits.items()} == {"train": 60, "val": 21}
    assert [image.label for image in found.splits["val"]] == [image.label for image in expected.splits["val"]]


def test_a_test_split_is_named_and_not_converted(image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder, tmp_path / "src")
    shutil.copytree(image_folder / "val", tmp_path / "src" / "test")
    result = without_progress(run_script("tools/make_shards.py", tmp_path / "src", "--out", tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert "not used: test" in result.stderr
    assert set(json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]) == {"train", "val"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["imagenet-train-0.tar", "imagenet-test-0.tar"], {"train": 1}),
        (["train-0.tar", "VAL-0.tar"], {"train": 1, "val": 1}),
        (["train-0.tar", "valset_0.tar"], {"train": 1, "val": 1}),
        (["train-0.tar", "DEV-0.TAR", "holdout-0.tar"], {"train": 1, "val": 1}),
        (["medieval-train-0.tar", "medieval-train-1.tar"], {"train": 2}),
        (["a-0.tar", "a-1.tar"], {"train": 2}),
        (["train/0.tar", "validation/0.tar"], {"train": 1, "val": 1}),
    ],
)
def test_splits_of_tars(tmp_path: Path, names: list[str], expected: dict[str, int]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(tar_of(range(4)))
    found = listed(tmp_path).splits
    assert {split: len(images) // 4 for split, images in found.items()} == expected


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train-0.tar", "more-0.tar"], "more-0.tar: is it for training or validation"),
        (["train-val-0.tar"], "names two splits, train and val"),
        (["test-0.tar"], "holds only a test split"),
        (["train/0.tar", "Training/0.tar"], "both the split train"),
    ],
)
def test_doubtful_splits_are_refused(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(tar_of(range(4)))
    with pytest.raises(UserError, match=words):
        listed(tmp_path)


@pytest.mark.parametrize(("names", "train"), [(("training_set", "test"), "training_set"), (("train", "train_old"), "train")])
def test_splits_in_whole_names_and_in_words_are_found_together(tmp_path: Path, names: tuple[str, str], train: str) -> None:
    for name in names:
        write_images(tmp_path, f"{name}/cat/0.jpg")
    assert [[image.path for image in found] for found in listed(tmp_path).splits.values()] == [[f"{tmp_path}/{train}/cat/0.jpg"]]


def test_tars_beside_class_folders_of_a_split_are_told(tmp_path: Path) -> None:
    write_images(tmp_path, "train/cat/0.jpg")
    (tmp_path / "train" / "x.tar").write_bytes(tar_of(range(2)))
    assert f"not used: 1 files beside the class folders, such as {tmp_path}/train/x.tar" in listed(tmp_path).notes


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_in_a_tar_are_not_skipped(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "train.tar").write_bytes(tar_of(range(2)))
    with tarfile.open(tmp_path / "train.tar", "a") as tar:
        for extension in ("jpg", "cls"):
            link = tarfile.TarInfo(f"twin.{extension}")
            link.type, link.linkname = kind, f"s1.{extension}"
            tar.addfile(link)
    with pytest.raises(UserError, match=r"train.tar: twin.jpg is a link"):
        listed(tmp_path)


def test_labels_that_are_fractions_are_refused(tmp_path: Path) -> None:
    files = {f"s{i}.{kind}": f"{i}.0".encode() if kind == "cls" else b"jpg" for i in range(11) for kind in ("jpg", "cls")}
    (tmp_path / "train.tar").write_bytes(packed(files))
    with pytest.raises(UserError, match=r"label 0.0 is a fraction"):  # as names, they would be numbered 0, 1, 10, 2, ...
        listed(tmp_path)


@pytest.mark.parametrize("where", ["train", "."])
def test_tars_that_class_folders_were_unpacked_from_are_not_used(image_folder: Path, tmp_path: Path, where: str) -> None:
    source = image_folder if where == "train" else image_folder / "train"
    shutil.copytree(source, tmp_path / "src")
    for folder in (tmp_path / "src" / where).iterdir():
        if folder.name.startswith("n"):
            with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
                tar.add(folder, ".")
    assert listed(tmp_path / "src").fingerprint() == listed(source).fingerprint()


# Names and damage


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    """A class and an image with Latin-1 names; the same shards under a Latin-1 locale."""
    folder = os.fsencode(tmp_path / "src") + b"/caf\xe9"
    os.makedirs(folder)
    for name in (b"\xe9t\xe9.jpg", "plätze.jpg".encode(), b"plain.jpg"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(jpeg(random_image(40, 50)))
    shards = {}
    for locale in ("C.UTF-8", "en_US.ISO-8859-1", "C"):
        environment: dict[str, Any] = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        result = run_script("tools/make_shards.py", tmp_path / "src", "--out", tmp_path / locale, **environment)
        assert result.returncode == 0, result.stderr
        shards[locale] = {file.name: file.read_bytes() for file in sorted((tmp_path / locale).rglob("*")) if file.is_file()}
    assert shards["C"] == shards["C.UTF-8"] == shards["en_US.ISO-8859-1"]
    assert json.loads(shards["C"]["manifest.json"])["classes"] == ["caf\\xe9"]
    with tarfile.open(tmp_path / "C" / "train" / "000000.tar", encoding="utf-8") as tar:
        keys = {name.rsplit(".", 1)[0] for name in tar.getnames()}
    assert keys == {"caf\\xe9/\\xe9t\\xe9", "caf\\xe9/plätze", "caf\\xe9/plain"}


def test_a_tar_that_is_cut_at_any_block_is_noticed(tmp_path: Path) -> None:
    data = tar_of(range(3))
    end = len(data.rstrip(b"\0"))
    for cut in (*range(tarfile.BLOCKSIZE, end, tarfile.BLOCKSIZE), end):
        (tmp_path / "train-0.tar").write_bytes(data[:cut])
        with pytest.raises(UserError, match="not a complete, uncompressed tar"):
            listed(tmp_path)


# Levels, places and files that are not part of the source


def write_images(root: Path, *names: str) -> Path:
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(random_image(40, 50, seed=index)))
    return root


def test_the_right_level_is_named(tmp_path: Path) -> None:
    images = tmp_path / "data" / "imagenet"
    write_images(images, "train/n1/a.jpg", "train/n2/a.jpg", "val/n1/b.jpg", "val/n2/b.jpg")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "train.zip").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    write_images(tmp_path, "flat/a.jpg", "top/flowers/rose/a.jpg", "top/flowers/tulip/a.jpg")
    for wrong, *words in (
        (images.parent, f"the images are in {images}", f"give {images}"),
        (images / "train" / "n1", "holds images, but no class folders", f"give {images}"),
        (images / "train" / "n1" / "a.jpg", "is an image", f"give {images}"),
        (tmp_path / "packed", "holds train.zip", "unpack it"),
        (tmp_path / "packed" / "train.zip", "is an archive", "unpack it"),
        (tmp_path / "empty", "is an empty folder"),
        (tmp_path / "flat", "holds images, but no class folders", f"if it is a class folder, give {tmp_path}"),
        (tmp_path / "top", "all class folders are in flowers", f"give {tmp_path}/top/flowers"),
        (tmp_path / "nowhere", "no such folder"),
    ):
        with pytest.raises(UserError) as refused:
            listed(wrong)
        for word in (str(wrong), *words):
            assert word in str(refused.value), (wrong, str(refused.value))
        assert "remove" not in str(refused.value)


@pytest.mark.parametrize(
    ("src", "out", "words"),
    [
        ("a", "a", "is the folder of the images"),
        ("a", "a/shards", "is inside the folder of the images"),
        ("a/images", "a", "is inside the folder for the shards"),
        ("a", "link/shards", "is inside the folder of the images"),
        ("s3://b/a", "s3://b/a/shards", "is inside the folder of the images"),
    ],
)
def test_images_and_shards_in_one_folder_are_refused(tmp_path: Path, src: str, out: str, words: str) -> None:
    write_images(tmp_path / "a", "images/n1/a.jpg", "n1/a.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))
    src, out = (place if "://" in place else str(tmp_path / place) for place in (src, out))
    with pytest.raises(UserError, match=words):
        make_shards(ConvertOptions(src, out, workers=1))
    assert sorted(tmp_path.rglob("*")) == before
    check_places(str(tmp_path / "a"), str(tmp_path / "a-shards"))


def test_a_home_folder_after_an_equals_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave --out=~/shards as it is. Without this, a folder called ~ would be made."""
    monkeypatch.setenv("HOME", "/home/me")
    parser = Parser(None)
    parser.add_argument("src")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(["~", "--out=~/shards"])
    assert (args.src, args.out) == ("/home/me", Path("/home/me/shards"))


def test_hidden_and_system_files_are_skipped_and_counted(image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder, tmp_path / "src")
    for name in ("train/n00000001/.DS_Store", "train/n00000001/._a.JPEG", "train/Thumbs.db", "val/n00000001/desktop.ini"):
        (tmp_path / "src" / name).write_bytes(b"x")
    write_images(tmp_path / "src", "train/.ipynb_checkpoints/a.JPEG", "train/n00000002/.ipynb_checkpoints/b.JPEG")
    found = listed(tmp_path / "src")
    assert found.fingerprint() == listed(image_folder).fingerprint()
    assert found.notes == [f"skipped 6 hidden or system files, such as {tmp_path}/src/train/.ipynb_checkpoints"]


def test_hidden_members_of_tars_are_skipped_and_counted(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(3):
        members |= {f"./._s{i}.jpg": b"\0\5\x16\7", f"./s{i}.jpg": jpeg(random_image(40, 50, i)), f"./._s{i}.cls": b"x"}
        members |= {f"./s{i}.cls": b"%d" % i}
    (tmp_path / "train-0.tar").write_bytes(packed({**members, ".DS_Store": b"x", "__MACOSX/s0.jpg": b"x"}))
    found = listed(tmp_path)
    assert [(image.key, image.label) for image in found.splits["train"]] == [("_/s0", 0), ("_/s1", 1), ("_/s2", 2)]
    assert found.notes == [f"skipped 8 hidden or system files, such as {tmp_path}/train-0.tar/./._s0.jpg"]


# Nested folders


def test_nested_class_folders(tmp_path: Path) -> None:
    """As in Places365: classes are paths, in the order of these paths."""
    names = [
        f"{split}/{name}/x.jpg" for split in ("train", "val") for name in ("b/bar/outdoor", "a/abbey", "a/airfield", "b/barn")
    ]
    found = listed(write_images(tmp_path, *names))
    assert found.classes == ["a/abbey", "a/airfield", "b/bar/outdoor", "b/barn"]
    assert [(image.key, image.label) for image in found.splits["train"]] == [
        ("a/abbey/x", 0), ("a/airfield/x", 1), ("b/bar/outdoor/x", 2), ("b/barn/x", 3),
    ]  # fmt: skip
    assert [Path(image.path).read_bytes() for image in found.splits["val"]] == [
        jpeg(random_image(40, 50, seed=seed)) for seed in (5, 6, 4, 7)
    ]


def test_a_link_to_a_folder_above_is_noticed(tmp_path: Path) -> None:
    write_images(tmp_path, "train/a/abbey/x.jpg", "train/b/x.jpg")
    (tmp_path / "train" / "a" / "again").symlink_to(tmp_path / "train")
    with pytest.raises(UserError, match="again: is a symbolic link to a folder above it"):
        listed(tmp_path)


def test_classes_may_be_called_like_a_split(tmp_path: Path) -> None:
    found = listed(write_images(tmp_path, "bus/x.jpg", "car/x.jpg", "train/x.jpg"))
    assert found.classes == ["bus", "car", "train"]
    assert list(found.splits) == ["train"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train/a/n1/train/a.jpg", "train/b/a.jpg"], "n1/train: is a train split, in a class folder"),
        (["train/n1/a.jpg", "train/n1/b/c.jpg"], "b: is a folder, but only images are expected here"),
        (["n1/train/a.jpg", "n1/val/a.jpg", "n2/train/a.jpg"], "the images are in .*/n1 and .*/n2; give one of them"),
        (["train/a.jpg", "val/a.jpg"], "train: holds no class folders"),
        (["test/n1/a.jpg"], "holds only a test split"),
    ],
)
def test_folders_without_a_clear_meaning_are_refused(tmp_path: Path, names: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        listed(write_images(tmp_path, *names))


# Parts of one split for validation


def test_a_part_of_each_class_becomes_the_validation_split(tmp_path: Path) -> None:
    names = [f"{name}/{i}.jpg" for name, count in (("a", 40), ("b", 10), ("c", 3)) for i in range(count)]
    whole = listed(write_images(tmp_path, *names))
    found = listed(tmp_path, val_share=0.1)
    counts = {split: [[image.label for image in images].count(i) for i in range(3)] for split, images in found.splits.items()}
    assert counts == {"train": [36, 9, 2], "val": [4, 1, 1]}
    assert sorted([*found.splits["train"], *found.splits["val"]], key=lambda image: image.path) == sorted(
        whole.splits["train"], key=lambda image: image.path
    )
    assert [image.name for image in found.splits["val"] if image.label == 1] == [
        min((f"b/{i}.jpg" for i in range(10)), key=lambda name: hashlib.sha256(f"0/{name}".encode()).hexdigest())
    ]
    assert [len(images) for images in listed(tmp_path, val_per_class=2).splits.values()] == [47, 6]
    other = kinds.list_sources(str(tmp_path), SourceOptions(val_share=0.1), seed=1)[1]
    assert other.splits["val"] != found.splits["val"]
    with pytest.raises(UserError, match="class c: has 3 images, 3 of them for validation leave none"):
        listed(tmp_path, val_per_class=3)
    with pytest.raises(UserError, match="with a training split alone"):
        listed(write_images(tmp_path / "both", "train/n1/a.jpg", "val/n1/a.jpg"), val_share=0.1)


# WebDataset tars of others


def test_labels_in_a_json_field_or_a_text_member(tmp_path: Path) -> None:
    """As img2dataset writes them: .jpg, .txt with the caption, .json."""
    members: dict[str, bytes] = {}
    for i, name in enumerate(("dog", "cat", "dog")):
        content = json.dumps({"label": name, "number": i % 2, "caption": "a"}).encode()
        members |= {f"{i}.webp": jpeg(random_image(40, 50, i)), f"{i}.txt": name.encode() + b"\n", f"{i}.json": content}
    (tmp_path / "00000.tar").write_bytes(packed(members))
    (tmp_path / "00000.parquet").write_bytes(b"img2dataset's table, without images")
    for column in ("label", "txt"):
        found = listed(tmp_path, label_column=column)
        assert found.classes == ["cat", "dog"]
        assert [image.label for image in found.splits["train"]] == [1, 0, 1]
    found = listed(tmp_path, label_column="number")
    assert found.classes == ["0", "1"]
    assert [image.label for image in found.splits["train"]] == [0, 1, 0]
    with pytest.raises(UserError, match=r"sample 0 has no .cls, only webp, txt, json; .*`label_column`"):
        listed(tmp_path)
    with pytest.raises(UserError, match="sample 0 has no field nothing"):
        listed(tmp_path, label_column="nothing")


def test_labels_as_names_and_known_names(tmp_path: Path) -> None:
    members = {"a.png": b"x", "a.cls": b"dog", "b.png": b"x", "b.cls": b"cat"}
    (tmp_path / "train-0.tar").write_bytes(packed(members))
    assert listed(tmp_path).classes == ["cat", "dog"]
    (tmp_path / "classes.txt").write_text("\ufeffdog\n\ncat\n\nbird\n", encoding="utf-8")
    found = listed(tmp_path)
    assert found.classes == ["dog", "cat", "bird"]
    assert [image.label for image in found.splits["train"]] == [0, 1]
    assert found.notes == ["train: 1 of 3 classes have no images, such as bird"]
    (tmp_path / "classes.txt").write_text("dog\nhorse\n")
    with pytest.raises(UserError, match="label 'cat' is none of the 2 classes, such as 'dog'"):
        listed(tmp_path)
    (tmp_path / "classes.txt").write_text("dog\ncat\ndog\n")
    with pytest.raises(UserError, match="two classes are called 'dog'"):
        listed(tmp_path)


def test_a_split_beside_the_source_is_told(image_folder: Path) -> None:
    assert listed(image_folder / "train").notes == [f"only the training images; to use val beside it, give {image_folder}"]
    assert listed(image_folder / "val").notes == ["the images of this val folder become the training split"]


@pytest.mark.parametrize("content", ["[]", "{}", "junk", '{"classes": 3}'])
def test_a_manifest_of_another_program_is_not_used(tmp_path: Path, content: str) -> None:
    (tmp_path / "train-0.tar").write_bytes(tar_of(range(4)))
    (tmp_path / "manifest.json").write_text(content)
    assert listed(tmp_path).classes == ["0", "1", "2"]


def test_splits_with_more_words_than_one(tmp_path: Path) -> None:
    """They are no class folders. A class may have such a word in its name, too."""
    found = listed(
        write_images(tmp_path / "a", "train2012/n1/a.jpg", "train2012/n2/a.jpg", "imagenet_val/n1/a.jpg", "x/n1/a.jpg")
    )
    assert found.classes == ["n1", "n2"]
    assert {split: len(images) for split, images in found.splits.items()} == {"train": 2, "val": 1}
    found = listed(write_images(tmp_path / "b", "test tube/a.jpg", "train station/a.jpg", "cat/a.jpg"))
    assert found.classes == ["cat", "test tube", "train station"]
    with pytest.raises(UserError, match="train2013 and train2012 are both the split train"):
        listed(write_images(tmp_path / "c", "train2012/n1/a.jpg", "train2013/n1/a.jpg"))


def test_tars_among_images_are_told_and_never_read_as_images(tmp_path: Path) -> None:
    write_images(tmp_path / "beside", "n1/a.jpg", "n1/all.tar", "n2/a.jpg", "flowers.tar")
    found = listed(tmp_path / "beside")
    assert [image.name for image in found.splits["train"]] == ["n1/a.jpg", "n2/a.jpg"]
    assert found.notes == [f"not used: all.tar among the images in {tmp_path}/beside/n1"]
    with pytest.raises(UserError, match=r"a/b: holds train.tar, no images; give .*/a/b if these are all, or unpack them"):
        listed(write_images(tmp_path / "deep", "a/b/train.tar", "a/b/val.tar"))


def test_classes_with_equal_names_are_told_apart_by_their_numbers(tmp_path: Path) -> None:
    """ImageNet has two cranes. With names as labels, nobody knows which is meant."""
    (tmp_path / "train-0.tar").write_bytes(tar_of(range(3)))
    (tmp_path / "classes.txt").write_text("crane\nbird\ncrane\n")
    found = listed(tmp_path)
    assert found.classes == ["crane (0)", "bird", "crane (2)"]
    assert found.notes == ["2 classes have equal names, and are called crane (0), crane (2)"]
