from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, assert_refused, run_forked

# A launcher with the given command line. It starts a process and exits once the process is ready. The process records a SIGTERM.
LAUNCHER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from training.launch import terminate_with_launcher
if os.fork() == 0:
    signal.signal(signal.SIGTERM, lambda *_: (open({signalled!r}, "w").close(), os._exit(0)))
    terminate_with_launcher()
    open({ready!r}, "w").close()
    time.sleep(60)
while not os.path.exists({ready!r}):
    time.sleep(0.01)
os._exit(0)
"""


@pytest.mark.parametrize(("words", "ends"), [(("accelerate", "launch", "train.py"), True), (("bash",), False)])
def test_a_process_terminates_with_accelerates_launcher_but_outlives_a_shell(
    words: tuple[str, ...], ends: bool, tmp_path: Path
) -> None:
    """`nohup python train.py &` must keep running. Under the launcher nothing else would terminate the process."""
    signalled, ready = tmp_path / "signalled", tmp_path / "ready"
    code = LAUNCHER.format(root=str(ROOT), signalled=str(signalled), ready=str(ready))
    subprocess.run([sys.executable, "-c", code, *words], check=True, timeout=60)
    deadline = time.monotonic() + (20 if ends else 0.3)
    while not signalled.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert signalled.exists() == ends


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
    ],
)
def test_settings_of_a_launcher_that_do_not_fit(settings: dict[str, Any], words: str, small_shards: Path, tmp_path: Path) -> None:
    result = run_forked(
        "train.py", "--data", small_shards, "--output", tmp_path / "run", "--batch-size", 4, ACCELERATE_USE_CPU="true", **settings
    )
    assert_refused(result, "the launcher's settings do not fit", words)
