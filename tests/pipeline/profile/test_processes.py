"""CPU time and memory of a process's family, compared with what the processes were made to use, and with psutil."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from pipeline.profile import processes

FAMILY = """
import subprocess, sys, time
burn = "import sys, time; t = time.process_time\\nwhile t() < float(sys.argv[1]): pass\\nprint(flush=True); sys.stdin.read()"
ended = subprocess.run([sys.executable, "-S", "-c", burn, "0.2"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
living = subprocess.Popen([sys.executable, "-S", "-c", burn, "0.3"], stdin=0, stdout=subprocess.PIPE, start_new_session=True)
living.stdout.readline()
memory = bytearray(b"x" * 50_000_000)
print(living.pid, flush=True)
sys.stdin.read()
"""


def test_children_that_live_or_have_ended_count() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            child = int(process.stdout.readline())
            assert set(processes.family(process.pid)) == {process.pid, child}
            assert 0.5 <= processes.cpu_seconds(process.pid) <= 1.5
            shared_once, peak = processes.memory(process.pid)
            resident = sum(psutil.Process(number).memory_info().rss for number in (process.pid, child))
            assert 50e6 < shared_once <= resident
            assert resident <= peak < 200e6
        finally:
            process.kill()
            psutil.Process(child).kill()
    assert processes.memory(process.pid) == (0, 0)


def test_times_agree_with_psutil() -> None:
    times = psutil.Process().cpu_times()
    own = processes.family(psutil.Process().pid)[psutil.Process().pid]
    assert own == pytest.approx(times.user + times.system + times.children_user + times.children_system, abs=0.1)
