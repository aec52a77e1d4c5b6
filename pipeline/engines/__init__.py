"""The engines that make batches: `cpu`, `dali` and `ffcv`, under one contract (`Loader`), and `open_loader`, which chooses.

`multiview` makes several views of each image from one decoding, for evaluation; `ffcv_field` puts region-addressable JPEGs into
FFCV files. An engine's module is imported only when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..loader import Loader
    from ..spec import LoaderSpec

# Name -> module with an `open(spec) -> Loader`.
ENGINES = {"dali": ".dali", "ffcv": ".ffcv", "cpu": ".cpu"}


def open_loader(spec: LoaderSpec) -> Loader:
    """The loader of `spec` by its engine; "auto" takes the best for this machine and data, see `choose_engine`.

    Raises UserError if the engine cannot be had.
    """
    name, why = choose_engine(spec) if spec.engine == "auto" else (spec.engine, "as asked for")
    if name not in ENGINES:
        raise UserError(f"unknown engine {name!r}; choose from {', '.join(ENGINES)}")
    import torch

    threads = torch.get_num_threads()
    try:
        module = importlib.import_module(ENGINES[name], __name__)
    except ImportError as error:
        raise UserError(f"engine {name} cannot be imported ({error}); install it with: pip install -e '.[{name}]'") from error
    finally:
        torch.set_num_threads(threads)  # importing FFCV leaves all of torch with one
    loader: Loader = module.open(spec)
    loader.why = why
    return loader


def choose_engine(spec: LoaderSpec) -> tuple[str, str]:
    """The engine that is fastest for `spec` on this machine, and why."""
    from ..store.shards import Manifest

    entry = Manifest(spec.data).splits.get(spec.split, {})
    if not entry.get("shards") and entry.get("beton"):
        return "ffcv", "the data set holds FFCV files only"
    if not spec.device.startswith("cuda"):
        return "cpu", "batches stay on the CPU, where it is the fastest"
    try:
        importlib.import_module("nvidia.dali")
    except ImportError:
        return "cpu", "DALI, which would decode on the GPU, is not installed: pip install -e '.[dali]'"
    return "dali", "it decodes on the GPU"
