"""No engine leaks memory, threads or processes, however an iteration ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline import open_loader
from pipeline.plan import sampling
from tests.helpers import ROOT, assert_ends, clean_environment, working_threads
from tests.pipeline.contract.helpers import ids, spec_for

EPOCHS, WARM_UP = 50, 15
SLOPE_LIMIT = 100_000  # bytes per epoch, of 56 images of 3 KB each


def test_memory_stays_flat(small: Path, engine: str) -> None:
    loader = open_loader(spec_for(small, engine, threads=2))
    memory = []
    for _ in range(EPOCHS):
        ids(loader)
        memory.append(psutil.Process().memory_info().rss)
    loader.close()
    slope = np.polyfit(np.arange(EPOCHS - WARM_UP), memory[WARM_UP:], 1)[0]
    assert slope < SLOPE_LIMIT, memory


def test_repeated_opening_leaks_nothing(small: Path, engine: str) -> None:
    before = working_threads(), len(psutil.Process().children(recursive=True)), psutil.Process().num_fds()
    for _ in range(4):
        loader = open_loader(spec_for(small, engine, threads=2, order="blocks"))
        next(iter(loader))
        loader.close()
    gc.collect()  # DALI's pipelines are part of reference cycles
    assert working_threads() <= before[0]
    assert len(psutil.Process().children(recursive=True)) == before[1]
    assert psutil.Process().num_fds() <= before[2] + 8  # some files are opened once and stay open


@pytest.mark.slow
def test_interrupts_are_raised_and_the_position_is_kept(small: Path, engine: str) -> None:
    """As in a notebook: after an interrupt at any point, the loader continues at its position when it is iterated again."""
    loader = open_loader(spec_for(small, engine, threads=2))
    next(iter(loader))
    rng = np.random.default_rng(0)
    for delay in rng.uniform(0.001, 0.03, 50).tolist():
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it may come at any point
            timer.start()
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                ids(loader)
        timer.join()
    epoch, consumed = loader.epoch, loader.consumed
    assert ids(loader) == sampling.order(0, epoch, np.arange(consumed, 56), 60).tolist()
    loader.close()


# Iterates over the data sys.argv[1] with engine sys.argv[2], and ends as sys.argv[3] says, without closing the loader. At the end
# it prints which of our threads are alive: compiled code that runs while the interpreter is finalized aborts the process.
PROGRAM = f"""
import atexit, sys, threading
def show_threads():
    print([t.name for t in threading.enumerate() if type(t).__module__.startswith("pipeline")], file=sys.stderr)
atexit.register(show_threads)
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import torch
from pipeline import open_loader
from pipeline.plan import sampling
from tests.pipeline.contract.helpers import spec_for
torch.set_num_threads(5)
loader = open_loader(spec_for(Path(sys.argv[1]), sys.argv[2], threads=3, order="blocks"))
for number, batch in enumerate(batch for _ in range(1_000_000) for batch in loader):
    if number == 3:
        print("running", torch.get_num_threads(), flush=True)
        if sys.argv[3] == "break":
            break
        if sys.argv[3] == "exception":
            raise RuntimeError("the training failed")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code", "words"),
    [("break", 0, ""), ("exception", 1, "the training failed"), ("interrupt", -signal.SIGINT, "KeyboardInterrupt")],
)
def test_a_program_ends_at_once_if_the_loader_is_not_closed(small: Path, engine: str, end: str, code: int, words: str) -> None:
    """torch's number of threads must not change. FFCV sets it to one when it is imported, and to its own number in its Loader."""
    program = [sys.executable, "-c", PROGRAM, str(small), engine, end]
    with subprocess.Popen(
        program, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running 5\n", process.communicate()
        children = psutil.Process(process.pid).children(recursive=True) if end == "interrupt" else []
        began = time.monotonic()
        if end == "interrupt":
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == code, errors
    assert words in errors
    assert errors.endswith("[]\n")
    assert "Exception ignored" not in errors
    assert time.monotonic() - began < 10
    for child in children:
        assert_ends(child.pid)
