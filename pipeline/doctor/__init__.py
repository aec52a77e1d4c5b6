"""`cropfeed doctor`: checks whether a machine is ready to load and train. It needs no packages until it checks a data set.

- `lines`: what all checks share: options, output lines, probes in a child process.
- `packages`: Python and the packages for the CPU. `gpu`: torch, NVIDIA's driver, DALI, nvJPEG.
- `machine`: processor, cores, memory, limits, disks. `data`: the data set and its cache.

This module runs the checks and prints their lines.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from ..cli import Parser, add_cache_flags
from ..errors import UserError
from . import gpu, machine, packages
from .lines import PACKAGES, DoctorOptions, Line

HELP = """Check whether this machine is ready to load and train.

With SHARDS, the folder or URL of the shards to load, the doctor also checks the data and compares its size with memory and disk.

Each line has a status and what was found:
  ok       nothing to do
  warning  it works, but slower than it could; or something optional is missing; or the check itself could not run
  failed   loading or training will not work
If something is wrong, the next line gives the remedy, after "->". Run its commands in the checkout of Cropfeed, if you have one.

Exit code: 0 if nothing failed (even with warnings), 1 if something failed, 2 for wrong arguments. With --strict, warnings count
as failures. The doctor needs no packages, so it runs before they are installed. It takes about 10 seconds, mostly for imports.
"""

Check = Callable[[DoctorOptions], list[Line]]

COLOURS = {"ok": "\x1b[32m", "warning": "\x1b[33m", "failed": "\x1b[31m"}


def check_data(options: DoctorOptions) -> list[Line]:
    if options.data is None:
        return []
    try:
        from . import data
    except ImportError as error:
        return [Line("failed", "data", f"{options.data}: cannot be read yet ({error})", PACKAGES)]
    return data.check(options, options.data)


CHECKS: dict[str, Check] = {
    "python": packages.check_python,
    "torch": gpu.check_torch,
    "driver": gpu.check_driver,
    "dali": gpu.check_dali,
    "nvjpeg": gpu.check_nvjpeg,
    "ffcv": packages.check_ffcv,
    "numba": packages.check_numba,
    "libjpeg-turbo": packages.check_jpeg,
    "processor": machine.check_processor,
    "cores": machine.check_cores,
    "numa": machine.check_numa,
    "shm": machine.check_shm,
    "open files": machine.check_open_files,
    "memlock": machine.check_memlock,
    "ram": machine.check_ram,
    "disk": machine.check_disk,
    "data": check_data,
}
NAME_WIDTH = max(len(name) for name in CHECKS)


def run_check(name: str, check: Check, options: DoctorOptions) -> list[Line]:
    """The lines of a check. If the check itself raises, the error becomes a line, so that the other checks still run."""
    try:
        return check(options)
    except Exception as error:
        found = f"this check failed to run: {type(error).__name__}: {' '.join(str(error).split())}"
        return [Line("warning", name, found, "check this by hand, and report the line above as a bug of the doctor")]


def text(line: Line, colour: bool) -> str:
    status = f"{line.status:<9}"
    if colour:
        status = f"{COLOURS[line.status]}{status}\x1b[0m"
    shown = f"{status}{line.name:<{NAME_WIDTH}}  {line.found}"
    return f"{shown}\n{'':9}-> {line.remedy}" if line.remedy else shown


def summary(lines: list[Line]) -> str:
    counts = Counter(line.status for line in lines)
    warnings = counts["warning"]
    return f"{counts['ok']} ok, {warnings} warning{'' if warnings == 1 else 's'}, {counts['failed']} failed"


def exit_code(lines: list[Line], strict: bool) -> int:
    bad = {"failed", "warning"} if strict else {"failed"}
    return int(any(line.status in bad for line in lines))


def main(arguments: Sequence[str] | None = None, prog: str = "python tools/doctor.py") -> None:
    """`cropfeed doctor` and tools/doctor.py. Exits with `exit_code`."""
    parser = Parser(HELP, prog)
    parser.add_argument("data", nargs="?", metavar="SHARDS", help="folder or URL (s3://...) of shards")
    add_cache_flags(parser)
    parser.add_argument("--strict", action="store_true", help="treat warnings as failures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the lines to this file, as JSON")
    args = parser.parse_args(arguments)
    options = DoctorOptions(data=args.data, cache=args.cache, cache_gb=args.cache_gb)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    lines = []
    for name, check in CHECKS.items():
        for line in run_check(name, check, options):
            lines.append(line)
            print(text(line, colour), flush=True)
    print(summary(lines))
    if args.json:
        try:
            args.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n", "utf-8")
        except OSError as error:
            raise UserError(f"--json {args.json}: cannot be written ({error})") from error
    sys.exit(exit_code(lines, args.strict))
