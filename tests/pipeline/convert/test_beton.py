""".beton files, read by FFCV's reader and loader. Parts of FFCV that can hang run in another process, with a time limit."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from PIL import Image

from pipeline.convert.beton import MODES, BetonSettings, write_beton
from pipeline.errors import UserError
from pipeline.jpeg.transcode import transcode
from pipeline.store import files
from pipeline.store.shards import ShardSet
from pipeline.store.tar import EncodedSample, label_digits, write_shard
from tests.helpers import ROOT, SUBSAMPLINGS, clean_environment, jpeg, open_image, random_image

if "ffcv" in os.environ.get("CROPFEED_WITHOUT", ""):
    pytest.skip("FFCV is not installed (see the output of make); CROPFEED_WITHOUT=ffcv", allow_module_level=True)

SIZE, RATIO = 32, 0.7  # of the loaders' centre crops
Read = dict[str, Any]  # NAME, NAME_label -> uint8 (N, height, width, 3), int64 (N,)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fail after a time limit instead of hanging."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def sha256(path: Path) -> str:
    return files.sha256(str(path))


def shards_of(source: Path, out: Path, samples: list[EncodedSample]) -> Path:
    """Write a data set with one training shard of `samples`, and otherwise with the manifest of the source."""
    (out / "train").mkdir(parents=True)
    tar = out / "train/000000.tar"
    manifest = json.loads((source / "manifest.json").read_text())
    records = write_shard(tar, tar.with_suffix(".idx"), 0, samples, label_digits(3))
    np.save(out / "train/samples.npy", records)
    shard = {"file": "train/000000.tar", "images": len(records), "bytes": tar.stat().st_size, "sha256": sha256(tar)}
    shard["idx_sha256"] = sha256(tar.with_suffix(".idx"))
    shard["idx_sha256"] = sha256(tar.with_suffix(".idx"))
    split = {"images": len(records), "samples": "train/samples.npy", "samples_sha256": sha256(out / "train/samples.npy")}
    manifest["splits"] = {"train": split | {"shards": [shard]}}
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


@pytest.fixture(scope="module")
def originals(small_shards: Path) -> ShardSet:
    return ShardSet(small_shards, "train")


@pytest.fixture(scope="module")
def regions(small_shards: Path, originals: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The same images, in region-addressable form."""
    samples = [
        EncodedSample(
            originals.key(i), transcode(originals.read(i).tobytes()), int(row["label"]), int(row["height"]), int(row["width"])
        )
        for i, row in enumerate(originals.samples)
    ]
    return ShardSet(shards_of(small_shards, tmp_path_factory.mktemp("regions") / "data", samples), "train")


@pytest.fixture(scope="module")
def alike(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Region-addressable images of every subsampling, several tiles wide. All have one size, for SimpleRGBImageDecoder."""
    samples = [
        EncodedSample(f"a/{i}", transcode(jpeg(random_image(136, 320, i), sampling)), i % 3, 136, 320)
        for i, sampling in enumerate(SUBSAMPLINGS)
    ]
    return ShardSet(shards_of(small_shards, tmp_path_factory.mktemp("alike") / "data", samples), "train")


@pytest.fixture(scope="module")
def betons(originals: ShardSet, regions: ShardSet, alike: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for each mode, and alike.beton, written by two workers."""
    folder = tmp_path_factory.mktemp("betons")
    with at_most(100):
        for mode in MODES:
            shards = regions if mode == "region" else originals
            assert write_beton(shards, folder / f"{mode}.beton", BetonSettings(mode), 2) == sha256(folder / f"{mode}.beton")
        write_beton(alike, folder / "alike.beton", BetonSettings("region"), 2)
    return folder


LOADERS = f"""
import io, sys
import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.writer import DatasetWriter
from PIL import Image
sys.path.insert(0, {str(ROOT)!r})
from pipeline.engines.ffcv_field import region_decoder
from pipeline.store.shards import ShardSet

stock = CenterCropRGBImageDecoder
ours = region_decoder(stock)
folder, source = sys.argv[1:]
arrays = {{}}


class Images:
    shards = ShardSet(source, "train")

    def __len__(self):
        return len(self.shards)

    def __getitem__(self, i):
        image = Image.open(io.BytesIO(self.shards.read(i).tobytes())).convert("RGB")
        return image, int(self.shards.samples["label"][i])


fields = {{"image": RGBImageField("jpg"), "label": IntField()}}
DatasetWriter(folder + "/stock.beton", fields, num_workers=1).from_indexed_dataset(Images())
for name, decoder in [("region", ours), ("region", stock), ("raw", stock), ("jpg", stock), ("jpg", ours),
                      ("alike", stock), ("alike", ours), ("alike", None)]:
    decoder = decoder(({SIZE}, {SIZE}), {RATIO}) if decoder else SimpleRGBImageDecoder()
    loader = Loader(f"{{folder}}/{{name}}.beton", 7, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False,
                    pipelines={{"image": [decoder]}})
    batches = [(image.copy(), label.numpy().copy()) for image, label in loader]
    key = name + "_ours" * isinstance(decoder, ours) + "_whole" * (type(decoder) is SimpleRGBImageDecoder)
    arrays[key], arrays[key + "_label"] = (np.concatenate(part) for part in zip(*batches))
np.savez(folder + "/read.npz", **arrays)
"""


@pytest.fixture(scope="module")
def read(betons: Path, small_shards: Path) -> Read:
    """The batches of FFCV's Loader: centre crops by the stock decoder and the region decoder, and whole images of alike.beton.

    The program also writes stock.beton with FFCV's DatasetWriter.
    """
    command = [sys.executable, "-c", LOADERS, str(betons), str(small_shards)]
    result = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=150, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(np.load(betons / "read.npz"))


def contents(path: Path) -> list[bytes]:
    """Each image's data, read by FFCV's Reader."""
    from ffcv.reader import Reader

    whole = path.read_bytes()
    return [whole[row["ptr"] : row["ptr"] + row["size"]] for row in Reader(str(path)).alloc_table]


def pixels(data: bytes) -> Any:
    return np.asarray(open_image(data).convert("RGB"))


def centre_crop(image: Any) -> Any:
    """FFCV's CenterCrop of a decoded image, computed with OpenCV."""
    import cv2

    height, width = image.shape[:2]
    side = int(RATIO * min(height, width))
    top, left = (height - side) // 2, (width - side) // 2
    return cv2.resize(image[top : top + side, left : left + side], (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def assert_near(found: Any, expected: Any, mean: float) -> None:
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean(axis=(1, 2, 3)).max() < mean


@pytest.mark.slow
def test_samples_and_labels_in_order(read: Read, originals: ShardSet) -> None:
    for name in ("region", "region_ours", "raw", "jpg", "jpg_ours"):
        assert np.array_equal(read[f"{name}_label"][:, 0], originals.samples["label"])


@pytest.mark.slow
@pytest.mark.usefixtures("read")
def test_same_bytes_as_datasetwriter(betons: Path) -> None:
    assert (betons / "jpg.beton").read_bytes() == (betons / "stock.beton").read_bytes()


@pytest.mark.slow
def test_raw_equals_pillow(betons: Path, read: Read, originals: ShardSet) -> None:
    expected = [pixels(originals.read(i).tobytes()) for i in range(len(originals))]
    assert contents(betons / "raw.beton") == [image.tobytes() for image in expected]
    assert_near(read["raw"], np.stack([centre_crop(image) for image in expected]), 0.5)


@pytest.mark.slow
def test_jpg_is_close_to_the_image(betons: Path, read: Read, originals: ShardSet) -> None:
    stored = contents(betons / "jpg.beton")
    assert_near(read["jpg"], np.stack([centre_crop(pixels(data)) for data in stored]), 1.5)  # FFCV uses the fast inverse DCT
    expected = np.stack([centre_crop(pixels(originals.read(i).tobytes())) for i in range(len(originals))])
    assert_near(read["jpg"], expected, 8)  # saturated colours at 4:2:0


def test_proportion_mixes_raw_and_jpg(betons: Path) -> None:
    jpg, raw = contents(betons / "jpg.beton"), contents(betons / "raw.beton")
    chosen = [data == as_jpg for data, as_jpg in zip(contents(betons / "proportion.beton"), jpg, strict=True)]
    assert contents(betons / "proportion.beton") == [jpg[i] if chosen[i] else raw[i] for i in range(len(jpg))]
    assert 15 < sum(chosen) < 45


@pytest.mark.slow
def test_region_keeps_bytes_and_stock_ffcv_decodes_them(betons: Path, read: Read, regions: ShardSet, alike: ShardSet) -> None:
    assert contents(betons / "region.beton") == [regions.read(i).tobytes() for i in range(len(regions))]
    assert_near(read["alike_whole"], np.stack([pixels(alike.read(i).tobytes()) for i in range(len(alike))]), 1.5)


@pytest.mark.slow
def test_region_decoder_gives_the_stock_decoders_pixels(read: Read) -> None:
    assert np.array_equal(read["region_ours"], read["region"])
    assert np.array_equal(read["alike_ours"], read["alike"])
    assert np.array_equal(read["jpg_ours"], read["jpg"])  # without a table, the whole image is decoded


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_same_bytes_for_any_number_of_workers(
    mode: str, betons: Path, originals: ShardSet, regions: ShardSet, tmp_path: Path
) -> None:
    shards = regions if mode == "region" else originals
    for workers in (1, 3):
        counts: list[int] = []
        with at_most(60):
            digest = write_beton(shards, tmp_path / "b", BetonSettings(mode), workers, counts.append)
        assert digest == sha256(betons / f"{mode}.beton")
        assert sum(counts) == len(shards)


def test_max_resolution_as_in_ffcv(originals: ShardSet, tmp_path: Path) -> None:
    from ffcv.fields.rgb_image import resizer

    with at_most(60):
        write_beton(originals, tmp_path / "b", BetonSettings("raw", max_resolution=50), 1)
    expected = [resizer(pixels(originals.read(i).tobytes()), 50).tobytes() for i in range(len(originals))]
    assert contents(tmp_path / "b") == expected


@pytest.mark.parametrize("mode", ["jpg", "region"])
def test_an_image_that_cannot_be_stored_is_named(mode: str, small_shards: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(small_shards, data)
    shards = ShardSet(data, "train")
    bad = shards.samples[40]
    with shards.shards[bad["shard"]].open("r+b") as stream:
        stream.seek(int(bad["offset"]))
        stream.write(b"no image")
    with at_most(60), pytest.raises(UserError) as error:
        write_beton(shards, tmp_path / "out/b", BetonSettings(mode), 2)
    assert str(error.value).startswith(shards.locate(40) + ": ")
    assert list((tmp_path / "out").iterdir()) == []
    assert multiprocessing.active_children() == []


def test_images_that_ffcv_cannot_decode_are_stored_as_pixels(small_shards: Path, tmp_path: Path) -> None:
    """PNG and WebP, of which lossless shards have some, and CMYK; also those whose pixels need larger pages."""
    images = [
        encoded(random_image(40, 50), "JPEG"),
        encoded(random_image(40, 50), "PNG"),
        encoded(random_image(30, 20, 1), "JPEG", "CMYK"),
        encoded(np.zeros((1800, 1700, 3), np.uint8), "PNG"),  # 9.2 MB of pixels, but few bytes
        encoded(np.zeros((2000, 1900, 3), np.uint8), "JPEG"),
        encoded(random_image(40, 50), "WEBP"),
    ]
    sizes = [Image.open(io.BytesIO(data)).size for data in images]
    samples = [EncodedSample(f"a/{i}", data, i % 3, h, w) for i, (data, (w, h)) in enumerate(zip(images, sizes, strict=True))]
    shards = ShardSet(shards_of(small_shards, tmp_path / "data", samples), "train")
    with at_most(60):
        write_beton(shards, tmp_path / "b", BetonSettings("region"), 2)
    for data, stored in zip(images, contents(tmp_path / "b"), strict=True):
        is_kept = data[:2] == b"\xff\xd8" and Image.open(io.BytesIO(data)).mode == "RGB"
        assert stored == (data if is_kept else np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tobytes())
    path = with_change(tmp_path / "b", tmp_path / "c", RECORDS + RECORD, b"\0")
    with pytest.raises(UserError, match="the size of sample 1"):
        opened(path, shards, "region")


def encoded(image: npt.NDArray[np.uint8], kind: str, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).convert(mode).save(stream, kind)
    return stream.getvalue()


def test_a_killed_worker_ends_the_write(originals: ShardSet, tmp_path: Path) -> None:
    def kill(_: int) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with at_most(60), pytest.raises(UserError, match="a worker process was killed at samples"):
        write_beton(originals, tmp_path / "b", BetonSettings("raw"), 2, kill)
    assert list(tmp_path.iterdir()) == []
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(error: Any, originals: ShardSet, tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"old")

    def fail(_: int) -> None:
        raise error

    with at_most(60), pytest.raises((KeyboardInterrupt, UserError)):
        write_beton(originals, tmp_path / "b", BetonSettings("raw"), 2, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert (tmp_path / "b").read_bytes() == b"old"
    assert multiprocessing.active_children() == []


KILLED = f"""
import multiprocessing, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from pipeline.convert.beton import BetonSettings, write_beton
from pipeline.store.shards import ShardSet

def kill(_):
    print(*[process.pid for process in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    write_beton(ShardSet(sys.argv[1], "train"), Path(sys.argv[2]), BetonSettings("raw"), 2, kill)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_no_file_and_no_workers(small_shards: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(small_shards), str(tmp_path / "out/b")]
    with subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert process.wait(100) == -signal.SIGKILL
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(map(psutil.pid_exists, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert all(path.name.startswith(".") for path in (tmp_path / "out").iterdir())


# Damaged files. The layout, from https://docs.ffcv.io/file_format.html: header, 2 field descriptions, records, pages, table.
RECORDS, RECORD, ENTRY = 24 + 2 * 1041, 24, 24  # where the records begin; bytes of a record, and of an entry in the table


def opened(path: Path, shards: ShardSet, mode: str) -> Any:
    from pipeline.engines.ffcv_file import open_beton

    return open_beton(path, shards.samples, asdict(BetonSettings(mode)))


def with_change(source: Path, out: Path, at: int, change: bytes) -> Path:
    """A copy with other bytes at `at`, which counts from the end if it is negative."""
    content = bytearray(source.read_bytes())
    at %= len(content)
    content[at : at + len(change)] = change
    out.write_bytes(content)
    return out


@pytest.mark.parametrize("mode", MODES)
def test_an_open_file_has_every_image(mode: str, betons: Path, originals: ShardSet, regions: ShardSet) -> None:
    content, images, sizes = opened(betons / f"{mode}.beton", regions if mode == "region" else originals, mode)
    found = [
        bytes(content[start : start + size]) for start, size in zip(images["data_ptr"].tolist(), sizes.tolist(), strict=True)
    ]
    assert found == contents(betons / f"{mode}.beton")


@pytest.mark.parametrize("mode", ["jpg", "region", "raw"])
@pytest.mark.parametrize(
    ("at", "change", "words"),
    [
        (0, b"\3", "its version is 3, not 2"),
        (2, b"\3", "its num_fields is 3, not 2"),
        (4, b"\1", "its page_size is 8388609, not a power of two"),
        (4, bytes(4), "its page_size is 0"),
        (8, b"\xff", "its num_samples is 255, not 60"),
        (14, b"\1", "its num_samples is 281474976710716, not 60"),
        (16, bytes(8), "its alloc_table_ptr is 0"),
        (24, b"\2\0", "its fields are not image and label"),
        (24, b"\x42", "its fields are not image and label"),
        (25, b"\xff", "its fields are not image and label"),
        (RECORDS + 7 * RECORD, b"\7", "the mode of sample 7"),
        (RECORDS + 7 * RECORD + 1, b"\xe0\1", "the width of sample 7"),
        (RECORDS + 7 * RECORD + 3, b"\xe0\1", "the height of sample 7"),
        (RECORDS + 7 * RECORD + 9, b"\2", "the address of sample 7"),  # bit 33
        (RECORDS + 7 * RECORD + 10, b"\1", "the address of sample 7"),  # 2 ** 40
        (RECORDS + 7 * RECORD + 16, b"\x55", "the label of sample 7"),
        (-53 * ENTRY, b"\x55", "the number of sample 7"),
        (-53 * ENTRY + 12, b"\2", "the address of sample 7"),
        (-53 * ENTRY + 16, bytes(8), "the size of sample 7"),
        (-53 * ENTRY + 16, b"\xff" * 8, "the size of sample 7"),
        (-53 * ENTRY + 18, b"\1", "the size of sample 7"),
        (-ENTRY + 18, b"\xff", "the (size|address) of sample 59"),
    ],
)
def test_a_damaged_number_is_named(
    mode: str, at: int, change: bytes, words: str, betons: Path, originals: ShardSet, regions: ShardSet, tmp_path: Path
) -> None:
    path = with_change(betons / f"{mode}.beton", tmp_path / "b", at, change)
    with pytest.raises(UserError, match=words) as error:
        opened(path, regions if mode == "region" else originals, mode)
    assert error.value.problem.startswith(f"{path}: is damaged")
    assert error.value.remedy == "make the shards again with `format` both"


def test_an_address_that_is_wrong_in_both_places_is_noticed(betons: Path, originals: ShardSet, tmp_path: Path) -> None:
    for address in (0, 1 << 33, 1 << 40, (1 << 64) - 1):
        path = with_change(betons / "jpg.beton", tmp_path / "a", RECORDS + 7 * RECORD + 5, address.to_bytes(8, "little"))
        path = with_change(path, tmp_path / "b", -53 * ENTRY + 8, address.to_bytes(8, "little"))
        with pytest.raises(UserError, match=r"the (address|size) of sample [67]"):
            opened(path, originals, "jpg")


def test_raw_pixels_must_have_the_size_of_the_image(betons: Path, originals: ShardSet, tmp_path: Path) -> None:
    path = with_change(betons / "jpg.beton", tmp_path / "b", RECORDS + 7 * RECORD, b"\1")
    with pytest.raises(UserError, match="the size of sample 7"):
        opened(path, originals, "proportion")


@pytest.mark.parametrize("length", [0, 10, 3000, -ENTRY, -1, 1])
def test_a_file_of_another_length_is_refused(length: int, betons: Path, originals: ShardSet, tmp_path: Path) -> None:
    content = (betons / "jpg.beton").read_bytes()
    (tmp_path / "b").write_bytes(content + b"x" if length == 1 else content[:length])
    with pytest.raises(UserError, match=f"{tmp_path / 'b'}: (is damaged|cannot be read)"):
        opened(tmp_path / "b", originals, "jpg")
