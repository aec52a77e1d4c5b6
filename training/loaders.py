"""The training and the validation loader of a run, made from its options."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from model.make import PREFIX, timm_cfg
from model.preprocessing import crop_share, preset
from model.weights import ModelConfig
from pipeline import open_loader
from pipeline.errors import UserError
from pipeline.loader import Loader
from pipeline.pixels.normalize import Normalization
from pipeline.plan import sampling
from pipeline.plan.geometry import CentreCrop, Geometry, ScaleJitter, TorchvisionCrop, choose_geometry
from pipeline.spec import PRECISIONS, LoaderSpec
from pipeline.store.shards import Manifest
from training.options import TrainOptions, default_size, make_sizes
from training.tuned import with_tuned

# The options that affect throughput; tools/profile_pipeline.py has them, too.
PROFILED = ("batch_size", "image_size", "geometry", "scale", "interpolation", "order", "engine", "threads", "prefetch",
            "cache", "cache_gb", "read_timeout")  # fmt: skip


def open_loaders(options: TrainOptions, accelerator: Accelerator) -> tuple[Loader, Loader | None]:
    """The training loader, and the validation loader if the data has that split."""
    if options.batch_size % (accelerator.num_processes * options.accumulate):
        raise UserError(f"`batch_size` {options.batch_size} must be a multiple of processes x `accumulate`")
    own = preprocessing_of(options.arch)
    splits = Manifest(options.data).splits
    steps_per_epoch = splits.get("train", {"images": 0})["images"] // options.batch_size or 1  # the loader refuses too few images
    spec = LoaderSpec(
        options.data,
        batch_size=options.batch_size,
        order=options.order,
        block_shards=options.block_shards,
        image_size=make_sizes(options, steps_per_epoch),
        geometry=choose_geometry(options.geometry, options.scale, options.image_size, options.area),
        seed=options.seed,
        normalization=options.mean,
        interpolation=options.interpolation or own["interpolation"],
        alpha_std=options.alpha_std,
        dtype=PRECISIONS.get(accelerator.mixed_precision, torch.float32),
        corrupt=options.corrupt,
        verify=options.verify,
        device=str(accelerator.device),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        engine=options.engine,
        cache=options.cache,
        cache_gb=options.cache_gb,
        read_timeout=options.read_timeout,
    )
    if options.mean == "model":
        spec = replace(spec, normalization=Normalization.of(own["mean"], own["std"]))
    spec = with_tuned(spec, options.threads, options.prefetch)
    if options.schedule == "plateau" and "val" not in splits:
        raise UserError(f"{options.data}: has no split val, but `schedule` plateau needs validation", "choose another schedule")
    return open_loader(spec), open_loader(eval_spec(options, spec)) if "val" in splits else None


def eval_spec(options: TrainOptions, spec: LoaderSpec) -> LoaderSpec:
    """The spec of the validation loader: the central crop of `eval_size`, and its mirror image if `flip_test` is set. For a model
    of timm, the crop is the share of the image that timm's is."""
    spec = spec.evaluation()
    geometry = spec.geometry
    assert isinstance(geometry, CentreCrop)
    if options.arch.startswith(PREFIX):
        own, size = preprocessing_of(options.arch), options.eval_size or spec.final_size
        short = math.floor(size / crop_share(timm_cfg(options.arch)))
        spec, geometry = replace(spec, image_size=size), TorchvisionCrop(short, square=own["resizing"] == "square")
    elif options.eval_size:
        short = sampling.short_at(geometry.short, options.eval_size, spec.final_size)
        spec, geometry = replace(spec, image_size=options.eval_size), CentreCrop(short)
    return replace(spec, geometry=replace(geometry, mirrored=options.flip_test))


def model_config_of(options: TrainOptions, loader: Loader) -> ModelConfig:
    """The config in the header of this run's weight files: architecture, classes and evaluation preprocessing."""
    spec = eval_spec(options, loader.spec)
    geometry, size = spec.geometry, spec.final_size
    assert isinstance(geometry, CentreCrop)
    normalization = loader.normalization_at((size, size))
    names = loader.shards.manifest.class_names
    own = preprocessing_of(options.arch)
    return ModelConfig(
        options.arch, loader.classes, size, geometry.short, normalization.mean, normalization.std, names,
        resizing=own["resizing"], interpolation=loader.spec.interpolation,
    )  # fmt: skip


def preprocessing_of(arch: str) -> dict[str, Any]:
    """The preprocessing of a model's published weights, as fields of ModelConfig; the paper's are resized as in training."""
    return preset("timm", arch) if arch.startswith(PREFIX) else preset("torchvision-v1", arch) | {"resizing": "short"}


def default_interpolation(arch: str) -> Any:
    """The interpolation if none is given: bilinear or, for a model of timm, its own."""
    return preprocessing_of(arch)["interpolation"] if arch.startswith(PREFIX) else "bilinear"


def profile_command(options: TrainOptions, precision: str) -> str:
    """The command that profiles the input of a run with these options."""
    command = ["python", "tools/profile_pipeline.py", options.data, "--arch", options.arch, "--precision", precision]
    for name in PROFILED:
        value = getattr(options, name)
        if value != (default_size(options.arch) if name == "image_size" else getattr(TrainOptions, name)):
            command += [f"--{name.replace('_', '-')}", *(map(str, value) if name == "scale" else [str(value)])]
    return shlex.join(command)


def scale_of(geometry: Geometry) -> tuple[int, int] | None:
    """The range of the short side in scale jitter, pixels; None for other geometries."""
    return (geometry.low, geometry.high) if isinstance(geometry, ScaleJitter) else None
