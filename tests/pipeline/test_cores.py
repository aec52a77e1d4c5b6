"""The cores that a process may use, in fake /proc and /sys trees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline import cores
from pipeline.cores import bind_to_gpu, cores_per_process, usable_cores

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


def two_sockets(root: Path) -> Path:
    """A machine of two nodes with eight cores each. GPUs a and b are at the first, c at the second, d at none."""
    files = {"sys/devices/system/cpu/online": "0-15", "proc/self/cgroup": "0::/"}
    for gpu, node in (("a", "0"), ("b", "0"), ("c", "1"), ("d", "-1")):
        files[f"sys/bus/pci/devices/{gpu}/numa_node"] = node
        files[f"sys/bus/pci/devices/{gpu}/local_cpulist"] = {"0": "0-3,8-11", "1": "4-7,12-15"}.get(node, "0-15")
    return plant(root, files)


@pytest.mark.parametrize(
    ("gpus", "own", "affinity", "off", "bound", "share"),
    [
        (["a", "b", "c"], 0, range(16), "", {0, 1, 2, 3, 8, 9, 10, 11}, 4),
        (["a", "b", "c"], 2, range(16), "", {4, 5, 6, 7, 12, 13, 14, 15}, 8),
        (["a"], 0, range(16), "", set(), 16),  # alone, so all cores are its own
        (["a", "b", "c"], 0, range(16), "0", set(), 5),
        (["a", "b"], 0, range(8), "", set(), 4),  # somebody has set the affinity
        (["d", "a"], 0, range(16), "", set(), 8),
        (["x", "a"], 0, range(16), "", set(), 8),
    ],
)
def test_processes_are_bound_to_the_node_of_their_gpu(
    gpus: list[str], own: int, affinity: range, off: str, bound: set[int], share: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls: list[set[int]] = []
    monkeypatch.setattr(cores, "_bound", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(affinity))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, chosen: calls.append(chosen))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(gpus)))
    monkeypatch.setenv("CROPFEED_BIND", off)
    root = two_sockets(tmp_path)
    assert bind_to_gpu(gpus, own, root) == bound
    assert calls == ([bound] if bound else [])
    assert cores_per_process(root) == share
