"""Resampling, compiled normalization and views, compared with Pillow and torch."""

from __future__ import annotations

import gc
import io

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from pipeline.buffers import BufferPool
from pipeline.jpeg.transcode import transcode
from pipeline.pixels import reference
from pipeline.pixels.decoder import CorruptImageError, Decoder, why_corrupt
from pipeline.pixels.normalize import Normalization, Normalizer, normalize_tensor, stored_dtype
from pipeline.pixels.resample import BICUBIC, BILINEAR, KERNELS, Kernel, resample
from tests.helpers import SUBSAMPLINGS, jpeg, random_image

Pixels = npt.NDArray[np.uint8]
Window = tuple[float, float, float, float]


def by_pillow(pixels: Pixels, window: Window, size: tuple[int, int], flip: bool = False) -> npt.NDArray[np.int64]:
    top, left, bottom, right = window
    small = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    return np.asarray(small).astype(np.int64)[:, :: -1 if flip else 1]


def by_cropfeed(
    pixels: Pixels, window: Window, size: tuple[int, int], flip: bool = False, kernel: Kernel = BILINEAR
) -> npt.NDArray[np.int64]:
    out = np.full((*size, 3), 99, np.uint8)
    resample(pixels, *window, flip, kernel, out)
    return out.astype(np.int64)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(224, 224), (64, 64), (32, 47), (5, 1), (4, 200), (33, 16)])
@pytest.mark.parametrize(
    ("height", "width", "window"),
    [
        (300, 400, (10.3, 20.7, 250.1, 260.5)),  # reduced a little
        (500, 375, (0.0, 0.0, 500.0, 375.0)),  # all of it
        (120, 90, (11.5, 3.25, 71.5, 63.25)),  # enlarged
        (2000, 3000, (0.0, 500.0, 2000.0, 2500.0)),  # reduced much
        (9, 13, (0.0, 2.0, 9.0, 11.0)),
        (1, 1, (0.0, 0.0, 1.0, 1.0)),
        (700, 40, (330.0, 0.0, 370.0, 40.0)),
    ],
)
def test_pixels_match_pillow(height: int, width: int, window: Window, size: tuple[int, int], flip: bool) -> None:
    for pixels in (random_image(height, width), np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)):
        difference = np.abs(by_cropfeed(pixels, window, size, flip) - by_pillow(pixels, window, size, flip))
        assert difference.mean() <= (1 if size[0] == 4 else 0.5)  # with four rows, images are reduced up to 500 times
        assert difference.max() <= 5


def test_random_windows_match_pillow() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        height, width = rng.integers(1, 400, 2)
        size = (int(rng.integers(1, 130)), int(rng.integers(1, 130)))
        pixels = random_image(int(height), int(width), int(rng.integers(100)))
        (top, bottom), (left, right) = np.sort(rng.uniform(0, height, 2)), np.sort(rng.uniform(0, width, 2))
        if min(bottom - top, right - left) < 0.1:
            continue
        window = (float(top), float(left), float(bottom), float(right))
        difference = np.abs(by_cropfeed(pixels, window, size) - by_pillow(pixels, window, size))
        assert difference.mean() <= 0.6, (height, width, window, size)
        assert difference.max() <= 5, (height, width, window, size)


def test_bicubic_pixels_match_pillow() -> None:
    """Also for black and white pixels, where both of Pillow's passes clip."""
    rng = np.random.default_rng(1)
    for index in range(100):
        height, width = rng.integers(1, 1200 if index < 20 else 400, 2)
        size = (int(rng.integers(1, 130)), int(rng.integers(1, 130)))
        pixels = random_image(int(height), int(width), index)
        if index % 3 == 0:
            pixels = rng.choice(np.array([0, 255], np.uint8), (height, width, 3))
        (top, bottom), (left, right) = np.sort(rng.uniform(0, height, 2)), np.sort(rng.uniform(0, width, 2))
        window = (0.0, 0.0, float(height), float(width)) if index % 4 == 0 else (top, left, bottom, right)
        if min(window[2] - window[0], window[3] - window[1]) < 0.1:
            continue
        image, bicubic = Image.fromarray(pixels), Image.Resampling.BICUBIC
        wide = image.resize((size[1], height), bicubic, box=(window[1], 0, window[3], height))
        expected = np.asarray(wide.resize(size[::-1], bicubic, box=(0, window[0], size[1], window[2]))).astype(np.int64)
        found = by_cropfeed(pixels, window, size, flip=bool(index % 2), kernel=BICUBIC)[:, :: -1 if index % 2 else 1]
        assert np.abs(found - expected).max() <= 2, (height, width, window, size)
        assert np.abs(found - expected).mean() <= 0.05, (height, width, window, size)
        assert np.array_equal(expected, reference.resample(image, window, False, size, "bicubic"))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_flat_images_stay_flat(kernel: Kernel) -> None:
    for value in (0, 1, 127, 254, 255):
        pixels = np.full((333, 222, 3), value, np.uint8)
        assert (by_cropfeed(pixels, (3.3, 7.7, 300.3, 199.9), (224, 224), kernel=kernel) == value).all()


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_nothing_is_written_outside_the_output(kernel: Kernel) -> None:
    memory = np.full(3 * 37 * 41 + 2000, 7, np.uint8)
    resample(random_image(100, 100), 0.0, 0.0, 100.0, 100.0, False, kernel, memory[1000:-1000].reshape(37, 41, 3))
    assert (memory[:1000] == 7).all()
    assert (memory[-1000:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("std", [(1, 1, 1), (58, 57, 56)])
@pytest.mark.parametrize("per_pixel", [True, False])
def test_compiled_normalization_equals_torch(dtype: torch.dtype, std: tuple[int, ...], per_pixel: bool) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 30, 41, 3), np.uint8)
    shift = rng.normal(0, 20, (2, 3)).astype(np.float32)
    normalization = Normalization.of(rng.uniform(0, 255, (30, 41, 3)) if per_pixel else (123, 117, 104), std)
    out = np.empty(pixels.shape, stored_dtype(dtype))
    Normalizer(normalization, 41)(pixels, shift, out)
    mean, deviation = torch.from_numpy(normalization.mean), torch.from_numpy(normalization.std)
    expected = normalize_tensor(torch.from_numpy(pixels), torch.from_numpy(shift), mean, deviation, dtype)
    found = torch.from_numpy(out).view(dtype).permute(0, 3, 1, 2)
    if std == (1, 1, 1):
        assert torch.equal(found, expected)
    else:  # it multiplies by the inverse instead of dividing
        assert torch.allclose(found.float(), expected.float(), rtol=torch.finfo(dtype).eps, atol=1e-5)


WINDOWS = np.array([[10.5, 20.25, 110.5, 120.25], [0.0, 0.0, 100.0, 100.0], [150.0, 250.0, 250.0, 350.0]])
FLIPS = np.array([False, True, False])


def assert_views_match_pillow(data: bytes, height: int, width: int) -> None:
    out = np.empty((3, 64, 64, 3), np.uint8)
    Decoder().make_views(np.frombuffer(data, np.uint8), height, width, WINDOWS, FLIPS, out)
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for window, flip, found in zip(WINDOWS, FLIPS, out, strict=True):
        difference = np.abs(found.astype(np.int64) - by_pillow(whole, tuple(window), (64, 64), bool(flip)))
        assert difference.mean() <= 0.5
        assert difference.max() <= 5


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("transcoded", [False, True])
def test_views_of_jpegs_match_pillow(subsampling: str, transcoded: bool) -> None:
    """Several windows of one image, from ordinary and from region-addressable files."""
    data = jpeg(random_image(250, 350), subsampling)
    assert_views_match_pillow(transcode(data) if transcoded else data, 250, 350)


@pytest.mark.parametrize("kind", ["PNG", "CMYK", "progressive", "palette", "WEBP"])
def test_views_of_other_files_match_pillow(kind: str) -> None:
    image, stream = Image.fromarray(random_image(250, 350)), io.BytesIO()
    if kind == "CMYK":
        image.convert("CMYK").save(stream, "JPEG")
    elif kind == "progressive":
        image.save(stream, "JPEG", progressive=True)
    elif kind == "palette":
        image.convert("P").save(stream, "PNG")
    else:
        image.save(stream, kind, lossless=True)
    assert_views_match_pillow(stream.getvalue(), 250, 350)


@pytest.mark.parametrize("subsampling", ["420", "411"])
def test_no_more_than_the_region_is_decoded(subsampling: str) -> None:
    """Our decoder rounds the region to whole MCUs. 4:1:1 is decoded by libjpeg-turbo from a cut, which has whole tiles."""
    data = np.frombuffer(transcode(jpeg(random_image(480, 640), subsampling)), np.uint8)
    decoder, window = Decoder(), np.array([[100.0, 200.0, 200.0, 300.0]])
    decoder.make_views(data, 480, 640, window, FLIPS[:1], np.empty((1, 64, 64, 3), np.uint8))
    top, left, height, width = decoder._place.tolist()
    assert 84 <= top <= 98
    assert 104 <= height <= 104 + 2 * 16
    assert 200 - 3 - 64 <= left <= 197
    assert 104 <= width <= 104 + 2 * (16 if subsampling == "420" else 64)


@pytest.mark.parametrize("transcoded", [False, True])
def test_damage_is_reported(transcoded: bool) -> None:
    data = jpeg(random_image(250, 350))
    data = transcode(data) if transcoded else data
    truncated = np.frombuffer(data[: len(data) // 3], np.uint8)
    zeros = np.zeros(len(data), np.uint8)
    out = np.empty((3, 64, 64, 3), np.uint8)
    for bad in (truncated, zeros):
        with pytest.raises(CorruptImageError):
            Decoder().make_views(bad, 250, 350, WINDOWS, FLIPS, out)
        assert why_corrupt(bad)
    with pytest.raises(CorruptImageError, match="has 250 x 350 pixels, but was stored as 100 x 350"):
        Decoder().make_views(np.frombuffer(jpeg(random_image(250, 350)), np.uint8), 100, 350, WINDOWS[1:2], FLIPS[:1], out[:1])
    assert why_corrupt(np.frombuffer(data, np.uint8)) is None


def test_buffers_are_recycled_when_the_last_tensor_is_gone() -> None:
    pool = BufferPool("cpu")
    array, tensor = pool.acquire((2, 3, 4), np.float32)
    address = tensor.data_ptr()
    array[:] = 5
    del array
    view = tensor[1].permute(1, 0)
    del tensor
    other = pool.acquire((2, 3, 4), np.float32)[1]
    assert other.data_ptr() != address
    assert (view == 5).all()
    del view
    gc.collect()
    assert pool.acquire((2, 3, 4), np.float32)[1].data_ptr() == address
    assert pool.acquire((6, 4), np.float16)[1].shape == (6, 4)
