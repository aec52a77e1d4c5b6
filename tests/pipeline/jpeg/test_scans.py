"""JPEGs with more than one scan: their coefficients are those of the same image in one baseline scan.

libjpeg quantizes before it codes, so that files of one image differ in their coding only. Transcoded, they are the same bytes.
"""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.jpeg.blocks import Coefficients, Component, fill_edges
from pipeline.jpeg.region import RegionError
from pipeline.jpeg.transcode import transcode
from tests.helpers import SUBSAMPLINGS, jpeg, random_image, run_mutants

SIZES = ((1, 1), (7, 9), (8, 8), (16, 17), (33, 100), (97, 131))
BY_COMPONENT, LUMA_FIRST = "0;\n1;\n2;\n", "0;\n1,2;\n"


def encoded(size: tuple[int, int], subsampling: str, quality: int, progressive: bool, **options: int) -> bytes:
    image = Image.fromarray(random_image(*size, seed=quality))
    stream = io.BytesIO()
    mode = {} if subsampling == "Gray" else {"subsampling": ":".join(subsampling)}
    image.convert("L" if subsampling == "Gray" else "RGB").save(
        stream, "JPEG", quality=quality, progressive=progressive, **mode, **options
    )
    return stream.getvalue()


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "411", "Gray"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_progressive_jpeg_gives_the_bytes_of_its_baseline_form(size: tuple[int, int], subsampling: str) -> None:
    for quality in (30, 75, 98):
        baseline = transcode(encoded(size, subsampling, quality, progressive=False))
        for options in ({}, {"restart_marker_blocks": 3}):
            assert transcode(encoded(size, subsampling, quality, progressive=True, **options)) == baseline


@pytest.mark.skipif(not shutil.which("jpegtran"), reason="jpegtran is not installed (apt-get install libjpeg-turbo-progs)")
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("options", [BY_COMPONENT, LUMA_FIRST, "-progressive"], ids=["by component", "luma first", "progressive"])
def test_scans_of_jpegtran(options: str, subsampling: str, tmp_path: Path) -> None:
    (tmp_path / "scans").write_text("0;\n" if subsampling == "Gray" else options)
    command = ["jpegtran", *([options] if options[0] == "-" else ["-scans", str(tmp_path / "scans")]), "-restart", "2b"]
    for size in SIZES:
        original = jpeg(random_image(*size), subsampling)
        rearranged = subprocess.run(command, input=original, capture_output=True, check=True).stdout
        assert transcode(rearranged) == transcode(original)


def test_damaged_and_missing_scans_are_refused_with_a_reason() -> None:
    data = encoded((60, 70), "420", 90, progressive=True)
    starts = [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xda"]
    tables = data.rindex(b"\xff\xc4")  # of the last scan
    repeated = data[:tables] + data[starts[0] : starts[1]] + data[tables:]
    for mutant, words in (
        (data[:tables] + b"\xff\xd9", "scans are missing"),
        (repeated, "impossible sequence"),
        (data[:-2] + data[starts[-1] : -2] + b"\xff\xd9", "impossible sequence"),
        (data[: starts[-1] + 30] + b"\xff\xd9", "ends too early"),
        (data[: starts[3]], "truncated"),
    ):
        with pytest.raises(RegionError, match=words):
            transcode(mutant)


def test_blocks_without_pixels_have_the_dc_of_the_block_before_and_no_ac() -> None:
    component = Component(0, first=1, columns=4, rows=2, width=3, height=1, h=2, v=2)
    coefficients = Coefficients(np.random.default_rng(1).integers(-1, 2, (10, 64), np.int16), np.zeros(10, np.uint64))
    coefficients.find_nonzero()
    expected = coefficients.values.copy()
    expected[4:9] = 0
    expected[4:9, 0] = expected[[3, 2, 2, 3, 3], 0]
    fill_edges(coefficients, component)
    assert np.array_equal(coefficients.values, expected)
    assert coefficients.nonzero.tolist() == [sum(1 << k for k in range(1, 64) if block[k]) for block in expected.tolist()]


# Counts the mutants that are transcoded, refused, and differ from what libjpeg-turbo decodes without a warning.
MUTANTS = """
import io, sys
root, seed, trials = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.path.insert(0, root)
import numpy as np
import simplejpeg
from PIL import Image
from pipeline.jpeg.region import RegionError
from pipeline.jpeg.transcode import transcode
from tests.helpers import mutate, random_image

rng = np.random.default_rng(seed)
originals = []
for number, subsampling in enumerate(("4:4:4", "4:2:0", "4:2:2", "L")):
    stream, image = io.BytesIO(), Image.fromarray(random_image(37 + number, 50, number))
    if subsampling == "L":
        image.convert("L").save(stream, "JPEG", progressive=True)
    else:
        image.save(stream, "JPEG", progressive=True, subsampling=subsampling, restart_marker_blocks=number)
    originals.append(stream.getvalue())
accepted = refused = differ = 0
for trial in range(trials):
    mutant = mutate(originals[trial % len(originals)], rng, trial % 5)
    try:
        written = transcode(mutant)
    except RegionError:
        refused += 1
        continue
    accepted += 1
    try:
        expected = simplejpeg.decode_jpeg(mutant, "RGB", strict=True)
    except ValueError:  # it warns, for example of surplus bytes
        continue
    differ += not np.array_equal(simplejpeg.decode_jpeg(written, "RGB", strict=True), expected)
print(accepted, refused, differ)
"""


@pytest.mark.slow
def test_mutants_are_transcoded_exactly_or_refused(tmp_path: Path) -> None:
    accepted, refused, differ = run_mutants(MUTANTS, tmp_path)
    assert refused > accepted > 0
    assert differ == 0
