"""tools/bench/bench_convert.py: the rows that it writes, and that it compares coefficients."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.helpers import ROOT, jpeg, random_image, run_script

needs_jpegtran = pytest.mark.skipif(not shutil.which("jpegtran"), reason="jpegtran is not installed")


def write_images(folder: Path, count: int) -> list[str]:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(jpeg(random_image(70, 90, number)))
    return sorted(str(path) for path in folder.iterdir())


@pytest.mark.slow
@needs_jpegtran
def test_rows_of_speed_and_memory(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    pytest.importorskip("webdataset")
    write_images(tmp_path / "images", 3)
    options = ("--results", tmp_path / "rows.csv", "--repeats", 1, "--memory", 4)
    result = run_script("tools/bench/bench_convert.py", tmp_path / "images", *options)
    assert result.returncode == 0, result.stderr
    with (tmp_path / "rows.csv").open(newline="") as stream:
        rows = {(row["engine"], row["spec"], row["metric"]): float(row["value"]) for row in csv.DictReader(stream)}
    for profile in ("lossless", "original"):
        assert rows[f"cropfeed {profile}", "images, 3 images, one core", "times_ffcv_writer"] > 0
    assert rows["cropfeed lossless, progressive JPEGs", "images, 9 images, one core", "images_per_s"] > 0
    assert 50 < rows["make_shards.py", "images, 4 images, one core", "peak_memory_mb"] < 5000


@needs_jpegtran
def test_changed_coefficients_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools/bench")
    from tools.bench import bench_convert

    (file,) = write_images(tmp_path / "images", 1)
    assert len(set(bench_convert.recode([file], tmp_path / "same"))) == 3
    monkeypatch.setattr(bench_convert, "transcode", lambda data: data)
    with pytest.raises(UserError, match="coefficients change"):
        bench_convert.recode([file], tmp_path / "other")
