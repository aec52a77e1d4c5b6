"""The loaders of a run, by train.py's options."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from model.weights import ModelConfig
from pipeline import open_loader
from pipeline.errors import UserError
from pipeline.loader import Loader
from pipeline.plan import sampling
from pipeline.plan.geometry import CentreCrop, Geometry, ScaleJitter, choose_geometry
from pipeline.spec import PRECISIONS, LoaderSpec
from pipeline.store.shards import Manifest
from training.options import make_sizes, parser
from training.tuned import with_tuned


def open_loaders(args: Any, accelerator: Accelerator) -> tuple[Loader, Loader | None]:
    """The training loader, and the validation loader where the data has that split."""
    if args.batch_size % (accelerator.num_processes * args.accumulate):
        raise UserError(f"--batch-size {args.batch_size} must be a multiple of processes x --accumulate")
    splits = Manifest(args.data).splits
    steps_per_epoch = splits.get("train", {"images": 0})["images"] // args.batch_size or 1  # the loader refuses too few images
    spec = LoaderSpec(
        args.data,
        batch_size=args.batch_size,
        order=args.order,
        block_shards=args.block_shards,
        image_size=make_sizes(args, steps_per_epoch),
        geometry=choose_geometry(args.geometry, args.scale, args.image_size, args.area),
        seed=args.seed,
        normalization=args.mean,
        alpha_std=args.alpha_std,
        dtype=PRECISIONS.get(accelerator.mixed_precision, torch.float32),
        corrupt=args.corrupt,
        device=str(accelerator.device),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        engine=args.engine,
        cache=args.cache,
        cache_gb=args.cache_gb,
    )
    spec = with_tuned(spec, args.threads, args.prefetch)
    if args.schedule == "plateau" and "val" not in splits:
        raise UserError(f"{args.data}: has no split val, whose error --schedule plateau needs; take another schedule")
    return open_loader(spec), open_loader(evaluation(args, spec)) if "val" in splits else None


def evaluation(args: Any, spec: LoaderSpec) -> LoaderSpec:
    """What validation loads: the central crop of --eval-size, with its mirror image under --flip-test."""
    spec = spec.evaluation()
    geometry = spec.geometry
    assert isinstance(geometry, CentreCrop)
    if args.eval_size:
        short = sampling.short_at(geometry.short, args.eval_size, spec.final_size)
        spec, geometry = replace(spec, image_size=args.eval_size), CentreCrop(short)
    return replace(spec, geometry=replace(geometry, mirrored=args.flip_test))


def model_config_of(args: Any, loader: Loader) -> ModelConfig:
    """What the weights' file says of the net: how it is tested."""
    spec = evaluation(args, loader.spec)
    geometry, size = spec.geometry, spec.final_size
    assert isinstance(geometry, CentreCrop)
    normalization = loader.normalization_at((size, size))
    return ModelConfig(args.arch, loader.classes, size, geometry.short, normalization.mean, normalization.std)


def profile_command(args: Any, precision: str) -> str:
    """The profiler's command for a run of these arguments."""
    command = ["python", "tools/profile_pipeline.py", args.data, "--arch", args.arch, "--precision", precision]
    default = parser().get_default
    for name in ("batch_size", "image_size", "geometry", "scale", "order", "engine", "threads", "prefetch", "cache", "cache_gb"):
        value = getattr(args, name)
        if value != default(name):
            command += [f"--{name.replace('_', '-')}", *(map(str, value) if name == "scale" else [str(value)])]
    return shlex.join(command)


def scale_of(geometry: Geometry) -> tuple[int, int] | None:
    return (geometry.low, geometry.high) if isinstance(geometry, ScaleJitter) else None
