"""A large manifest.json, whose shards stay in the file, is read as a small one is."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.convert.verify import verify
from pipeline.doctor import data
from pipeline.doctor.lines import DoctorOptions
from pipeline.errors import UserError
from pipeline.store import entries, manifest
from pipeline.store.entries import StoredEntries, column
from pipeline.store.manifest import Manifest
from pipeline.store.shards import ShardSet
from tests.helpers import upload

SHARDS: list[Any] = [
    {"file": f"train/{number:06d}.tar", "images": number, "bytes": 10**17 * number, "sha256": f"{number:064x}", "idx_sha256": ""}
    for number in range(9)
]
LIST = {"shards": SHARDS}


def scanned(text: str) -> Any:
    file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(text.encode())
    file.flush()
    return entries.read_large(file)


@pytest.mark.parametrize("chunk", [500, 1000, 1 << 20])  # bytes in memory at a time: most entries are cut in two
@pytest.mark.parametrize("layout", [{"indent": 1}, {}, {"separators": (",", ":")}, {"indent": "\t \r\n"}])
def test_entries_are_those_of_the_file(layout: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "_CHUNK", chunk)
    splits: dict[str, Any] = {"train": {"x": 1, "shards": SHARDS}, "none": {"shards": []}, "val": {"shards": SHARDS[:1]}}
    content = {"a": '"shards": [{', "splits": splits}
    found = scanned(json.dumps(content, **layout))
    train, val = found["splits"]["train"]["shards"], found["splits"]["val"]["shards"]
    assert isinstance(train, StoredEntries)
    assert isinstance(val, StoredEntries)
    assert [train[i] for i in range(9)] == list(train) == SHARDS
    assert (train[-1], train[-9], list(val)) == (SHARDS[-1], SHARDS[0], SHARDS[:1])
    with pytest.raises(IndexError):
        train[9]
    assert column(train, "images").tolist() == list(range(9))
    assert np.array_equal(column(train, "bytes"), column(SHARDS, "bytes"))
    found["splits"]["train"]["shards"], found["splits"]["val"]["shards"] = SHARDS, SHARDS[:1]
    assert found == content


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"images": 5', '"images": 05'), ('"images": 5', '"images": 5.0'), ('"images": 5', '"images": -5'),
        ('"images": 5', '"images": 1000000000000000000'), ('"images": 5', '"images": "5"'), ('"images": 5', '"images": 5e0'),
        ('"images": 5', '"images": '), ('"images": 5', '"Images": 5'), ("000005.tar", r"00000\u0035.tar"), ("000005", "é"),
        ("000005", "\n"), ('"idx_sha256": ""}', '"idx_sha256": "", "more": 1}'), ('"idx_sha256": ""}', '"idx_sha256": ""},'),
        ('"idx_sha256": ""}]', '"idx_sha256": ""}'), ('"bytes"', '"file"'), ("}, {", "} {"), ("}, {", "}, [], {"),
        ('{"file"', '{"fi le"'),
    ],
)  # fmt: skip
def test_anything_else_is_left_to_the_reader_of_json(old: str, new: str) -> None:
    text = json.dumps({"splits": {"train": {"shards": SHARDS}}}, ensure_ascii=False)
    assert old in text
    assert scanned(text) is not None
    assert scanned(text.replace(old, new)) is None


@pytest.mark.parametrize(
    "changed",
    [{"splits": [LIST]}, {"splits": LIST}, {"classes": LIST}, {"class_names": LIST}, {"profile": LIST}, {"conversion": LIST}],
)
def test_lists_elsewhere_are_as_wrong_as_in_a_small_manifest(small_shards: Path, changed: Any) -> None:
    content = json.loads((small_shards / "manifest.json").read_text()) | changed
    problem = manifest.manifest_problem(content)
    assert bool(problem) == ("conversion" not in changed)
    assert manifest.manifest_problem(scanned(json.dumps(content))) == problem


def test_a_data_set_is_the_same_if_its_manifest_is_large(
    small_shards: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ShardSet(small_shards, "train")
    expected = [(small.read(i).tobytes(), small.locate(i)) for i in range(len(small))]
    expected_line = data.check(DoctorOptions(data=str(small_shards), cache=tmp_path), str(small_shards))[0].found
    monkeypatch.setattr(manifest, "_LARGE", 0)
    for url in (str(small_shards), upload(small_shards, f"{s3}/large")):
        large = ShardSet(url, "train", cache=tmp_path if url.startswith("s3") else None)
        assert isinstance(large.manifest.splits["train"]["shards"], StoredEntries)
        assert list(large.manifest.splits["val"]["shards"]) == small.manifest.splits["val"]["shards"]
        found = [(large.read(i).tobytes(), large.locate(i).replace(url, str(small_shards))) for i in range(len(large))]
        assert found == expected
        assert large.sizes.tolist() == small.sizes.tolist()
        assert verify(url, 2) == []
        assert data.check(DoctorOptions(data=url, cache=tmp_path), url)[0].found == expected_line


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"images": 60', '"images": 59', "splits.train.images is not the sum over its shards"),
        ('"bytes": ', '"bytes": -', r"shards\[0\].bytes is negative"),
        ('"bytes": ', '"bytes": 9999999999999999999', r"shards\[0\].bytes is too large"),
        ('"statistics"', '"else"', "statistics is missing"),
        ("]", "", "not valid JSON"),
    ],
)
def test_what_is_wrong_is_named_in_a_large_manifest(
    small_shards: Path, old: str, new: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_LARGE", 0)
    text = (small_shards / "manifest.json").read_text()
    assert old in text
    (tmp_path / "manifest.json").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=words):
        Manifest(tmp_path)
