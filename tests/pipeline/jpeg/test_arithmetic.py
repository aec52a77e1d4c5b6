"""Arithmetic-coded JPEGs: their coefficients are those of the same image in one baseline scan, and they give the same bytes."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.jpeg.region import RegionError
from pipeline.jpeg.transcode import transcode
from tests.helpers import SHARED, SUBSAMPLINGS, jpeg, open_image, random_image, run_mutants

pytestmark = pytest.mark.skipif(not shutil.which("jpegtran"), reason="needs jpegtran (apt-get install libjpeg-turbo-progs)")
OPTIONS = ((), ("-progressive",), ("-restart", "3b"), ("-progressive", "-restart", "2b"))


def arithmetic(data: bytes, *options: str) -> bytes:
    return subprocess.run(["jpegtran", "-arithmetic", *options], input=data, capture_output=True, check=True).stdout


def cmyk(size: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(random_image(*size)).convert("CMYK").save(stream, "JPEG", subsampling=2)
    return stream.getvalue()


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("subsampling", [*SUBSAMPLINGS, "CMYK"])
def test_an_arithmetic_coded_jpeg_gives_the_bytes_of_its_baseline_form(subsampling: str, options: tuple[str, ...]) -> None:
    for size, quality in (((1, 1), 75), ((33, 100), 98), ((97, 131), 30)):
        original = cmyk(size) if subsampling == "CMYK" else jpeg(random_image(*size), subsampling, quality)
        coded = arithmetic(original, *options)
        assert coded.index(b"\xff\xca" if "-progressive" in options else b"\xff\xc9") < coded.index(b"\xff\xda")
        assert transcode(coded) == transcode(original)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the real ImageNet images are not on this machine")
def test_real_images() -> None:
    with tarfile.open(SHARED / "imagenet-400.tar") as tar:
        for member in [member for member in tar if member.isfile()][::80]:
            original = tar.extractfile(member).read()  # type: ignore[union-attr]
            for options in OPTIONS[:2]:
                assert transcode(arithmetic(original, *options)) == transcode(original), member.name


def conditioned(data: bytes, low: int, high: int, bound: int) -> bytes:
    """An arithmetic-coded JPEG with another DAC segment (T.81 B.2.4.3), so that it is another image."""
    while (at := data.find(b"\xff\xcc\0")) > 0:
        data = data[:at] + data[at + 2 + data[at + 3] :]
    scan = data.index(b"\xff\xda")
    dc, ac = high << 4 | low, bound
    return data[:scan] + b"\xff\xcc\0\x0a" + bytes([0, dc, 1, dc, 0x10, ac, 0x11, ac]) + data[scan:]


def test_conditioning_is_that_of_libjpeg() -> None:
    """No encoder here sets it. With other values, libjpeg decodes the same bytes to another image."""
    changed = 0
    for seed in range(12):
        coded = arithmetic(jpeg(random_image(24, 24, seed), ("444", "420", "Gray")[seed % 3], 60), *OPTIONS[seed % 2])
        for conditioning in ((0, 0, 1), (1, 3, 9), (0, 1, 63), (2, 6, 2), (15, 15, 0)):
            other = conditioned(coded, *conditioning)
            try:
                written = transcode(other)
            except RegionError:  # an impossible coefficient
                continue
            found, expected = (np.asarray(open_image(image).convert("RGB")) for image in (written, other))
            assert np.array_equal(found, expected), (seed, conditioning)
            changed += not np.array_equal(found, simplejpeg.decode_jpeg(coded))
    assert changed > 20


def test_damaged_arithmetic_coding_is_refused_with_a_reason() -> None:
    data = arithmetic(jpeg(random_image(60, 70), "420"), "-progressive", "-restart", "1")
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    sequential = arithmetic(jpeg(random_image(60, 70)))
    restart = data.index(b"\xff\xd0", scans[0])
    for mutant, words in (
        (data[: scans[-1]] + b"\xff\xd9", "scans are missing"),
        (data[: scans[0]] + data[scans[1] :], "impossible sequence"),
        (data[:restart] + data[restart + 2 :], "ends too early"),
        (data[: scans[2]], "truncated"),
        (data.replace(b"\xff\xcc\0\x06\0\x10", b"\xff\xcc\0\x06\0\x01", 1), "damaged DAC"),
        (data.replace(b"\xff\xcc\0\x06", b"\xff\xcc\0\x05", 1), "DAC|marker"),
        (sequential[: sequential.index(b"\xff\xda") + 14] + b"\x80" * 2000 + b"\xff\xd9", "out of range"),
    ):
        with pytest.raises(RegionError, match=words):
            transcode(mutant)


# Counts the mutants that are transcoded, refused, and differ from what libjpeg-turbo decodes.
MUTANTS = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from pipeline.jpeg.region import RegionError
from pipeline.jpeg.transcode import transcode
from tests.helpers import SUBSAMPLINGS, jpeg, mutate, open_image, random_image
from tests.pipeline.jpeg.test_arithmetic import OPTIONS, arithmetic, cmyk

rng = np.random.default_rng(int(sys.argv[2]))
baseline = [jpeg(random_image(37, 50, number), name) for number, name in enumerate(SUBSAMPLINGS)] + [cmyk((37, 50))]
originals = [arithmetic(data, *options) for data in baseline for options in OPTIONS]
accepted = refused = differ = 0
for trial in range(int(sys.argv[3]) // 5):
    mutant = mutate(originals[int(rng.integers(len(originals)))], rng, trial % 5)
    try:
        written = transcode(mutant)
    except RegionError:
        refused += 1
        continue
    accepted += 1
    try:
        expected = np.asarray(open_image(mutant).convert("RGB"))
    except Exception:  # Pillow raises a dozen types, here for segments that are not needed
        continue
    differ += not np.array_equal(np.asarray(open_image(written).convert("RGB")), expected)
print(accepted, refused, differ)
"""


@pytest.mark.slow
def test_mutants_of_arithmetic_coding_are_transcoded_exactly_or_refused(tmp_path: Path) -> None:
    accepted, refused, differ = run_mutants(MUTANTS, tmp_path)
    assert refused > accepted > 0
    assert differ == 0
