"""The DALI engine's pixels against the reference, and its GPU graph without a GPU."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_check import pixel_differences
from PIL import Image

from pipeline import open_loader
from pipeline.augment import Normalization, apply
from pipeline.engines import dali
from pipeline.loader import Loader, LoaderSpec, Part
from tests.helpers import SHARED, SUBSAMPLINGS, jpeg, open_image, picture, run_script

# Height and width: ordinary both ways up, small enough to be enlarged, tiny, extreme, large.
SIZES = ((375, 500), (500, 333), (131, 97), (9, 13), (40, 700), (1500, 2000))


@pytest.fixture(scope="module")
def varied_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class per subsampling, an image per size; and a class of what is no baseline YCbCr JPEG."""
    root = tmp_path_factory.mktemp("varied")
    for subsampling in SUBSAMPLINGS:
        folder = root / "images" / subsampling
        folder.mkdir(parents=True)
        for index, (height, width) in enumerate(SIZES):
            (folder / f"{index}.JPEG").write_bytes(jpeg(picture(height, width, index), subsampling))
    odd = root / "images" / "odd"
    odd.mkdir()
    image = Image.fromarray(picture(300, 400))
    image.save(odd / "progressive.JPEG", "JPEG", progressive=True)
    image.convert("CMYK").save(odd / "cmyk.JPEG", "JPEG")
    image.save(odd / "png.JPEG", "PNG")
    image.convert("L").save(odd / "grey_png.JPEG", "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(odd / "turned.JPEG", "JPEG", exif=exif)
    result = run_script("tools/make_shards.py", root / "images", "--out", root / "shards")
    assert result.returncode == 0, result.stderr
    return root / "shards"


def assert_like_the_reference(loader: Loader, epochs: int) -> set[str]:
    """Every sample over some epochs is within the limits; returns the names of the classes seen."""
    seen = set()
    for _ in range(epochs):
        for difference in pixel_differences(loader):
            key = loader.shards.key(difference.index)
            seen.add(key.split("/")[0])
            assert difference.pixels.mean() <= 1, key
            assert difference.percentile <= 4, key
            assert difference.pixels.max() <= 16, key
    return seen


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [224, 64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pixels_are_the_references(varied_shards: Path, training: bool, size: int, device: str) -> None:
    spec = LoaderSpec(
        varied_shards,
        training=training,
        batch_size=41,
        image_size=size,
        scale=(size * 8 // 7, size * 15 // 7),
        eval_short=size * 8 // 7,
        device=device,
    )
    seen = assert_like_the_reference(open_loader(spec), epochs=3 if training else 1)
    assert seen == {*SUBSAMPLINGS, "odd"}


def test_a_rounded_window_would_fail(varied_shards: Path) -> None:
    """The bounds above can tell a window that is off by up to half a source pixel."""
    loader = open_loader(LoaderSpec(varied_shards, batch_size=41))
    original = loader.plan
    loader.plan = lambda part: original(part)._replace(windows=original(part).windows.round())  # type: ignore[method-assign]
    batch = next(iter(loader))
    worst = 0.0
    for place, index in enumerate(batch.ids):
        draws = original(Part(0, 0, 41, 41)).draws.one(place)
        expected = apply(open_image(loader.shards.read(int(index)).tobytes()), draws, 224, loader.basis, loader.normalization)
        worst = max(worst, float(np.percentile(np.abs(batch.images[place].permute(1, 2, 0).numpy() - expected), 99.9)))
    assert worst > 4


@pytest.mark.skipif(not SHARED.exists(), reason="the real ImageNet images are not on this machine")
def test_pixels_of_real_images_are_the_references(tmp_path: Path) -> None:
    with tarfile.open(SHARED / "imagenet-400.tar") as tar:
        members = [member for member in tar if member.isfile()][::10]
        tar.extractall(tmp_path, members, filter="data")
    assert run_script("tools/make_shards.py", tmp_path / "imagenet-400", "--out", tmp_path / "shards").returncode == 0
    seen = assert_like_the_reference(open_loader(LoaderSpec(tmp_path / "shards", batch_size=20)), epochs=2)
    assert len(seen) == 40


def test_images_leave_dali_without_a_copy(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's tensor is DALI's memory: same address."""
    loader = open_loader(LoaderSpec(small_shards, batch_size=8, image_size=32, scale=(36, 68)))
    addresses = []
    original = torch.from_dlpack

    def watching(tensor: object) -> torch.Tensor:
        addresses.append(tensor.data_ptr())  # type: ignore[attr-defined]
        return original(tensor)

    monkeypatch.setattr(torch, "from_dlpack", watching)
    batch = next(iter(loader))
    assert batch.images.data_ptr() == addresses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("std", [(1, 1, 1), (58, 57, 57)])
def test_the_gpu_graph_is_whole(dtype: torch.dtype, std: tuple[int, int, int]) -> None:
    """Tracing needs no GPU: decoding is `mixed`, everything after it runs on the GPU, and so do both outputs."""
    spec = LoaderSpec("nowhere", device="cuda:1", dtype=dtype)
    normalization = Normalization.of(np.zeros((224, 224, 3)), std)
    pipe = dali.build_pipeline(lambda: None, 256, spec, normalization)
    assert pipe.device_id == 1
    outputs = pipe._graph_out  # what set_outputs was given
    assert [node.device for node in outputs] == ["gpu", "gpu"]
    operators = reachable(outputs)
    assert operators.pop("ImageSlice") == {"mixed"}
    assert operators.pop("ExternalSource") == {"cpu"}
    assert operators.keys() >= {"Resize", "Cast", "Constant"}
    assert all(devices == {"gpu"} for devices in operators.values()), operators


def reachable(outputs: Any) -> dict[str, set[str]]:
    """Operator name -> devices, of every operator that the outputs depend on."""
    found: dict[str, set[str]] = {}
    queue = list(outputs)
    while queue:
        source = queue.pop().source
        found.setdefault(source.name.strip("_").rsplit("_", 1)[0], set()).add(source._op._device)
        queue += source.inputs
    return found
