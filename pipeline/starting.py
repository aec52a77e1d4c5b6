"""Signals while a script imports its modules, which takes seconds. Our scripts import this module first.

Without it, Ctrl-C would show a traceback, and the kernel would ignore SIGTERM for the first process of a container.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_SCRIPTS = (_ROOT, _ROOT / "tools", _ROOT / "tools" / "bench", _ROOT / "tools" / "paper")  # folders


def end(number: int, _: Any) -> None:
    """A handler that ends the process at once."""
    if number == signal.SIGINT:
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


def end_as_first_process() -> None:
    """Let SIGTERM end this process if it is the first of a container."""
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, end)


_script = getattr(sys.modules["__main__"], "__file__", None)  # not that of pytest, nor of a worker process
if _script and Path(_script).resolve().parent in _SCRIPTS:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored
        signal.signal(signal.SIGINT, end)
    end_as_first_process()
