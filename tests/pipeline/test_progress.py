"""Long work says what it does and how long that will take; quick work says nothing."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline import progress
from pipeline.convert import folders, make, tars, verify
from pipeline.convert.sources import SourceOptions
from pipeline.progress import announce_if_slow, progress_bar
from pipeline.store import files
from pipeline.store.shards import ShardSet

DELAY = 0.2


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars and lines appear after 0.2 seconds."""
    monkeypatch.setattr(progress, "DELAY_S", DELAY)
    monkeypatch.setattr(progress, "LOG_S", 0.01)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], None]:
    """Makes a function take longer than the delay."""

    def slow_down(module: Any, name: str) -> None:
        function = getattr(module, name)

        def slowed(*args: Any, **options: Any) -> Any:
            time.sleep(1.5 * DELAY)
            return function(*args, **options)

        monkeypatch.setattr(module, name, slowed)

    return slow_down


class SlowStream(io.BytesIO):
    """A file on a slow disk."""

    def read(self, size: int | None = -1) -> bytes:
        time.sleep(0.6 * DELAY)
        return super().read(size)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def open_binary(path: str) -> Iterator[SlowStream]:
        yield SlowStream(Path(path).read_bytes())

    monkeypatch.setattr(files, "open_binary", open_binary)


@pytest.fixture
def large_tar(tmp_path: Path) -> Path:
    """A tar of three files of 4 MiB."""
    path = tmp_path / "large.tar"
    with tarfile.open(path, "w") as tar:
        for name in "abc":
            member = tarfile.TarInfo(name)
            member.size = 1 << 22
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """What has been written to stderr contains all words, and was not empty."""
    text = capsys.readouterr().err
    for word in words:
        assert word in text, text


def test_quick_work_stays_silent(
    image_folder: Path, small_shards: Path, large_tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders.list_folders(str(image_folder), SourceOptions())
    files.sha256(str(large_tar), "SHA-256")
    assert verify.verify(str(small_shards), 1) == []
    ShardSet(small_shards, "train", tmp_path / "cache").read(0)
    with announce_if_slow("sleeping"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("impatient")
def test_listing_folders(image_folder: Path, slow: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    slow(files, "list_folder")
    folders.list_folders(str(image_folder), SourceOptions())
    said(capsys, f"listing {image_folder}/train", "3/3", " classes/s")


@pytest.mark.usefixtures("impatient", "slow_disk")
def test_checksums_and_indices_of_large_files(
    large_tar: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = files.sha256(str(large_tar), "SHA-256 of large.tar")
    said(capsys, "SHA-256 of large.tar: 100%", "12.6M/12.6M", "B/s")
    monkeypatch.setitem(tars.MD5, "large.tar", "another")
    with pytest.raises(Exception, match="MD5"):
        tars.check_md5(str(large_tar.parent), "large.tar")
    said(capsys, "MD5 of large.tar: 100%", "12.6M/12.6M", "B/s")
    with files.open_binary(str(large_tar)) as stream:
        assert [member.name for _, member in tars._shown(str(large_tar), stream)] == ["a", "b", "c"]
    said(capsys, "index of large.tar: ", "/12.6M", "B/s")
    assert files.sha256(str(large_tar)) == digest  # without a label: in worker processes
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("impatient")
def test_verifying_shards(small_shards: Path, slow: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    slow(verify, "_check_shard")
    assert verify.verify(str(small_shards), 1) == []
    said(capsys, "verifying train: 100%", "verifying val: 100%", "B/s")


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_unpacking_a_tar(
    image_folder: Path, large_tar: Path, tmp_path: Path, slow: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(image_folder / "train", "train")
    slow(tarfile.TarFile, "_extract_member")
    assert make.find_images(tmp_path / "images.tar", tmp_path / "scratch")[0] == 60
    said(capsys, "unpacking images.tar", "B/s")


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.usefixtures("impatient")
def test_downloads_into_the_cache(
    small_shards: Path, tmp_path: Path, rank: str, monkeypatch: pytest.MonkeyPatch, slow: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Of all shards that are missing when the first is downloaded. Rank 1 shows nothing."""
    monkeypatch.setenv("RANK", rank)
    slow(files, "read_chunks")
    shards = ShardSet(small_shards, "train", tmp_path)
    first = [sum(shards.sizes[:shard]) for shard in range(len(shards.sizes))]
    for sample in first[:2]:
        shards.read(sample)
    text = capsys.readouterr().err
    total = sum(entry["bytes"] for entry in shards.manifest.splits["train"]["shards"])
    assert ("downloading train:" in text and f"/{total / 1e3:.0f}k" in text) == (rank == "0"), text
    for sample in first:
        shards.read(sample)
    shards.close()
    assert ("100%" in capsys.readouterr().err) == (rank == "0")


@pytest.mark.usefixtures("impatient")
def test_work_without_known_progress_is_announced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with announce_if_slow("sleeping, which takes half a second"):
        time.sleep(2 * DELAY)
    assert capsys.readouterr().err == "sleeping, which takes half a second\n"
    monkeypatch.setenv("RANK", "1")
    with announce_if_slow("sleeping, which takes half a second"):
        time.sleep(2 * DELAY)
    assert capsys.readouterr().err == ""


def test_a_log_gets_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal: the beginning, the end, and in between one in ten seconds."""
    for _ in progress_bar(range(1000), unit=" images", delayed=False):
        time.sleep(0.0005)
    lines = capsys.readouterr().err.strip().split("\r")
    assert len(lines) == 2
    assert "1000/1000" in lines[1]


@pytest.mark.usefixtures("impatient")
def test_a_second_bar_moves_no_cursor_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(total=2, desc="outer", delayed=False), progress_bar(total=2, desc="inner", delayed=False) as inner:
        inner.update()
    text = capsys.readouterr().err
    assert "outer" in text
    assert "inner" in text
    assert "\x1b" not in text
