from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import run_script, write_image_folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes, 20 training and 7 validation images each, of every subsampling, sides 40 to 90."""
    root = tmp_path_factory.mktemp("images")
    write_image_folder(root, classes=3, train=20, val=7)
    return root


@pytest.fixture(scope="session")
def small_shards(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of `image_folder`, 16 images each, made by the script."""
    out = tmp_path_factory.mktemp("shards") / "data"
    result = run_script("tools/make_shards.py", image_folder, "--out", out, "--workers", 2, "--shard-size", 16)
    assert result.returncode == 0, result.stderr
    return out
