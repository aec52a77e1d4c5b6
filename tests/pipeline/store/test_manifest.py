"""A manifest.json that is damaged is named, with the entry that is wrong."""

from __future__ import annotations

import copy
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.store.manifest import Manifest

MISSING = object()


def write(folder: Path, content: Any, *change: Any) -> Path:
    """Write a manifest. change: the path of an entry, and its new value or MISSING."""
    content = copy.deepcopy(content)
    if change:
        *keys, last, value = change
        place = content
        for key in keys:
            place = place[key]
        if value is MISSING:
            del place[last]
        else:
            place[last] = value
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def content(small_shards: Path) -> Any:
    return json.loads((small_shards / "manifest.json").read_text())


def test_every_missing_entry_is_named(content: Any, tmp_path: Path) -> None:
    paths: list[tuple[Any, ...]] = [(name,) for name in ("profile", "classes", "splits", "statistics")]
    paths += [("statistics", name) for name in ("channel_mean", "rgb_covariance", "mean_image", "mean_image_sha256")]
    paths += [("splits", "val", name) for name in content["splits"]["val"]]
    paths += [("splits", "val", "shards", 0, name) for name in content["splits"]["val"]["shards"][0]]
    for path in paths:
        with pytest.raises(UserError, match=rf"{tmp_path}/manifest.json: is damaged \(.*{path[-1]} is missing\)"):
            Manifest(write(tmp_path, content, *path, MISSING))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("classes", {}), "classes is not a list"),
        (("classes", 1, None), r"classes\[1\] is not a string"),
        (("splits", []), "splits is not an object"),
        (("splits", "train", None), "splits.train is not an object"),
        (("splits", "train", "images", 59), "splits.train.images is not the sum over its shards"),
        (("splits", "train", "images", "60"), "splits.train.images is not an integer"),
        (("splits", "train", "images", True), "splits.train.images is not an integer"),
        (("splits", "train", "shards", []), "splits.train has neither shards nor an FFCV file"),
        (("splits", "train", "shards", 1, "bytes", -1), r"splits.train.shards\[1\].bytes is negative"),
        (("splits", "train", "shards", 1, "images", 1.5), r"shards\[1\].images is not an integer"),
        (("statistics", "channel_mean", [1.0, 2.0]), "statistics.channel_mean is not a list of 3"),
        (("statistics", "channel_mean", 2, float("nan")), r"statistics.channel_mean\[2\] is not a finite number"),
        (("statistics", "rgb_covariance", 1, [0.0, float("inf"), 0.0]), r"rgb_covariance\[1\]\[1\] is not a finite number"),
        (("statistics", "rgb_covariance", 0, "x"), r"rgb_covariance\[0\] is not a list of 3"),
        (("class_names", ["x"]), "class_names is not an object"),
        (("splits", "train", "beton", {"file": "x"}), "splits.train.beton.sha256 is missing"),
    ],
)
def test_a_wrong_entry_is_named(content: Any, change: tuple[Any, ...], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}/manifest.json: is damaged \(.*{words}\); make the shards again"):
        Manifest(write(tmp_path, content, *change))


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"format": "cropfeed-shards", "version": 9}']
)
def test_what_is_no_manifest_is_refused_in_one_line(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(UserError, match=f"^{tmp_path}/manifest.json: not ") as caught:
        Manifest(tmp_path)
    assert "\n" not in str(caught.value)


def as_npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize(
    "damaged",
    [
        b"", b"junk", b"PK\3\4", as_npy(np.array([{}])), as_npy(np.zeros((224, 224))), as_npy(np.zeros((2, 2, 4), np.float32)),
        as_npy(np.full((224, 224, 3), np.nan, np.float32)), as_npy(np.zeros((224, 224, 3), np.float32))[:-9],
        b"\x93NUMPY\1\0\5\0{'x':",
    ],
)  # fmt: skip
def test_a_mean_image_that_is_none_is_named_even_if_its_hash_is_right(content: Any, damaged: bytes, tmp_path: Path) -> None:
    (tmp_path / "mean_image.npy").write_bytes(damaged)
    folder = write(tmp_path, content, "statistics", "mean_image_sha256", hashlib.sha256(damaged).hexdigest())
    with pytest.raises(UserError, match=rf"{tmp_path}/mean_image.npy: is damaged \("):
        Manifest(folder).mean_image()


def test_a_folder_of_images_or_of_an_unfinished_conversion_is_named(tmp_path: Path) -> None:
    """The advice never leads into the folder of the images."""
    (tmp_path / "images" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match=r"images: holds no shards; .*: cropfeed shards .*/images --out .*/images-shards$"):
        Manifest(tmp_path / "images")
    (tmp_path / "begun" / "conversion").mkdir(parents=True)
    with pytest.raises(UserError, match="begun: its conversion is not finished; repeat the command that began it"):
        Manifest(tmp_path / "begun")
