"""User errors: what a user can cause and correct. And the command that installs what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Before requirements of pip: in a checkout, the versions that Cropfeed is tested with.
PIP_CONSTRAINT = "--constraint constraints.txt " if (Path(__file__).resolve().parents[1] / "constraints.txt").exists() else ""


class UserError(Exception):
    """Something the user gave is wrong; one line without a traceback should say what, where, and what would help.

    problem: names the file or the value. remedy: what to do, or nothing. Both name fields of a spec or of options in backticks
    (`cache_gb`); a command line shows these as its own flags.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem, self.remedy = problem, remedy

    def __reduce__(self) -> Any:  # errors of worker processes are pickled
        return UserError, (self.problem, self.remedy)


def install_command(extra: str = "") -> str:
    """The pip command that installs Cropfeed with an extra; in a checkout, the checkout."""
    extra = f"[{extra}]" if extra else ""
    return f"pip install {PIP_CONSTRAINT}-e '.{extra}'" if PIP_CONSTRAINT else f"pip install 'cropfeed{extra}'"
