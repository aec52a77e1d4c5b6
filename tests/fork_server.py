"""Runs our scripts in processes forked from this one, which has imported what they need: a start takes no seven seconds then.

A request is a line of JSON on stdin: command (script, arguments), environment, folder (to run in), cores (numbers), stdout and
stderr (files). The answers are two lines: the process's number when it has begun, and when it has ended its exit code, as
subprocess has it. `tests.helpers.Forked` is the client.
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
    """In the forked process: become the script; its exit code."""
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
    except BaseException:  # as the interpreter does
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    sys.path.insert(0, str(ROOT))
    # What takes long; all but train is otherwise imported when it is first needed.
    for name in ("torch._dynamo", "torch.utils.tensorboard", "pipeline.engines.cpu", "train"):
        importlib.import_module(name)
    importlib.import_module("pipeline.plan.sampling").order(0, 0, range(2), 4)  # numba gets ready at the first call

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
