"""Decoding of regions: bit-identical to libjpeg-turbo; damaged data is refused, without crashes."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

from pipeline.jpeg.decode import REFUSED, decode
from pipeline.jpeg.region import RegionError, cut
from pipeline.jpeg.transcode import transcode
from pipeline.plan import sampling
from tests.helpers import SHARED, jpeg, random_image
from tests.pipeline.jpeg.test_region import windows

DECODED = ("444", "422", "440", "420", "Gray")
SIZES = ((1, 1), (1, 40), (40, 1), (7, 9), (8, 8), (16, 16), (17, 33), (64, 200), (131, 97), (375, 500))


def decoded(data: bytes, window: tuple[int, int, int, int]) -> tuple[int, npt.NDArray[np.uint8]]:
    """The status, and the window's pixels, uint8 (H, W, 3)."""
    stored, place = np.frombuffer(data, np.uint8), np.zeros(4, np.int64)
    room = np.zeros(0, np.uint8)
    while (status := decode(stored, *window, room, place)) > 0:
        room = np.zeros(status, np.uint8)
    top, left, height, width = place.tolist()
    pixels = room[: 3 * height * width if status == 0 else 0].reshape(-1, max(width, 1), 3)
    return int(status), pixels[window[0] - top : window[2] - top, window[1] - left : window[3] - left]


def assert_exact(original: bytes, count: int, seed: int) -> None:
    written = transcode(original)
    whole = simplejpeg.decode_jpeg(original)
    for window in windows(whole.shape[0], whole.shape[1], count, seed):
        status, pixels = decoded(written, window)
        assert status == 0
        top, left, bottom, right = window
        assert np.array_equal(pixels, whole[top:bottom, left:right]), window


@pytest.mark.parametrize("subsampling", DECODED)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_window_matches_libjpeg_turbo(subsampling: str, size: tuple[int, int]) -> None:
    if subsampling in ("422", "420") and size[1] <= 4:
        # For such widths libjpeg repeats chroma.
        assert decoded(transcode(jpeg(random_image(*size), subsampling)), (0, 0, 1, 1))[0] == REFUSED
        return
    for quality in (10, 50, 90, 100):
        assert_exact(jpeg(random_image(*size, seed=quality), subsampling, quality), 12, quality)


@pytest.mark.parametrize("subsampling", DECODED)
def test_noise_and_flat_images_match_libjpeg_turbo(subsampling: str) -> None:
    """These images have coefficients of every magnitude and number, and blocks with a single one."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (70, 90, 3), np.uint8)
    extremes = rng.choice(np.array([0, 255], np.uint8), (70, 90, 3))
    flat = np.full((70, 90, 3), (200, 30, 90), np.uint8)
    for pixels in (noise, extremes, flat, np.where(np.arange(90)[:, None] < 45, noise, flat)):
        for quality in (1, 20, 75, 95, 100):
            assert_exact(jpeg(pixels, subsampling, quality), 4, quality)


@pytest.mark.skipif(not SHARED.exists(), reason="the real ImageNet images are not on this machine")
def test_real_images_match_libjpeg_turbo() -> None:
    refused = 0
    with tarfile.open(SHARED / "imagenet-400.tar") as tar:
        for index, member in enumerate([member for member in tar if member.isfile()][::4]):
            stream = tar.extractfile(member)
            assert stream is not None
            original = stream.read()
            width, height = Image.open(io.BytesIO(original)).size
            drawn = sampling.windows(sampling.draw(0, 0, [index], [height], [width]), [height], [width], 224)
            window = tuple(sampling.regions(drawn, [height], [width], 224)[0].tolist())
            status, pixels = decoded(transcode(original), window)
            refused += status == REFUSED
            if status == 0:
                top, left, bottom, right = window
                assert np.array_equal(pixels, simplejpeg.decode_jpeg(original)[top:bottom, left:right]), member.name
    assert refused <= 2


def test_unsupported_input_is_refused() -> None:
    pixels = random_image(100, 120)
    whole = (0, 0, 100, 120)
    assert decoded(jpeg(pixels), whole)[0] == REFUSED  # no table
    assert decoded(transcode(jpeg(pixels, "411")), whole)[0] == REFUSED
    assert decoded(b"", whole)[0] == REFUSED
    written = transcode(jpeg(pixels))
    for window in ((0, 0, 101, 120), (0, 0, 100, 121), (-1, 0, 9, 9), (5, 5, 5, 9), (9, 9, 5, 20)):
        assert decoded(written, window)[0] == REFUSED
    rows = written.index(b"CROPFEED") + 14
    for table_rows in (1, 60_000):  # a table of another image
        damaged = written[:rows] + table_rows.to_bytes(2, "little") + written[rows + 2 :]
        assert decoded(damaged, whole)[0] == REFUSED
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", keep_rgb=True, subsampling=0)
    assert decoded(transcode(stream.getvalue()), whole)[0] == REFUSED


def test_the_decoder_returns_the_buffer_size_that_it_needs() -> None:
    data, place = np.frombuffer(transcode(jpeg(random_image(100, 120))), np.uint8), np.zeros(4, np.int64)
    lacking = decode(data, 0, 0, 100, 120, np.zeros(10, np.uint8), place)
    guarded = np.full(lacking + 100, 77, np.uint8)
    assert decode(data, 0, 0, 100, 120, guarded[:lacking], place) == 0
    assert (guarded[lacking:] == 77).all()


def test_a_flipped_bit_in_the_table_of_lengths_gives_no_other_pixels() -> None:
    """Each bit of each length: a window is decoded exactly, or refused, and so is its cut. The whole image is refused."""
    written = transcode(jpeg(random_image(90, 150), "420"))
    whole = simplejpeg.decode_jpeg(written)
    end = written.index(b"\xff\xdb")  # the table is followed by DQT
    places = windows(90, 150, 12, 0)
    for bit in range(8 * (written.index(b"CROPFEED") + 22), 8 * end):
        damaged = bytearray(written)
        damaged[bit // 8] ^= 1 << bit % 8
        assert decoded(bytes(damaged), places[0])[0] == REFUSED
        for window in places:
            top, left, bottom, right = window
            status, pixels = decoded(bytes(damaged), window)
            assert status == REFUSED or np.array_equal(pixels, whole[top:bottom, left:right]), (bit, window)
            try:
                piece = cut(np.frombuffer(damaged, np.uint8), *window)
            except RegionError:
                continue
            inside = simplejpeg.decode_jpeg(piece.jpeg.tobytes())[top - piece.top :, left - piece.left :]
            assert np.array_equal(inside[: bottom - top, : right - left], whole[top:bottom, left:right]), (bit, window)
