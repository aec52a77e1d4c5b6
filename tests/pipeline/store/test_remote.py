"""Remote shards, read from an S3 server (moto) through the cache, behave like local ones."""

from __future__ import annotations

import csv
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import open_loader
from pipeline.errors import UserError
from pipeline.plan.geometry import ScaleJitter
from pipeline.plan.order import Blocks
from pipeline.spec import LoaderSpec
from pipeline.store import files
from pipeline.store.cache import GIGABYTE
from pipeline.store.prefetch import Prefetcher
from pipeline.store.shards import Manifest, ShardSet
from tests.helpers import assert_refused, run_script, s3_client, upload

SMALL = ("--arch", "resnet18", "--epochs", 1, "--batch-size", 20, "--image-size", 32, "--threads", 1, "--log-every", 1)


@pytest.fixture
def remote(small_shards: Path, s3: str) -> str:
    """The URL of small_shards on S3."""
    return upload(small_shards, f"{s3}/imagenet/shards")


def gigabytes(folder: Path, shards: int) -> float:
    """The size of a cache for `shards` times the largest training shard of a local data set, and its samples.npy."""
    largest = max(path.stat().st_size for path in (folder / "train").glob("*.tar"))
    return (shards * largest + (folder / "train" / "samples.npy").stat().st_size + 1) / GIGABYTE


def used_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def deleted_but_held(folder: Path) -> list[str]:
    """Deleted files of a folder that are still open or mapped in this process."""
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    names = links + Path("/proc/self/maps").read_text().splitlines()
    return [name for name in names if f"{folder}/" in name and name.endswith("(deleted)")]


def spec_for(data: Any, **changes: Any) -> LoaderSpec:
    return replace(LoaderSpec(data, batch_size=8, image_size=32, geometry=ScaleJitter(36, 68), threads=1), **changes)


@pytest.mark.parametrize("split", ["train", "val"])
def test_remote_shards_equal_the_local_ones(
    small_shards: Path, remote: str, tmp_path: Path, downloads: list[str], split: str
) -> None:
    local, actual = ShardSet(small_shards, split), ShardSet(remote + "/", split, tmp_path)
    assert np.array_equal(actual.samples, local.samples)
    assert downloads == [f"{remote}/{split}/samples.npy"]  # no shard is downloaded before it is read
    for index in range(len(local)):
        assert np.array_equal(actual.read(index), local.read(index))
        assert actual.key(index) == local.key(index)
    assert len(downloads) == 1 + len(local.shards)
    assert actual.locate(0) == f"{remote}/{split}/000000.tar: {local.key(0)}"
    assert np.array_equal(actual.manifest.mean_image(), local.manifest.mean_image())
    assert actual.manifest.fingerprint == local.manifest.fingerprint
    assert np.array_equal(ShardSet(remote, split, tmp_path).read(3), local.read(3))  # from the cache
    assert len(downloads) == 1 + len(local.shards)


@pytest.mark.parametrize("training", [True, False])
def test_remote_batches_equal_the_local_ones(small_shards: Path, remote: str, tmp_path: Path, training: bool) -> None:
    spec = spec_for(small_shards) if training else spec_for(small_shards).evaluation()
    local, actual = open_loader(spec), open_loader(replace(spec, data=remote, cache=tmp_path))
    assert actual.fingerprint() == local.fingerprint()
    for reference, found in zip(local, actual, strict=True):
        assert np.array_equal(reference.ids, found.ids)
        assert torch.equal(reference.images, found.images)
        assert torch.equal(reference.labels, found.labels)


def test_a_cache_of_two_shards_serves_every_image(small_shards: Path, remote: str, tmp_path: Path, downloads: list[str]) -> None:
    local, limit = ShardSet(small_shards, "train"), gigabytes(small_shards, 2)
    actual = ShardSet(remote, "train", tmp_path, limit)
    for index in np.random.default_rng(0).permutation(60).tolist():
        assert np.array_equal(actual.read(index), local.read(index))
        assert used_bytes(tmp_path) <= limit * GIGABYTE
    assert len(downloads) > 5  # the shards do not all fit at once
    assert (tmp_path / actual._entry["samples_sha256"]).exists()  # never evicted: it stays mapped
    assert not deleted_but_held(tmp_path)


def test_warns_if_the_cache_cannot_hold_the_split(
    small_shards: Path, remote: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_for(remote, cache=tmp_path, cache_gb=gigabytes(small_shards, 2))
    open_loader(spec)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("cropfeed", "WARNING")
    assert re.match(
        rf"{remote}: the split's .* GB exceed the cache {tmp_path} of .* GB, .*; raise `cache_gb`", record.getMessage()
    )
    caplog.clear()
    open_loader(replace(spec, cache_gb=1.0))
    open_loader(replace(spec, world_size=2, rank=1))  # rank 0 has warned
    open_loader(spec.evaluation())  # in order, each shard is downloaded once
    assert not caplog.records


def test_local_shards_use_a_cache_only_if_asked_to(small_shards: Path, tmp_path: Path) -> None:
    assert ShardSet(small_shards, "train").cache is None
    cached = ShardSet(f"file://{small_shards}", "train", tmp_path)
    assert np.array_equal(cached.read(5), ShardSet(small_shards, "train").read(5))
    assert cached.shards[0].parent == tmp_path
    assert cached.shards[0].exists()


# --- Blocks of shards, fetched ahead


def test_the_shards_of_a_block_and_the_next_are_prefetched(remote: str, tmp_path: Path, downloads: list[str]) -> None:
    spec = spec_for(remote, cache=tmp_path, order="blocks", block_shards=1, engine="cpu", prefetch=1)
    loader = open_loader(spec)
    assert isinstance(loader.order, Blocks)
    next(iter(loader))  # 8 of the first shard's 16 or 12 images
    first = [loader.shards._urls[shard] for block in (0, 1) for shard in loader.order.shards(0, block)]
    wait_until(lambda: set(downloads) >= set(first))
    loader.close()
    wait_until(lambda: not threads_named("cropfeed-prefetch"))
    local = open_loader(replace(spec, data=remote, cache=tmp_path))
    assert [batch.ids.tolist() for batch in local]  # the cache is still usable


def test_batches_of_blocks_equal_the_local_ones(small_shards: Path, remote: str, tmp_path: Path) -> None:
    """The cache holds little more than one block."""
    spec = spec_for(small_shards, order="blocks", block_shards=2)
    actual = open_loader(replace(spec, data=remote, cache=tmp_path, cache_gb=gigabytes(small_shards, 3)))
    for reference, found in zip(open_loader(spec), actual, strict=True):
        assert np.array_equal(reference.ids, found.ids)
        assert torch.equal(reference.images, found.images)
    actual.close()


def test_no_more_is_prefetched_than_the_cache_holds(
    small_shards: Path, remote: str, tmp_path: Path, downloads: list[str]
) -> None:
    shards = ShardSet(remote, "train", tmp_path, gigabytes(small_shards, 2))
    shards.prefetch([3, 1, 0, 2])
    wait_until(lambda: len(downloads) == 3)  # samples.npy and two shards
    time.sleep(0.3)
    shards.close()
    assert [url.rsplit("/", 1)[1] for url in downloads] in (
        ["samples.npy", "000003.tar", "000001.tar"],
        ["samples.npy", "000001.tar", "000003.tar"],
    )


def test_errors_of_prefetching_are_raised_by_read(remote: str, s3: str, tmp_path: Path) -> None:
    shards = ShardSet(remote, "train", tmp_path)
    s3_client().delete_object(Bucket=s3.removeprefix("s3://"), Key="imagenet/shards/train/000001.tar")
    shards.prefetch([0, 1])
    wait_until(lambda: shards.shards[0].exists())
    shards.close()
    with pytest.raises(UserError, match=rf"{remote}/train/000001.tar: not found"):
        shards.read(20)


def test_closing_stops_a_download(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet(remote, "train", tmp_path)
    begun = threading.Event()

    def endless(url: str, count: int) -> Iterator[bytes]:
        while True:
            begun.set()
            time.sleep(0.01)
            yield b"x"

    monkeypatch.setattr(files, "read_chunks", endless)
    shards.prefetch([0, 1, 2, 3])
    assert begun.wait(10)
    began = time.monotonic()
    shards.close()
    assert time.monotonic() - began < 5
    wait_until(lambda: not threads_named("cropfeed-prefetch"))
    assert not list(tmp_path.glob("*.partial"))
    monkeypatch.undo()


def test_a_loader_never_closed_leaves_no_thread(remote: str, tmp_path: Path) -> None:
    loader = open_loader(spec_for(remote, cache=tmp_path, order="blocks", block_shards=1, engine="cpu"))
    next(iter(loader))
    wait_until(lambda: not threads_named("cropfeed-prefetch"))


def test_an_interrupted_close_stops_running_fetches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended, fetched = threading.Event(), threading.Event(), threading.Event()

    def fetch(number: int, stop: threading.Event) -> None:
        if number == 0:
            begun.set()
            assert stop.wait(10)
            ended.set()
        elif not stop.is_set():
            fetched.set()

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    prefetcher = Prefetcher(fetch)
    prefetcher.request([0])
    assert begun.wait(10)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prefetcher.close()
    assert ended.wait(10)
    prefetcher.request([1])
    assert fetched.wait(10)
    prefetcher.close()


def test_local_shards_are_read_ahead(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, start, count, advice: advised.append((os.readlink(f"/proc/self/fd/{fd}"), advice))
    )
    shards = ShardSet(small_shards, "train")
    shards.prefetch([2, 0])
    wait_until(lambda: len(advised) == 2)
    shards.close()
    assert {Path(path).name for path, _ in advised} == {"000000.tar", "000002.tar"}
    assert {advice for _, advice in advised} == {os.POSIX_FADV_WILLNEED}


def wait_until(done: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_missing_data_is_named(remote: str, s3: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"s3://no-such-bucket-here/data/manifest.json: not found; make shards first"):
        Manifest("s3://no-such-bucket-here/data")
    with pytest.raises(UserError, match=rf"{s3}/elsewhere/manifest.json: not found; make shards first"):
        ShardSet(f"{s3}/elsewhere", "train", tmp_path)
    with pytest.raises(UserError, match=rf"{remote}: has no split 'test', only train, val"):
        ShardSet(remote, "test", tmp_path)
    with pytest.raises(UserError, match=r"nosuch://bucket/manifest.json: .*nosuch"):
        Manifest("nosuch://bucket")
    stored = ShardSet(remote, "train", tmp_path)
    s3_client().delete_object(Bucket=s3.removeprefix("s3://"), Key="imagenet/shards/train/000001.tar")
    stored.read(0)
    with pytest.raises(UserError, match=rf"{remote}/train/000001.tar: not found"):
        stored.read(20)


def test_without_credentials_the_url_is_named(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    result = run_script("train.py", "--data", remote, "--output", tmp_path / "run", "--cache", tmp_path / "cache", *SMALL)
    assert_refused(result, f"{remote}/manifest.json: cannot be reached", "credentials")


@pytest.mark.parametrize("name", ["train/000002.tar", "train/samples.npy", "mean_image.npy"])
def test_a_changed_object_is_refused(small_shards: Path, remote: str, s3: str, tmp_path: Path, name: str) -> None:
    content = bytearray((small_shards / name).read_bytes())
    content[-600] ^= 1
    s3_client().put_object(Bucket=s3.removeprefix("s3://"), Key=f"imagenet/shards/{name}", Body=bytes(content))
    with pytest.raises(UserError, match=rf"{remote}/{name}: its SHA-256 is not the one in manifest.json"):
        list(open_loader(spec_for(remote, cache=tmp_path)))


@pytest.mark.slow
def test_training_and_evaluation_from_a_url(
    small_shards: Path, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run, cache, limit = tmp_path / "run", tmp_path / "cache", gigabytes(small_shards, 3)
    result = run_script("train.py", "--data", remote, "--cache", cache, "--cache-gb", f"{limit:.9f}", "--output", run, *SMALL)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("exceed the cache") == 1
    assert 0 < used_bytes(cache) <= limit * GIGABYTE
    with (run / "metrics.csv").open() as stream:
        assert len([row for row in csv.DictReader(stream) if row["train_loss"]]) == 3
    evaluate = ("tools/evaluate.py", run, "--data", remote, "--cache", tmp_path / "other", "--json", tmp_path / "figures.json")
    result = run_script(*evaluate)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "figures.json").read_text())["images"] == 21
    shards = {entry["sha256"] for entry in Manifest(small_shards).splits["val"]["shards"]}
    assert shards < {path.name for path in (tmp_path / "other").iterdir()}
    assert_refused(run_script(*evaluate, "--cache-gb", 1e-6), "/000000.tar: its", "do not fit into the cache", "raise --cache-gb")
    assert not (tmp_path / "home" / ".cache" / "cropfeed").exists()
