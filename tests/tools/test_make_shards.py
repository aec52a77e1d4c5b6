from __future__ import annotations

import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipeline.convert import run
from pipeline.convert.conversion import begin
from pipeline.convert.make import ConvertOptions, make_shards
from pipeline.errors import StorageError, UserError
from pipeline.store.shards import ShardSet
from tests.helpers import (
    ROOT,
    assert_ends,
    assert_refused,
    clean_environment,
    jpeg,
    open_image,
    random_image,
    run_script,
    without_progress,
    write_image_folder,
)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make(src: Path | str, out: Path | str, *options: object) -> subprocess.CompletedProcess[str]:
    """Run the script, with one worker by default."""
    return run_script("tools/make_shards.py", src, "--out", out, "--shard-size", 16, "--workers", 1, *options)


def pixels(data: bytes) -> npt.NDArray[np.int64]:
    return np.asarray(open_image(data).convert("RGB")).astype(np.int64)


WITHOUT_MAPS = """
import errno, mmap
class Map(mmap.mmap):
    def __new__(cls, file, *arguments, **options):
        if file != -1:
            raise OSError(errno.ENODEV, "No such device")
        return super().__new__(cls, file, *arguments, **options)
mmap.mmap = Map
"""


@pytest.fixture(scope="module")
def lossless(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`image_folder` in lossless shards of 16 images, made by two workers, on a system that maps no files."""
    folder = tmp_path_factory.mktemp("lossless")
    out = folder / "data"
    (folder / "sitecustomize.py").write_text(WITHOUT_MAPS)
    command = ["tools/make_shards.py", image_folder, "--out", out, "--shard-size", 16, "--workers", 2]
    result = run_script(*command, PYTHONPATH=str(folder))
    assert result.returncode == 0, result.stderr
    assert "81/81" in result.stderr  # the progress bar
    assert "6 shards, 81 images" in result.stdout
    assert "images/s" in result.stdout
    return out


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(image_folder: Path, lossless: Path, tmp_path: Path) -> None:
    assert make(image_folder, tmp_path / "again").returncode == 0  # with a single process
    assert digests(tmp_path / "again") == digests(lossless)
    assert not list(lossless.rglob(".*"))  # nothing hidden remains
    assert not (lossless / "conversion").exists()


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["lossless", "compact", "original"])
def test_profiles(image_folder: Path, tmp_path: Path, profile: str) -> None:
    assert make(image_folder, tmp_path / "out", "--profile", profile).returncode == 0
    stored = ShardSet(tmp_path / "out", "train")
    sources = {f"{path.parent.name}/{path.stem}": path.read_bytes() for path in image_folder.glob("train/*/*")}
    assert len(stored) == len(sources) == 60
    for i in range(len(stored)):
        before, after = sources[stored.key(i)], stored.read(i).tobytes()
        assert (before == after) == (profile == "original")
        assert (b"CROPFEED" in after[:60]) == (profile != "original")
        difference = np.abs(pixels(before) - pixels(after))
        assert (difference.max() == 0) == (profile != "compact")
        assert difference.mean() < 6
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["profile"] == profile


def test_training_samples_are_shuffled_over_the_shards_by_the_seed(image_folder: Path, lossless: Path, tmp_path: Path) -> None:
    labels = ShardSet(lossless, "train").samples["label"]
    assert all(len(set(labels[start : start + 16])) == 3 for start in range(0, 48, 16))
    assert make(image_folder, tmp_path / "other", "--seed", 1).returncode == 0
    one, other = (ShardSet(root, "train") for root in (lossless, tmp_path / "other"))
    assert [one.key(i) for i in range(60)] != [other.key(i) for i in range(60)]
    assert {one.key(i) for i in range(60)} == {other.key(i) for i in range(60)}
    val = [ShardSet(root, "val") for root in (lossless, tmp_path / "other")]
    assert [val[0].key(i) for i in range(21)] == [val[1].key(i) for i in range(21)] == sorted(val[0].key(i) for i in range(21))


def test_class_folders_alone_are_a_training_split(image_folder: Path, tmp_path: Path) -> None:
    assert make(image_folder / "val", tmp_path / "out").returncode == 0
    assert [path.name for path in tmp_path.glob("out/*") if path.is_dir()] == ["train"]
    assert len(ShardSet(tmp_path / "out", "train")) == 21


def test_awkward_names_get_unique_keys(tmp_path: Path) -> None:
    folder = tmp_path / "src" / "a class"
    folder.mkdir(parents=True)
    for index, name in enumerate(("a.b.jpg", "a_b.jpg", "a b.jpeg", "x" * 150 + ".JPEG", ".hidden")):
        (folder / name).write_bytes(jpeg(random_image(40, 50, index)))
    assert make(tmp_path / "src", tmp_path / "out", "--profile", "original").returncode == 0
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
        ("nested", "inner: is a folder"),
        ("unknown class", "n00000009"),
        ("no classes", "train: is empty"),
    ],
)
def test_bad_folders_are_refused_and_leave_nothing(image_folder: Path, tmp_path: Path, how: str, words: str) -> None:
    shutil.copytree(image_folder, tmp_path / "src")
    break_folder(tmp_path / "src", how)
    assert_refused(make(tmp_path / "src", tmp_path / "out"), words, str(tmp_path / "src"))
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_the_same_command_twice_at_a_time_succeeds_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image_folder(tmp_path / "src", classes=2, train=2, val=1)
    options = ConvertOptions(str(tmp_path / "src"), str(tmp_path / "out"), "original", workers=1)

    def is_overtaken(tasks: Any, workers: int) -> None:
        monkeypatch.undo()
        make_shards(options)
        raise StorageError("000000.tar: cannot be written: No such file or directory")  # it removed our partial file

    monkeypatch.setattr(run, "run_local", is_overtaken)
    make_shards(options)
    assert len(ShardSet(tmp_path / "out", "train")) == 4


@pytest.mark.parametrize(("file", "text"), [("manifest.json", "{"), ("manifest.json", "[]"), ("conversion/plan.json", "{")])
def test_a_damaged_record_of_a_conversion_is_named(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=f"{file}.* is damaged .*; give another `out`"):
        begin(str(tmp_path), {"version": 2})


@pytest.mark.slow
def test_bad_arguments_are_refused(image_folder: Path, lossless: Path, tmp_path: Path) -> None:
    before = digests(lossless)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    script = "tools/make_shards.py"
    for arguments, words in (
        ((tmp_path / "nowhere", "--out", tmp_path / "out"), "no such folder"),
        ((image_folder, "--out", tmp_path / "full"), "is not a conversion"),
        ((image_folder, "--out", lossless), "another shard_size"),
        ((image_folder, "--out", lossless, "--shard-size", 16, "--profile", "compact", "--seed", 3), "another profile, seed"),
        ((image_folder / "val", "--out", lossless, "--shard-size", 16), "another source"),
        ((image_folder, "--out", tmp_path / "out", "--workers", 0), "at least 1"),
        ((image_folder, "--out", tmp_path / "out", "--shards", "5-2"), "FIRST-LAST"),
        ((image_folder, "--out", tmp_path / "out", "--ffcv-proportion", "nan"), "--ffcv-proportion in [0, 1]"),
        ((image_folder,), "--out"),
        (("--verify", tmp_path / "nowhere"), "no such folder"),
    ):
        assert_refused(run_script(script, *arguments), words)
    assert digests(lossless) == before
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def odd_folder(root: Path) -> Path:
    """Write files with the irregularities that ImageNet contains, under their names in ImageNet."""
    files = {
        "train/n02105855/n02105855_2933.JPEG": saved("PNG"),
        "train/n02105855/n02105855_1.JPEG": jpeg(random_image(50, 60, 1)),
        "train/n02105855/copy.JPEG": jpeg(random_image(50, 60, 1)),
        "train/n01739381/n01739381_1309.JPEG": saved("JPEG", "CMYK"),
        "train/n01739381/twin.JPEG": jpeg(random_image(50, 60, 1)),
        "train/n01739381/cut.JPEG": jpeg(random_image(50, 60, 2))[:-300],
        "train/n01739381/notes.JPEG": b"no image",
        "train/n04532106/n04532106_1553.JPEG": saved("JPEG", xmp=b"<broken"),
        "train/n04532106/turned.JPEG": saved("JPEG", orientation=6),
        "train/n04532106/wide.JPEG": saved("JPEG", icc_profile=b"Adobe RGB (1998)"),
        "val/n04532106/ILSVRC2012_val_00000001.JPEG": saved("JPEG", "CMYK"),
        "val/n02105855/again.JPEG": jpeg(random_image(50, 60, 1)),
        "val/n01739381/fine.JPEG": jpeg(random_image(50, 60, 3)),
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def saved(kind: str, mode: str = "RGB", orientation: int | None = None, **options: object) -> bytes:
    stream = io.BytesIO()
    if orientation:
        tags = Image.Exif()
        tags[0x0112] = orientation
        options["exif"] = tags
    Image.fromarray(random_image(50, 60, 9)).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def test_the_report_lists_the_irregular_images_of_imagenet(tmp_path: Path) -> None:
    result = make(odd_folder(tmp_path / "src"), tmp_path / "out")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    train, val = report["splits"]["train"], report["splits"]["val"]
    assert (train["listed"], train["stored"], train["left_out"]) == (10, 8, 2)
    assert (val["listed"], val["stored"], val["left_out"]) == (3, 3, 0)
    names = {fact: found["names"] for fact, found in report["facts"].items()}
    assert names["CMYK"] == ["train/n01739381/n01739381_1309.JPEG", "val/n04532106/ILSVRC2012_val_00000001.JPEG"]
    assert names["not a JPEG: PNG"] == ["train/n02105855/n02105855_2933.JPEG"]
    assert names["broken metadata"] == ["train/n04532106/n04532106_1553.JPEG"]
    assert names["orientation tag, ignored"] == ["train/n04532106/turned.JPEG"]
    assert names["embedded color profile, ignored"] == ["train/n04532106/wide.JPEG"]
    assert names["decoded in full, not at the crop"] == ["train/n02105855/n02105855_2933.JPEG"]
    assert all(found["images"] == len(found["names"]) for found in report["facts"].values())
    reasons = {item["image"]: item["reason"] for item in report["left_out"]}
    assert "truncated" in reasons["train/n01739381/cut.JPEG"]
    assert reasons["train/n01739381/notes.JPEG"] == "not an image"
    cmyk, same = sorted(report["duplicates"], key=lambda group: len(group["images"]))
    assert [image["image"] for image in same["images"]] == [
        "train/n01739381/twin.JPEG", "train/n02105855/copy.JPEG", "train/n02105855/n02105855_1.JPEG", "val/n02105855/again.JPEG",
    ]  # fmt: skip
    assert same["sha256"] == hashlib.sha256(jpeg(random_image(50, 60, 1))).hexdigest()
    assert same["across_splits"]
    assert same["conflicting_labels"]
    assert len(cmyk["images"]) == 2
    assert report["duplicate_images"] == report["conflicting_duplicates"] == 6
    cost = "decoded in full, not at the crop: 1, each with about 10 times the CPU time of a JPEG (--reencode "
    for words in ("CMYK: 2", "not a JPEG: PNG: 1", cost, "left out: 2", "exact duplicates: 6 images in 2 groups"):
        assert words in result.stdout
    keys = {ShardSet(tmp_path / "out", "train").key(i) for i in range(8)}
    assert "n01739381/cut" not in keys


def test_a_conversion_is_resumed_only_with_the_same_choice_of_reencoding(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "image.png").write_bytes(saved("PNG"))

    def convert(name: str, profile: str, reencode: bool) -> dict[str, Any]:
        out = tmp_path / name
        make_shards(ConvertOptions(str(tmp_path / "src"), str(out), profile, workers=1, reencode=reencode))
        found: dict[str, Any] = json.loads((out / "manifest.json").read_text())
        return found

    for reencode, kind in ((False, "PNG"), (True, "JPEG")):
        made = convert(kind, "lossless", reencode)
        assert convert(kind, "lossless", reencode) == made  # complete already
        assert ("reencode" in made["conversion"]) == reencode  # version 0.1 does not know it
        for stored in (ShardSet(tmp_path / kind, "train").read(i).tobytes() for i in range(2)):
            assert open_image(stored).format == kind
        with pytest.raises(UserError, match="holds a conversion with another reencode"):
            convert(kind, "lossless", not reencode)
    assert convert("compact", "compact", True) == convert("compact", "compact", False)  # which re-encodes everything


def test_strict_stops_at_the_first_bad_image(tmp_path: Path) -> None:
    result = make(odd_folder(tmp_path / "src"), tmp_path / "out", "--strict")
    assert_refused(without_progress(result), "no usable image", "n01739381")
    assert not (tmp_path / "out" / "manifest.json").exists()
    for name in ("cut", "notes"):
        (tmp_path / "src" / "train" / "n01739381" / f"{name}.JPEG").unlink()
    shutil.rmtree(tmp_path / "out")  # the listing has changed
    assert make(tmp_path / "src", tmp_path / "out", "--strict").returncode == 0


def test_a_split_without_any_usable_image_is_refused(tmp_path: Path) -> None:
    for name in ("n1", "n2"):
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "notes.JPEG").write_text("no image")
    result = without_progress(make(tmp_path / "src", tmp_path / "out"))
    assert_refused(result, "no image of train can be used", "notes.JPEG")
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.slow
def test_shards_made_by_several_jobs_in_any_order(image_folder: Path, lossless: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for part, missing in (("4-99", 4), ("0", 3), ("2-3", 1)):
        result = make(image_folder, out, "--shards", part, "--workers", 1)
        assert result.returncode == 0, result.stderr
        assert f"{missing} shards are still to be made" in result.stdout
        with pytest.raises(UserError, match="its conversion is not finished"):
            ShardSet(out, "train")
    assert_refused(make(image_folder, out, "--shards", "6-9"), "there are only shards 0-5")
    (out / "train" / ".000003.tar.another-job.partial").write_text("being written")
    assert make(image_folder, out, "--shards", "1-1").returncode == 0
    assert json.loads((out / "manifest.json").read_text())
    (out / "train" / ".000003.tar.another-job.partial").unlink()  # still there, because another job may be writing it
    assert digests(out) == digests(lossless)


def start(src: Path | str, out: Path | str, *options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "tools" / "make_shards.py"),
            str(src),
            "--out",
            str(out),
            "--shard-size",
            "16",
            *map(str, options),
        ],
        env=clean_environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


def finished(out: Path) -> int:
    return len(list(out.glob("conversion/*.npz")))


def stop(process: subprocess.Popen[str], how: signal.Signals, reached: Callable[[], bool]) -> int:
    """Send a signal once `reached()` is true, unless the process ends before. Returns its exit code."""
    while process.poll() is None and not reached():
        time.sleep(0.01)
    process.send_signal(how)
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.slow
def test_a_run_stopped_anywhere_can_be_resumed(image_folder: Path, lossless: Path, tmp_path: Path) -> None:
    """After Ctrl-C and repeated SIGKILLs, the last run gives the bytes of an uninterrupted one."""
    out, rng = tmp_path / "out", np.random.default_rng(0)
    assert stop(start(image_folder, out), signal.SIGINT, lambda: finished(out) >= 1) == 130
    for shards in (1, 2, 3, 5, 6):  # kill a random moment after so many shards are finished
        process = start(image_folder, out)
        moment = float(rng.uniform(0, 0.3))

        def reached(shards: int = shards, moment: float = moment) -> bool:
            if finished(out) < shards:
                return False
            time.sleep(moment)
            return True

        before = finished(out)
        code = stop(process, signal.SIGKILL, reached)
        complete = (out / "manifest.json").exists()
        assert code == -9 or complete
        assert complete or finished(out) >= max(before, shards)  # nothing finished is lost
        if not complete:
            with pytest.raises(UserError, match="its conversion is not finished"):
                ShardSet(out, "train")
    assert make(image_folder, out).returncode == 0
    assert digests(out) == digests(lossless)


@pytest.mark.slow
def test_intact_shards_are_kept_and_damaged_ones_made_again(image_folder: Path, lossless: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert make(image_folder, out, "--shards", "0-4").returncode == 0
    kept, damaged = out / "train" / "000000.tar", out / "train" / "000001.tar"
    before = kept.stat().st_mtime_ns
    data = bytearray(damaged.read_bytes())
    data[5000] ^= 1
    damaged.write_bytes(data)
    (out / "train" / "000002.tar").unlink()
    (out / "conversion" / "train-000003.npz").write_bytes(b"junk")
    assert make(image_folder, out, "--workers", 2).returncode == 0
    assert kept.stat().st_mtime_ns == before
    assert digests(out) == digests(lossless)


@pytest.mark.slow
def test_verify_names_shard_and_sample_of_any_flipped_bit(lossless: Path, tmp_path: Path) -> None:
    result = run_script("tools/make_shards.py", "--verify", lossless)
    assert result.returncode == 0
    assert "every byte is as it was written" in result.stdout
    out = tmp_path / "out"
    shutil.copytree(lossless, out)
    stored, rng = ShardSet(out, "train"), np.random.default_rng(3)
    tar = out / "train" / "000001.tar"
    whole = tar.read_bytes()
    bounds = [int(record["offset"]) + int(record["bytes"]) for record in stored.samples[16:32]]
    for place in [0, 700, bounds[3] + 1, len(whole) - 1, *rng.integers(0, len(whole), 4).tolist()]:
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        tar.write_bytes(data)
        result = without_progress(run_script("tools/make_shards.py", "--verify", out))
        assert_refused(result, "1 damaged", str(out))
        owner = next((i for i, end in enumerate(bounds) if place < -(-end // 512) * 512), None)
        expected = "after its last sample" if owner is None else f"sample {stored.key(16 + owner)} is damaged"
        assert f"{tar}: " in result.stdout
        assert expected in result.stdout, (place, result.stdout)
    tar.write_bytes(whole[: bounds[13]])
    result = run_script("tools/make_shards.py", "--verify", out)
    assert f"has {bounds[13]} bytes" in result.stdout
    assert result.stdout.count("is damaged or cut off") in (2, 3)  # two whole samples, and perhaps the padding of one


def test_verify_checks_every_other_file_and_a_rerun_repairs_shards(image_folder: Path, lossless: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(lossless, out)
    (out / "val" / "000001.tar").unlink()
    for name in ("train/000002.tar", "train/000000.idx"):
        data = bytearray((out / name).read_bytes())
        data[len(data) // 2] ^= 4
        (out / name).write_bytes(data)
    result = run_script("tools/make_shards.py", "--verify", out)
    assert result.returncode == 2
    for words in ("val/000001.tar: not found", "000002.tar: sample", "000000.idx: is damaged", "3 damaged"):
        assert words in result.stdout + result.stderr
    result = make(image_folder, out)
    assert "3 damaged shards made again" in result.stdout
    assert digests(out) == digests(lossless)
    for name in ("mean_image.npy", "train/samples.npy"):
        (out / name).write_bytes((out / name).read_bytes()[:-1])
    result = run_script("tools/make_shards.py", "--verify", out)
    for words in ("mean_image.npy: is damaged", "samples.npy: is damaged", "2 damaged"):
        assert words in result.stdout + result.stderr


def test_a_killed_worker_ends_the_run_with_a_remedy(tmp_path: Path) -> None:
    import psutil

    folder = tmp_path / "src" / "n0"
    folder.mkdir(parents=True)
    data = jpeg(random_image(600, 800))
    for index in range(1500):
        (folder / f"{index}.JPEG").write_bytes(data)
    process = start(tmp_path / "src", tmp_path / "out", "--workers", 2)
    while not list(tmp_path.glob("out/conversion/*.npz")):
        time.sleep(0.05)
        assert process.poll() is None
    worker = max(psutil.Process(process.pid).children(), key=lambda child: child.cpu_times().user)
    worker.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a worker process was killed" in errors
    assert_ends(worker.pid)


def test_help_has_runnable_examples() -> None:
    result = run_script("tools/make_shards.py", "--help")
    assert result.returncode == 0
    for words in (
        "python tools/make_shards.py /imagenet --out",
        "--profile",
        "report.json",
        "ILSVRC2012_img_train.tar",
        "--verify",
    ):
        assert words in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 130
