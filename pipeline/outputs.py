"""Output of a program that outlives a full disk. Needs no packages, like `cropfeed doctor`."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any


class _Output(io.FileIO):
    """stdout or stderr. What cannot be written, as the disk is full, is dropped: hours of work must not end for that.

    lost: the first error. is_log: go on if nobody reads it any more, too.
    """

    lost: OSError | None = None
    is_log = False

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.lost = self.lost or error
            if isinstance(error, BrokenPipeError) and not self.is_log:
                raise
            return len(content)


class Outputs:
    """sys.stdout and sys.stderr of a program, as `_Output`; unless something else has replaced them."""

    def __init__(self, is_log: bool) -> None:
        self._raw: dict[str, _Output] = {}
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:  # closed by `>&-`; this also keeps files that are opened later from its number
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
                continue
            if stream is not getattr(sys, f"__{name}__"):
                continue
            stream.flush()
            raw = self._raw[name] = _Output(stream.fileno(), "w", closefd=False)
            raw.is_log = is_log
            lines = stream.line_buffering
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=lines))

    def lost(self) -> OSError | None:
        """Write what is buffered. Returns the error if a part of stdout is lost."""
        with suppress(BrokenPipeError):
            sys.stdout.flush()
        raw = self._raw.get("stdout")
        return raw.lost if raw else None

    def discard(self) -> None:
        """Drop what is buffered, and what comes from now on."""
        null = os.open(os.devnull, os.O_WRONLY)
        for raw in self._raw.values():
            os.dup2(null, raw.fileno())
