"""JPEGs that libjpeg decodes, but not each of our decoders: their regions have the pixels that Pillow decodes."""

from __future__ import annotations

import io
import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.convert.images import convert_image
from pipeline.jpeg.header import parse
from pipeline.jpeg.transcode import transcode
from pipeline.pixels.decoder import Decoder, decode_jpeg, has_4_components
from tests.helpers import open_image, random_image
from tests.pipeline.jpeg.test_region import windows

Factors = tuple[tuple[int, int], ...]
COMMON = ("1x4,1x1,1x1", "4x1,1x1,1x1", "4x2,1x1,1x1", "3x1,1x1,1x1", "1x3,1x1,1x1", "1x1,2x2,2x2", "2x2,1x2,2x1", "4x1,2x1,1x1")


def legal(factors: Factors) -> bool:
    """Whether libjpeg encodes and decodes these sampling factors in one scan."""
    widest, highest = (max(axis) for axis in zip(*factors, strict=True))
    return sum(h * v for h, v in factors) <= 10 and not any(widest % h or highest % v for h, v in factors)


def by_cjpeg(sampling: str, size: tuple[int, int], *options: str) -> bytes:
    pixels = random_image(*size)
    ppm = b"P6 %d %d 255\n" % size[::-1] + pixels.tobytes()
    return subprocess.run(["cjpeg", "-sample", sampling, *options], input=ppm, capture_output=True, check=True).stdout


def assert_regions_are_pillows(original: bytes, count: int = 8) -> None:
    """The image is stored without loss, and each window of it is decoded at the crop, to the pixels of the original."""
    stored = convert_image(original, "lossless")
    assert not any("re-encoded" in fact for fact in stored.facts), stored.facts
    assert np.array_equal(np.asarray(open_image(stored.data)), np.asarray(open_image(original)))  # CMYK, not its RGB
    whole = np.asarray(open_image(original).convert("RGB"))
    assert np.array_equal(decode_jpeg(stored.data), whole)
    decoder, data = Decoder(), np.frombuffer(stored.data, np.uint8)
    decoded = []
    height, width = whole.shape[:2]
    for window in windows(height, width, count, seed=0):
        top, left, bottom, right = window
        pixels, place = decoder.decode_region(data, height, width, np.array([window], np.float64), (bottom - top, right - left))
        inside = pixels[top - place[0] :, left - place[1] :][: bottom - top, : right - left]
        assert np.array_equal(inside, whole[top:bottom, left:right]), window
        decoded.append(pixels.size)
    assert min(decoded) < whole.size


needs_cjpeg = pytest.mark.skipif(not shutil.which("cjpeg"), reason="needs cjpeg (apt-get install libjpeg-turbo-progs)")


@needs_cjpeg
@pytest.mark.parametrize("sampling", COMMON)
def test_unusual_sampling_factors(sampling: str) -> None:
    for size in ((97, 258), (40, 130)):  # the last tile, of 32 pixels, has only 2 in it
        assert_regions_are_pillows(by_cjpeg(sampling, size))


@needs_cjpeg
@pytest.mark.slow
def test_all_sampling_factors_that_libjpeg_supports() -> None:
    sides = [(h, v) for h in range(1, 5) for v in range(1, 5)]
    supported = [factors for factors in itertools.product(sides, repeat=3) if legal(factors)]
    for number, factors in enumerate(supported):
        name = ",".join(f"{h}x{v}" for h, v in factors)
        size = ((70, 130), (97, 131), (40, 257), (33, 66))[number % 4]
        assert_regions_are_pillows(by_cjpeg(name, size, *(("-arithmetic",) if number % 5 == 0 else ())), count=4)
    assert len(supported) > 250


def cmyk(subsampling: int = 0, transform: int | None = 0, **options: bool) -> bytes:
    """transform: Adobe's, 0 for CMYK, 2 for YCCK; None without an Adobe segment."""
    stream = io.BytesIO()
    Image.fromarray(random_image(97, 200)).convert("CMYK").save(stream, "JPEG", subsampling=subsampling, **options)
    data = bytearray(stream.getvalue())
    at = data.index(b"\xff\xee\0\x0eAdobe")
    if transform is None:
        del data[at : at + 16]
    else:
        data[at + 15] = transform
    return bytes(data)


@pytest.mark.parametrize("transform", [0, 2, None])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_cmyk_and_ycck(subsampling: int, transform: int | None) -> None:
    for progressive in (False, True):
        data = cmyk(subsampling, transform, progressive=progressive)
        assert_regions_are_pillows(data)
        assert (b"Adobe" in transcode(data)) == (transform is not None)
        assert has_4_components(np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("subsampling", ["444", "422", "440", "420", "411"])
def test_ycck_with_subsampled_chroma(subsampling: str) -> None:
    """As Photoshop writes it: the black component has the factors of luma."""
    four = np.dstack([random_image(97, 200), random_image(97, 200, 1)[..., 0]])
    data = simplejpeg.encode_jpeg(four, 90, "CMYK", subsampling)
    assert len(parse(data).sampling) == 4
    assert_regions_are_pillows(data)


@needs_cjpeg
def test_too_many_blocks_in_an_mcu_are_re_encoded_and_reported(tmp_path: Path) -> None:
    """They are legal only in scans of one component."""
    (tmp_path / "scans").write_text("0;\n1;\n2;\n")
    stored = convert_image(by_cjpeg("2x2,2x2,2x2", (40, 60), "-scans", str(tmp_path / "scans")), "lossless")
    assert stored.facts == ("re-encoded: sampling factors of 12 blocks in an MCU, of which baseline allows 10",)
