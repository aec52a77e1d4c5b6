"""Runs our scripts in processes forked from this one, which has already imported their modules. That saves seven seconds a start.

A request is a line of JSON on stdin: command (script, arguments), environment, folder (working directory), cores (numbers),
stdout and stderr (files). The answers are two lines: the process ID when the process has started, and its exit code, as in
subprocess, when it has ended. `tests.helpers.Forked` is the client.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run(request: dict[str, Any]) -> int:
    """In the forked process: run the script; returns its exit code."""
    os.setsid()
    os.sched_setaffinity(0, request["cores"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    sys.stdout.reconfigure(line_buffering=False)  # type: ignore[union-attr]
    sys.argv = request["command"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # handled as by the interpreter
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    sys.path.insert(0, str(ROOT))
    # The slow imports. All except train are otherwise imported when they are first needed.
    for name in ("torch._dynamo", "torch.utils.tensorboard", "pipeline.engines.cpu", "train"):
        importlib.import_module(name)
    importlib.import_module("pipeline.plan.sampling").order(0, 0, range(2), 4)  # the first call initializes numba

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = run(json.loads(line))
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
