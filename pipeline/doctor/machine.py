"""Checks of the resources that this process may use: processor, cores, NUMA, shared memory, limits, memory, disk."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
from pathlib import Path

from ..cores import cgroups, core_quota, numbers, read
from .lines import DoctorOptions, Line, has_gpu

GB, GIB = 10**9, 2**30


def check_processor(options: DoctorOptions) -> list[Line]:
    info = read(options.root / "proc" / "cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    name, has = model[1] if model else platform.machine(), set(flags[1].split() if flags else ())
    vectors = [shown for flag, shown in (("avx2", "AVX2"), ("avx512bw", "AVX-512"), ("asimd", "NEON")) if flag in has]
    bfloat16 = [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if flag in has]
    found = f"{name}: {', '.join(vectors) or 'neither AVX2 nor NEON'}; "
    found += f"bfloat16 ({', '.join(bfloat16)})" if bfloat16 else "no bfloat16, so --mixed-precision bf16 is for GPUs only"
    if vectors:
        return [Line("ok", "processor", found)]
    remedy = "a virtual machine may hide them: give it the host's processor (qemu: -cpu host); otherwise decoding is slow"
    return [Line("warning", "processor", found, remedy)]


def check_cores(options: DoctorOptions) -> list[Line]:
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    found, quota = f"{usable} of {there}", core_quota(options.root)
    if quota < usable:
        threads = max(1, int(quota))
        remedy = f"--threads {threads}, over all processes of a machine; or raise the quota: docker run --cpus {usable} ..."
        return [Line("warning", "cores", f"{found}, but a control group limits CPU time to {quota:.3g} cores", remedy)]
    if usable == 1 < there:
        remedy = f"taskset -pc 0-{there - 1} $$ in the shell that starts the training"
        return [Line("warning", "cores", f"{found}: the CPU affinity allows only one", remedy)]
    return [Line("ok", "cores", found)]


def check_numa(options: DoctorOptions) -> list[Line]:
    system, usable = options.root / "sys", os.sched_getaffinity(0)
    nodes = {
        int(folder.name.removeprefix("node")): numbers(read(folder / "cpulist"))
        for folder in (system / "devices" / "system" / "node").glob("node[0-9]*")
    }
    if len(nodes) < 2:
        return [Line("ok", "numa", "1 node")]
    near = sorted(node for node, cores in nodes.items() if cores & usable)
    cards = {
        int(read(device / "numa_node"))
        for device in (system / "bus" / "pci" / "devices").glob("*")
        if read(device / "vendor") == "0x10de" and read(device / "class").startswith("0x03")  # NVIDIA, display or 3D
    }
    at = sorted(cards - {-1})  # -1: the firmware does not say
    found = f"{len(nodes)} nodes; the CPU affinity allows cores of {', '.join(map(str, near))}"
    found += f"; GPUs at {', '.join(map(str, at))}" if at else ""
    if far := [node for node in at if node not in near]:
        remedy = f"numactl --cpunodebind={far[0]} --membind={far[0]} before the command"
        return [Line("warning", "numa", found, remedy)]
    return [Line("ok", "numa", found)]


def check_shm(options: DoctorOptions) -> list[Line]:
    size = shutil.disk_usage(options.root / "dev" / "shm").total
    if size < GIB:
        remedy = "docker run --shm-size 8g ... (or --ipc host)"
        return [Line("warning", "shm", f"/dev/shm has {size / GIB:.2g} GiB; NCCL and Ray may need more", remedy)]
    return [Line("ok", "shm", f"/dev/shm has {size / GIB:.3g} GiB")]


def check_open_files(_: DoctorOptions) -> list[Line]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= 4096:
        return [Line("ok", "open files", str(soft))]
    remedy = (
        f"ulimit -n {min(65536, hard)}" if hard >= 4096 else "docker run --ulimit nofile=65536 ..., or /etc/security/limits.conf"
    )
    return [Line("warning", "open files", f"{soft}, each shard keeps one file open", remedy)]


def check_memlock(options: DoctorOptions) -> list[Line]:
    """NCCL locks memory for communication between machines."""
    if not has_gpu(options.root):
        return []
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return [Line("ok", "memlock", "unlimited")]
    if any((options.root / "sys" / "class" / "infiniband").glob("*")):
        found = f"{soft >> 10} KiB, but NCCL locks more memory to use InfiniBand"
        return [Line("warning", "memlock", found, "ulimit -l unlimited (docker run --ulimit memlock=-1 ...)")]
    return [Line("ok", "memlock", f"{soft >> 10} KiB")]


def check_ram(options: DoctorOptions) -> list[Line]:
    free = available_memory(options.root)
    if free < 4 * GB:
        remedy = "end other programs, or give the container more: docker run --memory 16g ..."
        return [Line("warning", "ram", f"{free / GB:.3g} GB available, which is little for training", remedy)]
    return [Line("ok", "ram", f"{free / GB:.3g} GB available")]


def available_memory(root: Path) -> int:
    """Bytes available for new allocations, page cache included: the minimum over machine and control groups of this process."""
    available = [_fields(root / "proc" / "meminfo")["MemAvailable"] << 10]
    for folder in cgroups(root, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            if (bound := read(folder / limit)).isdigit():  # otherwise "max" or empty
                parts = _fields(folder / "memory.stat")  # version 1 counts child groups in total_ fields, version 2 in all fields
                cached = sum(parts.get(f"total_{name}", parts[name]) for name in ("active_file", "inactive_file"))
                available.append(int(bound) - int(read(folder / used)) + cached)  # cached memory counts as used but is available
    return min(available)


def _fields(path: Path) -> dict[str, int]:
    return {words[0].rstrip(":"): int(words[1]) for words in map(str.split, read(path).splitlines())}


def check_disk(_: DoctorOptions) -> list[Line]:
    place, free = free_disk(Path.cwd())
    found = f"{free / GB:.3g} GB free for runs in {place}"
    if free < 2 * GB:
        remedy = "write runs to another disk, or free some space: a ResNet-50's checkpoint takes 0.2 GB"
        return [Line("warning", "disk", found, remedy)]
    return [Line("ok", "disk", found)]


def free_disk(folder: Path) -> tuple[Path, int]:
    """The folder, or its nearest existing parent, and the free bytes there."""
    exists = next(place for place in (folder, *folder.parents) if place.exists())
    return exists, shutil.disk_usage(exists).free
