"""tools/bench/compare.py, and the crops that its contenders make."""

from __future__ import annotations

import csv
import importlib
import os
import random
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

from pipeline.convert.make import find_images
from pipeline.errors import UserError
from tests.helpers import assert_ends, assert_refused, jpeg, run_script, without_progress, write_image_folder
from tools.bench.peers import cuts, dali, data, report, torch_loaders
from tools.bench.peers.compare import CompareOptions
from tools.bench.peers.contenders import CONTENDERS, DECODE, Contender
from tools.bench.peers.jitter import jitter_crop
from tools.bench.peers.job import Job, draw
from tools.bench.peers.turns import Result, measure

SIZE, LOW, HIGH = 32, 36, 68
RIVALS = {
    "slipstream-jpeg": "build github.com/harvard-visionlab/slipstream",
    "slipstream-yuv420": "build github.com/harvard-visionlab/slipstream",
    "litdata": "pip install litdata ",
    "mosaicml-streaming": "pip install mosaicml-streaming ",
    "datasets": "pip install datasets ",
    "torch-torchcodec": "pip install torchcodec ",
}
HEIGHT, WIDTH, STEP = 96, 112, 2  # of ramp images, where red is STEP * column and green is STEP * row


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three class folders of eight JPEGs."""
    root = tmp_path_factory.mktemp("images")
    write_image_folder(root, classes=3, train=8, val=0)
    return root / "train"


def compare(images: Path, out: Path, *options: object) -> Any:
    return without_progress(
        run_script(
            "tools/bench/compare.py", images, "--results", out / "compare.csv",
            "--image-size", SIZE, "--scale", LOW, HIGH, "--batch-size", 8, "--repeats", 2, "--seconds", 0.2, *options,
        )
    )  # fmt: skip


@pytest.mark.slow
def test_figures_failures_and_missing_packages(images: Path, tmp_path: Path) -> None:
    """A contender with `false` as its Python exits at once. tensorflow is not installed."""
    only = ["dali-roi:original", "dali-plain:original", "dali-plain:500", "tf-data:original", f"{DECODE}:lossless"]
    pythons = ["--python-for", "dali-plain=/bin/false"]
    before = set(Path("/tmp").glob("cropfeed-compare-*"))
    result = compare(images, tmp_path, "--only", *only, *pythons)
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path)
    figures = [row for row in rows if row["benchmark"] == "compare"]
    assert [(row["engine"], row["metric"]) for row in figures] == [
        ("dali-roi", "images_per_s"), ("dali-roi", "cpu_ms_per_image"), ("dali-roi", "kb_per_image"),
        ("dali-roi", "ratio_to_fastest_peer"),
        (DECODE, "images_per_s"), (DECODE, "cpu_ms_per_image"), (DECODE, "kb_per_image"),
    ]  # fmt: skip
    assert all(row["repeats"] == "2" for row in figures if row["metric"] != "kb_per_image")
    assert all(0 < float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in figures)
    value = {(row["engine"], row["metric"]): float(row["value"]) for row in figures}
    assert value["dali-roi", "ratio_to_fastest_peer"] == 1.0
    assert "nvidia-dali" in figures[0]["spec"]
    stored = sum(path.stat().st_size for path in images.glob("*/*")) / 24e3
    assert (
        stored < value["dali-roi", "kb_per_image"] < stored + 7
    )  # a tar's labels, headers and end: up to 10 kB for three images
    assert value[DECODE, "images_per_s"] > value["dali-roi", "images_per_s"]

    touched = {row["engine"]: row["value"] for row in rows if row["metric"] == "mean_to_image"}
    assert 0.1 < float(touched["cut"]) < 1.1
    assert "kB/image" in result.stdout
    assert len(re.findall(r"^  dali-plain +its process ended, exit code 1$", result.stdout, re.MULTILINE)) == 2
    assert "  tf-data                      not installed: pip install tensorflow-cpu" in result.stdout
    assert set(Path("/tmp").glob("cropfeed-compare-*")) <= before


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "compare.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("name", RIVALS)
def test_a_missing_package_is_one_line_that_says_what_to_install(name: str, tmp_path: Path) -> None:
    """`python -S` finds no packages."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    job = Job(str(tmp_path), 8, 8, 16, (16, 20), 1, "uint8", (0.0, 0.0, 0.0))
    rival = next(contender for contender in CONTENDERS if contender.name == name)
    (result,) = measure([rival], {rival.data: job}, 2, 0.1, {name: str(python)}, {})
    assert result.error is not None
    assert re.fullmatch(rf"not installed: {RIVALS[name]}.*\(ModuleNotFoundError: .*\)", result.error)


@pytest.mark.slow
def test_images_of_shards(small_shards: Path, tmp_path: Path) -> None:
    result = compare(small_shards, tmp_path, "--only", "dali-roi:original", "cropfeed-cpu-original", "--seconds", 0.1)
    assert result.returncode == 0, result.stderr
    rows = {row["engine"]: row for row in rows_of(tmp_path) if row["metric"] == "ratio_to_fastest_peer"}
    assert all(row["spec"].startswith(f"original: {small_shards.name}, 60 images, ") for row in rows.values())
    ratios = {name: float(row["value"]) for name, row in rows.items()}
    assert ratios == {"dali-roi": 1.0, "cropfeed-cpu-original": pytest.approx(2, abs=2)}


@pytest.mark.slow
def test_wrong_options_are_refused(images: Path, tmp_path: Path) -> None:
    assert_refused(compare(images, tmp_path, "--only", "nobody"), "--only nobody", "dali-roi")
    (tmp_path / "x.tar").write_text("no tar")
    with pytest.raises(UserError, match=r"x\.tar: cannot be unpacked"):
        find_images(tmp_path / "x.tar", tmp_path)
    with pytest.raises(UserError, match=r"holds no <class>/\*\.JPEG"):
        find_images(tmp_path, tmp_path)
    assert CompareOptions(images, threads=1).only == ()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"scale": (20, 30), "image_size": SIZE}, "`scale` 20 30"),
        ({"python_for": {"nobody": "python"}}, "`python_for` nobody"),
        ({"threads": 1000}, "`threads` 1000"),
        ({"out": "float16"}, "`out` is uint8 or float32"),
        ({"repeats": 1}, "`repeats` must be at least 2"),
        ({"seconds": 0.0}, "`seconds`"),
        ({"only": ("nobody",)}, "`only` nobody"),
    ]
    for changes, words in wrong:
        with pytest.raises(UserError, match=words):
            CompareOptions(images, **{"threads": 1, **changes})


def test_images_may_come_as_a_tar(images: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(images, "some/folder")
    count, found = find_images(tmp_path / "x.tar", tmp_path)
    assert count == 24
    assert {path.name for path in found.iterdir()} == {path.name for path in images.iterdir()}


UNRULY = """
import os, subprocess, sys, threading, time
def batches(job):
    import numpy as np
    while True:
        yield np.zeros((job.batch_size, job.size, job.size, 3), job.out), [0] * job.batch_size
        time.sleep(0.01)
def dies(job):
    for number, batch in enumerate(batches(job)):
        if number == 120:
            print("last words"); sys.stdout.flush(); os._exit(3)
        yield batch
def raises(job):
    yield from [next(batches(job))] * 2
    raise ValueError("out of luck")
def in_a_thread(job):
    def work():
        raise ValueError("out of luck, in a thread")
    threading.Thread(target=work).start()
    time.sleep(1000)
    yield
def other_shape(job):
    for images, labels in batches(job):
        yield images[:, 1:], labels
def leaves_a_child(job):
    child = subprocess.Popen(["sleep", "1000"])
    open(job.data, "w").write(str(child.pid))
    yield from batches(job)
"""


@pytest.fixture
def unruly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job for the contenders in UNRULY."""
    (tmp_path / "unruly.py").write_text(UNRULY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Job(str(tmp_path / "pid"), 8, 8, 16, (16, 20), 2, "uint8", (0.0, 0.0, 0.0))


def contender(name: str) -> Contender:
    return Contender(name, "original", f"unruly:{name}", ("nothing",))


@pytest.mark.slow
def test_a_failing_contender_does_not_stop_the_others(unruly: Job) -> None:
    names = ["dies", "batches", "raises", "in_a_thread", "other_shape", "leaves_a_child"]
    results = measure([contender(name) for name in names], {"original": unruly}, 3, 0.3, {}, {})
    errors = {
        name: re.sub(r"\S+unruly.py, line \d+, in \w+: ", "", one.error or "") for name, one in zip(names, results, strict=True)
    }
    assert errors == {
        "dies": "its process ended, exit code 3: last words",
        "batches": "",
        "raises": "ValueError: out of luck",
        "in_a_thread": "ValueError: out of luck, in a thread",
        "other_shape": "its batch is uint8 (8, 15, 16, 3), not uint8 (8, 16, 16, 3)",
        "leaves_a_child": "",
    }
    good = results[1]
    assert len(good.images_per_s) == len(good.cpu_ms) == 3
    assert min(good.images_per_s) > 300  # 8 images per 10 ms, and overhead
    assert max(good.images_per_s) <= 800
    assert_ends(int(Path(unruly.data).read_text()))


# The contenders' images


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """48 equal images as files, as tars and, with FFCV, as a .beton. A pixel's red and green encode its column and row."""
    root = tmp_path_factory.mktemp("ramps")
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[..., 0] = STEP * np.arange(WIDTH)
    pixels[..., 1] = STEP * np.arange(HEIGHT)[:, None]
    for number in range(48):
        path = root / "source" / f"n{number % 2}" / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(pixels, "444", 100) + bytes(number))  # different lengths, because the converter reports duplicates
    with_ffcv = os.environ.get("CROPFEED_WITHOUT") != "ffcv"
    assert data.prepare(root / "source", root, {"original"}, {"original"} if with_ffcv else set()) == {}
    return Job(str(root / "original"), 48, 16, SIZE, (LOW, HIGH), 2, "uint8", (100.0, 110.0, 120.0))


def shown(images: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The windows of crops of ramp images, (N, 5): left and top edge in source pixels, source pixels per crop pixel along x and
    along y, and 1 if the crop is mirrored."""
    found = []
    for image in images.astype(np.float64):
        inner = slice(2, -2)  # filters are asymmetric at the border of the image
        places = np.arange(SIZE)[inner] + 0.5
        across, along_x = np.polyfit(places, image[:, inner, 0].mean(0) / STEP + 0.5, 1)
        down, along_y = np.polyfit(places, image[inner, :, 1].mean(1) / STEP + 0.5, 1)
        left = along_x if across > 0 else along_x + across * SIZE
        found.append((left, along_y, abs(across), down, across < 0))
    return np.array(found)


def assert_windows(windows: npt.NDArray[np.float64], slack: float = 1.2) -> None:
    """Assert that the windows have the distribution that `Job` describes.

    slack: tolerance of a window's edges, source pixels. Rounding to whole pixels needs half a pixel. If a resized side was
    rounded up, its windows also exceed the image by a quarter of a crop pixel, 0.7 here.
    """
    left, top, across, down, flip = windows.T
    short = min(HEIGHT, WIDTH) / down
    assert np.abs(across - down).max() < 2.5 * slack / SIZE
    assert short.min() > LOW - HIGH * slack / SIZE
    assert short.max() < HIGH + 1 + HIGH * slack / SIZE
    assert abs(short.mean() - (LOW + HIGH) / 2) < 2.5  # 4 standard errors of 192
    for start, side in ((left, WIDTH), (top, HEIGHT)):
        free = side - SIZE * down
        assert start.min() > -slack
        assert (start - free).max() < slack
        relative = start[free > side / 3] / free[free > side / 3]
        assert 0.35 < relative.mean() < 0.65
        assert relative.min() < 0.1
        assert relative.max() > 0.9
    assert 0.35 < flip.mean() < 0.65
    assert abs(np.corrcoef(left, flip)[0, 1]) < 0.35


def first(batches: Iterator[tuple[Any, Any]], count: int = 12) -> npt.NDArray[Any]:
    """The images of some batches, copied."""
    return np.concatenate([np.asarray(next(batches)[0]).copy() for _ in range(count)])


IN_PYTHON = {
    "dali-plain": dali.plain,
    "dali-resize-crop-mirror": dali.resize_crop_mirror,
    "dali-roi": dali.roi,
    "webdataset-opencv": torch_loaders.webdataset_opencv,
    "webdataset-pillow": torch_loaders.webdataset_pillow,
    "torch-pillow": torch_loaders.files_pillow,
}


@pytest.mark.parametrize("name", IN_PYTHON)
def test_crops_of_peers(ramps: Job, name: str) -> None:
    if "opencv" in name:
        pytest.importorskip("cv2")
    images = first(IN_PYTHON[name](ramps))
    assert images.dtype == np.uint8
    assert images.shape == (192, SIZE, SIZE, 3)
    assert_windows(shown(images))
    assert images[..., 2].max() < 10  # RGB, not BGR


@pytest.mark.slow
@pytest.mark.parametrize("name", RIVALS)
def test_crops_of_rivals(ramps: Job, name: str) -> None:
    """Where they are installed: the development environment has none of them."""
    packages = {"slipstream": "slipstream", "mosaicml": "streaming", "torch": "torchcodec"}
    pytest.importorskip(packages.get(name.split("-")[0], name))
    rival = next(contender for contender in CONTENDERS if contender.name == name)
    module, function = rival.function.split(":")
    images = first(getattr(importlib.import_module(module), function)(ramps))
    assert_windows(shown(images))
    assert images[..., 2].max() < 10


@pytest.mark.parametrize("name", ["dali-plain", "dali-resize-crop-mirror", "dali-roi", "torch-pillow"])
def test_the_mean_is_subtracted_from_float32(ramps: Job, name: str) -> None:
    images = first(IN_PYTHON[name](ramps._replace(out="float32")))
    assert images.dtype == np.float32
    assert_windows(shown(images + np.array(ramps.mean, np.float32)))


def test_crops_of_ffcv_and_slipstream(ramps: Job) -> None:
    """Tests the function that draws crops without their compilation."""
    found = np.array([jitter_crop(HEIGHT, WIDTH, ramps.scale, (SIZE, SIZE)) for _ in range(192)], float)
    top, left, height, width = found.T
    flips = np.arange(192) % 2
    assert_windows(np.stack([left, top, width / SIZE, height / SIZE, flips], axis=1))


@pytest.mark.skipif(os.environ.get("CROPFEED_WITHOUT") == "ffcv", reason="FFCV is not installed")
def test_ffcv_stores_raw_pixels_if_the_disk_has_room(ramps: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.bench.peers import ffcv

    stored = Path(ffcv.write_raw(ramps))
    raw = next(contender for contender in CONTENDERS if contender.name == "ffcv-raw")
    assert raw.kb_per_image(ramps) == stored.stat().st_size / 48e3 > HEIGHT * WIDTH * 3 / 1e3
    assert Image.open(ramps.files()[-1][0]).tobytes() in stored.read_bytes()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=48 * HEIGHT * WIDTH * 3))
    with pytest.raises(ValueError, match=r"raw pixels take 0\.0 GB, but 0\.0 GB are free in .*: too few"):
        ffcv.write_raw(ramps)


def test_random_crops_of_dali(ramps: Job) -> None:
    images = first(dali.random_resized_crop(ramps))
    assert images.shape == (192, SIZE, SIZE, 3)
    assert images[..., 2].max() < 10
    _, _, across, down, flip = shown(images).T
    assert 0.7 < (across / down).min() < 0.85 < 1.2 < (across / down).max() < 1.43  # 3/4 to 4/3, in whole pixels
    area = across * down * SIZE**2 / (HEIGHT * WIDTH)
    assert 0.05 < area.min() < 0.2 < 0.7 < area.max() <= 1.05
    assert 0.35 < flip.mean() < 0.65


def test_windows_drawn_in_python(ramps: Job) -> None:
    windows = [draw(HEIGHT, WIDTH, ramps) for _ in range(192)]
    found = [(w.left, w.top, (w.right - w.left) / SIZE, (w.bottom - w.top) / SIZE, w.flip) for w in windows]
    assert_windows(np.array(found, float))
    for window in windows:
        left, top, right, bottom = window.whole()
        assert 0 <= left < right <= WIDTH
        assert 0 <= top < bottom <= HEIGHT


def test_draft_changes_little() -> None:
    """Pillow's `draft` decodes an image that is reduced sixfold at half or quarter size, with nearly the same result."""
    pixels = np.add.outer(np.arange(400), np.arange(600))[..., None].repeat(3, 2) / 4
    data = jpeg(pixels.astype(np.uint8), "420", 95)
    job = Job("", 1, 1, SIZE, (66, 66), 1, "uint8", (0.0, 0.0, 0.0))
    for seed in range(5):
        random.seed(seed)
        plain = torch_loaders.pillow(job, data)
        random.seed(seed)
        drafted = torch_loaders.pillow_draft(job, data)
        assert np.abs(plain.astype(int) - drafted).max() <= 3


def test_bytes_read_for_a_cut(images: Path, tmp_path: Path) -> None:
    data.prepare(images, tmp_path, {"lossless"}, set())
    job = Job(str(tmp_path / "lossless"), 24, 8, SIZE, (LOW, HIGH), 2, "uint8", (0.0, 0.0, 0.0))
    touched = cuts.touched(job)
    assert len(touched.needed) == len(touched.stored) == 24
    assert (touched.needed <= touched.stored).all()
    assert (touched.needed < touched.stored).any()
    if touched.loaded is not None:
        assert (touched.loaded >= touched.needed // cuts.PAGE).all()
        assert (touched.loaded <= touched.stored + 2 * cuts.PAGE).all()


def test_ratios_are_to_a_peer_that_stores_pixels_only_if_there_is_no_other() -> None:
    def ratios(**rates: float) -> dict[str, float]:
        results = [
            Result(Contender(name, "original", "", (), kind=name.split("_")[0]), images_per_s=[rate, rate], cpu_ms=[1.0, 1.0])
            for name, rate in rates.items()
        ]
        return {row.result.contender.name: row.ratios[0] for row in report.figures(results)}

    assert ratios(cropfeed=300, peer=100, peer_slow=50, raw=200) == {"cropfeed": 3, "peer": 1, "peer_slow": 0.5, "raw": 2}
    assert ratios(cropfeed=300, raw=200, raw_slow=100) == {"cropfeed": 1.5, "raw": 1, "raw_slow": 0.5}


def test_every_contender_has_an_install_command() -> None:
    keys = [contender.key for contender in CONTENDERS]
    assert len(set(keys)) == len(keys)
    own = [contender for contender in CONTENDERS if not contender.install.startswith("pip install ")]
    assert {contender.name for contender in own} == {"slipstream-jpeg", "slipstream-yuv420"}
    assert {contender.name for contender in CONTENDERS} >= {*RIVALS, "ffcv-raw", "dali-rrc"}
    assert {contender.group for contender in CONTENDERS} == {"original", "500"}


def test_images_shrink_as_in_ffcv() -> None:
    stored = data.shrink(np.frombuffer(jpeg(np.zeros((600, 801, 3), np.uint8), "444"), np.uint8))
    assert simplejpeg.decode_jpeg_header(stored)[:4] == (374, 500, "YCbCr", "420")
