"""The engines that make batches: `cpu`, `dali` and `ffcv`, under one contract (`Loader`), and `open_loader`, which chooses one.

`multiview` makes several views of each image from one decoding, for evaluation; `ffcv_field` puts region-addressable JPEGs into
FFCV files. The module of an engine is imported only when the engine is used.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

from ..errors import UserError, install_command

if TYPE_CHECKING:
    from ..loader import Loader
    from ..spec import LoaderSpec

# Name -> module with an `open(spec) -> Loader`.
ENGINES = {"dali": ".dali", "ffcv": ".ffcv", "cpu": ".cpu"}
_EXTRAS = {"dali": "gpu", "ffcv": "ffcv", "cpu": ""}
log = logging.getLogger("cropfeed")


def open_loader(spec: LoaderSpec) -> Loader:
    """The loader of `spec` with its engine; "auto" takes the fastest one for this machine and data, see `choose_engine`.

    Raises UserError for a spec that cannot be loaded, or an engine that is not installed.
    """
    name, reason = choose_engine(spec) if spec.engine == "auto" else (spec.engine, "as asked for")
    if name not in ENGINES:
        raise UserError(f"unknown engine {name!r}", f"choose from {', '.join(ENGINES)}")
    import torch

    threads = torch.get_num_threads()
    try:
        module = importlib.import_module(ENGINES[name], __name__)
    except ImportError as error:
        raise UserError(f"engine {name} cannot be imported ({error})", f"install it: {install_command(_EXTRAS[name])}") from error
    finally:
        torch.set_num_threads(threads)  # importing FFCV sets torch to one thread
    loader: Loader = module.open(spec)
    loader.engine_reason = reason
    log.info("%s, %s: engine %s, %s", spec.data, spec.split, name, reason)
    return loader


def choose_engine(spec: LoaderSpec) -> tuple[str, str]:
    """The fastest engine for `spec` on this machine, and the reason."""
    from ..store.shards import Manifest

    entry = Manifest(spec.data).splits.get(spec.split, {})
    if not entry.get("shards") and entry.get("beton"):
        return "ffcv", "the data set holds only FFCV files"
    if not spec.device.startswith("cuda"):
        return "cpu", "batches stay on the CPU, where it is the fastest"
    try:
        importlib.import_module("nvidia.dali")
    except ImportError:
        return "cpu", f"DALI, which would decode on the GPU, is not installed: {install_command('gpu')}"
    return "dali", "it decodes on the GPU"
