"""Several geometries in one pass: views equal those of Pillow and of ordinary loaders, and each image is decoded once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import open_loader
from pipeline.engines import multiview
from pipeline.engines.multiview import MultiViewLoader, ViewSpec
from pipeline.errors import UserError
from pipeline.pixels.decoder import Decoder
from pipeline.plan.geometry import CentreCrop, ScaleJitter, TenCrop, WholeImage
from pipeline.spec import LoaderSpec
from pipeline.store.shards import ShardSet
from tests.helpers import open_image, run_forked, working_threads

CENTRE, TEN, WHOLE, SMALL = (
    ViewSpec(CentreCrop(36), 32),
    ViewSpec(TenCrop(40), 24),
    ViewSpec(WholeImage(50, mirrored=True), 50),
    ViewSpec(WholeImage(20), 20),
)
ALL = (CENTRE, TEN, WHOLE, SMALL)


@pytest.fixture(scope="module")
def regions(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Region-addressable shards of `image_folder`."""
    out = tmp_path_factory.mktemp("regions") / "data"
    assert run_forked("tools/make_shards.py", image_folder, "--out", out, "--shard-size", 16).returncode == 0
    return out


def spec_for(data: Path, **options: Any) -> LoaderSpec:
    spec = LoaderSpec(data, batch_size=7, dtype=torch.uint8, normalization="channel", threads=2)
    return LoaderSpec(**vars(spec) | options).evaluation("val")


def expected(image: Image.Image, view_spec: ViewSpec, resampling: Image.Resampling) -> list[np.ndarray]:
    """The views of an image, made by Pillow from the whole image."""
    image = image.convert("RGB")
    short = view_spec.geometry.short  # type: ignore[attr-defined]
    sides = np.array(image.size)
    scale = sides.min() / short
    out = np.floor(sides / scale + 0.5)
    if isinstance(view_spec.geometry, WholeImage):
        views = [np.asarray(image.resize(tuple(out.astype(int)), resampling))]
        return views + [views[0][:, ::-1]] * view_spec.geometry.mirrored
    high = out - view_spec.size
    corners = [(high // 2).tolist()]
    if isinstance(view_spec.geometry, TenCrop):
        corners = [[0, 0], [high[0], 0], [0, high[1]], high.tolist(), *corners]
    views = []
    for corner in corners:
        low = np.maximum((corner - out / 2) * scale + sides / 2, 0)
        box = (*low, *np.minimum((corner - out / 2 + view_spec.size) * scale + sides / 2, sides))
        views.append(np.asarray(image.resize((view_spec.size, view_spec.size), resampling, box=box)))
    return views if len(corners) == 1 else [*views, *(view[:, ::-1] for view in views)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("profile", "interpolation"), [("original", "bilinear"), ("lossless", "bilinear"), ("lossless", "bicubic")]
)
def test_views_match_pillow(small_shards: Path, regions: Path, profile: str, interpolation: str, device: str) -> None:
    data = small_shards if profile == "original" else regions
    pass_ = MultiViewLoader(spec_for(data, device=device, interpolation=interpolation), ALL)
    for batch in pass_:
        assert batch.images.keys() == set(ALL)
        assert batch.labels.tolist() == pass_.shards.samples["label"][batch.ids].tolist()
        for view_spec, images in batch.images.items():
            assert (images.dtype, images.device.type) == (torch.uint8, device)
            crops = images.cpu().numpy().reshape(len(batch.ids), view_spec.geometry.crops, *images.shape[1:])
            for sample, actual in zip(batch.ids.tolist(), crops, strict=True):
                reference = np.stack(
                    expected(open_image(pass_.shards.read(sample).tobytes()), view_spec, Image.Resampling[interpolation.upper()])
                )
                difference = np.abs(actual.astype(float) - reference)
                assert difference.mean(axis=(1, 2, 3)).max() <= 1, (sample, view_spec)
                assert np.percentile(difference, 99.9) <= 4, (sample, view_spec)


@pytest.mark.parametrize(
    "view_specs", [ALL, (CENTRE, TEN), (CENTRE, ViewSpec(CentreCrop(36), 20))], ids=["all", "crops", "centres"]
)
def test_views_equal_those_of_ordinary_loaders(regions: Path, view_specs: tuple[ViewSpec, ...]) -> None:
    """They are bit-identical, although the decoded regions are not those of any single view spec."""
    actual: dict[ViewSpec, dict[int, np.ndarray]] = {view_spec: {} for view_spec in view_specs}
    for batch in MultiViewLoader(spec_for(regions), view_specs):
        for view_spec, images in batch.images.items():
            actual[view_spec].update(zip(batch.ids.tolist(), images.numpy().reshape(len(batch.ids), -1), strict=True))
    for view_spec in view_specs:
        loader = open_loader(
            LoaderSpec(**vars(spec_for(regions)) | {"geometry": view_spec.geometry, "image_size": view_spec.size})
        )
        for other in loader:
            reference = other.images.permute(0, 2, 3, 1).reshape(len(other.ids), -1).numpy()
            for sample, view in zip(other.ids.tolist(), reference, strict=True):
                assert np.array_equal(actual[view_spec].pop(sample), view)
        assert not actual[view_spec]
        loader.close()


@pytest.mark.parametrize("batch_size", [1, 4, 21, 100])
@pytest.mark.parametrize("view_specs", [ALL, (CENTRE, TEN)], ids=["all", "crops"])
def test_each_sample_comes_once_in_batches_of_one_size(
    small_shards: Path, batch_size: int, view_specs: tuple[ViewSpec, ...]
) -> None:
    pass_ = MultiViewLoader(spec_for(small_shards, batch_size=batch_size), view_specs)
    batches = list(pass_)
    assert sorted(sample for batch in batches for sample in batch.ids.tolist()) == list(range(21))
    assert len(pass_) == len(batches)
    assert max(len(batch.ids) for batch in batches) <= batch_size
    records = pass_.shards.samples
    for batch in batches:
        sides = {(int(records[sample]["height"]), int(records[sample]["width"])) for sample in batch.ids.tolist()}
        for view_spec in set(view_specs) - {CENTRE, TEN}:
            sizes = {tuple(int(side * view_spec.size / min(pair) + 0.5) for side in pair) for pair in sides}
            assert sizes == {tuple(batch.images[view_spec].shape[1:3])}
    if view_specs == (CENTRE, TEN):
        assert len(batches) == -(-21 // batch_size)  # all views have one size, so batches are full
    assert [batch.ids.tolist() for batch in pass_] == [batch.ids.tolist() for batch in batches]  # and again


def test_each_image_is_read_and_decoded_once(regions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[int] = Counter()
    areas: list[int] = []
    read, decoded = ShardSet.read, Decoder.decode_region

    def counted_read(self: ShardSet, index: int) -> Any:
        reads[index] += 1
        return read(self, index)

    def counted_decoded(self: Decoder, *arguments: Any) -> Any:
        pixels, place = decoded(self, *arguments)
        areas.append(pixels.shape[0] * pixels.shape[1])
        return pixels, place

    monkeypatch.setattr(ShardSet, "read", counted_read)
    monkeypatch.setattr(Decoder, "decode_region", counted_decoded)
    pass_ = MultiViewLoader(spec_for(regions), ALL)
    assert sum(len(batch.ids) for batch in pass_) == 21
    assert reads == Counter(range(21))
    whole = (pass_.shards.samples["height"].astype(int) * pass_.shards.samples["width"]).tolist()
    assert sorted(areas) == sorted(whole)
    areas.clear()
    list(MultiViewLoader(spec_for(regions), (ViewSpec(CentreCrop(40), 16), ViewSpec(CentreCrop(40), 8))))
    assert len(areas) == 21
    assert sum(areas) < 0.8 * sum(whole)  # if no view shows the whole image, only a part is decoded


def test_a_batch_is_bounded_in_bytes(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_each = 3 * (32**2 + 10 * 24**2)
    for limit, largest in ((4 * bytes_each, 4), (4 * bytes_each - 1, 3), (1, 1)):
        monkeypatch.setattr(multiview, "MAX_BATCH_BYTES", limit)
        batches = list(MultiViewLoader(spec_for(small_shards), (CENTRE, TEN)))
        assert max(len(batch.ids) for batch in batches) == largest
        assert sum(len(batch.ids) for batch in batches) == 21


def test_a_corrupt_image_is_named(small_shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_shards, copy)
    shards = ShardSet(copy, "val")
    record = shards.samples[9]
    with shards.shards[record["shard"]].open("r+b") as stream:
        stream.seek(int(record["offset"]))
        stream.write(bytes(int(record["bytes"])))
    with pytest.raises(UserError, match=r"cannot be decoded \(.+\); make the shards again") as caught:
        list(MultiViewLoader(spec_for(copy), ALL))
    assert str(caught.value).startswith(shards.locate(9))


def test_an_image_of_another_size_than_stored_is_corrupt(small_shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_shards, copy)
    samples = np.load(copy / "val" / "samples.npy")
    samples["height"][4] += 1
    np.save(copy / "val" / "samples.npy", samples)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["val"]["samples_sha256"] = hashlib.sha256((copy / "val" / "samples.npy").read_bytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"has \d+ x \d+ pixels, but was stored as \d+ x \d+"):
        list(MultiViewLoader(spec_for(copy), ALL))


def test_an_abandoned_pass_leaves_no_threads(small_shards: Path) -> None:
    before = working_threads()
    batches = iter(MultiViewLoader(spec_for(small_shards), ALL))
    next(batches)
    assert working_threads() > before
    batches.close()  # type: ignore[attr-defined]
    assert working_threads() == before


def test_unsupported_specs_are_refused(small_shards: Path) -> None:
    with pytest.raises(UserError, match="`engine` dali makes only one kind of view"):
        MultiViewLoader(spec_for(small_shards, engine="dali"), ALL)
    with pytest.raises(UserError, match=r"short side \(16\) must be at least the image size \(32\)"):
        MultiViewLoader(spec_for(small_shards), (CENTRE, ViewSpec(CentreCrop(16), 32)))
    with pytest.raises(ValueError, match="evaluation"):
        MultiViewLoader(spec_for(small_shards), (CENTRE, ViewSpec(ScaleJitter(36, 40), 32)))
