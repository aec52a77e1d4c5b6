"""The benchmark of remote shards reads every image in each way, and writes rows."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.helpers import run_script


@pytest.mark.slow
def test_each_way_of_reading_has_its_rows(small_shards: Path, tmp_path: Path) -> None:
    rows = tmp_path / "remote.csv"
    settings = ("--latency-ms", 1, "--megabytes-per-s", 20, "--epochs", 1, "--repeats", 1, "--results", rows)
    result = run_script("tools/bench/bench_remote.py", small_shards, *settings)
    assert result.returncode == 0, result.stderr
    with rows.open(newline="") as stream:
        found = {(row["spec"].partition(",")[0], row["metric"]): float(row["value"]) for row in csv.DictReader(stream)}
    assert len(found) == 16
    shard = max(path.stat().st_size for path in (small_shards / "train").glob("*.tar")) / 1e3
    assert found["image", "requests_per_image"] >= 1
    assert found["blocks", "requests_per_image"] < 0.9
    assert found["shards", "kb_per_image"] > shard / 16 > 0
    assert all(value > 0 for value in found.values())
