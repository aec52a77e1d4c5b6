"""The options of a training run, and the schedules of learning rate and image size that they define."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from model import ARCHS
from model.make import PREFIX, check_arch, has_one_size, image_size_of
from pipeline.errors import UserError
from pipeline.plan import sampling
from pipeline.plan.geometry import GEOMETRIES
from pipeline.spec import CORRUPT, INTERPOLATIONS, PRECISIONS
from pipeline.store.waiting import TIMEOUT_S
from training.compiling import GRAPHED, MODES
from training.optimizers import OPTIMIZERS, scaled_rate
from training.schedule import MILESTONES, PATIENCE, SCHEDULES, Schedule, image_sizes
from training.trackers import check_trackers

DEFAULT_EPOCHS = 90
RAMP = (0.3, 0.7)  # fractions of the way from the first epoch to the last

CHOICES: dict[str, tuple[str, ...]] = {
    "resume": ("last", "auto"),
    "amp": tuple(PRECISIONS),
    "compile": MODES,
    "compress_gradients": ("bf16", "fp16"),
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "geometry": GEOMETRIES,
    "interpolation": INTERPOLATIONS,
    "mean": ("pixel", "channel", "model"),
    "order": ("full", "blocks"),
    "corrupt": CORRUPT,
}
MAX = 2**31 - 1  # of the options that count something
POSITIVE = (
    "epochs", "iterations", "batch_size", "accumulate", "patience", "image_size", "start_size", "eval_size", "block_shards",
    "threads", "prefetch", "eval_every", "log_every", "checkpoint_every",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of a training run. `train.py --help` describes each of them.

    The constructor completes them: either `epochs` or `iterations` is set, `arch` ends in _blur if `blurpool` is set, and
    `image_size` and `mean` are set: by default 224 and pixel or, for a model of timm, its own. It raises UserError for a value
    out of range and for options that contradict each other.
    """

    recipe: str | None = None
    data: str
    output: Path | None = None
    resume: str | None = None
    seed: int = 0

    arch: str = "resnet50"
    blurpool: bool = False
    weights: str | None = None
    amp: str | None = None
    compile: str | None = None
    compress_gradients: str | None = None

    epochs: int | None = None
    iterations: int | None = None
    batch_size: int = 256
    accumulate: int = 1
    optimizer: str = "sgd"
    lr: float = 0.1
    scale_lr: bool = False
    schedule: str = "step"
    milestones: tuple[float, ...] | None = None
    patience: int = PATIENCE
    warmup: float = 0.0
    warmup_lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    no_norm_decay: bool = False

    image_size: int = None  # type: ignore[assignment]  # completed
    start_size: int | None = None
    ramp: tuple[float, float] | None = None
    geometry: str = "jitter"
    scale: tuple[int, int] | None = None
    area: tuple[float, float] | None = None
    interpolation: str | None = None
    alpha_std: float = sampling.ALPHA_STD
    mean: str = None  # type: ignore[assignment]  # completed
    eval_size: int | None = None
    flip_test: bool = False

    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    drop_path: float = 0.0
    ema: float | None = None

    order: str = "full"
    block_shards: int = 8
    corrupt: str = "replace"
    engine: str = "auto"
    threads: int | None = None
    prefetch: int | None = None
    cache: Path | None = None
    cache_gb: float | None = None
    read_timeout: float = TIMEOUT_S
    verify: bool = False

    eval_every: int = 1
    log_every: int = 20
    checkpoint_every: int = 500
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        self._complete_arch()
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"`{name}` must be at least 1, not {value}")
            if value is not None and value > MAX:
                raise UserError(f"`{name}` must be at most {MAX}, not {value}")
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, float) and not math.isfinite(one):
                    raise UserError(f"`{name}` must be a finite number, not {one}")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise UserError(f"`{name}` must be one of {', '.join(choices)}, not {value!r}")
        if self.epochs and self.iterations:
            raise UserError("`epochs` and `iterations` both set the length of the run", "leave one out")
        if self.epochs is None and self.iterations is None:
            object.__setattr__(self, "epochs", DEFAULT_EPOCHS)
        if self.accumulate > 1 and self.compile in GRAPHED:  # the next part's pass would overwrite the outputs of this one
            remedy = "set `accumulate` 1, or `compile` default"
            raise UserError(f"`compile` {self.compile} uses CUDA graphs, which do not work with `accumulate`", remedy)
        self._check_optimization()
        self._check_regularization()
        if self.ramp and not self.start_size:
            raise UserError("`ramp` needs `start_size`", "set `start_size`, or leave `ramp` out")
        check_trackers(self.trackers)

    def _complete_arch(self) -> None:
        check_arch(self.arch)
        if self.blurpool:
            arch = self.arch.removesuffix("_blur") + "_blur"
            if arch not in ARCHS:
                blurred = ", ".join(name for name in ARCHS if name.endswith("_blur"))
                raise UserError(f"`blurpool`: there is no {arch}", f"choose from {blurred}")
            object.__setattr__(self, "arch", arch)
        is_timm = self.arch.startswith(PREFIX)
        if vars(self)["image_size"] is None:
            object.__setattr__(self, "image_size", default_size(self.arch))
        if vars(self)["mean"] is None:
            object.__setattr__(self, "mean", "model" if is_timm else "pixel")
        if self.drop_path and is_timm:  # timm draws it from torch's generator, whose state a checkpoint does not hold
            raise UserError(f"`drop_path`: {self.arch} cannot resume with the same random numbers", "leave it out")
        sizes = {self.image_size, self.start_size or self.image_size, self.eval_size or self.image_size}
        if len(sizes) > 1 and has_one_size(self.arch):
            raise UserError(f"`start_size`, `eval_size`: {self.arch} takes images of one size only", "leave them out")

    def _check_optimization(self) -> None:
        length, unit = self.iterations or self.epochs or 0, "iterations" if self.iterations else "epochs"
        if self.lr <= 0 or self.weight_decay < 0 or not 0 <= self.momentum < 1 or self.alpha_std < 0:
            raise UserError(
                "`lr` must be positive, `weight_decay` and `alpha_std` must not be negative, and `momentum` must lie in [0, 1)"
            )
        if not 0 <= self.warmup < length or (self.warmup_lr is not None and self.warmup_lr <= 0):
            raise UserError(
                f"`warmup` {self.warmup:g} must be shorter than the run's {length} {unit}, and `warmup_lr` must be positive"
            )
        for milestone in self.milestones or ():
            if not 0 < milestone < length:
                raise UserError(f"`milestones`: {milestone:g} lies outside the run's {length} {unit}")

    def _check_regularization(self) -> None:
        if not (0 <= self.label_smoothing < 1 and 0 <= self.drop_path < 1 and 0 <= (self.ema or 0) < 1):
            raise UserError("`label_smoothing`, `drop_path` and `ema` must lie in [0, 1)")
        if self.drop_path and self.arch.startswith("plain"):
            raise UserError(f"`drop_path`: {self.arch} has no residual branches to drop", "leave it out")
        if self.mixup < 0 or self.cutmix < 0:
            raise UserError("`mixup` and `cutmix` must not be negative")


def default_size(arch: str) -> int:
    """The image size if none is given, pixels: that of the paper or, for a model of timm, its own."""
    return image_size_of(arch) if arch.startswith(PREFIX) else sampling.CROP


def _total_steps(options: TrainOptions, steps_per_epoch: int) -> int:
    if options.iterations:
        return options.iterations
    assert options.epochs is not None
    return options.epochs * steps_per_epoch


def make_schedule(options: TrainOptions, steps_per_epoch: int) -> Schedule:
    """The run's learning-rate schedule, in steps."""
    base = scaled_rate(options.lr, options.batch_size) if options.scale_lr else options.lr
    unit = 1 if options.iterations else steps_per_epoch
    steps = _total_steps(options, steps_per_epoch)
    milestones = tuple(at * (steps if at < 1 else unit) for at in options.milestones or MILESTONES)
    return Schedule(options.schedule, base, steps, milestones, options.warmup * unit, options.warmup_lr, options.patience)


def make_sizes(options: TrainOptions, steps_per_epoch: int) -> int | tuple[tuple[int, int], ...]:
    """The run's image size, or the sizes of progressive resizing as `LoaderSpec.image_size` takes them. Raises UserError if the
    ramp does not end within the run.
    """
    if options.start_size is None:
        return options.image_size
    epochs = -(-_total_steps(options, steps_per_epoch) // steps_per_epoch)
    first, last = (at * (epochs - 1) if at < 1 else at for at in options.ramp or RAMP)
    try:
        return image_sizes(options.start_size, options.image_size, (first, last), epochs)
    except ValueError as error:
        remedy = f"the last epoch must have `image_size` {options.image_size}"
        raise UserError(f"`ramp`, `start_size`: {error}", remedy) from error
