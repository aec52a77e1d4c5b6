"""CPU time and memory of a process and of all that it started, from Linux's /proc."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")  # per second
PROC = Path("/proc")


def family(process: int) -> dict[int, float]:
    """The process, its descendants and the other processes of its session: number -> CPU seconds.

    CPU seconds are user and system time, including that of children that have ended.
    """
    parents, members = {}, {}
    for folder in PROC.iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):  # it ended meanwhile
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            number = int(folder.name)
            parents[number] = int(fields[1]), sum(map(int, fields[11:15])) / TICKS
            if process in (number, int(fields[3])):
                members[number] = parents[number][1]
    while more := {n: cpu for n, (parent, cpu) in parents.items() if parent in members and n not in members}:
        members |= more
    return members


def cpu_seconds(process: int) -> float:
    """CPU seconds that the family of a process has used."""
    return sum(family(process).values())


def memory(process: int) -> tuple[int, int]:
    """Memory of a process's family now, in bytes, with shared pages counted once; and the sum of their peak resident sizes."""
    shared_once = peak = 0
    for number in family(process):
        folder = PROC / str(number)
        own_peak = _kilobytes(folder / "status", "VmHWM")
        shared_once += _kilobytes(folder / "smaps_rollup", "Pss") or _kilobytes(folder / "status", "VmRSS")
        peak += own_peak
    return 1024 * shared_once, 1024 * peak


def _kilobytes(file: Path, field: str) -> int:
    """A field of a file such as /proc/1/status; 0 if there is none."""
    with suppress(OSError):
        for line in file.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0])
    return 0
