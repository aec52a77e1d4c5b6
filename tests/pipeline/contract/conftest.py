"""The contract suite runs once for every engine: python -m pytest -k contract [--engine NAME].

If an engine cannot be imported, its tests fail. CROPFEED_WITHOUT=NAME[,NAME] skips engines.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline import ENGINES
from pipeline.convert.beton import BetonSettings
from pipeline.convert.make import ConvertOptions, make_shards
from tests.helpers import SUBSAMPLINGS, jpeg, random_image

WITHOUT = os.environ.get("CROPFEED_WITHOUT", "").split(",")
# FFCV needs its own files.
FORMAT = "both" if importlib.util.find_spec("ffcv") and "ffcv" not in WITHOUT else "webdataset"

# Height and width: landscape, portrait, too small for the crop, tiny, extreme aspect ratio, large.
SIZES = ((375, 500), (500, 333), (131, 97), (9, 13), (40, 700), (1500, 2000))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" in metafunc.fixturenames:
        asked = metafunc.config.getoption("--engine")
        metafunc.parametrize("engine", [asked] if asked else list(ENGINES), indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name in WITHOUT:
        pytest.skip(f"engine {name} is in CROPFEED_WITHOUT")
    return name


@pytest.fixture(scope="session")
def small(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Region-addressable shards of `image_folder`, 8 images each."""
    return make(image_folder, tmp_path_factory.mktemp("small") / "data", shard_size=8)


@pytest.fixture(scope="session")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Shards by profile: a class per subsampling with an image per size, and a class of files other than baseline YCbCr JPEGs."""
    root = tmp_path_factory.mktemp("varied")
    write_varied_images(root / "images")

    @cache
    def of_profile(profile: str) -> Path:
        mode = "jpg" if profile == "original" else "region"  # so that both are tested
        return make(root / "images", root / profile, profile=profile, beton=BetonSettings(mode))

    return of_profile


def make(images: Path, out: Path, **options: Any) -> Path:
    """Shards of a folder of images, made in this process, as a new process would import FFCV again."""
    make_shards(ConvertOptions(str(images), str(out), format=FORMAT, workers=1, **options))
    return out


def write_varied_images(root: Path) -> None:
    for subsampling in SUBSAMPLINGS:
        folder = root / subsampling
        folder.mkdir(parents=True)
        for index, (height, width) in enumerate(SIZES):
            (folder / f"{index}.JPEG").write_bytes(jpeg(random_image(height, width, index), subsampling))
    odd = root / "odd"
    odd.mkdir()
    image = Image.fromarray(random_image(300, 400))
    image.save(odd / "progressive.JPEG", "JPEG", progressive=True)
    image.convert("CMYK").save(odd / "cmyk.JPEG", "JPEG")
    image.save(odd / "png.JPEG", "PNG")
    image.convert("L").save(odd / "grey_png.JPEG", "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(odd / "turned.JPEG", "JPEG", exif=exif)
