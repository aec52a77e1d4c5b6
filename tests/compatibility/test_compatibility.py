"""Compatibility with version 0.1 (commit e2283d1): this version makes the same shards, FFCV files and draws, and resumes a
checkpoint.

That commit converted images/ and trained on them. expected.json contains the SHA-256 of each file that it wrote, and the batches
and metrics of its train.py after it resumed run.tar.gz. Most weights in run.tar.gz are zero, to keep the file small.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.convert import images
from pipeline.convert.beton import BetonSettings
from pipeline.convert.make import ConvertOptions, make_shards
from pipeline.jpeg.header import NotBaselineError, parse
from pipeline.jpeg.transcode import transcode
from tests.helpers import run_forked

HERE = Path(__file__).parent
EXPECTED: dict[str, Any] = json.loads((HERE / "expected.json").read_text())
HAS_FFCV = "ffcv" not in os.environ.get("CROPFEED_WITHOUT", "").split(",")


def convert(out: Path, profile: str) -> Path:
    """Convert as that commit did: it re-encoded JPEGs with several scans or 4 components, which are lossless since."""

    def transcode_one_scan(data: bytes, *checks: Any) -> bytes:
        header = parse(data)
        if len(header.sampling) == 4:
            raise NotBaselineError("8 bits, 4 components")
        if not header.is_one_scan:
            raise NotBaselineError("progressive coding")
        return transcode(data, *checks)

    options = ConvertOptions(
        str(HERE / "images"), str(out), profile=profile, shard_size=8, workers=1, format="both" if HAS_FFCV else "webdataset",
        beton=BetonSettings("jpg" if profile == "original" else "region"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "transcode", transcode_one_scan)
        make_shards(options)
    return out


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("compatibility") / "data", "lossless")


def assert_same_files(out: Path, profile: str) -> None:
    for name, digest in EXPECTED["files"][profile].items():
        if HAS_FFCV or not name.endswith(".beton"):
            assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["compact", "original"])
def test_shards_have_the_same_bytes(profile: str, tmp_path: Path) -> None:
    assert_same_files(convert(tmp_path / "data", profile), profile)


@pytest.mark.slow
def test_lossless_shards_and_their_manifest_are_the_same(lossless: Path) -> None:
    assert_same_files(lossless, "lossless")
    found, expected = (json.loads(path.read_text()) for path in (lossless / "manifest.json", HERE / "manifest.json"))
    statistics, before = found.pop("statistics"), expected.pop("statistics")
    if not HAS_FFCV:
        for split in expected["splits"].values():
            del split["beton"]
    assert found == expected
    assert list(statistics) == list(before)
    for name in ("channel_mean", "rgb_covariance", "eigenvalues", "eigenvectors"):
        np.testing.assert_allclose(statistics[name], before[name], atol=1e-9)  # LAPACK's last bits depend on the processor
    assert statistics["mean_image_sha256"] == before["mean_image_sha256"]


@pytest.mark.slow
def test_a_checkpoint_resumes_with_the_same_samples_draws_and_losses(lossless: Path, tmp_path: Path) -> None:
    with tarfile.open(HERE / "run.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    result = run_forked(
        "tests/traced_train.py", "--data", lossless, "--output", tmp_path / "run", "--resume", "--arch", "resnet20",
        "--epochs", 3, "--batch-size", 4, "--image-size", 32, "--scale", 36, 68, "--lr", 0.01, "--threads", 1, "--log-every", 1,
        "--checkpoint-every", 20, "--ema", 0.9, "--mixup", 0.2, "--drop-path", 0.1, "--order", "blocks", "--block-shards", 2,
        "--trackers", "none", TRACE=str(tmp_path / "trace"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (trace,) = tmp_path.glob("trace.*")
    batches = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [batch["ids"] for batch in batches] == [batch["ids"] for batch in EXPECTED["trace"]]
    for batch, before in zip(batches, EXPECTED["trace"], strict=True):
        for drawn, expected in zip(batch["draws"], before["draws"], strict=True):
            np.testing.assert_allclose([ast.literal_eval(value) for value in drawn], [ast.literal_eval(v) for v in expected])
    with (tmp_path / "run" / "metrics.csv").open() as stream:
        rows = [[float(row[name] or 0) for name in ("step", "lr", "train_loss", "val_top1")] for row in csv.DictReader(stream)]
    resumed, before = [row for row in rows if row[0] > 5], EXPECTED["metrics"]
    assert [row[:2] for row in resumed] == [pytest.approx(row[:2]) for row in before]
    # With batches of four images, training is chaotic: after three steps, another number of threads changes the third digit.
    assert [row[2] for row in resumed[:3]] == pytest.approx([row[2] for row in before[:3]], rel=0.02)
