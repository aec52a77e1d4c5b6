"""Shared by evaluate.py and report.py: the options of an evaluation, their flags, and the batches."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from model import ARCHS
from model.schemes import SCHEMES
from pipeline import open_loader
from pipeline.cli import Parser, add_cache_flags, positive
from pipeline.engines.multiview import MultiViewBatch, MultiViewLoader, ViewSpec
from pipeline.errors import UserError
from pipeline.spec import PRECISIONS, LoaderSpec
from training.launch import cores_per_process

MAX_CONFUSION = 10_000  # most classes of a confusion matrix, which takes 8 * classes^2 bytes


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """How models are evaluated. Raises UserError for a value out of range.

    - data: folder or URL of shards. None: each run's own data (report.py), or saved predictions only (evaluate.py).
    - split: name of a split.
    - schemes: in `model.schemes`. Empty: the central crop, or those of saved predictions.
    - scales: short sides for multi-scale, pixels. Empty: the paper's.
    - shares: the weight of each member of an ensemble, in their order. Empty: equal weights.
    - arch: architecture, for weights that do not name it.
    - precision: "no" (float32), "fp16" or "bf16".
    - batch_size, device, engine, threads, cache, cache_gb: as in `LoaderSpec`.
    """

    data: str | None = None
    split: str = "val"
    schemes: tuple[str, ...] = ()
    scales: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    arch: str | None = None
    batch_size: int = 256
    precision: str = "no"
    device: str = field(default_factory=_default_device)
    engine: str = "auto"
    threads: int = field(default_factory=cores_per_process)
    cache: Path | None = None
    cache_gb: float | None = None

    def __post_init__(self) -> None:
        for name, values in (("batch_size", [self.batch_size]), ("threads", [self.threads]), ("scales", self.scales)):
            if min(values, default=1) < 1:
                raise UserError(f"`{name}` must be at least 1, not {min(values)}")
        for scheme in self.schemes:
            if scheme not in SCHEMES:
                raise UserError(f"unknown scheme {scheme!r} in `schemes`", f"choose from {', '.join(SCHEMES)}")
        if self.precision not in PRECISIONS:
            raise UserError(f"`precision` is {', '.join(PRECISIONS)}, not {self.precision!r}")
        if self.arch is not None and self.arch not in ARCHS:
            raise UserError(f"unknown `arch` {self.arch!r}", f"choose from {', '.join(ARCHS)}")
        if not all(share > 0 and math.isfinite(share) for share in self.shares):
            raise UserError("`shares` must be above 0", "leave out members that should have no weight")

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]


def add_loading_flags(parser: Parser) -> None:
    """Add the flags for what to load and how. The defaults of these and of all other fields come from EvaluateOptions."""
    parser.set_defaults(**vars(EvaluateOptions()))
    parser.add_argument("--split", help="split to evaluate on (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="crops per forward pass (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="precision of the forward pass; no is float32 (default: %(default)s)"
    )
    parser.add_argument("--device", help="device that runs the model: cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--engine", help="engine that loads the images; several schemes, scales or image sizes need cpu "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--threads", type=positive, metavar="N", help="decoding threads (default: one per core, here "
                        "%(default)s)")  # fmt: skip
    add_cache_flags(parser)


def options_from(args: argparse.Namespace) -> EvaluateOptions:
    """The options in parsed arguments."""
    options: dict[str, Any] = {each.name: getattr(args, each.name) for each in fields(EvaluateOptions)}
    for name in ("schemes", "scales", "shares"):
        options[name] = tuple(options[name])
    return EvaluateOptions(**options)


def open_batches(options: EvaluateOptions, view_specs: Sequence[ViewSpec]) -> tuple[Iterable[MultiViewBatch], int]:
    """Batches of uint8 views, and their number. One view per image can come from any engine, several only from the CPU engine."""
    assert options.data is not None
    spec = LoaderSpec(
        options.data,
        batch_size=options.batch_size,
        normalization="channel",  # unused: each model has its own
        dtype=torch.uint8,
        device=options.device,
        engine=options.engine,
        threads=options.threads,
        cache=options.cache,
        cache_gb=options.cache_gb,
    ).evaluation(options.split)
    if len(view_specs) > 1:
        multi = MultiViewLoader(spec, view_specs)
        return multi, len(multi)
    view = view_specs[0]
    loader = open_loader(replace(spec, geometry=view.geometry, image_size=view.size))
    return (MultiViewBatch({view: batch.images.permute(0, 2, 3, 1)}, batch.labels, batch.ids) for batch in loader), len(loader)
