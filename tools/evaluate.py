"""Top-1 and top-5 of nets on a split: python tools/evaluate.py runs/latest --data /data/shards --schemes centre multi-scale

WEIGHTS_OR_RUN is a run's folder (its model.safetensors, or its last checkpoint while it still trains), a .safetensors or a .pth
file, a folder as timm writes it, or hf://user/repo (model/loading.py has it in full). A file of ours knows its architecture and
preprocessing, timm's its config.json. Any other is taken for torchvision's, of the architecture that its name or --arch tells.

The schemes are those of He et al. 2015: the central crop, ten crops, and whole images at five scales (model/schemes.py). All of
them come from one pass over the data, in which each image is decoded once.

Several nets are an ensemble: each one's figures, then those of their averaged probabilities. --save keeps the predictions (of the
ensemble, where there is one) in a .npz file, which can take a net's place: ensembles of such files need no data.

    python tools/evaluate.py runs/r50 --data /data/shards --save r50.npz
    python tools/evaluate.py r50.npz r101.npz r152.npz --shares 1 1 2
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import torch
from tqdm import tqdm

from model import ARCHS
from model.ensembles import EvalSet, Member, PredictionWriter, SavedPredictions, evaluate
from model.loading import load_model
from model.schemes import SCALES, SCHEMES, Classifier, view_specs_of
from model.testing import Score
from pipeline import open_loader
from pipeline.cli import Parser, positive, run_cli
from pipeline.engines.multiview import MultiViewBatch, MultiViewLoader, ViewSpec
from pipeline.errors import UserError
from pipeline.spec import PRECISIONS, LoaderSpec
from pipeline.store.shards import Manifest
from tools.bench.recording import Figure, record
from training.launch import cores_per_process


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("weights", nargs="+", metavar="WEIGHTS_OR_RUN", help="or a .npz that --save wrote; several: an ensemble")
    parser.add_argument("--data", help="folder or URL (s3://...) of shards; not needed for .npz files alone")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, help="default: centre; of .npz files what they hold")
    scales = " ".join(map(str, SCALES))
    parser.add_argument(
        "--scales",
        nargs="+",
        type=positive,
        help=f"short sides of multi-scale ({scales} for crops of 224, else in proportion)",
    )
    parser.add_argument("--shares", nargs="+", type=float, help="each member's weight in the ensemble, in their order (1 each)")
    parser.add_argument("--save", help="write the predictions there, a .npz file")
    parser.add_argument("--json", type=Path, help="write top1, top5 and images there, and those of all schemes and members")
    parser.add_argument("--results", type=Path, help="append a row for each figure there, as tools/bench/results/ has them")
    parser.add_argument("--per-class", type=Path, help="write a CSV with a row a class there, of the first scheme")
    parser.add_argument("--confusion", type=Path, help="write the confusion matrix as CSV there, of the first scheme")
    parser.add_argument("--arch", help="for weights that do not name it: " + ", ".join(ARCHS))
    add_feed_options(parser)
    return parser


def add_feed_options(parser: Parser) -> None:
    """What `open_pictures` and a `Classifier` need to be told, beside --data."""
    parser.add_argument("--split", default="val")
    parser.add_argument("--cache", type=Path, help="folder for copies of remote shards (CROPFEED_CACHE; ~/.cache/cropfeed)")
    parser.add_argument("--cache-gb", type=float, help="its bound (CROPFEED_CACHE_GB; 80 %% of the free disk)")
    parser.add_argument("--batch-size", type=positive, default=256)
    parser.add_argument("--precision", default="no", choices=PRECISIONS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--engine", default="auto", help="cpu, where there are several schemes, scales or image sizes")
    parser.add_argument("--threads", type=positive, default=cores_per_process())


def choose_schemes(asked: Sequence[str] | None, saved: Sequence[SavedPredictions]) -> list[str]:
    """The schemes asked for; else those of saved predictions; else the central crop. Saved predictions go on with them alone.
    Raises UserError where a file lacks one."""
    schemes = list(dict.fromkeys(asked or (saved[0].schemes if saved else ["centre"])))
    for one in saved:
        lacking = [scheme for scheme in schemes if scheme not in one.schemes]
        if lacking or (not asked and set(one.schemes) != set(schemes)):
            held, wanted = ", ".join(one.schemes), ", ".join(schemes)
            raise UserError(f"{one.name}: holds {held}, not {wanted}; give --schemes that all members have")
        one.select(schemes)
    return schemes


def choose_ground(args: Any, saved: Sequence[SavedPredictions]) -> EvalSet:
    """What all predictions must be of: the data, or where none is given what the first file's are of."""
    if args.data is None:
        ground, whose = saved[0].ground._replace(split=args.split), f"{saved[0].name}, --split {args.split}"
    else:
        manifest = Manifest(args.data)
        if args.split not in manifest.splits:
            raise UserError(f"{args.data}: has no split {args.split!r}, only {', '.join(manifest.splits)}")
        images = manifest.splits[args.split]["images"]
        ground = EvalSet(manifest.fingerprint, args.split, manifest.classes, images)
        whose = f"--data {args.data} --split {args.split}"
    for one in saved:
        one.check(ground, whose)
    return ground


def check_options(args: Any, nets: Sequence[str], schemes: Sequence[str]) -> list[float]:
    """Raise UserError for options that do not go together; returns the members' shares."""
    if nets and args.data is None:
        raise UserError(f"{nets[0]}: running a net needs --data; give it the folder of shards")
    if args.scales and not (nets and "multi-scale" in schemes):
        raise UserError("--scales belongs to nets tested with --schemes multi-scale; leave it out, or give that")
    if args.save and not args.save.endswith(".npz"):
        raise UserError(f"--save {args.save}: give a name that ends with .npz, by which predictions are known from weights")
    shares: list[float] = args.shares or [1.0] * len(args.weights)
    if len(shares) != len(args.weights):
        raise UserError(f"{len(shares)} --shares for {len(args.weights)} members; give one for each, in their order")
    if not all(share > 0 and math.isfinite(share) for share in shares):
        raise UserError("--shares must be above 0; leave out members that shall have none")
    return shares


def open_pictures(args: Any, view_specs: Sequence[ViewSpec]) -> tuple[Iterable[MultiViewBatch], int]:
    """Batches of plain pictures, and how many. Those of one look come from any engine, several at once from the CPU."""
    spec = LoaderSpec(
        args.data,
        batch_size=args.batch_size,
        normalization="channel",  # unused: each net has its own
        dtype=torch.uint8,
        device=args.device,
        engine=args.engine,
        threads=args.threads,
        cache=args.cache,
        cache_gb=args.cache_gb,
    ).evaluation(args.split)
    if len(view_specs) > 1:
        several = MultiViewLoader(spec, view_specs)
        return several, len(several)
    look = view_specs[0]
    loader = open_loader(replace(spec, geometry=look.geometry, image_size=look.size))
    return (MultiViewBatch({look: batch.images.permute(0, 2, 3, 1)}, batch.labels, batch.ids) for batch in loader), len(loader)


def open_members(
    args: Any, saved: dict[str, SavedPredictions], schemes: Sequence[str], classes: list[str]
) -> tuple[list[Member], Iterable[MultiViewBatch]]:
    """The members in the order given, and the batches that they have to see."""
    nets = {path: load_model(path, args.arch, classes) for path in args.weights if path not in saved}
    if not nets:
        return [saved[path] for path in args.weights], next(iter(saved.values())).batches()
    view_specs = dict.fromkeys(
        look for _, recipe in nets.values() for scheme in schemes for look in view_specs_of(scheme, recipe, args.scales).values()
    )
    batches, count = open_pictures(args, list(view_specs))  # first, as it also checks the device
    how = schemes, args.scales, args.device, PRECISIONS[args.precision], args.batch_size
    tested = {path: Classifier(path, net, recipe, *how) for path, (net, recipe) in nets.items()}
    return [(saved | tested)[path] for path in args.weights], tqdm(batches, total=count, unit=" batches")


def rates(scores: dict[str, Score]) -> dict[str, dict[str, float]]:
    return {scheme: {"top1": score.top1_rate, "top5": score.top5_rate} for scheme, score in scores.items()}


def print_table(names: Sequence[str], results: Sequence[dict[str, Score]]) -> None:
    """A line for each member and scheme."""
    rows = [(name, scheme, score) for name, scores in zip(names, results, strict=True) for scheme, score in scores.items()]
    names_width, schemes_width = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    for name, scheme, score in rows:
        top1, top5 = f"top-1 {score.top1_rate:.2%}", f"top-5 {score.top5_rate:.2%}"
        print(f"{name:{names_width}}  {scheme:{schemes_width}}  {top1:13}  {top5:13}  of {score.images} images")


def record_rows(file: Path, args: Any, names: Sequence[str], results: Sequence[dict[str, Score]]) -> None:
    spec = f"{Path(args.data).name if args.data else 'saved predictions'}, {args.split}, precision {args.precision}"
    for name, scores in zip(names, results, strict=True):
        for scheme, score in scores.items():
            for metric, rate in (("top1", score.top1_rate), ("top5", score.top5_rate)):
                record(file, scheme, Figure(metric, [rate]), engine="evaluate.py", spec=f"{name}, {spec}", cache="warm")


def write_tables(result: Score, classes: list[str], per_class: Path | None, confusion: Path | None) -> None:
    """per_class: a row a class: name, images, its top-1 and top-5 shares. confusion: rows are labels, columns predictions."""
    counts = result.confusion
    if per_class:
        with per_class.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["class", "images", "top1", "top5"])
            for index, name in enumerate(classes):
                images = int(counts[index].sum())
                shares = [int(hits) / images if images else "" for hits in (counts[index, index], result.top5[index])]
                writer.writerow([name, images, *shares])
    if confusion:
        with confusion.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["label \\ prediction", *classes])
            writer.writerows([name, *row] for name, row in zip(classes, counts.tolist(), strict=True))


def main() -> None:
    args = parser().parse_args()
    saved = {path: SavedPredictions(path) for path in args.weights if path.endswith(".npz")}
    schemes = choose_schemes(args.schemes, list(saved.values()))
    shares = check_options(args, [path for path in args.weights if path not in saved], schemes)
    ground = choose_ground(args, list(saved.values()))
    members, batches = open_members(args, saved, schemes, ground.classes)
    collected = PredictionWriter(ground, schemes) if args.save else None
    results = evaluate(members, shares, batches, schemes, len(ground.classes), collected)

    names = [member.name for member in members]
    if collected:
        collected.save(args.save, " + ".join(names))
    result = results[-1][schemes[0]]
    write_tables(result, ground.classes, args.per_class, args.confusion)
    if args.json:
        figures: dict[str, Any] = {"top1": result.top1_rate, "top5": result.top5_rate, "images": result.images}
        figures["schemes"] = rates(results[-1])
        if len(members) > 1:
            triples = zip(names, shares, results[:-1], strict=True)
            figures["members"] = [{"name": name, "share": share, "schemes": rates(scores)} for name, share, scores in triples]
        args.json.write_text(json.dumps(figures) + "\n")
    rows = [*names, "all, averaged"][: len(results)]
    print_table(rows, results)
    if args.results:
        record_rows(args.results, args, rows, results)


if __name__ == "__main__":
    run_cli(main)
