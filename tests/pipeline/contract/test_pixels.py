"""Every engine's pixels, compared with the reference in Pillow and NumPy."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pipeline import open_loader
from pipeline.loader import Loader
from pipeline.pixels.normalize import Normalization
from pipeline.plan import sampling
from pipeline.plan.geometry import CentreCrop, Geometry, PaddedCrop, RandomResizedCrop, ScaleJitter, TenCrop, WholeImage
from pipeline.spec import LoaderSpec
from tests.helpers import SHARED, SUBSAMPLINGS, jpeg, random_image
from tests.pipeline.contract.conftest import make
from tests.pipeline.contract.helpers import differences, stored_image

MEAN_LIMIT, PERCENTILE_LIMIT = 1.0, 4.0  # of 255; JPEG decoders differ in their inverse DCT

GEOMETRIES = (ScaleJitter(), RandomResizedCrop(), PaddedCrop(28), CentreCrop(), TenCrop(), WholeImage(mirrored=True))


def spec_of(data: Path, geometry: Geometry, size: int, **options: object) -> LoaderSpec:
    """A spec for training if the geometry is random, otherwise for evaluation. geometry: for 224; it is scaled to `size`."""
    spec = LoaderSpec(data, batch_size=41, image_size=size, geometry=geometry.scaled(size, 224), **options)  # type: ignore[arg-type]
    return spec if geometry.random else spec.evaluation("train", geometry=spec.geometry)


def assert_like_the_reference(loader: Loader, epochs: int) -> set[str]:
    """Assert that every view in some epochs is within the limits; returns the names of the classes seen."""
    seen = set()
    for _ in range(epochs):
        for batch_range, batch in zip(loader.batch_ranges(loader.epoch, 0), loader, strict=True):
            plan = loader.plan(batch_range)
            for view, difference in enumerate(differences(loader, plan, batch)):
                key = loader.shards.key(int(plan.ids[view // loader.crops]))
                assert difference.mean() <= MEAN_LIMIT, (key, view)
                assert np.percentile(difference, 99.9) <= PERCENTILE_LIMIT, (key, view)
                seen.add(key.split("/")[0])
    return seen


@pytest.mark.parametrize(
    ("size", "geometry"),
    [
        # Ten crops and whole images have many pixels; at 64 pixels they are quick.
        pytest.param(size, geometry, id=f"{size}-{type(geometry).__name__}",
                     marks=[pytest.mark.slow] if size == 224 and isinstance(geometry, TenCrop | WholeImage) else [])
        for size in (224, 64) for geometry in GEOMETRIES
    ],
)  # fmt: skip
@pytest.mark.parametrize("profile", ["original", "lossless", "compact"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pixels_equal_the_reference(
    varied: Callable[[str], Path], engine: str, profile: str, geometry: Geometry, size: int, device: str
) -> None:
    loader = open_loader(spec_of(varied(profile), geometry, size, engine=engine, device=device))
    assert assert_like_the_reference(loader, epochs=1) == {*SUBSAMPLINGS, "odd"}
    loader.close()


@pytest.mark.parametrize("geometry", [RandomResizedCrop(), pytest.param(TenCrop(), marks=pytest.mark.slow)], ids=repr)
@pytest.mark.parametrize("profile", ["original", "lossless", pytest.param("compact", marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bicubic_pixels_equal_the_reference(
    varied: Callable[[str], Path], engine: str, profile: str, geometry: Geometry, device: str
) -> None:
    spec = spec_of(varied(profile), geometry, 64, engine=engine, device=device, interpolation="bicubic")
    with open_loader(spec) as loader:
        assert assert_like_the_reference(loader, epochs=1) == {*SUBSAMPLINGS, "odd"}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bicubic_black_and_white_edges_equal_the_reference(engine: str, tmp_path: Path, device: str) -> None:
    """Where bicubic overshoots, both passes clip."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    for index in range(8):
        squares = np.random.default_rng(index).choice(np.array([0, 255], np.uint8), (25, 30, 1)).repeat(3, axis=2)
        pixels = squares.repeat(16, axis=0).repeat(16, axis=1)
        (tmp_path / "images" / "a" / f"{index}.JPEG").write_bytes(jpeg(pixels, "444", 100))
    shards = make(tmp_path / "images", tmp_path / "shards")
    spec = LoaderSpec(shards, batch_size=8, geometry=RandomResizedCrop(), interpolation="bicubic", engine=engine, device=device)
    with open_loader(spec) as loader:
        assert assert_like_the_reference(loader, epochs=2) == {"a"}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of images that are 32 x 32 or can be resized exactly to short side 32. No pixel is nearly black."""
    root = tmp_path_factory.mktemp("exact")
    (root / "images" / "a").mkdir(parents=True)
    for index, (height, width) in enumerate([(32, 32)] * 24 + [(32, 40), (64, 96), (144, 96), (24, 16)] * 6):
        pixels = random_image(height, width, index) // 2 + 100
        (root / "images" / "a" / f"{index:02}.JPEG").write_bytes(jpeg(pixels, "444", 95))
    return make(root / "images", root / "shards")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_padded_crops_are_expanded_and_cropped(exact: Path, engine: str, device: str) -> None:
    """The reference is made step by step in Pillow: resize, pad by 4 zeros, crop, mirror. Visible padding is exactly 0."""
    spec = LoaderSpec(exact, batch_size=48, image_size=32, geometry=PaddedCrop(4), engine=engine)
    loader = open_loader(replace(spec, dtype=torch.uint8, device=device))
    seen = 0
    for epoch in range(3):
        (batch,) = loader
        sizes = [stored_image(loader, sample).size for sample in batch.ids.tolist()]
        widths, heights = zip(*sizes, strict=True)
        drawn = sampling.draw(0, epoch, batch.ids, heights, widths, (32, 32), 32, padding=4)
        for pixels, sample, top, left, flip in zip(batch.images, batch.ids.tolist(), *drawn[1:4], strict=True):
            image = stored_image(loader, sample).convert("RGB")
            image = image.resize([32 * side // min(image.size) for side in image.size], Image.Resampling.BILINEAR)
            crop = ImageOps.expand(image, border=4, fill=0).crop((left + 4, top + 4, left + 36, top + 36))
            expected = np.asarray(ImageOps.mirror(crop) if flip else crop).astype(int)
            found = pixels.permute(1, 2, 0).cpu().numpy().astype(int)
            difference = np.abs(found - expected)
            assert difference.mean() <= MEAN_LIMIT
            assert np.percentile(difference, 99.9) <= PERCENTILE_LIMIT
            padding = (expected == 0).all(axis=-1)
            assert np.array_equal((found == 0).all(axis=-1), padding)
            assert not found[padding].any()
            seen += int(padding.any())
    assert seen > 100  # of 144 crops, about 8 of 9 reach into the padding
    loader.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_zero_before_normalization(exact: Path, engine: str, dtype: torch.dtype) -> None:
    normalization = Normalization.of([110, 120, 130], [50, 60, 70])
    spec = LoaderSpec(exact, batch_size=48, image_size=32, geometry=PaddedCrop(4), engine=engine, alpha_std=0.0)
    plain = next(iter(open_loader(replace(spec, dtype=torch.uint8)))).images
    normalized = next(iter(open_loader(replace(spec, dtype=dtype, normalization=normalization)))).images
    mean, std = (torch.from_numpy(column)[:, None, None] for column in (normalization.mean, normalization.std))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert torch.allclose(normalized.float(), (plain.float() - mean) / std, atol=tolerance)
    assert (plain == 0).any()


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the real ImageNet images are not on this machine")
def test_pixels_of_real_images_equal_the_reference(engine: str, tmp_path: Path) -> None:
    with tarfile.open(SHARED / "imagenet-400.tar") as tar:
        members = [member for member in tar if member.isfile()][::10]
        tar.extractall(tmp_path, members, filter="data")
    shards = make(tmp_path / "imagenet-400", tmp_path / "shards")
    loader = open_loader(LoaderSpec(shards, batch_size=20, engine=engine))
    assert len(assert_like_the_reference(loader, epochs=2)) == 40
    loader.close()


def test_the_limits_detect_a_rounded_window(varied: Callable[[str], Path], engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rounded window is off by up to half a source pixel."""
    loader = open_loader(LoaderSpec(varied("lossless"), batch_size=41, engine=engine))
    batch_range = next(loader.batch_ranges(0, 0))
    exact = loader.plan(batch_range)
    rounded = exact._replace(views=exact.views._replace(windows=exact.views.windows.round()))
    plan = loader.plan
    monkeypatch.setattr(loader, "plan", lambda asked: rounded if asked == batch_range else plan(asked))
    batch = next(iter(loader))
    assert max(np.percentile(difference, 99.9) for difference in differences(loader, exact, batch)) > PERCENTILE_LIMIT
    loader.close()
