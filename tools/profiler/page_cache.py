"""Dropping files from the kernel's page cache."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def drop_pages(files: Iterable[Path]) -> None:
    """Drop these files from the page cache, so that the next read comes from the storage.

    Mapped pages stay in the cache, and some file systems ignore the request.
    """
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # dirty pages cannot be dropped
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
