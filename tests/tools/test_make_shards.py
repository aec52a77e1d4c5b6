from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.shards import ShardSet
from tests.helpers import ROOT, assert_refused, clean_environment, jpeg, picture, run_script


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_any_number_of_workers_gives_the_same_bytes(image_folder: Path, small_shards: Path, tmp_path: Path) -> None:
    result = run_script("tools/make_shards.py", image_folder, "--out", tmp_path / "again", "--workers", 1, "--shard-size", 16)
    assert result.returncode == 0
    assert digests(tmp_path / "again") == digests(small_shards)
    assert "60 train, 21 val images of 3 classes" in result.stdout
    assert "images/s" in result.stdout
    assert "81/81" in result.stderr  # the progress bar


def test_training_samples_are_shuffled_over_the_shards(small_shards: Path) -> None:
    labels = ShardSet(small_shards, "train").samples["label"]
    assert all(len(set(labels[start : start + 16])) == 3 for start in range(0, 48, 16))


def test_class_folders_alone_are_a_training_split(image_folder: Path, tmp_path: Path) -> None:
    assert run_script("tools/make_shards.py", image_folder / "val", "--out", tmp_path / "out").returncode == 0
    assert [path.name for path in tmp_path.glob("out/*") if path.is_dir()] == ["train"]
    assert len(ShardSet(tmp_path / "out", "train")) == 21


def test_awkward_names_get_keys_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "src" / "a class"
    folder.mkdir(parents=True)
    for index, name in enumerate(("a.b.jpg", "a_b.jpg", "a b.jpeg", "x" * 150 + ".JPEG", ".hidden")):
        (folder / name).write_bytes(jpeg(picture(40, 50, index)))
    assert run_script("tools/make_shards.py", tmp_path / "src", "--out", tmp_path / "out").returncode == 0
    stored = ShardSet(tmp_path / "out", "train")
    keys = sorted(stored.key(i) for i in range(len(stored)))
    assert keys == ["a_class/a_b", "a_class/a_b-1", "a_class/a_b-2", "a_class/" + "x" * 150]
    content = {stored.read(i).tobytes() for i in range(4)}
    assert content == {path.read_bytes() for path in folder.iterdir() if path.name != ".hidden"}


def break_folder(root: Path, how: str) -> None:
    victim = root / "train" / "n00000001"
    if how == "empty class":
        shutil.rmtree(victim)
        victim.mkdir()
    elif how == "text":
        (victim / "notes.JPEG").write_text("no image")
    elif how == "truncated":
        path = next(iter(sorted(victim.iterdir())))
        path.write_bytes(path.read_bytes()[:-300])
    elif how == "gif":
        from PIL import Image

        Image.fromarray(picture(20, 20)).save(victim / "moving.JPEG", "GIF")
    elif how == "nested":
        (victim / "inner").mkdir()
    elif how == "unknown class":
        shutil.copytree(root / "val" / "n00000001", root / "val" / "n00000009")
    elif how == "no classes":
        shutil.rmtree(root / "train")
        (root / "train").mkdir()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("empty class", "without images"),
        ("text", "notes.JPEG: no readable image"),
        ("truncated", "no readable image"),
        ("gif", "moving.JPEG: is a GIF image"),
        ("nested", "inner: is a folder"),
        ("unknown class", "n00000009"),
        ("no classes", "holds no class folders"),
    ],
)
def test_bad_folders_are_refused_and_leave_nothing(image_folder: Path, tmp_path: Path, how: str, words: str) -> None:
    shutil.copytree(image_folder, tmp_path / "src")
    break_folder(tmp_path / "src", how)
    result = run_script("tools/make_shards.py", tmp_path / "src", "--out", tmp_path / "out")
    result.stderr = "\n".join(
        line for line in result.stderr.replace("\r", "\n").splitlines() if "images/s" not in line and line.strip()
    )
    assert_refused(result, words, str(tmp_path / "src"))
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_bad_arguments_are_refused(image_folder: Path, small_shards: Path, tmp_path: Path) -> None:
    before = digests(small_shards)
    assert_refused(run_script("tools/make_shards.py", tmp_path / "nowhere", "--out", tmp_path / "out"), "no such folder")
    assert_refused(run_script("tools/make_shards.py", image_folder, "--out", small_shards), "exists already")
    assert_refused(run_script("tools/make_shards.py", image_folder, "--out", tmp_path / "out", "--workers", 0), "at least 1")
    assert_refused(run_script("tools/make_shards.py", image_folder), "--out")
    assert digests(small_shards) == before
    assert not list(tmp_path.iterdir())


def test_interrupting_leaves_nothing_and_killing_only_what_the_next_run_clears(image_folder: Path, tmp_path: Path) -> None:
    many = tmp_path / "src" / "train" / "n0"
    many.mkdir(parents=True)
    data = jpeg(picture(600, 800))
    for index in range(1500):
        (many / f"{index}.JPEG").write_bytes(data)
    out = tmp_path / "out"
    command = [
        sys.executable,
        str(ROOT / "tools" / "make_shards.py"),
        str(tmp_path / "src"),
        "--out",
        str(out),
        "--shard-size",
        "100",
    ]
    for how, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = subprocess.Popen(
            command,
            env=clean_environment(),
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )
        while not list(tmp_path.glob("out.partial/train/*.tar")):
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(how)
        process.communicate(timeout=60)
        assert process.returncode == code
        assert not out.exists()
        assert (tmp_path / "out.partial").exists() == (how == signal.SIGKILL)
    shutil.rmtree(many)
    shutil.copytree(image_folder / "train" / "n00000000", many)
    assert run_script("tools/make_shards.py", tmp_path / "src", "--out", out).returncode == 0
    assert json.loads((out / "manifest.json").read_text())["splits"]["train"]["images"] == 20
    assert not (tmp_path / "out.partial").exists()
