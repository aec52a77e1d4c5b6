"""The kernel's page cache, of files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def drop_pages(files: Iterable[Path]) -> None:
    """Make the next read of these files come from the storage, as far as its file system obeys. Pages that are mapped stay."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # pages not yet written cannot be dropped
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
