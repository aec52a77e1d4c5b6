"""train.py's command line: its options, the recipes that give them, and what of them depends on each other."""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model import ARCHS
from model.describe import describe, table
from pipeline import ENGINES
from pipeline.cli import Parser, positive
from pipeline.errors import UserError
from pipeline.plan import sampling
from pipeline.plan.geometry import GEOMETRIES
from pipeline.spec import CORRUPT, PRECISIONS
from training.compiling import MODES
from training.optimizers import OPTIMIZERS, REFERENCE_BATCH, scaled_rate
from training.schedule import MILESTONES, PATIENCE, SCHEDULES, Schedule, image_sizes
from training.trackers import check_trackers

RECIPES = Path(__file__).with_name("recipes")
DEFAULT_EPOCHS = 90
METAVARS = {int: "N", positive: "N", float: "X", Path: "FOLDER"}
RAMP = (0.3, 0.7)  # shares of the way from the first epoch to the last


class _ListNets(argparse.Action):
    def __call__(self, *_: Any) -> None:
        print(table([describe(arch) for arch in ARCHS]))
        sys.exit(0)


def parser(description: str | None = None) -> Parser:
    parse = Parser(description)
    for add in (_add_run, _add_net, _add_optimization, _add_pictures, _add_regularization, _add_feed, _add_records):
        add(parse)
    parse.usage = "train.py [--recipe NAME] --data SHARDS [options]"
    for action in parse._actions:
        action.metavar = action.metavar or METAVARS.get(action.type)
    return parse


def _add_run(parse: Parser) -> None:
    parse.add_argument("--list", action=_ListNets, nargs=0, help="list the nets with parameters and multiply-adds, and end")
    parse.add_argument(
        "--recipe", metavar="NAME", help=f"{', '.join(recipes())}, or a .toml file: options, which those given here override"
    )
    parse.add_argument(
        "--data", metavar="SHARDS", required=True, help="folder or URL (s3://...) of shards, from tools/make_shards.py"
    )
    parse.add_argument("--output", type=Path, help="folder of this run (default: runs/ARCH)")
    parse.add_argument("--resume", nargs="?", const="last", choices=("last", "auto"), help="go on from the last checkpoint in "
                       "--output; auto: from the start where there is none")  # fmt: skip
    parse.add_argument("--seed", type=int, default=0)


def _add_net(parse: Parser) -> None:
    net = parse.add_argument_group("net")
    net.add_argument("--arch", "--model", default="resnet50", metavar="NET", help="one of --list (resnet50)")
    net.add_argument("--blurpool", action="store_true", help="blur before strides, as the nets named _blur do")
    net.add_argument("--weights", metavar="FILE", help="weights to start from: a run, a file, a timm folder or hf://user/repo; a "
                     "classifier for other classes starts anew")  # fmt: skip
    net.add_argument("--amp", "--mixed-precision", nargs="?", const="bf16", choices=PRECISIONS, help="autocast (bf16); default: "
                     "what accelerate was told")  # fmt: skip
    net.add_argument("--compile", nargs="?", const="default", choices=MODES, help="torch.compile; reduce-overhead: with CUDA "
                     "graphs (default)")  # fmt: skip


def _add_optimization(parse: Parser) -> None:
    group = parse.add_argument_group("optimization (the defaults: He et al. 2015, section 3.4)")
    group.add_argument("--epochs", type=positive, help=f"length of the run ({DEFAULT_EPOCHS})")
    group.add_argument("--iterations", type=positive, help="length of the run in steps, instead of --epochs")
    group.add_argument("-b", "--batch-size", type=positive, default=256, help="global, over all processes (256)")
    group.add_argument("--accumulate", type=positive, default=1, help="parts that each batch is computed in, for less memory")
    group.add_argument("--optimizer", default="sgd", choices=OPTIMIZERS, help="lars: for batches of many thousands (sgd)")
    group.add_argument("--lr", type=float, default=0.1, help="for the global batch (0.1)")
    group.add_argument("--scale-lr", action="store_true", help=f"--lr is for a batch of {REFERENCE_BATCH}; take it in proportion")
    group.add_argument("--schedule", default="step", choices=SCHEDULES, help="step: divide by 10 at --milestones; plateau: when "
                       "the validation error stops falling; cosine, linear: to 0 (step)")  # fmt: skip
    group.add_argument("--milestones", type=float, nargs="+", metavar="T", help="epochs (or, with --iterations, steps) where "
                       "step divides; below 1: shares of the run (a third and two thirds)")  # fmt: skip
    group.add_argument("--patience", type=positive, default=PATIENCE, help="validations in a row without a lower error that "
                       f"plateau bears; at one more it divides ({PATIENCE})")  # fmt: skip
    group.add_argument("--warmup", type=float, default=0.0, help="epochs (or steps) of warm-up, linear from 0")
    group.add_argument("--warmup-lr", type=float, help="a constant rate in warm-up instead")
    group.add_argument("--momentum", type=float, default=0.9)
    group.add_argument("--weight-decay", type=float, default=1e-4)
    group.add_argument("--no-norm-decay", action="store_true", help="no weight decay of BN and biases")


def _add_pictures(parse: Parser) -> None:
    pictures = parse.add_argument_group("pictures")
    pictures.add_argument("--image-size", type=positive, default=sampling.CROP, help="side of the crop, pixels (224)")
    pictures.add_argument("--start-size", type=positive, help="progressive resizing: the side at the start")
    pictures.add_argument("--ramp", type=float, nargs=2, metavar=("FROM", "TO"), help="epochs between which it rises; below 1: "
                          f"shares of the way to the last ({RAMP[0]:g} {RAMP[1]:g})")  # fmt: skip
    pictures.add_argument("--geometry", default="jitter", choices=GEOMETRIES, help="scale jitter; random resized crops; crops of "
                          "the whole image padded by 4 pixels, as for CIFAR (jitter)")  # fmt: skip
    pictures.add_argument(
        "--scale", type=int, nargs=2, metavar=("LO", "HI"), help="of the short side, for jitter (256 480 at 224)"
    )
    pictures.add_argument("--area", type=float, nargs=2, metavar=("LO", "HI"), help="share of the image, for rrc (0.08 1)")
    pictures.add_argument("--alpha-std", type=float, default=sampling.ALPHA_STD, help="deviation of the PCA coefficients; "
                          "0 for none (0.1)")  # fmt: skip
    pictures.add_argument("--mean", default="pixel", choices=("pixel", "channel"), help="what is subtracted (pixel)")
    pictures.add_argument("--eval-size", type=positive, help="side of the crop in validation, pixels (--image-size)")
    pictures.add_argument("--flip-test", action="store_true", help="validate on the crop and its mirror image")


def _add_regularization(parse: Parser) -> None:
    group = parse.add_argument_group("regularization (none in He et al. 2015)")
    group.add_argument("--label-smoothing", type=float, default=0.0, metavar="SHARE")
    group.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA", help="mix images in pairs; with --cutmix, either")
    group.add_argument("--cutmix", type=float, default=0.0, metavar="ALPHA", help="paste a box of one image into another")
    group.add_argument("--drop-path", type=float, default=0.0, metavar="P", help="stochastic depth: the last block's chance")
    group.add_argument("--ema", type=float, metavar="DECAY", help="test and keep a moving average of the weights")


def _add_feed(parse: Parser) -> None:
    feed = parse.add_argument_group("data feed")
    feed.add_argument("--order", default="full", choices=("full", "blocks"), help="shuffle all images, or blocks of shards")
    feed.add_argument("--block-shards", type=positive, default=8, help="shards in a block; two blocks should fit the cache")
    feed.add_argument("--corrupt", default="replace", choices=CORRUPT, help="what to do at an image that cannot be decoded")
    feed.add_argument("--engine", default="auto", help=", ".join(("auto", *ENGINES)))
    feed.add_argument("-j", "--threads", "--workers", type=positive, help="decoding threads per process (default: as tuned; its "
                      "share of the cores)")  # fmt: skip
    feed.add_argument("--prefetch", type=positive, help="batches made ahead (default: as tuned by profile_pipeline.py --tune; 2)")
    feed.add_argument("--cache", type=Path, help="folder for copies of remote shards (CROPFEED_CACHE; ~/.cache/cropfeed)")
    feed.add_argument("--cache-gb", type=float, help="its bound (CROPFEED_CACHE_GB; 80 %% of the free disk)")


def _add_records(parse: Parser) -> None:
    notes = parse.add_argument_group("records")
    notes.add_argument("--eval-every", type=positive, default=1, help="epochs between validations; the run's end always has one")
    notes.add_argument("--log-every", type=positive, default=20, help="steps between rows of metrics.csv")
    notes.add_argument("--checkpoint-every", type=positive, default=500, help="steps between checkpoints within an epoch")
    notes.add_argument("--trackers", nargs="+", default=["tensorboard"], metavar="NAME", help="beside metrics.csv: tensorboard, "
                       "wandb, trackio, ... as Accelerate names them; none (tensorboard)")  # fmt: skip


def parse_arguments(description: str | None, given: Sequence[str]) -> argparse.Namespace:
    """Options from the command line, and from the recipe that it names: those given override the recipe's."""
    parse = parser(description)
    name = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    name.add_argument("--recipe")
    recipe = name.parse_known_args(given)[0].recipe
    if recipe is None:
        return _checked(parse.parse_args(given))
    options = read_recipe(recipe, parse)
    if {"--epochs", "--iterations"} & {word.split("=")[0] for word in given}:
        options = {key: value for key, value in options.items() if key not in ("epochs", "iterations")}
    words = [word for key, value in options.items() for word in _as_words(key, value)]
    return _checked(parse.parse_args([*words, *given]))


def recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read_recipe(name: str, parse: argparse.ArgumentParser) -> dict[str, Any]:
    """Options by their names without dashes before them. name: one of ours, or a .toml file. Raises UserError."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        raise UserError(f"no recipe {name!r}; choose from {', '.join(recipes())}, or give a .toml file")
    try:
        options = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({error})") from error
    known = {option.removeprefix("--") for action in parse._actions for option in action.option_strings}
    for key in options:
        if key not in known - {"help", "list", "recipe", "resume", "output"}:
            raise UserError(f"{path}: {key} is no option that a recipe may give; see train.py --help")
    return options


def _as_words(key: str, value: Any) -> list[str]:
    """A recipe's option as the command line has it."""
    if isinstance(value, bool):
        return [f"--{key}"] if value else []
    return [f"--{key}", *(str(part) for part in (value if isinstance(value, list) else [value]))]


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    """The same, where they go together; UserError where not."""
    if args.arch not in ARCHS:
        raise UserError(f"unknown --arch {args.arch!r}; choose from {', '.join(ARCHS)}")
    if args.epochs and args.iterations:
        raise UserError("--epochs and --iterations are two ways to give the run's length; leave one out")
    if args.epochs is None and args.iterations is None:
        args.epochs = DEFAULT_EPOCHS
    length = args.iterations or args.epochs
    unit = "iterations" if args.iterations else "epochs"
    if args.lr <= 0 or args.weight_decay < 0 or not 0 <= args.momentum < 1 or args.alpha_std < 0:
        raise UserError("--lr must be positive, --weight-decay and --alpha-std not negative, --momentum in [0, 1)")
    if args.blurpool:
        args.arch = args.arch.removesuffix("_blur") + "_blur"
        if args.arch not in ARCHS:
            raise UserError(
                f"--blurpool: there is no {args.arch}; choose from {', '.join(n for n in ARCHS if n.endswith('_blur'))}"
            )
    if not (0 <= args.label_smoothing < 1 and 0 <= args.drop_path < 1 and 0 <= (args.ema or 0) < 1):
        raise UserError("--label-smoothing, --drop-path and --ema must lie in [0, 1)")
    if args.drop_path and args.arch.startswith("plain"):
        raise UserError(f"--drop-path: {args.arch} has no residual branches to drop; leave it out")
    if args.mixup < 0 or args.cutmix < 0:
        raise UserError("--mixup and --cutmix must not be negative")
    if args.ramp and not args.start_size:
        raise UserError("--ramp belongs to --start-size; give that, or leave it out")
    check_trackers(args.trackers)
    if not 0 <= args.warmup < length or (args.warmup_lr is not None and args.warmup_lr <= 0):
        raise UserError(f"--warmup {args.warmup:g} must be shorter than the run's {length} {unit}, and --warmup-lr positive")
    for milestone in args.milestones or ():
        if not 0 < milestone < length:
            raise UserError(f"--milestones: {milestone:g} lies outside the run's {length} {unit}")
    return args


def make_schedule(args: argparse.Namespace, steps_per_epoch: int) -> Schedule:
    """The run's schedule, in steps."""
    base = scaled_rate(args.lr, args.batch_size) if args.scale_lr else args.lr
    unit = 1 if args.iterations else steps_per_epoch
    steps = args.iterations or args.epochs * steps_per_epoch
    milestones = tuple(at * (steps if at < 1 else unit) for at in args.milestones or MILESTONES)
    return Schedule(args.schedule, base, steps, milestones, args.warmup * unit, args.warmup_lr, args.patience)


def make_sizes(args: argparse.Namespace, steps_per_epoch: int) -> int | tuple[tuple[int, int], ...]:
    """The run's image size, or its steps by epoch. Raises UserError where the ramp does not end within the run."""
    if args.start_size is None:
        return int(args.image_size)
    epochs = -(-args.iterations // steps_per_epoch) if args.iterations else args.epochs
    ramp = [at * (epochs - 1) if at < 1 else at for at in args.ramp or RAMP]
    try:
        return image_sizes(args.start_size, args.image_size, (ramp[0], ramp[1]), epochs)
    except ValueError as error:
        raise UserError(f"--ramp, --start-size: {error}; the last epoch must have --image-size {args.image_size}") from error
