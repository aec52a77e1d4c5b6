"""User errors: what a user can cause and correct."""

from __future__ import annotations

from typing import Any


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
