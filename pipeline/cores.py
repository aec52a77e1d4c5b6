"""The CPU cores that this process may use: CPU affinity, control groups, and the other training processes on the machine.

root: the folder of proc and sys; tests use another one than /.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path("/")
_bound = 0  # this process's share of the cores of the NUMA node that it is bound to


def cores_per_process(root: Path = ROOT) -> int:
    """This process's share of the cores: the usable ones, divided by the number of training processes on the machine, which the
    launcher puts into LOCAL_WORLD_SIZE. At least 1."""
    return _bound or max(1, usable_cores(root) // local_processes())


def local_processes() -> int:
    """The number of training processes on this machine, according to the launcher."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(processes) if processes.isdigit() else 1)


def bind_to_gpu(gpus: list[str], own: int, root: Path = ROOT) -> set[int]:
    """Restrict this process, and the threads that it starts from now on, to the cores of its GPU's NUMA node. Returns them.

    It is not bound, and the result is empty, if it is the machine's only process, if somebody has set its CPU affinity, if the
    GPU's node is unknown, or if CROPFEED_BIND is 0.

    gpus: PCI addresses of the GPUs of this machine's processes, such as "0000:41:00.0". own: the index of this process's GPU.
    """
    global _bound
    allowed = os.sched_getaffinity(0)
    if len(gpus) < 2 or os.environ.get("CROPFEED_BIND") == "0" or allowed != _allowed_by_machine(root):
        return set()
    near = [_cores_near(gpu, root) & allowed for gpu in gpus]
    if not near[own] or near[own] == allowed:
        return set()
    _bound = max(1, int(min(len(near[own]) // near.count(near[own]), core_quota(root) / len(gpus))))
    os.sched_setaffinity(0, near[own])
    return near[own]


def _cores_near(address: str, root: Path) -> set[int]:
    """The cores of a GPU's NUMA node; none if it is unknown."""
    device = root / "sys" / "bus" / "pci" / "devices" / address
    return numbers(read(device / "local_cpulist")) if read(device / "numa_node") not in ("", "-1") else set()


def _allowed_by_machine(root: Path) -> set[int]:
    """The cores that a process has if nobody sets its affinity: those of its control group, or all."""
    for folder in cgroups(root, "cpuset"):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus"):
            if cores := numbers(read(folder / name)):
                return cores
    return numbers(read(root / "sys" / "devices" / "system" / "cpu" / "online"))


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
