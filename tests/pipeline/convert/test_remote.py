"""Conversion from and to a local S3 server."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.store import files
from pipeline.store.shards import ShardSet
from tests.helpers import assert_refused, run_script, upload, without_progress
from tests.tools.test_make_shards import digests, make, start


def download(url: str, folder: Path) -> Path:
    for entry in files.list_folder(url):
        if entry.is_folder:
            download(files.join(url, entry.name), folder / entry.name)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / entry.name).write_bytes(files.read(files.join(url, entry.name)))
    return folder


@pytest.mark.slow
def test_from_s3_to_s3_gives_the_local_bytes(image_folder: Path, s3: str, tmp_path: Path) -> None:
    """After a kill, every visible file is complete, and the next run resumes."""
    assert make(image_folder, tmp_path / "expected").returncode == 0
    upload(image_folder, f"{s3}/images")
    process = start(f"{s3}/images", f"{s3}/shards", "--workers", 1)
    deadline = time.monotonic() + 60
    while len([e for e in files.list_folder(f"{s3}/shards/conversion") if e.name.endswith(".npz")]) < 2:
        time.sleep(0.1)
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.kill()
    process.communicate()
    with pytest.raises(UserError, match="not found"):
        ShardSet(f"{s3}/shards", "train")
    result = make(f"{s3}/images", f"{s3}/shards", "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert digests(download(f"{s3}/shards", tmp_path / "found")) == digests(tmp_path / "expected")


@pytest.mark.slow
def test_verify_and_repair_on_s3(image_folder: Path, s3: str) -> None:
    out = f"{s3}/shards"
    assert make(image_folder, out).returncode == 0
    assert run_script("tools/make_shards.py", "--verify", out).returncode == 0
    path = f"{out}/train/000002.tar"
    data = bytearray(files.read(path))
    data[9000] ^= 1
    files.write(path, bytes(data))
    result = without_progress(run_script("tools/make_shards.py", "--verify", out))
    assert_refused(result, "1 damaged", out)
    assert f"{path}: sample " in result.stdout
    assert "1 damaged shards made again" in make(image_folder, out).stdout
    assert run_script("tools/make_shards.py", "--verify", out).returncode == 0


@pytest.mark.slow
def test_missing_sources_and_outputs_are_named(image_folder: Path, s3: str, tmp_path: Path) -> None:
    assert_refused(make(f"{s3}/nothing", tmp_path / "out"), f"{s3}/nothing: no such folder")
    result = without_progress(make(image_folder, "s3://no-such-bucket-here/out"))
    assert_refused(result, "s3://no-such-bucket-here/out")
    assert_refused(make(image_folder, "gopher://x/out"), "gopher://x/out")
