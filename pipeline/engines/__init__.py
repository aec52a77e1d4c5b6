"""Engines: the implementations of `Loader`. `open_loader` opens one by name, or chooses the fastest one.

An engine makes the pixels of the views that the plan asks for. All engines return the same samples in the same order, with pixels
that are equal within the tolerance of the contract tests. A module is imported only when its engine is used.

- `cpu`: compiled decoding and resampling in threads. `pool` has its worker threads; `warm_up` compiles its kernels.
- `dali`: NVIDIA DALI, which decodes on a GPU, or on the CPU.
- `ffcv`: FFCV's loader, from .beton files. `ffcv_field` stores region-addressable JPEGs in such files, and decodes their crops.
- `multiview`: for evaluation, several views of each image from one decode. It is not a `Loader`.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

from ..cores import cores_per_process
from ..errors import UserError, install_command
from ..progress import announce_if_slow

if TYPE_CHECKING:
    from ..loader import Loader
    from ..spec import LoaderSpec

# Name -> module with an `open(spec) -> Loader`.
ENGINES = {"dali": ".dali", "ffcv": ".ffcv", "cpu": ".cpu"}
_EXTRAS = {"dali": "gpu", "ffcv": "ffcv", "cpu": ""}
# With so many, the CPU engine makes more images than a GPU trains a ResNet-50 with: from 1,500/s per core, of about 3,000/s.
ENOUGH_CORES = 4
log = logging.getLogger("cropfeed")


def open_loader(spec: LoaderSpec) -> Loader:
    """Open a loader with the engine that `spec` names; "auto" is the fastest one for this machine and data, see `choose_engine`.

    Raises UserError for a spec that cannot be loaded, or an engine that is not installed.
    """
    from ..store.manifest import read_once

    with read_once():
        return _open_loader(spec)


def _open_loader(spec: LoaderSpec) -> Loader:
    name, reason = choose_engine(spec) if spec.engine == "auto" else (spec.engine, "as requested")
    if name not in ENGINES:
        raise UserError(f"unknown engine {name!r}", f"choose from {', '.join(ENGINES)}")
    if spec.verify and name == "ffcv":
        raise UserError("`verify` needs shards in tars: FFCV's code reads its file without checksums", "use `engine` cpu or dali")
    if spec.fields and name == "ffcv":
        raise UserError("`fields` needs shards in tars: FFCV's file has images and labels only", "use `engine` cpu or dali")
    import torch

    threads = torch.get_num_threads()
    try:
        with announce_if_slow(f"importing the engine {name}, which takes about 10 seconds"):
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
    from ..store.manifest import Manifest

    entry = Manifest(spec.data).splits.get(spec.split, {})
    if not entry.get("shards") and entry.get("beton"):
        return "ffcv", "the data set holds only FFCV files"
    if not spec.device.startswith("cuda"):
        return "cpu", "batches stay on the CPU, where it is the fastest"
    cores = cores_per_process()
    if cores >= ENOUGH_CORES:
        return "cpu", f"this process has {cores} cores to decode with, which leaves the GPU to training"
    few = f"as this process has only {cores} core{'s' if cores > 1 else ''}"
    try:
        importlib.import_module("nvidia.dali")
    except ImportError:
        return "cpu", f"DALI, which would decode on the GPU {few}, is not installed: {install_command('gpu')}"
    return "dali", f"it decodes on the GPU, {few}"
