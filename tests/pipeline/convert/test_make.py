"""`make_shards.py --format`: .beton files as part of a conversion. test_beton.py tests the files themselves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.store.shards import ShardSet
from tests.helpers import assert_refused, run_script, without_progress
from tests.tools.test_make_shards import digests, make

if os.environ.get("CROPFEED_WITHOUT") == "ffcv":
    pytest.skip("FFCV is not installed; see the output of make", allow_module_level=True)


@pytest.mark.slow
def test_both_formats_are_one_data_set(image_folder: Path, tmp_path: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.reader import Reader

    out = tmp_path / "out"
    result = make(image_folder, out, "--format", "both")
    assert result.returncode == 0, result.stderr
    before = digests(out)
    for split, count in (("train", 60), ("val", 21)):
        stored, reader = ShardSet(out, split), Reader(str(out / f"{split}.beton"))
        assert isinstance(reader.handlers["image"], RGBImageField)
        assert isinstance(reader.handlers["label"], IntField)
        assert len(stored) == reader.num_samples == count
    assert make(image_folder, out, "--format", "both").returncode == 0  # nothing is left to do
    assert digests(out) == before
    beton = out / "train.beton"
    data = bytearray(beton.read_bytes())
    data[len(data) // 2] ^= 1
    beton.write_bytes(data)
    result = without_progress(run_script("tools/make_shards.py", "--verify", out))
    assert_refused(result, "1 damaged")
    assert "train.beton: is damaged" in result.stdout
    assert make(image_folder, out, "--format", "both").returncode == 0
    assert digests(out) == before


@pytest.mark.slow
def test_format_ffcv_keeps_no_tars(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = make(image_folder, out, "--format", "ffcv", "--ffcv-mode", "jpg", "--ffcv-max-resolution", 64)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == [
        "manifest.json", "mean_image.npy", "report.json", "samples.npy", "samples.npy", "train.beton", "val.beton",
    ]  # fmt: skip
    assert json.loads((out / "manifest.json").read_text())["splits"]["val"]["beton"]["settings"]["max_resolution"] == 64
    assert run_script("tools/make_shards.py", "--verify", out).returncode == 0
    with pytest.raises(UserError, match="only FFCV files"):
        ShardSet(out, "train")
