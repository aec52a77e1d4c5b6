"""How functions of this package are compiled: once on a machine, and again when the source of any of them has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile

F = TypeVar("F", bound=Callable[..., Any])
Int = int | np.integer[Any]  # in signatures of compiled functions, which pass NumPy's integers on


@overload
def jit(function: F) -> F: ...
@overload
def jit(**options: Any) -> Callable[[F], F]: ...
def jit(function: Any = None, **options: Any) -> Any:
    """A decorator: numba's `njit` without the GIL, cached where numba caches. options: njit's own, such as `parallel=True`.

    Compiled code contains the code of the functions that it calls, but numba only looks at a function's own file for changes:
    after a `git pull` that changed the resampling, the decoder that calls it would keep using the old one.
    """
    if function is None:
        return lambda function: jit(function, **options)
    dispatcher = njit(nogil=True, **options)(function)
    dispatcher._cache = _Cache(function)  # all that `cache=True` does, with another class
    return dispatcher


@cache
def _sources() -> str:
    """SHA-256 of the sources of all modules here that compile functions."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(source for source in sources if b"@jit" in source)).hexdigest()


class _OfAllSources:
    """Overrides for numba's locators."""

    def get_source_stamp(self) -> Any:
        """Compiled code with another stamp is not used: that of the function's own file, and of all sources."""
        return super().get_source_stamp(), _sources()  # type: ignore[misc]


class _CacheImpl(CompileResultCacheImpl):
    _locator_classes = tuple(
        type(stock.__name__, (_OfAllSources, stock), {}) for stock in CompileResultCacheImpl._locator_classes
    )

    def get_filename_base(self, fullname: str, abiflags: str) -> str:
        """Cached types name their modules: in an editable checkout, `pipeline` and `cropfeed` must not share files."""
        base: str = super().get_filename_base(f"{__name__.partition('.')[0]}.{fullname}", abiflags)
        return base


class _IndexFile(IndexDataCacheFile):
    def _load_index(self) -> Any:
        """What another version cached may name classes that no longer exist; numba would fail to unpickle it."""
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
