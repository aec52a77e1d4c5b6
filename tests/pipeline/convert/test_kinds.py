"""The kinds of sources beside plain class folders and tars: what each of them lists."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.convert import kinds, tars
from pipeline.convert.make import ConvertOptions, make_shards
from pipeline.convert.sources import Listing, SourceOptions
from pipeline.convert.verify import verify
from pipeline.errors import UserError
from pipeline.store import files
from pipeline.store.manifest import Manifest
from pipeline.store.shards import ShardSet
from tests.helpers import jpeg, random_image, run_forked, run_script
from tests.pipeline.convert.test_sources import WNIDS, devkit, listed, packed, write_images


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
        (kaggle / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit([1 + i % 3 for i in range(7)]))
    else:
        (kaggle / "devkit.tar.gz").write_bytes(devkit([1 + i % 3 for i in range(7)]))
        shutil.unpack_archive(kaggle / "devkit.tar.gz", kaggle, filter="data")


@pytest.mark.parametrize(
    "how", ["wnids in order", "numbers in order", "names and numbers", "Tiny ImageNet", "devkit", "unpacked"]
)
def test_labels_of_flat_validation_images(kaggle: Path, how: str) -> None:
    labels_file(kaggle, how)
    assert content(listed(kaggle), "val") == EXPECTED


def test_flat_validation_images_whose_names_differ_in_the_extension(kaggle: Path) -> None:
    flat = write_images(kaggle / "flat" / "val", "1.jpg", "1.png", "2,a.jpg")
    for wnid in ("n01", "n02"):
        write_images(kaggle / "flat" / "train", f"{wnid}/0.jpg")
    labels = {"val.txt": "n01\nn02\nn01\n", "val.csv": '"image","label"\n"2,a.jpg","n02"\n1.jpg,n01\n'}
    for name, text in labels.items():
        (flat.parent / name).write_text(text)
    assert [image.label for image in listed(flat.parent).splits["val"]] == [0, 1, 0]
    (flat.parent / "val.txt").unlink()
    (flat / "1.png").unlink()
    assert [image.label for image in listed(flat.parent).splits["val"]] == [0, 1]


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
    assert found.notes == [f"not used: 2 files beside the class folders, such as {tmp_path}/train/b.jpg"]


# Parquet


def write_parquet(
    path: Path, images: list[tuple[Any, Any]], names: list[str] | None = None, group: int = 2, **columns: str
) -> None:
    """As Hugging Face's datasets write it: a struct of bytes and path, a ClassLabel with names. columns: image, label."""
    image, label = columns.get("image", "image"), columns.get("label", "label")
    features: dict[str, Any] = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
    schema = pa.schema(
        [
            (image, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            (label, pa.string() if names is None else pa.int64()),
        ],
        metadata={} if names is None else {"huggingface": json.dumps({"info": {"features": features}})},
    )
    cells = [data if data is None else {"bytes": data, "path": f"{i}.jpg"} for i, (data, _) in enumerate(images)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({image: cells, label: [label for _, label in images]}, schema=schema), path, row_group_size=group)


def shards_of(src: Path | str, out: Path, **options: Any) -> dict[bytes, str]:
    """Convert with the profile `original`; the stored bytes of all images, with their splits and classes."""
    make_shards(ConvertOptions(str(src), str(out), "original", shard_size=3, workers=1, images=SourceOptions(**options)))
    found = {}
    for split in Manifest(out).splits:
        stored = ShardSet(out, split)
        for i in range(len(stored)):
            found[stored.read(i).tobytes()] = f"{split} {stored.manifest.classes[int(stored.samples['label'][i])]}"
    return found


IMAGES = [jpeg(random_image(40, 50, seed)) for seed in range(9)]
CLASSES = ["tench, Tinca tinca", "goldfish", "a, b"]
STORED = {data: f"{'train' if i < 7 else 'val'} {CLASSES[i % 3]}" for i, data in enumerate(IMAGES)}


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    rows = [(data, i % 3) for i, data in enumerate(IMAGES)]
    src = tmp_path / "parquet"
    write_parquet(src / "data" / "train-00000-of-00002.parquet", rows[:5], CLASSES)
    write_parquet(src / "data" / "train-00001-of-00002.parquet", rows[5:7], CLASSES)
    write_parquet(src / "data" / "validation-00000-of-00001.parquet", rows[7:], CLASSES)
    write_parquet(src / "data" / "test-00000-of-00001.parquet", [(IMAGES[0], -1)], CLASSES)
    (src / "README.md").write_text("dataset_info:")
    return src


def test_parquet_files_of_hugging_face(parquet: Path, tmp_path: Path) -> None:
    assert kind_of(parquet)[0] == "parquet"
    assert shards_of(parquet, tmp_path / "out") == STORED
    assert not (tmp_path / "out" / "conversion").exists()


def test_parquet_files_at_a_url(parquet: Path, tmp_path: Path) -> None:
    for path in parquet.rglob("*.parquet"):
        files.write(f"memory://{tmp_path}/{path.relative_to(parquet)}", path.read_bytes())
    assert shards_of(f"memory://{tmp_path}", tmp_path / "out") == STORED


def test_damaged_shards_of_parquet_files_are_made_again(parquet: Path, tmp_path: Path) -> None:
    """The row groups are unpacked again, as the first conversion has removed them."""
    shards_of(parquet, tmp_path / "out")
    tar = tmp_path / "out" / "train" / "000001.tar"
    before = tar.read_bytes()
    tar.write_bytes(before[:-1])
    assert shards_of(parquet, tmp_path / "out") == STORED
    assert tar.read_bytes() == before
    assert not (tmp_path / "out" / "conversion").exists()


def test_row_groups_are_read_once_and_in_parts(parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards draw their images from all row groups; reading a row group for each image would take forever."""
    read: list[tuple[str, int]] = []
    whole = pq.ParquetFile.iter_batches

    def counted(self: Any, rows: int, groups: list[int], columns: list[str]) -> Any:
        read.append((self.metadata.row_group(0).column(0).path_in_schema, groups[0]))
        assert rows <= 64
        assert columns == ["image.bytes"]
        return whole(self, rows, groups, columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    shards_of(parquet, tmp_path / "out")
    assert len(read) == 5


def test_parquet_files_with_other_columns(tmp_path: Path) -> None:
    """Labels as text, other names of columns, null images, splits as folders."""
    rows = [(IMAGES[0], "dog"), (None, "cat"), (IMAGES[1], "cat")]
    write_parquet(tmp_path / "src" / "train" / "0000.parquet", rows, image="photo", label="animal")
    found = shards_of(tmp_path / "src", tmp_path / "out", label_column="animal")
    assert found == {IMAGES[0]: "train dog", IMAGES[1]: "train cat"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["left_out"] == [{"split": "train", "image": "train/0000.parquet/000001", "reason": "an empty file"}]
    with pytest.raises(UserError, match="no column of labels, of photo, animal; choose one"):
        listed(tmp_path / "src")
    with pytest.raises(UserError, match="no column of encoded images"):
        listed(tmp_path / "src", image_column="image", label_column="animal")


def test_bad_parquet_files_are_refused(tmp_path: Path) -> None:
    for name, rows, names, words in (
        ("minus", [(IMAGES[0], -1)], ["a", "b"], "label -1; labels begin at 0"),
        ("null", [(IMAGES[0], None)], ["a", "b"], "has the label None"),
        ("high", [(IMAGES[0], 2)], ["a", "b"], "labels go up to 2, but there are names for 2"),
        ("none", [], ["a", "b"], "the train split holds no images"),
    ):
        write_parquet(tmp_path / name / "train.parquet", rows, names)
        with pytest.raises(UserError, match=words):
            listed(tmp_path / name)
    data = (tmp_path / "minus" / "train.parquet").read_bytes()
    for name, damaged in (("cut", data[:-9]), ("junk", b"junk" * 99)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match=r"train\.parquet: cannot be read as parquet"):
            listed(tmp_path / name)


def test_parquet_files_without_images_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([[b"jpg"]], pa.list_(pa.binary())), "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"train.parquet: has no column of encoded images, of image, label"):
        listed(tmp_path)


def test_parquet_without_pyarrow(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pyarrow is not installed; install it: pip install .*parquet"):
        listed(parquet)


# Lists


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four images in no order, whose labels only a list knows."""
    return write_images(tmp_path / "photos", "b/2.jpg", "a.jpg", "b/1.jpg", "with space, comma.jpg")


ROWS: list[tuple[str, ...]] = [
    ("b/2.jpg", "dog", "train"),
    ("a.jpg", "cat", "train"),
    ("b/1.jpg", "cat", "Validation"),
    ("with space, comma.jpg", "dog", "train"),
]


def write_list(path: Path, rows: list[tuple[str, ...]] = ROWS, names: tuple[str, ...] = ("path", "label", "split")) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([names, *rows])
    return path


@pytest.mark.parametrize("extension", ["csv", "tsv", "jsonl", "parquet"])
def test_lists(photos: Path, tmp_path: Path, extension: str) -> None:
    kind, found = kind_of(photos, list=str(write_list(tmp_path / f"list.{extension}")))
    assert kind == "list"
    assert found.classes == ["cat", "dog"]
    keys = {split: [(image.key, image.label) for image in images] for split, images in found.splits.items()}
    assert keys == {"train": [("b/2", 1), ("a", 0), ("with_space,_comma", 1)], "val": [("b/1", 0)]}
    assert content(found, "train") == {
        jpeg(random_image(40, 50, 0)): "dog", jpeg(random_image(40, 50, 1)): "cat", jpeg(random_image(40, 50, 3)): "dog",
    }  # fmt: skip


def test_lists_of_urls_numbers_and_other_columns(photos: Path, tmp_path: Path) -> None:
    files.write(f"memory://{tmp_path}/far.jpg", IMAGES[5])
    rows: list[tuple[str, ...]] = [(f"memory://{tmp_path}/far.jpg", "2"), (f"{photos}/a.jpg", "0"), ("b/1.jpg", "1")]
    path = write_list(tmp_path / "list.csv", rows, ("where", "animal"))
    found = shards_of(photos, tmp_path / "out", list=str(path), image_column="where", label_column="animal")
    assert found == {IMAGES[5]: "train 2", IMAGES[1]: "train 0", IMAGES[2]: "train 1"}


def test_images_at_dead_urls_are_left_out_and_reported(photos: Path, tmp_path: Path) -> None:
    dead = f"memory://{tmp_path}/gone.jpg"
    path = write_list(tmp_path / "list.csv", [("a.jpg", "0"), (dead, "1"), ("b/1.jpg", "1")], ("path", "label"))
    found = shards_of(photos, tmp_path / "out", list=str(path))
    assert found == {IMAGES[1]: "train 0", IMAGES[2]: "train 1"}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["left_out"] == [
        {"split": "train", "image": dead, "reason": "not found"}
    ]
    options = ConvertOptions(str(photos), str(tmp_path / "strict"), workers=1, strict=True, images=SourceOptions(list=str(path)))
    with pytest.raises(UserError, match=rf"{dead}: no usable image \(not found\)"):
        make_shards(options)


@pytest.mark.parametrize(
    ("rows", "names", "words"),
    [
        (
            [("a.jpg", "cat"), ("b.jpg", "dog"), ("c.jpg", "dog")],
            ("path", "label"),
            "2 of 3 images do not exist or are folders, such as .*b.jpg",
        ),
        ([("a.jpg", "cat"), ("a.jpg", "dog")], ("path", "label"), "row 2: a.jpg has two labels, cat and dog"),
        ([("a.jpg", "")], ("path", "label"), "row 1 has no label"),
        ([("a.jpg", "cat", "fold 1")], ("path", "label", "split"), "row 1 has the split 'fold 1'"),
        ([("a.jpg", "cat", "test")], ("path", "label", "split"), "lists no images for training or validation"),
        ([("a.jpg", "cat")], ("photo", "label"), "has no column path, only photo, label; name it"),
        ([], ("path", "label"), "lists no images"),
        ([("a.jpg", "cat"), ("b\0.jpg", "dog")], ("path", "label"), "1 of 2 images do not exist"),
        ([("b", "cat"), ("/", "dog"), ("a.jpg", "dog")], ("path", "label"), "2 of 3 images do not exist or are folders"),
        ([("a" * 200_000, "cat")], ("path", "label"), "cannot be read as a table .field larger"),
    ],
)
def test_bad_lists_are_refused(photos: Path, tmp_path: Path, rows: Any, names: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        listed(photos, list=str(write_list(tmp_path / "list.csv", rows, names)))


@pytest.mark.parametrize(("extension", "label"), [("csv", "a\nb"), ("tsv", 'a "b"'), ("jsonl", "a\u2028b")])
def test_labels_with_line_breaks_and_quotes(photos: Path, tmp_path: Path, extension: str, label: str) -> None:
    path = tmp_path / f"list.{extension}"
    if extension == "jsonl":
        path.write_text(json.dumps({"path": "a.jpg", "label": label}, ensure_ascii=False))
    else:
        write_list(path, [("a.jpg", label)], ("path", "label"))
    assert listed(photos, list=str(path)).classes == [label]


def test_a_list_of_deeply_nested_json_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('{"path": ' + 100_000 * "[")
    with pytest.raises(UserError, match=r"list.jsonl: not valid JSON lines \(maximum recursion depth"):
        listed(photos, list=str(tmp_path / "list.jsonl"))


def test_what_a_list_repeats_is_told(photos: Path, tmp_path: Path) -> None:
    rows: list[tuple[str, ...]] = [*ROWS, ("a.jpg", "cat", "train"), ("a.jpg", "cat", "val"), ("x.jpg", "dog", "test")]
    path = write_list(tmp_path / "list.csv", rows)
    assert listed(photos, list=str(path)).notes == [
        f"{path}: 1 images of the test split are not used",
        f"{path}: 1 images are listed twice",
        f"{path}: 1 images are in both splits, such as a.jpg",
        "val: 1 of 2 classes have no images, such as dog",
    ]


# All kinds

KINDS = ("folders", "official", "kaggle", "webdataset", "parquet", "list")


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same nine images as a source of each kind, and shards of each."""
    root = tmp_path_factory.mktemp("kinds")
    wnids = sorted(WNIDS)
    names = [f"{'train' if i < 7 else 'val'}/{wnids[i % 3]}/{i}.jpg" for i in range(9)]
    write_images(root / "folders", *names)
    for split, numbers in (("train", range(7)), ("val", range(7, 9))):
        members = {f"{i}.{kind}": data for i in numbers for kind, data in (("jpg", IMAGES[i]), ("cls", wnids[i % 3].encode()))}
        (root / "webdataset").mkdir(exist_ok=True)
        (root / "webdataset" / f"{split}.tar").write_bytes(packed(members))
        write_parquet(root / "parquet" / f"{split}.parquet", [(IMAGES[i], i % 3) for i in numbers], wnids)
    write_images(root / "kaggle", *names[:7], "val/7.jpg", "val/8.jpg")
    (root / "kaggle" / "val.txt").write_text(f"7 {wnids[1]}\n8 {wnids[2]}\n")
    shutil.copytree(root / "folders", root / "list")
    write_list(root / "list.csv", [(name, name.split("/")[1], name.split("/")[0]) for name in names])
    (root / "official").mkdir()
    classes = {wnids[c]: {f"{i}.JPEG": IMAGES[i] for i in range(c, 7, 3)} for c in range(3)}
    (root / "official" / tars.TRAIN).write_bytes(packed({f"{wnid}.tar": packed(its) for wnid, its in classes.items()}))
    (root / "official" / tars.VAL).write_bytes(packed({f"ILSVRC2012_val_{i:08d}.JPEG": IMAGES[6 + i] for i in (1, 2)}))
    (root / "official" / tars.DEVKIT).write_bytes(devkit([1 + WNIDS.index(wnid) for wnid in wnids[1:]]))
    for kind in KINDS:
        images = SourceOptions(list=str(root / "list.csv") if kind == "list" else "", check_md5=False)
        make_shards(ConvertOptions(str(root / kind), str(root / f"{kind}-shards"), shard_size=3, workers=1, images=images))
    return {kind: root / f"{kind}-shards" for kind in KINDS}


def test_the_same_images_give_the_same_samples_from_every_kind(every_kind: dict[str, Path]) -> None:
    samples, wnids = {}, sorted(WNIDS)
    for kind, out in every_kind.items():
        assert verify(str(out), 1) == []
        for split in ("train", "val"):
            stored = ShardSet(out, split)
            classes = [stored.manifest.classes[label] for label in stored.samples["label"]]
            samples[kind, split] = {stored.read(i).tobytes(): name for i, name in enumerate(classes)}
    assert {split: sorted(found.values()) for (kind, split), found in samples.items() if kind == "folders"} == {
        "train": [wnids[0]] * 3 + [wnids[1]] * 2 + [wnids[2]] * 2, "val": wnids[1:],
    }  # fmt: skip
    assert all(found == samples["folders", split] for (_, split), found in samples.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_trained_on_and_evaluated(every_kind: dict[str, Path], tmp_path: Path, kind: str) -> None:
    options = ("--arch", "resnet20", "--iterations", 2, "--batch-size", 4, "--image-size", 32, "--scale", 36, 40, "--threads", 1)
    result = run_forked("train.py", "--data", every_kind[kind], "--output", tmp_path / "run", *options)
    assert result.returncode == 0, result.stderr
    result = run_script("tools/evaluate.py", tmp_path / "run", "--data", every_kind[kind])
    assert result.returncode == 0, result.stderr
    assert "top" in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"val_share": 1.0}, "`val_share` must be at least 0"),
        ({"val_per_class": -1}, "`val_per_class` is a number"),
        ({"source": "list"}, "needs a file that lists the images"),
        ({"source": "kaggle"}, "holds no train/<class>"),
        ({"source": "parquet"}, "or no images of this kind"),
        ({"source": "official"}, "holds neither"),
        ({"source": "webdataset"}, "or no images of this kind"),
        ({"source": "folders", "list": "x.csv"}, "`list` is for the source list, not folders"),
        ({"label_column": "label"}, "`label_column` is for the source list or parquet or webdataset, not folders"),
        ({"val_labels": "val.txt"}, "`val_labels` is for the source kaggle, not folders"),
        ({"source": "zip"}, "`source` is one of official, kaggle"),
    ],
)
def test_options_that_do_not_fit_the_source_are_refused(image_folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        listed(image_folder, **options)
