"""The CPU cores that this process may use: CPU affinity, control groups, and the other training processes on the machine.

root: the folder of proc and sys; tests use another one than /.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path("/")


def cores_per_process(root: Path = ROOT) -> int:
    """This process's share of the cores: the usable ones, divided by the number of training processes on the machine, which the
    launcher puts into LOCAL_WORLD_SIZE. At least 1."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, usable_cores(root) // max(1, int(processes) if processes.isdigit() else 1))


def usable_cores(root: Path = ROOT) -> int:
    """The number of cores that the CPU affinity allows, or fewer if a control group limits CPU time. At least 1."""
    return max(1, int(min(len(os.sched_getaffinity(0)), core_quota(root))))


def core_quota(root: Path = ROOT) -> float:
    """The CPU time quota of this process's control groups, in cores; infinite without one."""
    quotas = []
    for folder in cgroups(root, "cpu"):
        old = f"{read(folder / 'cpu.cfs_quota_us')} {read(folder / 'cpu.cfs_period_us')}"
        for text in (read(folder / "cpu.max"), old):
            if re.fullmatch(r"\d+ [1-9]\d*", text):  # otherwise "max", -1 or empty
                quota, period = map(int, text.split())
                quotas.append(quota / period)
    return min(quotas, default=float("inf"))


def cgroups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and its parents, in cgroup v1 and v2. In a container some do not exist."""
    folders = []
    for line in read(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys" / "fs" / "cgroup" / (controller if controllers else "")  # version 2 names no controllers
        place = top / path.lstrip("/")
        folders += [folder for folder in (place, *place.parents) if folder.is_relative_to(top)]
    return folders


def numbers(text: str) -> set[int]:
    """The numbers of a list of the kernel, such as 0-3,8. A node without cores has an empty list."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def read(path: Path) -> str:
    """The content of a file in /proc or /sys; "" if it does not exist."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
