"""Shared by evaluate.py and report.py: the options of an evaluation, their flags, and the batches."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.make import check_arch
from model.preprocessing import PRESETS, preset
from model.schemes import SCHEMES
from model.weights import ModelConfig
from pipeline import open_loader
from pipeline.cli import Parser, add_cache_flags, add_verify_flag, positive
from pipeline.cores import cores_per_process
from pipeline.engines.multiview import MultiViewBatch, MultiViewLoader, ViewSpec
from pipeline.errors import UserError
from pipeline.plan.geometry import MAX_ASPECT, WholeImage
from pipeline.spec import INTERPOLATIONS, PRECISIONS, LoaderSpec
from pipeline.store.shards import ShardSet
from pipeline.store.waiting import TIMEOUT_S

log = logging.getLogger("cropfeed")

MAX_CONFUSION = 10_000  # most classes of a confusion matrix, which takes 8 * classes^2 bytes
MAX_BATCH = 1_000_000  # crops
MAX_SIDE = 4096  # pixels of a short side or a crop: with 64 channels, a whole image takes gigabytes in the model


PREPROCESSING = ("preset", "resize", "resize_to", "crop", "interpolation", "mean", "std")  # options


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
    - preset: preprocessing instead of the models' own: a name in PRESETS, or the config.json of a model of timm or the
      preprocessor_config.json of one of transformers. The following ones replace parts of it.
    - resize, crop: short side and side of the crop, pixels, instead of the models' own. None: their own.
    - resize_to: "short" for the short side, "square" for both sides. interpolation: as in `LoaderSpec`. None: the models' own.
    - mean, std: of each channel, for pixels in 0..1, instead of the models' own. Empty: their own.
    - precision: "no" (float32), "fp16" or "bf16".
    - batch_size, device, engine, threads, cache, cache_gb, read_timeout, verify: as in `LoaderSpec`.
    """

    data: str | None = None
    split: str = "val"
    schemes: tuple[str, ...] = ()
    scales: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    arch: str | None = None
    preset: str | None = None
    resize: int | None = None
    resize_to: str | None = None
    interpolation: str | None = None
    crop: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    batch_size: int = 256
    precision: str = "no"
    device: str = field(default_factory=_default_device)
    engine: str = "auto"
    threads: int = field(default_factory=cores_per_process)
    cache: Path | None = None
    cache_gb: float | None = None
    read_timeout: float = TIMEOUT_S
    verify: bool = False

    def __post_init__(self) -> None:
        limits = {"batch_size": MAX_BATCH, "threads": None, "scales": MAX_SIDE, "resize": MAX_SIDE, "crop": MAX_SIDE}
        for name, most in limits.items():
            given = getattr(self, name)
            for value in given if isinstance(given, tuple) else (given,):
                if value is not None and value < 1:
                    raise UserError(f"`{name}` must be at least 1, not {value}")
                if value is not None and most is not None and value > most:
                    raise UserError(f"`{name}` must be at most {most}, not {value}")
        for scheme in self.schemes:
            if scheme not in SCHEMES:
                raise UserError(f"unknown scheme {scheme!r} in `schemes`", f"choose from {', '.join(SCHEMES)}")
        if self.precision not in PRECISIONS:
            raise UserError(f"`precision` is {', '.join(PRECISIONS)}, not {self.precision!r}")
        if self.arch is not None:
            check_arch(self.arch)
        if self.preset is not None and self.preset not in PRESETS and not self.preset.endswith(".json"):
            raise UserError(f"unknown `preset` {self.preset!r}", f"choose from {', '.join(PRESETS)}, or give a .json file")
        if not all(share > 0 and math.isfinite(share) for share in self.shares):
            raise UserError("`shares` must be above 0", "leave out members that should have no weight")
        if not all(0 <= value <= 1 for value in self.mean):
            raise UserError("`mean` must lie in 0..1", "divide values for 0..255 by 255")
        if not all(0 < value <= 1 for value in self.std):
            raise UserError("`std` must be above 0 and at most 1", "divide values for 0..255 by 255")

    @property
    def changes_preprocessing(self) -> bool:
        return any(getattr(self, name) for name in PREPROCESSING)

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
    add_verify_flag(parser)


def add_preprocessing_flags(parser: Parser) -> None:
    """Add the flags that replace the models' own preprocessing."""
    group = parser.add_argument_group("preprocessing, instead of the models' own")
    group.add_argument("--preset", metavar="NAME", help="that of torchvision-v1 or torchvision-v2 weights; timm: of the model's "
                       "weights in timm; none: resized to the model's size, pixels in 0..1; or a config.json of timm or "
                       "preprocessor_config.json of transformers. The other options replace parts of it")  # fmt: skip
    group.add_argument("--resize", type=positive, metavar="N", help="short side to which images are resized, in pixels")
    group.add_argument("--resize-to", choices=("short", "square"), help="resize the short side, or both sides to a square")
    group.add_argument("--interpolation", choices=INTERPOLATIONS, help="filter of the resizing, antialiased in any case")
    group.add_argument("--crop", type=positive, metavar="N", help="side of the crop, in pixels")
    for flag, what in (("--mean", "mean"), ("--std", "standard deviation")):
        group.add_argument(flag, type=float, nargs=3, metavar=("R", "G", "B"), help=f"{what} of each channel, for pixels in 0..1")


def options_from(args: argparse.Namespace) -> EvaluateOptions:
    """The options in parsed arguments."""
    options: dict[str, Any] = {each.name: getattr(args, each.name) for each in fields(EvaluateOptions)}
    for name in ("schemes", "scales", "shares", "mean", "std"):
        options[name] = tuple(options[name])
    return EvaluateOptions(**options)


def with_preprocessing(config: ModelConfig, options: EvaluateOptions) -> ModelConfig:
    """The config with the preprocessing that the options give."""
    if options.preset:
        config = replace(config, **preset(options.preset, config.arch))
    mean, std = (np.array(values, np.float32) * 255 if values else None for values in (options.mean, options.std))
    given: dict[str, Any] = {"eval_short": options.resize, "image_size": options.crop, "mean": mean, "std": std}
    given |= {"interpolation": options.interpolation, "resizing": options.resize_to}
    if options.resize_to == "short" and config.resizing == "torchvision":
        del given["resizing"]  # the short side already, with torchvision's rounding
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        return config
    is_all = {"eval_short", "image_size", "mean", "std"} <= changes.keys()
    return replace(config, **changes, origin="the options" + ("" if is_all else f" and {config.origin}"))


def open_batches(
    options: EvaluateOptions, view_specs: Sequence[ViewSpec], interpolation: str = "bilinear"
) -> tuple[Iterable[MultiViewBatch], int]:
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
        read_timeout=options.read_timeout,
        verify=options.verify,
        interpolation=interpolation,
    ).evaluation(options.split)
    if len(view_specs) > 1:
        multi = MultiViewLoader(spec, view_specs)
        _warn_of_long_images(multi.shards, view_specs)
        return multi, len(multi)
    view = view_specs[0]
    loader = open_loader(replace(spec, geometry=view.geometry, image_size=view.size))
    _warn_of_long_images(loader.shards, view_specs)
    return (MultiViewBatch({view: batch.images.permute(0, 2, 3, 1)}, batch.labels, batch.ids) for batch in loader), len(loader)


def _warn_of_long_images(shards: ShardSet, view_specs: Sequence[ViewSpec]) -> None:
    """Name an image of which `WholeImage` takes only the central part, if there are any."""
    if not any(isinstance(view.geometry, WholeImage) for view in view_specs):
        return
    sides = np.stack([shards.samples["height"], shards.samples["width"]]).astype(np.int64)
    found = np.flatnonzero(sides.max(axis=0) > MAX_ASPECT * sides.min(axis=0))
    if len(found):
        first = int(found[0])
        height, width = sides[:, first].tolist()
        log.warning(
            "multi-scale tests only the centre of images longer than %d times their short side: %d of %d, such as %s (%d x %d)",
            MAX_ASPECT, len(found), len(shards), shards.locate(first), width, height,
        )  # fmt: skip
