"""The loader that a user names, MODULE:FUNCTION, and what to say about errors in the user's code."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError

PACKAGE = __package__.partition(".")[0]
OURS = Path(__file__).resolve().parents[1]
EXAMPLE = "such as mypackage.data:make_loader"


def find(target: str) -> Callable[[], Iterable[Any]]:
    """The function of MODULE:FUNCTION, which makes a loader. It may also name an iterable. Looks in the current folder first.

    Raises UserError, for exceptions of the module as well.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise UserError(f"`loader` {target}: is not MODULE:FUNCTION", EXAMPLE)
    if module_name.endswith(".py") or "/" in module_name:
        dotted = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise UserError(f"`loader` {target}: names a file", f"name its module as in an import, such as {dotted}:{attribute}")
    sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    found: Any = _import(module_name, target)
    for name in attribute.split("."):
        if not hasattr(found, name):
            similar = difflib.get_close_matches(name, [other for other in dir(found) if not other.startswith("_")])
            raise UserError(
                f"`loader` {target}: {module_name} has no {attribute}",
                f"did you mean {' or '.join(similar)}?" if similar else "name a function that returns the loader",
            )
        found = getattr(found, name)
    return _maker(found, target)


def _import(name: str, target: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not (error.name and f"{name}.".startswith(f"{error.name}.")):
            raise explain(error, target) from error
        if name.partition(".")[0] == PACKAGE:
            raise UserError(f"`loader` {target}: {PACKAGE} is Cropfeed's own package here", "give yours another name") from error
        where = f"no module {error.name} in {os.getcwd()} or among the installed packages"
        raise UserError(f"`loader` {target}: {where}", "run this in the folder that holds it") from error
    except SystemExit as error:
        problem = f"`loader` {target}: {name} is a program, which ended when it was imported (exit code {error.code})"
        raise UserError(problem, "put the function into a module that only defines it") from error
    except Exception as error:
        raise explain(error, target) from error


def _maker(found: Any, target: str) -> Callable[[], Iterable[Any]]:
    """A function without arguments that returns the iterable."""
    if not callable(found):
        if not _is_iterable(found):
            raise UserError(f"`loader` {target}: is of type {type(found).__name__}, not a function or an iterable", EXAMPLE)
        return lambda: found
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise UserError(f"`loader` {target}: is called without arguments, but {error}", "give a function without any") from error
    except ValueError:  # compiled code has no signature
        pass

    def make() -> Iterable[Any]:
        loader = found()
        if not _is_iterable(loader):
            problem = f"`loader` {target}: returned an object of type {type(loader).__name__}, which is not iterable"
            raise UserError(problem, "return the loader")
        return loader

    return make


def _is_iterable(found: Any) -> bool:
    return hasattr(found, "__iter__") or hasattr(found, "__getitem__")


def explain(error: BaseException, target: str) -> UserError:
    """An exception of the user's code in one line: where it happened in their code, and what it says."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)  # str repeats the file
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    embedded = "Traceback (most recent call last)" in str(error)  # torch quotes the exception of a worker process
    what = lines[-1] if embedded else f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
    frames = [(frame.filename, frame.lineno, frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    frames += [(file, int(line), name) for file, line, name in re.findall(r'File "(.+?)", line (\d+), in (\S+)', str(error))]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno, "<module>"))
    module, _, attribute = target.partition(":")
    place = next((_place(*frame) for frame in reversed(frames) if _is_users(frame[0], module)), "")
    repeat = f'python -c "import {module} as m; next(iter(m.{attribute}()))"'
    return UserError(f"`loader` {target}: {place}{what}", f"for the whole traceback: {repeat}")


def _place(file: str, line: int | None, name: str) -> str:
    inside = f", in {name}" if name.isidentifier() else ""
    return f"{os.path.relpath(file) if file.startswith(os.getcwd()) else file}, line {line}{inside}: "


def _is_users(file: str, module: str) -> bool:
    """Whether a file is the user's code: neither Python's, nor an installed package's except the loader's own, nor ours."""
    path = Path(file)
    if not path.is_absolute() or path.is_relative_to(OURS):
        return False
    if {"site-packages", "dist-packages"} & set(path.parts):
        return module.partition(".")[0] in {path.stem, *path.parts}
    return not path.is_relative_to(sysconfig.get_path("stdlib"))
