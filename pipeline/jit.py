"""`jit`, the numba decorator of this package. Its disk cache is invalidated when the source of any compiled function changes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile

F = TypeVar("F", bound=Callable[..., Any])
Int = int | np.integer[Any]  # an integer argument of a compiled function, called from Python or from compiled code


@overload
def jit(function: F) -> F: ...
@overload
def jit(**options: Any) -> Callable[[F], F]: ...
def jit(function: Any = None, **options: Any) -> Any:
    """A decorator: numba's `njit` without the GIL, cached in numba's cache folder. options: njit's, such as `parallel=True`.

    Unlike `cache=True`, the cache is invalidated by a change in any file with compiled functions. numba only checks the
    function's own file, but compiled code includes the functions that it calls: after a change to the resampling, the cached
    decoder would still contain the old resampling.
    """
    if function is None:
        return lambda function: jit(function, **options)
    dispatcher = njit(nogil=True, **options)(function)
    dispatcher._cache = _Cache(function)  # as `cache=True` does, with another class
    return dispatcher


def is_cached(function: Any) -> bool:
    """Whether numba's cache on disk holds compiled code of a `jit` function, from the present sources."""
    return bool(function._cache._cache_file._load_index())


@contextmanager
def compiling_beside(function: Callable[[], None]) -> Iterator[None]:
    """A context to compile in. Meanwhile, `function` compiles in a second process, because numba compiles one function at a time
    in a process. Afterwards, its code is in numba's cache."""
    module, name = function.__module__, function.__name__
    paths = filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")))
    second = subprocess.Popen(
        [sys.executable, "-c", f"from {module} import {name}; {name}()"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
        second.wait()
    finally:
        second.kill()
        second.wait()


@cache
def _sources() -> str:
    """SHA-256 of all modules of this package that contain compiled functions."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(source for source in sources if b"@jit" in source)).hexdigest()


class _OfAllSources:
    """A mixin for numba's cache locators."""

    def get_source_stamp(self) -> Any:
        """The stamp of the function's file and the hash of all sources. numba ignores cached code with another stamp."""
        return super().get_source_stamp(), _sources()  # type: ignore[misc]


class _CacheImpl(CompileResultCacheImpl):
    _locator_classes = tuple(
        type(stock.__name__, (_OfAllSources, stock), {}) for stock in CompileResultCacheImpl._locator_classes
    )

    def get_filename_base(self, fullname: str, abiflags: str) -> str:
        """Names of cache files. In an editable checkout, `pipeline` and `cropfeed` have the same sources, but must not share
        cache files: cached types contain their module's name.
        """
        base: str = super().get_filename_base(f"{__name__.partition('.')[0]}.{fullname}", abiflags)
        return base


class _IndexFile(IndexDataCacheFile):
    def _load_index(self) -> Any:
        """An empty index if another version of Cropfeed wrote one with classes that no longer exist. numba would raise."""
        try:
            return super()._load_index()
        except (ImportError, AttributeError):
            return {}


class _Cache(FunctionCache):
    _impl_class = _CacheImpl

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _IndexFile(self._cache_path, self._impl.filename_base, stamp)
