"""The cores that a process may use, in fake /proc and /sys trees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.cores import cores_per_process, usable_cores

V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu"


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "processes", "usable", "share"),
    [
        ({}, "", 16, 16),
        ({}, "4", 16, 4),
        ({}, "5", 16, 3),
        ({}, "32", 16, 1),
        ({}, "x", 16, 16),
        ({"proc/self/cgroup": "0::/", f"{V2}/cpu.max": "max 100000"}, "", 16, 16),
        ({"proc/self/cgroup": "0::/a", f"{V2}/cpu.max": "350000 100000", f"{V2}/a/cpu.max": "800000 100000"}, "2", 3, 1),
        ({"proc/self/cgroup": "0::/a", f"{V2}/cpu.max": "max 100000", f"{V2}/a/cpu.max": "800000 100000"}, "2", 8, 4),
        ({"proc/self/cgroup": "0::/", f"{V2}/cpu.max": "6400000 100000"}, "", 16, 16),
        ({"proc/self/cgroup": "0::/", f"{V2}/cpu.max": "50000 100000"}, "", 1, 1),
        ({"proc/self/cgroup": "3:cpu,cpuacct:/d", f"{V1}/cpu.cfs_quota_us": "600000", f"{V1}/cpu.cfs_period_us": "100000"},
         "2", 6, 3),
        ({"proc/self/cgroup": "3:cpu:/", f"{V1}/cpu.cfs_quota_us": "-1", f"{V1}/cpu.cfs_period_us": "100000"}, "", 16, 16),
        ({"proc/self/cgroup": "3:cpu:/", f"{V1}/cpu.cfs_quota_us": "100000", f"{V1}/cpu.cfs_period_us": "0"}, "", 16, 16),
    ],
)  # fmt: skip
def test_affinity_and_quota_limit_the_cores_that_processes_share(
    files: dict[str, str], processes: str, usable: int, share: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    root = plant(tmp_path, files)
    assert (usable_cores(root), cores_per_process(root)) == (usable, share)
