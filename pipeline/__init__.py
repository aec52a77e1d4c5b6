"""Cropfeed's input pipeline: `open_loader(spec)` gives batches; see `pipeline.plan` for what makes them reproducible."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.loader import Loader, LoaderSpec

# Name -> module with an `open(spec) -> Loader`, best first. Imported only when asked for.
ENGINES = {"dali": "pipeline.engines.dali"}


def open_loader(spec: LoaderSpec) -> Loader:
    """The loader of `spec` by its engine; "auto" takes the first of `ENGINES`. Raises UserError if that cannot be had."""
    name = next(iter(ENGINES)) if spec.engine == "auto" else spec.engine
    if name not in ENGINES:
        raise UserError(f"unknown engine {name!r}; choose from {', '.join(ENGINES)}")
    try:
        module = importlib.import_module(ENGINES[name])
    except ImportError as error:
        raise UserError(f"engine {name} cannot be imported ({error}); install it with: pip install -e '.[{name}]'") from error
    loader: Loader = module.open(spec)
    return loader
