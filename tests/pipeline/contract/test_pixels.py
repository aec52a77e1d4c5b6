"""Every engine's pixels against the reference in Pillow and NumPy."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline import open_loader
from pipeline.geometry import CentreCrop, Geometry, RandomResizedCrop, ScaleJitter, TenCrop, WholeImage
from pipeline.loader import Loader
from pipeline.spec import LoaderSpec
from tests.helpers import SHARED, SUBSAMPLINGS
from tests.pipeline.contract.conftest import make
from tests.pipeline.contract.helpers import differences

MEAN_LIMIT, PERCENTILE_LIMIT = 1.0, 4.0  # of 255; JPEG decoders differ in their inverse DCT

GEOMETRIES = (ScaleJitter(), RandomResizedCrop(), CentreCrop(), TenCrop(), WholeImage(mirrored=True))


def spec_of(data: Path, geometry: Geometry, size: int, **options: object) -> LoaderSpec:
    """Random geometries in training, the others in evaluation; geometries are meant for 224."""
    spec = LoaderSpec(data, batch_size=41, image_size=size, geometry=geometry.scaled(size, 224), **options)  # type: ignore[arg-type]
    return spec if geometry.random else spec.evaluation("train", geometry=spec.geometry)


def assert_like_the_reference(loader: Loader, epochs: int) -> set[str]:
    """Every view over some epochs is within the limits; returns the names of the classes seen."""
    seen = set()
    for _ in range(epochs):
        for part, batch in zip(loader.parts(loader.epoch, 0), loader, strict=True):
            work = loader.plan(part)
            for view, difference in enumerate(differences(loader, work, batch)):
                key = loader.shards.key(int(work.ids[view // loader.crops]))
                assert difference.mean() <= MEAN_LIMIT, (key, view)
                assert np.percentile(difference, 99.9) <= PERCENTILE_LIMIT, (key, view)
                seen.add(key.split("/")[0])
    return seen


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: type(geometry).__name__)
@pytest.mark.parametrize("profile", ["original", "lossless", "compact"])
@pytest.mark.parametrize("size", [224, 64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pixels_are_the_references(
    varied: Callable[[str], Path], engine: str, profile: str, geometry: Geometry, size: int, device: str
) -> None:
    loader = open_loader(spec_of(varied(profile), geometry, size, engine=engine, device=device))
    assert assert_like_the_reference(loader, epochs=1) == {*SUBSAMPLINGS, "odd"}
    loader.close()


@pytest.mark.skipif(not SHARED.exists(), reason="the real ImageNet images are not on this machine")
def test_pixels_of_real_images_are_the_references(engine: str, tmp_path: Path) -> None:
    with tarfile.open(SHARED / "imagenet-400.tar") as tar:
        members = [member for member in tar if member.isfile()][::10]
        tar.extractall(tmp_path, members, filter="data")
    shards = make(tmp_path / "imagenet-400", tmp_path / "shards")
    loader = open_loader(LoaderSpec(shards, batch_size=20, engine=engine))
    assert len(assert_like_the_reference(loader, epochs=2)) == 40
    loader.close()


def test_the_limits_can_tell_a_rounded_window(
    varied: Callable[[str], Path], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is off by up to half a source pixel."""
    loader = open_loader(LoaderSpec(varied("lossless"), batch_size=41, engine=engine))
    part = next(loader.parts(0, 0))
    exact = loader.plan(part)
    rounded = exact._replace(views=exact.views._replace(windows=exact.views.windows.round()))
    plan = loader.plan
    monkeypatch.setattr(loader, "plan", lambda asked: rounded if asked == part else plan(asked))
    batch = next(iter(loader))
    assert max(np.percentile(difference, 99.9) for difference in differences(loader, exact, batch)) > PERCENTILE_LIMIT
    loader.close()
