"""The command line of train.py, and the recipes that it reads."""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from model import ARCHS
from model.describe import describe, table
from pipeline import ENGINES
from pipeline.cli import Parser, add_cache_flags, add_verify_flag, positive
from pipeline.errors import UserError
from training.optimizers import REFERENCE_BATCH
from training.options import CHOICES, DEFAULT_EPOCHS, RAMP, TrainOptions

RECIPES = Path(__file__).with_name("recipes")
METAVARS = {int: "N", positive: "N", float: "X", Path: "FOLDER"}
FLAGS = {"arch": "--arch", "amp": "--amp", "threads": "--threads", "normalization": "--mean"}  # field -> flag, for messages


class _ListModels(argparse.Action):
    def __call__(self, *_: Any) -> None:
        print(table([describe(arch) for arch in ARCHS]))
        sys.exit(0)


def parser(description: str | None = None) -> Parser:
    """The parser of train.py: a flag for every field of TrainOptions, with the same default, and --list."""
    parse = Parser(description, fields=FLAGS)
    for add in (_add_run, _add_model, _add_optimization, _add_images, _add_regularization, _add_loading, _add_records):
        add(parse)
    parse.usage = "train.py [--recipe NAME] --data SHARDS [options]"
    parse.set_defaults(**{field.name: field.default for field in fields(TrainOptions) if field.default is not MISSING})
    for action in parse._actions:
        action.metavar = action.metavar or METAVARS.get(action.type)
    return parse


def _add_run(parse: Parser) -> None:
    parse.add_argument("--list", action=_ListModels, nargs=0, default=argparse.SUPPRESS, help="print all models with their "
                       "parameters and multiply-adds, and exit")  # fmt: skip
    parse.add_argument("--recipe", metavar="NAME", help=f"read options from a recipe: {', '.join(recipes())}, or the path of a "
                       ".toml file; options on the command line take precedence")  # fmt: skip
    parse.add_argument("--data", metavar="SHARDS", required=True, help="folder or URL (s3://...) of shards, made by "
                       "tools/make_shards.py; required")  # fmt: skip
    parse.add_argument("--output", type=Path, help="folder for the results of this run (default: runs/ARCH)")
    parse.add_argument("--resume", nargs="?", const="last", choices=CHOICES["resume"], help="continue from the last checkpoint "
                       "in --output; auto: start a new run if there is no checkpoint")  # fmt: skip
    parse.add_argument("--seed", type=int, help="seed of all random numbers: initial weights, order of the images, augmentation "
                       "(default: %(default)s)")  # fmt: skip


def _add_model(parse: Parser) -> None:
    model = parse.add_argument_group("model")
    model.add_argument("--arch", "--model", metavar="ARCH", help="model to train: one that --list prints, or timm/NAME for "
                       "one of timm (default: %(default)s)")  # fmt: skip
    model.add_argument("--blurpool", action="store_true", help="train the _blur variant of the model, which blurs the input of "
                       "strided convolutions")  # fmt: skip
    model.add_argument("--weights", metavar="FILE", help="start from these weights: a run's folder, a weight file, a folder in "
                       "timm's format or hf://user/repo; if its classes differ from the data's, the classifier is initialized "
                       "anew (default: random weights)")  # fmt: skip
    model.add_argument("--amp", "--mixed-precision", nargs="?", const="bf16", choices=CHOICES["amp"], help="train in mixed "
                       "precision; no is float32 (default: as configured in accelerate; without a value: bf16)")  # fmt: skip
    model.add_argument("--compile", nargs="?", const="default", choices=CHOICES["compile"], help="compile the model with "
                       "torch.compile in this mode; reduce-overhead uses CUDA graphs (default: eager mode)")  # fmt: skip
    model.add_argument("--compress-gradients", nargs="?", const="bf16", choices=CHOICES["compress_gradients"], help="round "
                       "gradients to this precision when several processes exchange them (default: float32)")  # fmt: skip


def _add_optimization(parse: Parser) -> None:
    group = parse.add_argument_group("optimization (the defaults are those of He et al. 2015, section 3.4)")
    group.add_argument("--epochs", type=positive, help=f"length of the run in epochs (default: {DEFAULT_EPOCHS})")
    group.add_argument("--iterations", type=positive, help="length of the run in steps, instead of --epochs")
    group.add_argument("-b", "--batch-size", type=positive, help="global batch size: images per step, summed over all processes "
                       "(default: %(default)s)")  # fmt: skip
    group.add_argument("--accumulate", type=positive, help="split each batch into this many parts and accumulate their "
                       "gradients, to save memory (default: %(default)s)")  # fmt: skip
    group.add_argument("--optimizer", choices=CHOICES["optimizer"], help="sgd, or lars for batches of many thousands of images "
                       "(default: %(default)s)")  # fmt: skip
    group.add_argument("--lr", type=float, help="learning rate for the global batch (default: %(default)s)")
    group.add_argument("--scale-lr", action="store_true", help=f"linear scaling rule: multiply --lr by --batch-size / "
                       f"{REFERENCE_BATCH}")  # fmt: skip
    group.add_argument("--schedule", choices=CHOICES["schedule"], help="learning-rate schedule: step divides the rate by 10 at "
                       "--milestones; plateau divides it by 10 when the validation error stops falling; cosine and linear decay "
                       "to 0 (default: %(default)s)")  # fmt: skip
    group.add_argument("--milestones", type=float, nargs="+", metavar="T", help="when --schedule step divides the rate, in "
                       "epochs (with --iterations: in steps); below 1: as fractions of the run (default: 1/3 2/3)")  # fmt: skip
    group.add_argument("--patience", type=positive, help="validations without improvement that --schedule plateau tolerates "
                       "before it divides the rate (default: %(default)s)")  # fmt: skip
    group.add_argument("--warmup", type=float, help="length of a linear warm-up from rate 0, in epochs (with --iterations: in "
                       "steps) (default: %(default)g)")  # fmt: skip
    group.add_argument("--warmup-lr", type=float, help="constant learning rate during the warm-up, instead of the linear rise")
    group.add_argument("--momentum", type=float, help="momentum of the optimizer (default: %(default)s)")
    group.add_argument("--weight-decay", type=float, help="weight decay (L2 penalty) (default: %(default)s)")
    group.add_argument("--no-norm-decay", action="store_true", help="exclude batch-norm parameters and biases from weight decay")


def _add_images(parse: Parser) -> None:
    images = parse.add_argument_group("images")
    images.add_argument("--image-size", type=positive, help="side of the training crop, in pixels (default: 224; for "
                        "timm/NAME, the model's own)")  # fmt: skip
    images.add_argument("--start-size", type=positive, help="progressive resizing: side of the crop in the first epochs, in "
                        "pixels (default: --image-size)")  # fmt: skip
    images.add_argument("--ramp", type=float, nargs=2, metavar=("FROM", "TO"), help="epochs between which the crop grows to "
                        f"--image-size; below 1: as fractions of the run (default: {RAMP[0]:g} {RAMP[1]:g})")  # fmt: skip
    images.add_argument("--geometry", choices=CHOICES["geometry"], help="training crops: jitter resizes the short side to a "
                        "random length and crops (scale jitter); rrc is the random resized crop; pad crops from the image "
                        "padded by 4 pixels, as for CIFAR (default: %(default)s)")  # fmt: skip
    images.add_argument("--scale", type=int, nargs=2, metavar=("LO", "HI"), help="jitter: range of the short side, in pixels "
                        "(default: in proportion to 256 480 for crops of 224)")  # fmt: skip
    images.add_argument("--area", type=float, nargs=2, metavar=("LO", "HI"), help="rrc: range of the crop's area, as fractions "
                        "of the image's area (default: 0.08 1)")  # fmt: skip
    images.add_argument("--interpolation", choices=CHOICES["interpolation"], help="filter of the resizing, antialiased (default: "
                        "bilinear; for timm/NAME, the model's own)")  # fmt: skip
    images.add_argument("--alpha-std", type=float, help="PCA lighting (color augmentation): standard deviation of its "
                        "coefficients; 0 turns it off (default: %(default)s)")  # fmt: skip
    images.add_argument("--mean", choices=CHOICES["mean"], help="subtract the data's mean image or color, or normalize as for "
                        "the model's published weights (default: pixel; for timm/NAME: model)")  # fmt: skip
    images.add_argument("--eval-size", type=positive, help="side of the validation crop, in pixels (default: --image-size)")
    images.add_argument("--flip-test", action="store_true", help="in validation, average the predictions for the crop and its "
                        "mirror image")  # fmt: skip


def _add_regularization(parse: Parser) -> None:
    group = parse.add_argument_group("regularization (all off by default, as in He et al. 2015)")
    group.add_argument("--label-smoothing", type=float, metavar="SHARE", help="fraction of each target that is spread evenly "
                       "over all classes, for example 0.1")  # fmt: skip
    group.add_argument("--mixup", type=float, metavar="ALPHA", help="blend pairs of images, with weights drawn from Beta(ALPHA, "
                       "ALPHA)")  # fmt: skip
    group.add_argument("--cutmix", type=float, metavar="ALPHA", help="paste a box of one image into another, with an area drawn "
                       "from Beta(ALPHA, ALPHA); with --mixup, each pair gets one of the two at random")  # fmt: skip
    group.add_argument("--drop-path", type=float, metavar="P", help="stochastic depth: the probability of skipping the last "
                       "block; it is linearly lower for earlier blocks")  # fmt: skip
    group.add_argument("--ema", type=float, metavar="DECAY", help="validate and save an exponential moving average of the "
                       "weights with this decay, for example 0.9999")  # fmt: skip


def _add_loading(parse: Parser) -> None:
    loading = parse.add_argument_group("data loading")
    loading.add_argument("--order", choices=CHOICES["order"], help="shuffle over all images (full), or within blocks of "
                         "shards, for remote data (default: %(default)s)")  # fmt: skip
    loading.add_argument("--block-shards", type=positive, help="shards per block of --order blocks; the cache should have room "
                         "for two blocks (default: %(default)s)")  # fmt: skip
    loading.add_argument("--corrupt", choices=CHOICES["corrupt"], help="replace an image that cannot be decoded by another one, "
                         "or stop (default: %(default)s)")  # fmt: skip
    loading.add_argument("--engine", help=f"what decodes and augments: {', '.join(ENGINES)}, or auto for the fastest one on this "
                         "machine (default: %(default)s)")  # fmt: skip
    loading.add_argument("-j", "--threads", "--workers", type=positive, help="decoding threads per process (default: "
                         "profile_pipeline.py --tune's, otherwise its share of the cores)")  # fmt: skip
    loading.add_argument("--prefetch", type=positive, help="batches to prefetch (default: as found by profile_pipeline.py "
                         "--tune, otherwise 2)")  # fmt: skip
    add_cache_flags(loading)
    add_verify_flag(loading)


def _add_records(parse: Parser) -> None:
    records = parse.add_argument_group("validation, checkpoints and logging")
    records.add_argument("--eval-every", type=positive, help="epochs between validations; the run always ends with one "
                         "(default: %(default)s)")  # fmt: skip
    records.add_argument("--log-every", type=positive, help="steps between rows of metrics.csv (default: %(default)s)")
    records.add_argument("--checkpoint-every", type=positive, help="steps between checkpoints within an epoch; there is always "
                         "one at its end (default: %(default)s)")  # fmt: skip
    records.add_argument("--trackers", nargs="+", metavar="NAME", help="experiment trackers of Accelerate that also receive the "
                         "metrics: tensorboard, wandb, trackio, ..., or none (default: tensorboard)")  # fmt: skip


def parse_arguments(description: str | None, given: Sequence[str]) -> TrainOptions:
    """The options given on the command line and in its recipe. The command line takes precedence."""
    parse = parser(description)
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--recipe")
    recipe = named.parse_known_args(given)[0].recipe
    words: list[str] = []
    if recipe is not None:
        values = read_recipe(recipe, parse)
        if {"--epochs", "--iterations"} & {word.split("=")[0] for word in given}:
            values = {key: value for key, value in values.items() if key not in ("epochs", "iterations")}
        words = [word for key, value in values.items() for word in _as_words(key, value)]
    found = vars(parse.parse_args([*words, *given]))
    options: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return TrainOptions(**options)


def recipes() -> list[str]:
    """The names of the recipes in training/recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read_recipe(name: str, parse: argparse.ArgumentParser) -> dict[str, Any]:
    """The options in a recipe: flag without the leading dashes -> value. name: one of `recipes()`, or the path of a .toml file.
    Raises UserError for a recipe that does not exist, cannot be read or sets an unknown option.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        raise UserError(f"no recipe {name!r}", f"choose from {', '.join(recipes())}, or give a .toml file")
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({error})") from error
    known = {option.removeprefix("--") for action in parse._actions for option in action.option_strings}
    for key in values:
        if key not in known - {"help", "list", "recipe", "resume", "output"}:
            raise UserError(f"{path}: {key} is not an option that a recipe may set", "see train.py --help")
    return values


def _as_words(key: str, value: Any) -> list[str]:
    """A recipe's option as command-line arguments."""
    if isinstance(value, bool):
        return [f"--{key}"] if value else []
    return [f"--{key}", *(str(part) for part in (value if isinstance(value, list) else [value]))]
