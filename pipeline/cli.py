"""Command lines: the console command `cropfeed`, and what all scripts share.

    cropfeed shards /imagenet --out /data/shards      convert labelled images
    cropfeed verify /data/shards                      re-read every byte of a data set
    cropfeed doctor [/data/shards]                    check whether this machine is ready
    cropfeed profile --loader mydata:make_loader      measure any loader, and compare it with Cropfeed's

`cropfeed COMMAND --help` shows the options of a command.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import starting
from .errors import FULL, UserError, storage_error
from .outputs import Outputs
from .store.waiting import TIMEOUT_S, set_timeout

_parser: Parser | None = None  # the parser of this process's arguments


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserErrors. --help shows the description with its line breaks."""

    def __init__(self, description: str | None, prog: str | None = None, fields: dict[str, str] | None = None) -> None:
        """fields: library field -> flag, for flags that are not named like their field."""
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self._fields = fields or {}

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        global _parser
        _parser = self
        found, rest = super().parse_known_args(*args, **options)
        for name, value in vars(found).items():  # shells expand ~ at the beginning of a word only, not in --out=~/shards
            if isinstance(value, str | Path) and (str(value) == "~" or str(value).startswith("~/")):
                setattr(found, name, type(value)(os.path.expanduser(value)))
        return found, rest

    def error(self, message: str) -> NoReturn:
        raise UserError(message, "see --help")

    def with_flags(self, text: str) -> str:
        """A message of the library, with field names in backticks replaced by the flags of this command line."""
        flags = {action.dest: action.option_strings[-1] for action in self._actions if action.option_strings} | self._fields
        return re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[1]), text)


def with_flags(text: str) -> str:
    """A message of the library in one line, with field names in backticks replaced by the flags of the command line."""
    text = " ".join(text.split())
    return _parser.with_flags(text) if _parser else text


def positive(text: str) -> int:
    """The argparse type of an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _timeout(text: str) -> float:
    """The argparse type of --read-timeout. It holds from now on, as manifests are read before a loader opens."""
    value = float(text)
    set_timeout(value)
    return value


def add_cache_flags(parser: argparse._ActionsContainer) -> None:
    """Add the flags of `LoaderSpec.cache`, `cache_gb` and `read_timeout` to a parser or an argument group."""
    parser.add_argument(
        "--cache", type=Path, help="folder for copies of remote or slow shards (default: $CROPFEED_CACHE, else ~/.cache/cropfeed)"
    )
    parser.add_argument(
        "--cache-gb", type=float, help="size limit of the cache in GB (default: $CROPFEED_CACHE_GB, else 80 %% of the free disk)"
    )
    parser.add_argument(
        "--read-timeout", type=_timeout, default=TIMEOUT_S, metavar="S",
        help="seconds after which a read is repeated, in case the storage hangs (default: %(default)g)",
    )  # fmt: skip


def add_verify_flag(parser: argparse._ActionsContainer) -> None:
    """Add the flag of `LoaderSpec.verify` to a parser or an argument group."""
    parser.add_argument(
        "--verify-reads", dest="verify", action="store_true",
        help="compare the checksum of each image that is read, for storage that returns wrong bytes without an error",
    )  # fmt: skip


def check_writable(file: Path) -> None:
    """Create the file's folder. Raises UserError if the file could not be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file.parent}: cannot be created ({error.strerror})", "choose another folder") from error
    if file.is_dir():
        raise UserError(f"{file}: is a folder", "give the name of a file")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"{file}: cannot be written", "choose another folder")


def _show_flags(record: logging.LogRecord) -> bool:
    """A logging filter: messages of the library show flags instead of field names."""
    record.msg, record.args = with_flags(record.getMessage()), ()
    return True


def run_cli(main: Callable[[], None], is_log: bool = False) -> NoReturn:
    """Run a command-line program: exit 0 on success, 2 with one line on a UserError or an error of the system, 130 on Ctrl-C.

    is_log: its output is only a log, so that the program succeeds even if that cannot be written.
    """
    logging.getLogger("cropfeed").addFilter(_show_flags)
    if signal.getsignal(signal.SIGINT) is starting.end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    starting.end_as_first_process()
    outputs = Outputs(is_log)
    code = _exit_code(main, outputs)
    lost = outputs.lost()
    if isinstance(lost, BrokenPipeError):  # `... | head`
        outputs.discard()
        code = code or int(not is_log)
    elif lost:
        print(f"error: a part of the output is lost ({lost.strerror})", file=sys.stderr)
        code = code or (0 if is_log else 2)
    sys.exit(code)


def _exit_code(main: Callable[[], None], outputs: Outputs) -> int:
    """Run `main`. Prints errors in one line; returns the exit code."""
    try:
        main()
        return 0
    except UserError as error:
        problem = error
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and outputs.lost() is error:
            return 1
        explained = _explained(error)
        if explained is None:
            raise
        problem = explained
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"error: {with_flags(str(problem))}", file=sys.stderr)
    return 2


_AMOUNT = re.compile(r"(?:tried|unable) to allocate [\d.,]+ \w+", re.IGNORECASE)
_NO_MEMORY = re.compile(r"allocate memory|DefaultCPUAllocator|bad_alloc|CUDA error: out of memory|_STATUS_ALLOC_FAILED")


def _explained(error: Exception) -> UserError | None:
    """An error of the system as a UserError: storage, memory. None for anything else, which is a bug."""
    if isinstance(error, OSError):
        if error.errno is None:
            return None
        if error.errno in FULL:
            return storage_error(error, error.filename or "a file")
        return UserError(f"{error.filename}: {error.strerror}" if error.filename else f"the system says: {error}")
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY.search(text):
        amount, on_gpu = _AMOUNT.search(text), re.search("CUDA|CUBLAS|CUDNN", text)
        names = ("batch_size", "image_size", "scales", *(() if on_gpu else ("workers", "threads")))
        known = {action.dest for action in _parser._actions} if _parser else set()
        remedies = ["lower " + " or ".join(f"`{name}`" for name in names if name in known)] if known & {*names} else []
        remedies += ["raise `accumulate`"] if "accumulate" in known else []
        where = "memory of the GPU" if on_gpu else "memory"
        return UserError(f"{where} ran out" + (f" ({amount[0]})" if amount else ""), ", or ".join(remedies))
    return None


def _module(name: str) -> Any:
    return importlib.import_module(name, __package__)  # with its command only, as imports take seconds


def shards(arguments: Sequence[str] | None = None, prog: str = "python tools/make_shards.py") -> None:
    """`cropfeed shards`, and tools/make_shards.py."""
    _module(".convert.command").shards(arguments, prog)


def profile(arguments: Sequence[str], prog: str = "cropfeed profile") -> None:
    """`cropfeed profile`, and tools/profile_pipeline.py --loader."""
    _module(".profile.command").main(arguments, prog)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "shards": lambda arguments: shards(arguments, "cropfeed shards"),
    "verify": lambda arguments: _module(".convert.command").verify(arguments),
    "doctor": lambda arguments: _module(".doctor").main(arguments, "cropfeed doctor"),
    "profile": profile,
}


def _command() -> None:
    name, arguments = sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]
    if name in ("", "-h", "--help"):
        print(__doc__.partition("\n\n")[2].strip("\n"))
        return
    if name not in COMMANDS:
        raise UserError(f"cropfeed has no command {name!r}", f"choose from {', '.join(COMMANDS)}")
    COMMANDS[name](arguments)


def main() -> None:
    """The console command `cropfeed`."""
    run_cli(_command)
