from __future__ import annotations

import builtins
import errno
import hashlib
import io
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.errors import UserError
from pipeline.store import checks, local, shards
from pipeline.store.shards import ShardSet
from pipeline.store.tar import ChecksumError, label_digits, sample_checksums
from tests.helpers import ROOT, open_image, run_forked


def source_files(folder: Path, split: str) -> dict[bytes, int]:
    """Encoded bytes -> label of every image of a split."""
    classes = sorted(path.name for path in (folder / split).iterdir())
    return {path.read_bytes(): label for label, name in enumerate(classes) for path in (folder / split / name).iterdir()}


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_image_is_stored_once_and_unchanged(image_folder: Path, small_shards: Path, split: str) -> None:
    stored = ShardSet(small_shards, split)
    expected = source_files(image_folder, split)
    found = {stored.read(i).tobytes(): int(stored.samples[i]["label"]) for i in range(len(stored))}
    assert found == expected
    assert len(stored) == len(expected)
    for i in range(len(stored)):
        image = open_image(stored.read(i).tobytes())
        assert image.size == (stored.samples[i]["width"], stored.samples[i]["height"])


def test_stock_webdataset_reads_the_tars(image_folder: Path, small_shards: Path) -> None:
    urls = [str(path) for path in sorted((small_shards / "train").glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "cls")
    stored = ShardSet(small_shards, "train")
    rows = list(dataset)
    assert len(rows) == 60
    for i, (key, image, label) in enumerate(rows):
        assert key == stored.key(i)
        assert label == stored.samples[i]["label"]
        assert np.array_equal(np.asarray(image), np.asarray(open_image(stored.read(i).tobytes()).convert("RGB")))


def test_dalis_reader_reads_the_tars_with_their_index(small_shards: Path) -> None:
    from nvidia.dali import Pipeline, fn, types

    tars = sorted((small_shards / "train").glob("*.tar"))
    digits = label_digits(3)
    pipe = Pipeline(batch_size=60, num_threads=1, device_id=None)
    with pipe:
        components: Any = fn.readers.webdataset(
            paths=[str(path) for path in tars],
            index_paths=[str(path.with_suffix(".idx")) for path in tars],
            ext=["jpg", "cls"],
            missing_component_behavior="error",
        )
        jpg, text = components
        powers = types.Constant(np.array([10**i for i in reversed(range(digits))], np.int32))
        pipe.set_outputs(jpg, fn.reductions.sum((fn.cast(text, dtype=types.INT32) - 48) * powers))
    pipe.build()
    encoded, labels = pipe.run()
    stored = ShardSet(small_shards, "train")
    assert [np.asarray(labels[i]).item() for i in range(60)] == stored.samples["label"].tolist()
    assert all(np.array_equal(np.asarray(encoded[i]), stored.read(i)) for i in range(60))


def test_index_equals_that_of_dalis_tool(small_shards: Path, tmp_path: Path) -> None:
    for tar in sorted((small_shards / "train").glob("*.tar")):
        made = tmp_path / "made.idx"
        subprocess.run([sys.executable, "-m", "wds2idx", str(tar), str(made)], check=True, capture_output=True)
        assert made.read_text() == tar.with_suffix(".idx").read_text()


def test_manifest_statistics_are_those_of_the_images(image_folder: Path, small_shards: Path) -> None:
    crops = []
    for path in sorted((image_folder / "train").glob("*/*")):
        image = Image.open(path).convert("RGB")
        width, height = image.size
        scale = 256 / min(width, height)
        size = int(width * scale + 0.5), int(height * scale + 0.5)
        left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
        crops.append(np.asarray(image.resize(size, Image.Resampling.BILINEAR))[top : top + 224, left : left + 224].astype(float))
    pixels = np.stack(crops)
    manifest = ShardSet(small_shards, "train").manifest
    assert np.abs(manifest.mean_image() - pixels.mean(axis=0)).max() < 1
    assert np.abs(manifest.channel_mean() - pixels.mean(axis=(0, 1, 2))).max() < 0.05
    covariance = np.cov(pixels.reshape(-1, 3).T / 255)
    assert np.abs(np.array(manifest.statistics["rgb_covariance"]) - covariance).max() < 2e-4
    values, vectors = np.array(manifest.statistics["eigenvalues"]), np.array(manifest.statistics["eigenvectors"])
    assert np.allclose(covariance @ vectors, vectors * values, atol=1e-3)


def test_the_manifest_has_every_file_and_its_hash(small_shards: Path) -> None:
    manifest = json.loads((small_shards / "manifest.json").read_text())
    assert manifest["classes"] == ["n00000000", "n00000001", "n00000002"]
    assert {name: split["images"] for name, split in manifest["splits"].items()} == {"train": 60, "val": 21}
    files = {"mean_image.npy": manifest["statistics"]["mean_image_sha256"]}
    for split in manifest["splits"].values():
        files[split["samples"]] = split["samples_sha256"]
        files |= {shard["file"]: shard["sha256"] for shard in split["shards"]}
        assert sum(shard["images"] for shard in split["shards"]) == split["images"]
    for name, digest in files.items():
        assert hashlib.sha256((small_shards / name).read_bytes()).hexdigest() == digest
    assert {path.name for path in (small_shards / "train").glob("*.tar")} == {f"{i:06d}.tar" for i in range(4)}


def test_damaged_data_sets_are_named(small_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        ShardSet(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="not found"):
        ShardSet(tmp_path, "train")
    with pytest.raises(UserError, match="only train, val"):
        ShardSet(small_shards, "test")
    copy = tmp_path / "copy"
    shutil.copytree(small_shards, copy)
    tar = copy / "train" / "000001.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    stored = ShardSet(copy, "train")
    stored.read(0)
    with pytest.raises(UserError, match=r"000001.tar: has 5000 bytes"):
        stored.read(20)
    (copy / "train" / "samples.npy").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"samples.npy: cannot be read"):
        ShardSet(copy, "train")
    (copy / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        ShardSet(copy, "train")
    (copy / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="not cropfeed-shards"):
        ShardSet(copy, "train")


def test_reading_opens_only_the_needed_shard(small_shards: Path) -> None:
    before = open_files()
    stored = ShardSet(small_shards, "train")
    stored.read(17)
    assert open_files() - before == Counter([str(stored.shards[1])])


def open_files() -> Counter[str]:
    return Counter(os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())


def test_data_on_a_file_system_without_maps_is_read(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ShardSet(small_shards, "train")
    images = [expected.read(i).copy() for i in range(len(expected))]

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mmap, "mmap", refused)
    monkeypatch.setattr(checks, "_READ", 0)
    stored = ShardSet(small_shards, "train")
    assert not isinstance(stored.samples, np.memmap)
    assert np.array_equal(stored.samples, expected.samples)
    assert all(np.array_equal(stored.read(i), images[i]) for i in range(len(stored)))


@pytest.mark.parametrize("name", ["manifest.json", "mean_image.npy", "train/samples.npy", "train/000001.tar"])
def test_a_file_without_permission_is_named(small_shards: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def guarded(original: Any) -> Any:
        def opened(path: Any, *arguments: Any, **options: Any) -> Any:
            if str(path) == str(small_shards / name):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return original(path, *arguments, **options)

        return opened

    for module in (builtins, io):
        monkeypatch.setattr(module, "open", guarded(open))
    monkeypatch.setattr(local, "FileIO", guarded(io.FileIO))
    problem = rf"^{small_shards / name}: permission denied for user ID \d+; ask its owner for access$"
    with pytest.raises(UserError, match=problem):
        read_all(ShardSet(small_shards, "train"))


@pytest.mark.parametrize("limit", [64 << 20, 0])
def test_only_a_large_samples_npy_is_mapped(
    small_shards: Path, tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a mapped file is shortened, the kernel kills the process."""
    shutil.copytree(small_shards, tmp_path / "data")
    monkeypatch.setattr(checks, "_READ", limit)
    expected = np.load(small_shards / "train" / "samples.npy")
    stored = ShardSet(tmp_path / "data", "train")
    assert isinstance(stored.samples, np.memmap) == (limit == 0)
    if limit:
        os.truncate(tmp_path / "data" / "train" / "samples.npy", 0)
    assert np.array_equal(stored.samples, expected)


def read_all(stored: ShardSet) -> None:
    stored.manifest.mean_image()
    for index in range(len(stored)):
        stored.read(index)


@pytest.mark.parametrize("size", [0, 5000, None])
def test_a_tar_that_is_changed_in_place_while_it_is_open_is_named(small_shards: Path, tmp_path: Path, size: int | None) -> None:
    """A mapped file would end the process with SIGBUS. size: of the changed file; None: larger than before."""
    shutil.copytree(small_shards, tmp_path / "data")
    tar = tmp_path / "data" / "train" / "000001.tar"
    stored, before = ShardSet(tmp_path / "data", "train"), tar.stat().st_size
    kept = stored.read(20)
    content = kept.tobytes()
    os.truncate(tar, before + 512 if size is None else size)
    with pytest.raises(UserError, match=rf"{tar}: has {tar.stat().st_size} bytes, manifest.json says {before}; restore the file"):
        stored.read(20)
    assert kept.tobytes() == content


def test_a_tar_that_is_replaced_by_renaming_stays_readable(small_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(small_shards, tmp_path / "data")
    stored = ShardSet(tmp_path / "data", "train")
    expected = stored.read(20).tobytes()
    (tmp_path / "new").write_bytes(b"other")
    (tmp_path / "new").replace(tmp_path / "data" / "train" / "000001.tar")
    assert stored.read(20).tobytes() == expected


def test_a_disk_that_fails_is_named(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    stored = ShardSet(small_shards, "train")
    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(UserError, match=rf"{small_shards}/train/000000.tar: .*Input/output error"):
        stored.read(0)


def test_short_reads_are_continued(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, read = ShardSet(small_shards, "train"), os.preadv
    expected = stored.read(17).tobytes()
    monkeypatch.setattr(os, "preadv", lambda stream, buffers, *where: read(stream, [buffers[0][:100]], *where))
    assert stored.read(17).tobytes() == expected


@pytest.mark.parametrize("cached", [False, True])
def test_verified_reads_notice_every_byte_of_a_sample(small_shards: Path, tmp_path: Path, cached: bool) -> None:
    """Also in its label and the headers, and after it. The neighbours stay readable."""
    shutil.copytree(small_shards, tmp_path / "data")
    stored = ShardSet(tmp_path / "data", "train", tmp_path / "cache" if cached else None, verify=True)
    plain = ShardSet(small_shards, "train")
    for index in range(len(stored)):
        assert np.array_equal(stored.read(index), plain.read(index))
    rng, records = np.random.default_rng(0), stored.samples
    for index in (0, 1, 15, 16, 59):
        start = 0 if index % 16 == 0 else -(-int(records["offset"][index - 1] + records["bytes"][index - 1]) // 512) * 512
        end = -(-int(records["offset"][index] + records["bytes"][index]) // 512) * 512
        for at in (start, end - 1, int(rng.integers(start, end))):
            with stored.shards[records["shard"][index]].open("r+b") as stream:
                flip(stream, at)
                with pytest.raises(ChecksumError, match="its checksum is not the one in"):
                    stored.read(index)
                for neighbour in {max(index - 1, 0), min(index + 1, 59)} - {index}:
                    assert np.array_equal(stored.read(neighbour), plain.read(neighbour))
                flip(stream, at)


def flip(stream: Any, at: int) -> None:
    stream.seek(at)
    byte = stream.read(1)[0]
    stream.seek(at)
    stream.write(bytes([byte ^ 4]))
    stream.flush()


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\n", b"v1.2 16\ncls 1\n", None])
def test_a_sample_is_named_by_its_number_if_the_index_is_damaged(
    small_shards: Path, tmp_path: Path, damage: bytes | None
) -> None:
    shutil.copytree(small_shards, tmp_path / "data")
    index = tmp_path / "data" / "train" / "000001.idx"
    if damage is None:
        index.unlink()
    else:
        index.write_bytes(damage)
    assert ShardSet(tmp_path / "data", "train").locate(20) == f"{tmp_path}/data/train/000001.tar: sample 20"


@pytest.mark.parametrize("damage", [b"", b"junk", b"PK\3\4" + bytes(100), b"\x93NUMPY\1\0\5\0{'x':"])
def test_a_samples_file_that_is_none_is_refused(small_shards: Path, tmp_path: Path, damage: bytes) -> None:
    shutil.copytree(small_shards, tmp_path / "data")
    (tmp_path / "data" / "train" / "samples.npy").write_bytes(damage)
    with pytest.raises(UserError, match=rf"^{tmp_path}/data/train/samples.npy: cannot be read \(") as caught:
        ShardSet(tmp_path / "data", "train")
    assert "\n" not in str(caught.value)


def test_the_checksums_that_are_written_are_those_of_the_tars(small_shards: Path) -> None:
    stored = ShardSet(small_shards, "train")
    for number, tar in enumerate(stored.shards):
        samples = stored.samples[stored.samples["shard"] == number]
        found = sample_checksums(np.frombuffer(tar.read_bytes(), np.uint8), samples)
        assert found.tolist() == samples["crc32"].tolist()


def test_a_relative_path_stays_valid_after_chdir(small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_shards.parent)
    stored = ShardSet(small_shards.name, "train")
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(stored.read(20), ShardSet(f"file://{small_shards}", "train").read(20))
    assert stored.locate(20) == f"{small_shards}/train/000001.tar: {stored.key(20)}"


@pytest.mark.parametrize("field", ["label", "shard", "offset", "bytes"])
def test_one_flipped_bit_in_the_samples_is_noticed(
    small_shards: Path, tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the split is opened or, if that would take long, while it is read."""
    shutil.copytree(small_shards, tmp_path / "data")
    path = tmp_path / "data" / "train" / "samples.npy"
    samples = np.load(path)
    samples[field][7] ^= 1
    np.save(path, samples)
    with pytest.raises(UserError, match=r"samples.npy: its SHA-256 is not the one in manifest.json"):
        ShardSet(tmp_path / "data", "train")
    monkeypatch.setattr(shards, "_CHECKED_AT_ONCE", 0)
    late = ShardSet(tmp_path / "data", "train")
    with pytest.raises(UserError, match=r"samples.npy: its SHA-256"):
        read_for(late, seconds=30)


def read_for(stored: ShardSet, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stored.read(0)


def test_more_shards_than_the_limits_of_open_files(small_shards: Path, tmp_path: Path) -> None:
    """Than the soft limit, which is raised, and than the hard limit, where files are closed."""
    made = run_forked("tools/make_shards.py", small_shards, "--out", tmp_path / "many", "--shard-size", 1)
    assert made.returncode == 0, made.stderr
    code = (
        "import gc, resource, sys; sys.path.insert(0, sys.argv[2]); from pipeline.store.shards import ShardSet; "
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]; "
        "read = lambda shards: print(len(shards.sizes), sum(len(shards.read(i)) > 0 for i in range(len(shards)))); "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard)); read(ShardSet(sys.argv[1], 'train')); "
        "gc.collect(); resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)); read(ShardSet(sys.argv[1], 'train'))"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "many", ROOT], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["60", "60"] * 2, result.stderr
