from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import ROOT

# A launcher, by its words, that starts a process and ends when that is ready; the process waits for SIGTERM and notes it.
LAUNCHER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from training.launch import end_with_launcher
if os.fork() == 0:
    signal.signal(signal.SIGTERM, lambda *_: (open({told!r}, "w").close(), os._exit(0)))
    end_with_launcher()
    open({ready!r}, "w").close()
    time.sleep(60)
while not os.path.exists({ready!r}):
    time.sleep(0.01)
os._exit(0)
"""


@pytest.mark.parametrize(("words", "ends"), [(("accelerate", "launch", "train.py"), True), (("bash",), False)])
def test_a_process_ends_with_accelerates_launcher_and_outlives_a_shell(
    words: tuple[str, ...], ends: bool, tmp_path: Path
) -> None:
    """`nohup python train.py &` must go on; under the launcher nobody else would end it."""
    told, ready = tmp_path / "told", tmp_path / "ready"
    code = LAUNCHER.format(root=str(ROOT), told=str(told), ready=str(ready))
    subprocess.run([sys.executable, "-c", code, *words], check=True, timeout=60)
    deadline = time.monotonic() + (20 if ends else 0.3)
    while not told.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert told.exists() == ends
