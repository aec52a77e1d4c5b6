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
from pipeline import ENGINES, plan
from pipeline.errors import Parser, UserError, positive
from pipeline.geometry import GEOMETRIES
from pipeline.spec import CORRUPT, PRECISIONS
from training.schedule import MILESTONES, PATIENCE, SCHEDULES, Schedule

RECIPES = Path(__file__).with_name("recipes")
DEFAULT_EPOCHS = 90


class _ListNets(argparse.Action):
    def __call__(self, *_: Any) -> None:
        print(table([describe(arch) for arch in ARCHS]))
        sys.exit(0)


def parser(description: str | None = None) -> Parser:
    parse = Parser(description)
    parse.add_argument("--list", action=_ListNets, nargs=0, help="list the nets with parameters and multiply-adds, and end")
    parse.add_argument("--recipe", help=f"{', '.join(recipes())}, or a .toml file: options, which those given here override")
    parse.add_argument("--data", required=True, help="folder or URL (s3://...) of shards, from tools/make_shards.py")
    parse.add_argument("--cache", type=Path, help="folder for copies of remote shards (CROPFEED_CACHE; ~/.cache/cropfeed)")
    parse.add_argument("--cache-gb", type=float, help="its bound (CROPFEED_CACHE_GB; 80 %% of the free disk)")
    parse.add_argument("--output", type=Path, help="folder of this run (default: runs/ARCH)")
    parse.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")

    net = parse.add_argument_group("net")
    net.add_argument("--arch", default="resnet50", metavar="NET", help="one of --list (resnet50)")
    net.add_argument("--weights", metavar="FILE", help="weights to start from: a run, a file, a timm folder or hf://user/repo; a "
                     "classifier for other classes starts anew")  # fmt: skip
    net.add_argument("--compile", action="store_true", help="torch.compile the model")
    net.add_argument("--mixed-precision", choices=PRECISIONS, help="default: what accelerate was told")

    length = parse.add_argument_group("optimization (the defaults: He et al. 2015, section 3.4)")
    length.add_argument("--epochs", type=positive, help=f"length of the run ({DEFAULT_EPOCHS})")
    length.add_argument("--iterations", type=positive, help="length of the run in steps, instead of --epochs")
    length.add_argument("--batch-size", type=positive, default=256, help="global, over all processes (256)")
    length.add_argument("--accumulate", type=positive, default=1, help="parts that each batch is computed in, for less memory")
    length.add_argument("--lr", type=float, default=0.1, help="for the global batch (0.1)")
    length.add_argument("--schedule", default="step", choices=SCHEDULES, help="step: divide by 10 at --milestones; plateau: when "
                        "the validation error stops falling; cosine: to 0 (step)")  # fmt: skip
    length.add_argument("--milestones", type=float, nargs="+", metavar="T", help="epochs (or, with --iterations, steps) where "
                        "step divides; below 1: shares of the run (a third and two thirds)")  # fmt: skip
    length.add_argument("--patience", type=positive, default=PATIENCE, help="validations in a row without a lower error that "
                        f"plateau bears; at one more it divides ({PATIENCE})")  # fmt: skip
    length.add_argument("--warmup", type=float, default=0.0, help="epochs (or steps) of warm-up, linear from 0")
    length.add_argument("--warmup-lr", type=float, help="a constant rate in warm-up instead")
    length.add_argument("--momentum", type=float, default=0.9)
    length.add_argument("--weight-decay", type=float, default=1e-4)
    length.add_argument("--seed", type=int, default=0)

    pictures = parse.add_argument_group("pictures")
    pictures.add_argument("--image-size", type=positive, default=plan.CROP, help="side of the crop, pixels (224)")
    pictures.add_argument("--geometry", default="jitter", choices=GEOMETRIES, help="scale jitter; random resized crops; crops of "
                          "the whole image padded by 4 pixels, as for CIFAR (jitter)")  # fmt: skip
    pictures.add_argument(
        "--scale", type=int, nargs=2, metavar=("LO", "HI"), help="of the short side, for jitter (256 480 at 224)"
    )
    pictures.add_argument("--alpha-std", type=float, default=plan.ALPHA_STD, help="deviation of the PCA colour's coefficients; 0 "
                          "for none (0.1)")  # fmt: skip
    pictures.add_argument("--mean", default="pixel", choices=("pixel", "channel"), help="what is subtracted (pixel)")

    feed = parse.add_argument_group("data feed")
    feed.add_argument("--order", default="full", choices=("full", "blocks"), help="shuffle all images, or blocks of shards")
    feed.add_argument("--block-shards", type=positive, default=8, help="shards in a block; two blocks should fit the cache")
    feed.add_argument("--corrupt", default="replace", choices=CORRUPT, help="what to do at an image that cannot be decoded")
    feed.add_argument("--engine", default="auto", help=", ".join(("auto", *ENGINES)))
    feed.add_argument("--threads", type=positive, help="decoding threads per process (default: as tuned; its share of the cores)")
    feed.add_argument("--prefetch", type=positive, help="batches made ahead (default: as tuned by profile_pipeline.py --tune; 2)")

    notes = parse.add_argument_group("records")
    notes.add_argument("--eval-every", type=positive, default=1, help="epochs between validations; the run's end always has one")
    notes.add_argument("--log-every", type=positive, default=20, help="steps between rows of metrics.csv")
    notes.add_argument("--checkpoint-every", type=positive, default=500, help="steps between checkpoints within an epoch")
    return parse


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
    if not 0 <= args.warmup < length or (args.warmup_lr is not None and args.warmup_lr <= 0):
        raise UserError(f"--warmup {args.warmup:g} must be shorter than the run's {length} {unit}, and --warmup-lr positive")
    for milestone in args.milestones or ():
        if not 0 < milestone < length:
            raise UserError(f"--milestones: {milestone:g} lies outside the run's {length} {unit}")
    return args


def make_schedule(args: argparse.Namespace, steps_per_epoch: int) -> Schedule:
    """The run's schedule, in steps."""
    unit = 1 if args.iterations else steps_per_epoch
    steps = args.iterations or args.epochs * steps_per_epoch
    milestones = tuple(at * (steps if at < 1 else unit) for at in args.milestones or MILESTONES)
    return Schedule(args.schedule, args.lr, steps, milestones, args.warmup * unit, args.warmup_lr, args.patience)
