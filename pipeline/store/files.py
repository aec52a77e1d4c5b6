"""Files by local path or fsspec URL (s3://bucket/key and the like): ranges, listings, and writing that is whole or absent.

Every function takes paths as strings. Errors of the storage (missing files, credentials, unknown protocols) are UserErrors.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..errors import UserError

PARTIAL = ".partial"  # ends the names of files that are still being written; they begin with a dot
_PIECE, _AT_ONCE = 8 << 20, 8  # bytes; requests: object stores give each one a share of what the network could carry
# An object is there once its upload has ended, whole; other file systems show a file while it grows.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "memory"}


class Entry(NamedTuple):
    """What a folder holds. name: without the folder. bytes: of a file."""

    name: str
    is_folder: bool
    bytes: int


def is_remote(path: str) -> bool:
    """Whether `path` is a URL of something else than local files."""
    return "://" in path and not path.startswith(("file://", "local://"))


def join(folder: str, *names: str) -> str:
    return "/".join([folder.rstrip("/"), *names])


def absolute(path: str) -> str:
    """A local path made absolute, so that processes elsewhere understand it; a URL as it is, without a slash at its end."""
    return path.rstrip("/") if is_remote(path) else os.path.abspath(path.removeprefix("file://").removeprefix("local://"))


def read(path: str, start: int = 0, count: int | None = None) -> bytes:
    """`count` bytes from `start` on (all that follow, if None). Fewer only where the file ends before."""
    with _explained(path):
        if not is_remote(path):  # without fsspec's 0.2 ms
            with open(absolute(path), "rb") as stream:
                stream.seek(start)
                return stream.read(-1 if count is None else count)
        system, target = _system(path)
        content: bytes = system.cat_file(target, start=start or None, end=None if count is None else start + count)
        return content


def size(path: str) -> int:
    """A file's bytes, now."""
    with _explained(path):
        system, target = _system(path)
        system.invalidate_cache()  # an earlier listing's answer may be out of date
        return int(system.info(target)["size"])


def pieces(path: str, count: int) -> Iterator[bytes]:
    """The first `count` bytes of a file, in order and in pieces, of which several are on their way at a time."""
    with _explained(path):
        system, target = _system(path)
        for first in range(0, count, _PIECE * _AT_ONCE):
            starts = list(range(first, min(first + _PIECE * _AT_ONCE, count), _PIECE))
            ends = [min(start + _PIECE, count) for start in starts]
            found = system.cat_ranges([target] * len(starts), starts, ends)
            for start, end, piece in zip(starts, ends, found, strict=True):
                if isinstance(piece, Exception):
                    raise piece
                if len(piece) != end - start:  # a web server that knows no ranges answers with the whole file
                    raise OSError(f"asked for {end - start} bytes from {start} on, got {len(piece)}")
                yield piece


@contextmanager
def opened(path: str) -> Iterator[Any]:
    """A seekable binary file, for reading headers here and there."""
    with _explained(path):
        system, target = _system(path)
        with system.open(target, "rb") as stream:
            yield stream


def exists(path: str) -> bool:
    with _explained(path):
        system, target = _system(path)
        return bool(system.exists(target))


def is_folder(path: str) -> bool:
    with _explained(path):
        system, target = _system(path)
        return bool(system.isdir(target))


def listing(folder: str) -> list[Entry]:
    """A folder's entries by name, hidden ones left out. An absent folder is an empty one."""
    with _explained(folder):
        system, target = _system(folder)
        system.invalidate_cache()
        try:
            found = system.ls(target, detail=True)
        except FileNotFoundError:
            return []
        entries = [Entry(i["name"].rstrip("/").rsplit("/", 1)[1], i["type"] == "directory", i["size"] or 0) for i in found]
        return sorted(entry for entry in entries if entry.name and not entry.name.startswith("."))


def remove(path: str) -> None:
    """Remove a file, if it is there."""
    with _explained(path):
        system, target = _system(path)
        try:
            system.rm_file(target)
        except FileNotFoundError:
            return


@contextmanager
def atomic_write(path: str) -> Iterator[Path]:
    """A local file to write. When the block ends well its content is at `path`, whole; else nothing of it remains.

    Whoever reads `path` meanwhile sees what was there before, or nothing. Folders are made as needed.
    """
    with _explained(path):
        system, target = _system(path)
        local = isinstance(system, LocalFileSystem)
        folder = Path(target).parent if local else Path(tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".{target.rsplit('/', 1)[1]}.{uuid.uuid4().hex}{PARTIAL}"
    try:
        yield scratch
        with _explained(path):
            if local:
                os.replace(scratch, target)
            elif set(_protocols(system)) & _OBJECT_STORES:
                system.put_file(str(scratch), target)
            else:
                system.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                system.put_file(str(scratch), target + PARTIAL)
                system.mv(target + PARTIAL, target)
    finally:
        scratch.unlink(missing_ok=True)


def write(path: str, content: bytes) -> None:
    """A whole file at once, or nothing."""
    with atomic_write(path) as scratch:
        scratch.write_bytes(content)


def _system(path: str) -> tuple[Any, str]:
    system, target = fsspec.core.url_to_fs(path)
    return system, target


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn the dozen exceptions of fsspec's back ends into one-line UserErrors that name the path."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found") from error
    except ImportError as error:  # fsspec's message names the package to install
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        raise UserError(f"{path}: cannot be reached ({type(error).__name__}: {error})") from error


def sha256(path: str) -> str:
    """The SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with opened(path) as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def remove_folder(path: str) -> None:
    """Remove a folder with all that is in it, if it is there."""
    with _explained(path):
        system, target = _system(path)
        with contextlib.suppress(FileNotFoundError):
            system.rm(target, recursive=True)


def remove_partials(folder: str, seconds: float) -> None:
    """Remove what killed writers left in a local folder and those below it, if nobody wrote to it for so many seconds.

    Object stores keep nothing of a broken upload.
    """
    for path in [] if is_remote(folder) else Path(folder).rglob(f".*{PARTIAL}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= seconds:
                path.unlink()
