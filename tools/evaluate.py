"""Evaluate models on a split: python tools/evaluate.py runs/latest --data /data/shards --schemes centre multi-scale

WEIGHTS_OR_RUN is one of
  - the folder of a run: its model.safetensors, or its last checkpoint while it is still training;
  - a .safetensors or .pth file;
  - a folder in timm's format, or hf://user/repo on the Hugging Face Hub.
Files of Cropfeed and folders in timm's format contain architecture and preprocessing. For other files, --arch or the file's name
gives the architecture: one of train.py --list, or timm/NAME for a model of timm. The published files of torchvision and timm are
recognized; for others, the preprocessing of torchvision's first weights is assumed. The script prints what it uses; --preset,
--resize, --crop, --mean, --std and others change it. Details: model/loading.py and model/preprocessing.py.

The testing schemes are those of He et al. 2015: the central crop, ten crops, and whole images at five scales (model/schemes.py).
All schemes are computed in one pass over the data, which decodes each image once.

Several models form an ensemble. The script prints the accuracy of each model, then that of their averaged probabilities. --save
writes the predictions (of the ensemble, if there is one) to a .npz file. Such files can replace models as members. An ensemble of
such files needs no --data:

    python tools/evaluate.py runs/r50 --data /data/shards --save r50.npz
    python tools/evaluate.py r50.npz r101.npz r152.npz --shares 1 1 2
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import _path  # noqa: F401

from model.ensembles import EnsembleMember, EvalSet, PredictionWriter, SavedPredictions, evaluate_ensemble
from model.loading import load_model
from model.make import has_one_size
from model.preprocessing import ASSUMED
from model.schemes import SCALES, SCHEMES, MultiViewClassifier, view_specs_of
from model.testing import Accuracy
from model.weights import ModelConfig
from pipeline.cli import Parser, check_writable, positive, run_cli
from pipeline.engines.multiview import MultiViewBatch
from pipeline.errors import UserError, writing
from pipeline.progress import progress_bar
from pipeline.store.class_names import class_name
from pipeline.store.shards import Manifest
from tools.reporting.evaluation import (
    MAX_CONFUSION,
    EvaluateOptions,
    add_loading_flags,
    add_preprocessing_flags,
    open_batches,
    options_from,
    with_preprocessing,
)  # fmt: skip

AVERAGE = "all, averaged"  # the ensemble's name


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("weights", nargs="+", metavar="WEIGHTS_OR_RUN", help="model, or .npz file written by --save; several "
                        "form an ensemble")  # fmt: skip
    parser.add_argument("--data", metavar="SHARDS", help="folder or URL (s3://...) of shards; not needed if all members are "
                        ".npz files")  # fmt: skip
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, metavar="SCHEME", help=f"testing schemes: {', '.join(SCHEMES)} "
                        "(default: centre, or those of the .npz files)")  # fmt: skip
    parser.add_argument("--scales", nargs="+", type=positive, metavar="N", help="short sides for multi-scale, in pixels "
                        f"(default: {' '.join(map(str, SCALES))} for crops of 224, in proportion for other sizes)")  # fmt: skip
    parser.add_argument("--shares", nargs="+", type=float, metavar="X", help="weights of the members in the ensemble, in their "
                        "order (default: equal weights)")  # fmt: skip
    parser.add_argument("--save", metavar="FILE", help="write the predictions to this .npz file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the accuracies of all schemes and members to this JSON "
                        "file")  # fmt: skip
    parser.add_argument("--per-class", type=Path, metavar="FILE", help="write the first scheme's accuracy for each class to "
                        "this CSV file")  # fmt: skip
    parser.add_argument("--confusion", type=Path, metavar="FILE", help="write the first scheme's confusion matrix to this "
                        "CSV file")  # fmt: skip
    parser.add_argument("--arch", help="architecture, for weights that do not name it: a model of train.py --list, or timm/NAME")
    add_loading_flags(parser)
    add_preprocessing_flags(parser)
    return parser


def choose_schemes(requested: Sequence[str], saved: Sequence[SavedPredictions]) -> list[str]:
    """The requested schemes, or else those of the saved predictions, or else the central crop. Saved predictions are reduced to
    these schemes. Raises UserError if a file lacks one of them."""
    schemes = list(dict.fromkeys(requested or (saved[0].schemes if saved else ["centre"])))
    for one in saved:
        missing = [scheme for scheme in schemes if scheme not in one.schemes]
        if missing or (not requested and set(one.schemes) != set(schemes)):
            held, wanted = ", ".join(one.schemes), ", ".join(schemes)
            raise UserError(f"{one.name}: contains the schemes {held}, not {wanted}", "give --schemes that all members have")
        one.select(schemes)
    return schemes


def choose_eval_set(options: EvaluateOptions, saved: Sequence[SavedPredictions]) -> EvalSet:
    """The images that all members predict: those of the data, or without data, those of the first file of predictions."""
    if options.data is None:
        eval_set, source = saved[0].eval_set._replace(split=options.split), f"{saved[0].name}, --split {options.split}"
    else:
        manifest = Manifest(options.data)
        if options.split not in manifest.splits:
            raise UserError(f"{options.data}: has no split {options.split!r}, only {', '.join(manifest.splits)}")
        images = manifest.splits[options.split]["images"]
        eval_set = EvalSet(manifest.fingerprint, options.split, manifest.classes, images)
        source = f"--data {options.data} --split {options.split}"
    for one in saved:
        one.check(eval_set, source)
    return eval_set


def check_options(options: EvaluateOptions, weights: Sequence[str], schemes: Sequence[str], save: str | None) -> None:
    """Raise UserError for options that do not fit the weights or each other. schemes: the schemes to compute."""
    models = [path for path in weights if not path.endswith(".npz")]
    if models and options.data is None:
        raise UserError(f"{models[0]}: running a model needs --data", "give it the folder of shards")
    if options.scales and not (models and "multi-scale" in schemes):
        raise UserError("--scales only applies to models with --schemes multi-scale", "leave it out, or add multi-scale")
    if not models and options.changes_preprocessing:
        raise UserError("--preset, --resize, --crop, --mean, --std and their like only apply to models", "leave them out")
    if save and not save.endswith(".npz"):
        raise UserError(f"--save {save}: the name must end with .npz", "the suffix distinguishes predictions from weights")
    if options.shares and len(options.shares) != len(weights):
        raise UserError(f"{len(options.shares)} --shares for {len(weights)} members", "give one for each member, in their order")


def adapted(path: str, config: ModelConfig, options: EvaluateOptions, schemes: Sequence[str]) -> ModelConfig:
    """A model's config with the options' preprocessing. Raises UserError if the model does not take these images."""
    new = with_preprocessing(config, options)
    if has_one_size(config.arch) and new.image_size != config.image_size:
        raise UserError(f"{path}: {config.arch} takes images of {config.image_size} pixels only", "leave --crop out")
    if "multi-scale" in schemes and has_one_size(config.arch):
        raise UserError(f"{path}: {config.arch} takes images of one size only, so not multi-scale", "choose other --schemes")
    if "ten-crop" in schemes and new.resizing == "square":
        raise UserError(f"{path}: its images are resized to squares, of which no ten crops are taken", "choose other --schemes")
    return new


def open_members(
    weights: list[str], saved: dict[str, SavedPredictions], options: EvaluateOptions, schemes: Sequence[str], classes: list[str]
) -> tuple[list[EnsembleMember], Iterable[MultiViewBatch]]:
    """The members, in the given order, and the batches to evaluate them on."""
    models = {path: load_model(path, options.arch, classes) for path in weights if path not in saved}
    if not models:
        return [saved[path] for path in weights], next(iter(saved.values())).batches()
    models = {path: (model, adapted(path, config, options, schemes)) for path, (model, config) in models.items()}
    interpolations = {config.interpolation for _, config in models.values()}
    if len(interpolations) > 1:
        raise UserError("the models differ in their interpolation", "give --interpolation, or evaluate each alone with --save")
    pairs = [(scheme, config) for _, config in models.values() for scheme in schemes]
    views = list(dict.fromkeys(view for pair in pairs for view in view_specs_of(*pair, options.scales).values()))
    batches, count = open_batches(options, views, interpolations.pop())  # checks the device, before the models move there
    classifiers = {
        path: MultiViewClassifier(path, model, config, schemes, options.scales, options.device, options.dtype, options.batch_size)
        for path, (model, config) in models.items()
    }
    for path, (_, config) in models.items():
        remedy = "; --preset, --resize, --crop, --mean and --std change it" if ASSUMED in config.origin else ""
        print(f"{path}: {config.preprocessing}{remedy}", flush=True)
    bar = progress_bar(batches, total=count, desc="evaluating", unit=" batches")
    return [(saved | classifiers)[path] for path in weights], bar


def rates(results: dict[str, Accuracy]) -> dict[str, dict[str, float]]:
    """By scheme: top1 and top5, 0..1."""
    return {scheme: {"top1": result.top1_rate, "top5": result.top5_rate} for scheme, result in results.items()}


def summary(
    options: EvaluateOptions, names: Sequence[str], shares: Sequence[float], results: Sequence[dict[str, Accuracy]], scheme: str
) -> dict[str, Any]:
    """The content of --json. Its top1, top5 and images are those of `scheme`, for the ensemble or the only member."""
    result = results[-1][scheme]
    found: dict[str, Any] = {"top1": result.top1_rate, "top5": result.top5_rate, "images": result.images}
    found |= {"schemes": rates(results[-1]), "name": AVERAGE if len(names) > 1 else names[0], "command": sys.argv}
    data = Path(options.data).name if options.data else None
    found |= {"data": data, "split": options.split, "precision": options.precision}
    if len(names) > 1:
        members = zip(names, shares, results[:-1], strict=True)
        found["members"] = [{"name": name, "share": share, "schemes": rates(one)} for name, share, one in members]
    return found


def print_table(names: Sequence[str], results: Sequence[dict[str, Accuracy]]) -> None:
    """One line for each member and scheme."""
    rows = [(name, scheme, one) for name, by_scheme in zip(names, results, strict=True) for scheme, one in by_scheme.items()]
    names_width, schemes_width = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    for name, scheme, one in rows:
        top1, top5 = f"top-1 {one.top1_rate:.2%}", f"top-5 {one.top5_rate:.2%}"
        print(f"{name:{names_width}}  {scheme:{schemes_width}}  {top1:13}  {top5:13}  of {one.images} images")


def write_tables(result: Accuracy, classes: list[str], per_class: Path | None, confusion: Path | None) -> None:
    """per_class: for each class its name, images, top-1 and top-5 rates. confusion: rows are labels, columns predictions.
    classes: their names for people, in label order."""
    if per_class:
        with writing(per_class), per_class.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["class", "images", "top1", "top5"])
            for index, name in enumerate(classes):
                images = int(result.of_class[index])
                correct = (result.top1_correct[index], result.top5_correct[index])
                writer.writerow([name, images, *(int(count) / images if images else "" for count in correct)])
    if confusion:
        assert result.confusion is not None
        with writing(confusion), confusion.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["label \\ prediction", *classes])
            writer.writerows([name, *row] for name, row in zip(classes, result.confusion.tolist(), strict=True))


def main() -> None:
    args = parser().parse_args()
    weights, options = args.weights, options_from(args)
    for file in filter(None, (args.save, args.json, args.per_class, args.confusion)):
        check_writable(Path(file))
    saved = {path: SavedPredictions(path) for path in weights if path.endswith(".npz")}
    schemes = choose_schemes(options.schemes, list(saved.values()))
    check_options(options, weights, schemes, args.save)
    shares = options.shares or (1.0,) * len(weights)
    eval_set = choose_eval_set(options, list(saved.values()))
    if args.confusion and len(eval_set.classes) > MAX_CONFUSION:
        raise UserError(
            f"--confusion: {len(eval_set.classes):,} classes squared are too many, at most {MAX_CONFUSION:,} classes",
            "use --per-class instead",
        )
    members, batches = open_members(weights, saved, options, schemes, eval_set.classes)
    writer = PredictionWriter(eval_set, schemes) if args.save else None
    results = evaluate_ensemble(members, shares, batches, schemes, len(eval_set.classes), writer, args.confusion is not None)

    names = [member.name for member in members]
    print_table([*names, AVERAGE][: len(results)], results)
    if writer:
        writer.save(args.save, " + ".join(names))
    names_of_data = Manifest(options.data).class_names if options.data else {}
    classes = [class_name(one, names_of_data) for one in eval_set.classes]
    write_tables(results[-1][schemes[0]], classes, args.per_class, args.confusion)
    if args.json:
        with writing(args.json):
            args.json.write_text(json.dumps(summary(options, names, shares, results, schemes[0])) + "\n", "utf-8")


if __name__ == "__main__":
    run_cli(main)
