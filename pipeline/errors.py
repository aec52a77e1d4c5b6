"""`UserError`, for mistakes that the user can correct; `StorageError`, for files that a disk does not take; and the pip command
that installs what is missing."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# An option of pip: in a checkout, install the versions that Cropfeed is tested with.
PIP_CONSTRAINT = "--constraint constraints.txt " if (Path(__file__).resolve().parents[1] / "constraints.txt").exists() else ""


class UserError(Exception):
    """An error that the user can correct. Programs show it in one line, without a traceback.

    problem: what is wrong, with the file or the value. remedy: what would help, or "". Names of fields (of a spec or of options)
    are in backticks, such as `cache_gb`; command lines replace them by their flags.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem, self.remedy = problem, remedy

    def __reduce__(self) -> Any:  # errors of worker processes are pickled
        return type(self), (self.problem, self.remedy)


class CorruptImageError(ValueError):
    """An image that none of the decoders can decode; the message says why, in one line."""


class StorageError(UserError):
    """A file cannot be written: its disk is full or fails, or the file system does not allow it."""


_CAUSES = {  # error number -> what it means, what helps
    errno.ENOSPC: ("not enough space on the disk at {disk}", "free some space there"),
    errno.EDQUOT: ("your quota on the disk at {disk} is used up", "free some of your space there"),
    errno.EFBIG: ("the file is too large for the file system at {disk} or for `ulimit -f`", "choose a folder on another disk"),
    errno.EROFS: ("the file system at {disk} is read-only", "choose another folder"),
    errno.EIO: ("the disk at {disk} reports an input/output error", "check it, or choose a folder on another disk"),
    errno.EACCES: ("permission denied", "choose another folder"),
    errno.EPERM: ("operation not permitted", "choose another folder"),
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # only writing gives these errors
_OTHER = ("{error}", "choose another folder")


def storage_error(error: BaseException, path: str | Path) -> StorageError | None:
    """What an exception that was raised while `path` was being written says about its disk; None if it says nothing.

    Libraries hide the number of the system's error: torch.save raises a RuntimeError after it, safetensors writes it into a text,
    and NumPy leaves it out.
    """
    number = None
    found: BaseException | None = error
    while found is not None and not number:
        text = str(found)
        if match := re.search(r"\(os error (\d+)\)", text):
            number = int(match[1])
        elif isinstance(found, OSError):
            number = errno.ENOSPC if re.match(r"\d+ requested and|Not enough free space", text) else found.errno
        elif not isinstance(found, RuntimeError):
            break
        found = found.__cause__ or found.__context__
    if not number:
        return None
    cause, remedy = _CAUSES.get(number, _OTHER)
    cause = cause.format(disk=_disk(path, number == errno.ENOSPC), error=os.strerror(number))
    return StorageError(f"{path}: cannot be written: {cause}", remedy)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """A context in which `path` is written; errors of its disk become StorageErrors."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if explained := storage_error(error, path):
            raise explained from error
        raise


def _disk(path: str | Path, full: bool) -> str:
    """The mount point of a path and, of a full disk, what is free."""
    place = Path(os.path.realpath(path))
    while not os.path.ismount(place) and place != place.parent:
        place = place.parent
    try:
        status = os.statvfs(place)
    except OSError:
        return str(place)
    if not full:
        return str(place)
    if status.f_files and not status.f_favail:
        return f"{place} (no inode free)"
    return f"{place} ({readable_bytes(status.f_bavail * status.f_frsize)} free)"


def readable_bytes(count: int) -> str:
    """A number of bytes for people: 512 bytes, 1.5 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def install_command(extra: str = "") -> str:
    """The pip command that installs Cropfeed with an optional extra. In a checkout, it installs the checkout."""
    extra = f"[{extra}]" if extra else ""
    return f"pip install {PIP_CONSTRAINT}-e '.{extra}'" if PIP_CONSTRAINT else f"pip install 'cropfeed{extra}'"
