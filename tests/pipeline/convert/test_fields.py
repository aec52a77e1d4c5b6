"""What a sample carries beside image and label: the conversion keeps it, and the shards stay readable by other programs."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from pipeline.convert.make import ConvertOptions, make_shards
from pipeline.convert.sources import SourceOptions
from pipeline.convert.verify import verify
from pipeline.errors import UserError
from pipeline.store.manifest import Manifest
from pipeline.store.shards import ShardSet
from pipeline.store.tar import ChecksumError, EncodedSample, read_fields, write_shard
from tests.helpers import jpeg, random_image
from tests.pipeline.convert.test_kinds import write_parquet
from tests.pipeline.convert.test_sources import add, listed, packed, write_images

IMAGES = [jpeg(random_image(40 + i, 50, i)) for i in range(5)]
LONG = "n1/" + 40 * "long"  # a name that does not fit into a header


def members(i: int) -> dict[str, bytes]:
    """The members of sample i, in an order of its own; not every sample has all."""
    found = {"json": b'{"n": %d}' % i, "cls": b"%d" % (i % 2), "jpg": IMAGES[i], "seg.png": bytes(700 * i), "txt": b""}
    if i == 3:
        del found["json"], found["seg.png"], found["txt"]  # a sample without fields, among others
    return dict(list(found.items())[i:] + list(found.items())[:i])


def write_tar(path: Path, kind: int, names: list[str], litter: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for i, name in enumerate(names):
            for extension, data in members(i).items():
                add(tar, f"{name}.{extension}", data)
                if litter:
                    add(tar, f"._{name}.{extension}", b"litter")


def convert(src: Path, out: Path, **options: Any) -> Path:
    images = SourceOptions(**options)
    make_shards(ConvertOptions(str(src), str(out), "original", shard_size=2, workers=1, images=images))
    return out


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """All samples as stock webdataset reads them, with labels as numbers and images as .jpg."""
    tars = [str(path) for path in sorted(folder.rglob("*.tar"))]
    found = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        content = {name: data for name, data in sample.items() if not name.startswith("__")}
        found[sample["__key__"]] = content | {"cls": int(content["cls"])}
    return found


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_of_webdataset_samples_are_kept(tmp_path: Path, kind: int, caplog: pytest.LogCaptureFixture) -> None:
    names = ["a", "ä/b", LONG, "n1/c", "n1/d"]
    write_tar(tmp_path / "src" / "train.tar", kind, names, litter=True)
    write_tar(tmp_path / "clean" / "train.tar", kind, names)  # stock webdataset does not skip litter
    out = convert(tmp_path / "src", tmp_path / "out")
    expected = read(tmp_path / "clean")
    assert list(expected) == names
    assert read(out) == expected
    assert "stored beside the images: .json (4 samples), .seg.png (4 samples), .txt (4 samples)" in caplog.text
    manifest = Manifest(out)
    assert manifest.splits["train"]["fields"] == ["json", "seg.png", "txt"]
    assert verify(str(out), 1) == []
    stored = ShardSet(out, "train", verify=True)
    for i in range(5):
        image, fields = stored.read_with_fields(i)
        sample = expected[stored.key(i)]
        assert image.tobytes() == stored.read(i).tobytes() == sample.pop("jpg")
        assert int(fields.pop("cls")) == sample.pop("cls")
        assert fields == sample
    assert read(convert(out, tmp_path / "again")) == read(out)  # shards as a source


def test_damaged_fields_are_found_and_repaired(tmp_path: Path) -> None:
    write_tar(tmp_path / "src" / "train.tar", tarfile.PAX_FORMAT, ["a", "b", "c"])
    out = convert(tmp_path / "src", tmp_path / "out")
    tar = next(path for path in (out / "train").glob("*.tar") if b'{"n": 2}' in path.read_bytes())
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b'{"n": 2}', b'{"n": 7}'))
    assert verify(str(out), 1) == [f"{tar}: sample c is damaged or cut off"]
    convert(tmp_path / "src", out)
    assert tar.read_bytes() == content


def test_dali_reads_fields_with_our_index(tmp_path: Path) -> None:
    from nvidia.dali import Pipeline, fn

    write_tar(tmp_path / "src" / "train.tar", tarfile.PAX_FORMAT, ["a", "b", "c", "d", "e"])
    tars = sorted((convert(tmp_path / "src", tmp_path / "out") / "train").glob("*.tar"))
    for tar in tars:
        subprocess.run([sys.executable, "-m", "wds2idx", tar, tmp_path / "made.idx"], check=True, capture_output=True)
        assert (tmp_path / "made.idx").read_text() == tar.with_suffix(".idx").read_text()
    pipe = Pipeline(batch_size=5, num_threads=1, device_id=None)
    with pipe:
        outputs: Any = fn.readers.webdataset(
            paths=[str(tar) for tar in tars], index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=["jpg", "json", "seg.png"], missing_component_behavior="empty",
        )  # fmt: skip
        pipe.set_outputs(*outputs)
    pipe.build()
    parts = pipe.run()
    found = [[np.asarray(part[i]).tobytes() for part in parts] for i in range(5)]
    expected = read(tmp_path / "out").values()
    assert found == [[sample.get(name, b"") for name in ("jpg", "json", "seg.png")] for sample in expected]


def test_names_of_fields_are_as_in_stock_webdataset(tmp_path: Path) -> None:
    """Lower case. White space would break DALI's index. Samples of images and labels alone are as ever."""
    files = {"a.CLS": b"1", "a.JPG": IMAGES[0], "a.My Json": b"{}", "a": b"no extension", "b.cls": b"0", "b.jpg": IMAGES[1]}
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "train.tar").write_bytes(packed(files))
    found = read(convert(tmp_path / "src", tmp_path / "out"))
    assert found == {"a": {"cls": 1, "jpg": IMAGES[0], "my_json": b"{}"}, "b": {"cls": 0, "jpg": IMAGES[1]}}


def test_images_among_the_members(tmp_path: Path) -> None:
    files = {"a.cls": b"1", "a.jpg": IMAGES[0], "a.png": b"a mask", "a.txt": b"dog"}
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "train.tar").write_bytes(packed(files))
    with pytest.raises(UserError, match=r"sample a has two images, \.jpg and \.png; choose one \(`image_column`\)"):
        listed(tmp_path / "src")
    with pytest.raises(UserError, match=r"sample a has no \.webp, only cls, jpg, png, txt"):
        listed(tmp_path / "src", image_column="webp")
    found = read(convert(tmp_path / "src", tmp_path / "out", image_column="jpg"))
    assert found == {"a": {"cls": 1, "jpg": IMAGES[0], "png": b"a mask", "txt": b"dog"}}
    notes = listed(tmp_path / "src", image_column="png", label_column="txt").notes
    assert notes[0] == "stored beside the images: .txt (1 samples)"
    assert notes[1].startswith("not stored, as shards use these names for label and image: .cls (1 samples), .jpg (1 samples)")
    (tmp_path / "src" / "train.tar").write_bytes(packed({"a.cls": b"1", "a.jpg": IMAGES[0], "a.txt": b"", "a.TXT": b""}))
    with pytest.raises(UserError, match=r"sample a has two members \.txt"):
        listed(tmp_path / "src")


ROWS: list[dict[str, Any]] = [
    {"path": "a.jpg", "label": "cat", "tags": ["ä", "x"], "age": 3, "box": {"left": 0.5}},
    {"path": "b.jpg", "label": "dog", "tags": [], "age": None, "box": {"left": 2.0}},
]
COLUMNS = ("tags", "age", "box")


@pytest.mark.parametrize("source", ["list.jsonl", "list.parquet", "list.csv", "parquet"])
def test_columns_are_stored_as_json(tmp_path: Path, source: str, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "src", "a.jpg", "b.jpg")
    path, options = tmp_path / source, dict[str, Any](list=str(tmp_path / source), field_column=COLUMNS)
    expected: list[dict[str, Any]] = [{name: row[name] for name in COLUMNS} for row in ROWS]
    if source == "list.jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)).replace('"x"', r'"\ud800"'))  # half of a surrogate pair
        expected[0]["tags"] = ["ä", "\ud800"]
    elif source == "list.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif source == "list.csv":  # all cells are text
        path.write_text("path,label,tags,age,box\na.jpg,cat,ä x,3,0.5\nb.jpg,dog,,,2\n")
        expected = [{"tags": "ä x", "age": "3", "box": "0.5"}, {"tags": "", "age": "", "box": "2"}]
    else:
        images = [(tmp_path / "src" / row["path"]).read_bytes() for row in ROWS]
        write_parquet(tmp_path / "parquet" / "train.parquet", [(images[0], 0), (images[1], 1)], ["cat", "dog"])
        table = pq.read_table(tmp_path / "parquet" / "train.parquet")
        for name in COLUMNS:
            table = table.append_column(name, pa.array([row[name] for row in ROWS]))
        pq.write_table(table, tmp_path / "parquet" / "train.parquet", row_group_size=1)
        options = {"field_column": COLUMNS}
    src = path if source == "parquet" else tmp_path / "src"
    found = read(convert(src, tmp_path / "out", **options)).values()
    assert {sample["cls"]: json.loads(sample["json"]) for sample in found} == dict(enumerate(expected))
    assert "stored beside the images, as .json: tags, age, box" in caplog.text
    plain = convert(src, tmp_path / "plain", **options | {"field_column": ()})
    assert {sample["jpg"] for sample in read(plain).values()} == {sample["jpg"] for sample in found}
    assert "fields" not in Manifest(plain).splits["train"]


def test_bad_columns_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path, "a.jpg")
    path = tmp_path / "list.csv"
    path.write_text("path,label,age\na.jpg,cat,3\na.jpg,cat,4\n")
    with pytest.raises(UserError, match=r"row 1: has no column size; choose another `field_column`"):
        listed(tmp_path, list=str(path), field_column=("size",))
    with pytest.raises(UserError, match=r"row 2: a\.jpg is listed before with another age; list each image once"):
        listed(tmp_path, list=str(path), field_column=("age",))
    assert len(listed(tmp_path, list=str(path)).splits["train"]) == 1
    pq.write_table(pa.Table.from_pylist([{"path": "a.jpg", "label": "cat", "raw": b"\0"}]), tmp_path / "list.parquet")
    with pytest.raises(UserError, match="row 1: a column of raw holds bytes"):
        listed(tmp_path, list=str(tmp_path / "list.parquet"), field_column=("raw",))


def test_another_column_is_another_conversion(tmp_path: Path) -> None:
    write_images(tmp_path, "a.jpg")
    path = tmp_path / "list.csv"
    path.write_text("path,label,age\na.jpg,cat,3\n")
    options = {"list": str(path), "field_column": ("age",)}
    first = listed(tmp_path, **options).fingerprint()
    assert first == listed(tmp_path, **options).fingerprint() != listed(tmp_path, list=str(path)).fingerprint()
    path.write_text("path,label,age\na.jpg,cat,4\n")
    assert listed(tmp_path, **options).fingerprint() != first


def test_mutated_headers_are_damage_or_fields(tmp_path: Path) -> None:
    """Whatever the bytes before an image are, reading its fields returns some or raises ChecksumError."""
    rng = np.random.default_rng(0)
    fields = {"json": b"{}" * 300, "txt": b"a"}
    write_shard(tmp_path / "0.tar", tmp_path / "0.idx", 0, [EncodedSample(LONG, b"image", 0, 1, 1, fields)], 4)
    content = (tmp_path / "0.tar").read_bytes()
    head = content[: content.index(b"image")]
    assert read_fields(head) == {"cls": b"0000", **fields}
    outcomes = set()
    for trial in range(3000):
        mutant = bytearray(head)
        for _ in range(rng.integers(1, 8)):
            header = rng.integers(len(head) // 512) * 512
            mutant[header + rng.integers(100, 160) if trial % 2 else rng.integers(len(head))] = rng.integers(256)
        try:
            found = read_fields(bytes(mutant))
            assert all(isinstance(data, bytes) for data in found.values())
            outcomes.add("fields")
        except ChecksumError:
            outcomes.add("damage")
    assert outcomes == {"fields", "damage"}
