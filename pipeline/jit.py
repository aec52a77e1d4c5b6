"""How functions of this package are compiled: once on a machine, and anew when the source of any of them has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """A decorator: numba's `njit` without the GIL, cached where numba caches. options: njit's own, `parallel=True` say.

    What numba compiles holds the code of the functions that it calls, but numba looks only at a function's own file for changes:
    after a `git pull` that changed the resampling, say, the decoder that calls it would go on with the old one.
    """
    if function is None:
        return lambda function: jit(function, **options)
    dispatcher = njit(nogil=True, **options)(function)
    dispatcher._cache = _Cache(function)  # which is all that `cache=True` does, but for the class
    return dispatcher


@cache
def _sources() -> str:
    """SHA-256 of the sources of all modules here that compile functions."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(source for source in sources if b"@jit" in source)).hexdigest()


class _OfAllSources:
    """What numba's locators do otherwise here."""

    def get_source_stamp(self) -> Any:
        """Compiled code with another stamp is not taken: that of the function's own file, and of all sources."""
        return super().get_source_stamp(), _sources()  # type: ignore[misc]


class _CacheImpl(CompileResultCacheImpl):
    _locator_classes = tuple(
        type(stock.__name__, (_OfAllSources, stock), {}) for stock in CompileResultCacheImpl._locator_classes
    )


class _Cache(FunctionCache):
    _impl_class = _CacheImpl
