"""`UserError`, for mistakes that the user can correct, and the pip command that installs what is missing."""

from __future__ import annotations

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
        return UserError, (self.problem, self.remedy)


def install_command(extra: str = "") -> str:
    """The pip command that installs Cropfeed with an optional extra. In a checkout, it installs the checkout."""
    extra = f"[{extra}]" if extra else ""
    return f"pip install {PIP_CONSTRAINT}-e '.{extra}'" if PIP_CONSTRAINT else f"pip install 'cropfeed{extra}'"
