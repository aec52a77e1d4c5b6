from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import assert_refused, run_forked


@pytest.fixture(scope="module")
def demo_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "images"
    result = run_forked("tools/make_demo_data.py", out, "--train", 60, "--val", 30)
    assert result.returncode == 0, result.stderr
    return out


def mean_colours(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A constant and the mean RGB in 0..1, float64 (N, 4), and labels (N,)."""
    rows, labels = [], []
    for label, name in enumerate(sorted(path.name for path in folder.iterdir())):
        for path in sorted((folder / name).iterdir()):
            mean = np.asarray(Image.open(path).convert("RGB")).mean(axis=(0, 1)) / 255
            rows.append([1.0, *mean])
            labels.append(label)
    return np.array(rows), np.array(labels)


@pytest.mark.slow
def test_a_linear_model_on_mean_colour_cannot_tell_the_classes(demo_images: Path) -> None:
    """The accuracy of least squares on one-hot labels is not significantly better than chance, 1 in 8."""
    features, labels = mean_colours(demo_images / "train")
    weights = np.linalg.lstsq(features, np.eye(8)[labels], rcond=None)[0]
    features, labels = mean_colours(demo_images / "val")
    accuracy = ((features @ weights).argmax(axis=1) == labels).mean()
    assert accuracy < 1 / 8 + 4 * np.sqrt(1 / 8 * 7 / 8 / len(labels))


@pytest.mark.slow
def test_images_are_mixed_like_imagenets(demo_images: Path) -> None:
    images = [Image.open(path) for path in demo_images.rglob("*.JPEG")]
    assert len(images) == 8 * 90
    grey = sum(image.mode == "L" for image in images)
    assert 1 <= grey <= 40
    layers = [tuple(layer[1:3] for layer in image.layer) for image in images if image.mode == "RGB"]  # type: ignore[attr-defined]
    share = {first: sum(layer[0] == first for layer in layers) / len(layers) for first in {layer[0] for layer in layers}}
    assert 0.68 < share[(1, 1)] < 0.88  # 4:4:4
    assert 0.12 < share[(2, 2)] < 0.28  # 4:2:0
    assert 0 < share[(2, 1)] < 0.08  # 4:2:2
    shorts = np.array([min(image.size) for image in images])
    assert shorts.min() < 224 < np.median(shorts) < 480 < shorts.max()


def test_the_same_seed_draws_the_same_images(tmp_path: Path) -> None:
    for name, options in [("two", []), ("again", ["--workers", 1]), ("other", ["--seed", 5, "--workers", 1])]:
        run_forked("tools/make_demo_data.py", tmp_path / name, "--train", 1 + (name == "two"), "--val", 1, *options)
    drawn = sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.JPEG"))
    assert len(drawn) == 8 * 2
    for path in drawn:
        assert (tmp_path / "two" / path).read_bytes() == (tmp_path / "again" / path).read_bytes()
        assert (tmp_path / "two" / path).read_bytes() != (tmp_path / "other" / path).read_bytes()


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    assert_refused(run_forked("tools/make_demo_data.py", tmp_path), "exists already")
    assert_refused(run_forked("tools/make_demo_data.py", tmp_path / "x", "--train", 0), "at least 1")
