"""`cropfeed shards` and `cropfeed verify`: their options and help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import TypeVar

from ..cli import Parser, positive
from ..cores import usable_cores
from ..errors import StorageError, UserError
from ..store import files
from .beton import MODES, BetonSettings
from .images import PROFILES
from .kinds import KINDS
from .make import ENGINES, FORMATS, ConvertOptions, make_shards
from .sources import SourceOptions
from .verify import verify as problems_of

T = TypeVar("T")

HELP = """Turn ImageNet, or any labelled images, into shards.

    {prog} /imagenet --out /data/shards
    {prog} /imagenet --out /data/compact --profile compact     half the size, half the decoding time
    {prog} /imagenet --out /data/both --format both            tars, and a .beton file for FFCV
    {prog} s3://bucket/tars --out s3://bucket/shards --workers 32
    {verify} /data/shards     verify every byte

SRC, a local path or any fsspec URL, is one of
  - folders: SRC/train/<class>/*.JPEG and SRC/val/<class>/*.JPEG, or SRC/<class>/*.JPEG (then training only);
  - kaggle: Kaggle's ILSVRC/Data/CLS-LOC, or any SRC/train/<class>/*.JPEG with SRC/val/*.JPEG and a file of labels;
  - official: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12.tar.gz, never unpacked;
  - webdataset: SRC/train/*.tar and SRC/val/*.tar, or SRC/*.tar with "val" in the names of the validation tars;
  - parquet: Hugging Face's SRC/data/train-*.parquet and validation-*.parquet, also hf://datasets/NAME;
  - list: any images that a file lists (--list).
Labels are the indices of the sorted class folders, or the numbers or sorted names that the source has.

Reports show readable names of ImageNet's classes beside their wnids. For other classes, names are read from SRC/classes.txt, with
one line per class folder: folder, tab, name; or from SRC/classes.json, {{"folder": "name"}}; or from Kaggle's
LOC_synset_mapping.txt.

Every image is decoded once in full. Images that cannot be decoded are left out. OUT/report.json lists them with the reason. It
also lists CMYK images, PNGs named .JPEG, images that are not decoded at the crop, broken metadata and exact duplicates.

If a run was stopped or killed, the same command resumes it: finished shards are verified and kept. The same source and options
give the same bytes, with any number of workers, on one machine or many, interrupted or not.

To use many machines, run a job array with a shared OUT: --shards 0-63 makes only these shards (numbered over all splits). The job
that ends last completes the data set. Or use --engine ray, which distributes the shards over a running Ray cluster.
"""


def shard_range(text: str) -> range:
    """The type of --shards: FIRST-LAST, both included, or one number."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not found or int(found[2] or found[1]) < int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST-LAST, such as 0-63")
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def _parser(prog: str, verify: str) -> Parser:
    """A parser whose flags have the names of the fields of the options as `dest`."""
    parser = Parser(HELP.format(prog=prog, verify=verify), prog)
    parser.add_argument("src", metavar="SRC", nargs="?", help="images to convert")
    parser.add_argument("--out", help="folder or URL for the shards")
    _add_source_flags(parser)
    _add_format_flags(parser)
    how = parser.add_argument_group("how it runs")
    how.add_argument("--workers", type=positive, default=usable_cores(), help="worker processes (default: one per core)")
    how.add_argument(
        "--engine", choices=ENGINES, default="local", help="make shards on this machine or on a Ray cluster (default: local)"
    )
    how.add_argument(
        "--ray-address", default="auto", help="address of the Ray cluster (default: the one that this machine belongs to)"
    )
    how.add_argument("--shards", type=shard_range, metavar="FIRST-LAST", help="make only these shards, such as 0-63")
    return parser


def _add_source_flags(parser: Parser) -> None:
    source = parser.add_argument_group("the source")
    source.add_argument("--source", choices=KINDS, default="", help="kind of SRC (default: recognized, and printed)")
    source.add_argument(
        "--list", default="", metavar="FILE",
        help=".csv, .tsv, .jsonl or .parquet file that lists the images of SRC: columns path, label, and perhaps split",
    )  # fmt: skip
    source.add_argument(
        "--image-column", default="",
        help="column of a list's paths, or of the images in parquet files; of WebDataset tars: the images' extension",
    )  # fmt: skip
    source.add_argument(
        "--label-column", default="",
        help="column of the labels in a list or in parquet files; of WebDataset tars: a field of .json, or the extension of a "
        "text member such as txt (default: cls)",
    )  # fmt: skip
    source.add_argument("--split-column", default="", help="column of a list with train, val or test")
    source.add_argument(
        "--field-column", action="append", default=[], metavar="NAME",
        help="further column of a list or of parquet files, to be stored as .json beside each image; may be repeated",
    )  # fmt: skip
    source.add_argument(
        "--val-labels", default="", metavar="FILE", help="labels of validation images in one flat folder (default: looked for)"
    )
    source.add_argument(
        "--val-share", type=float, default=0, help="if SRC has no validation split: the fraction of each class to take for it"
    )
    source.add_argument("--val-per-class", type=int, default=0, help="the same, as a number of images of each class")


def _add_format_flags(parser: Parser) -> None:
    what = parser.add_argument_group("what is stored")
    what.add_argument(
        "--profile", choices=PROFILES, default="lossless",
        help="how images are stored. lossless (default): the same pixels in about the same size; only the crop is decoded. "
        "compact: resized to a short side of at most 480, JPEG quality 90, 4:2:0: half the size; only the crop is decoded. "
        "original: the files unchanged; every image is decoded in full",
    )  # fmt: skip
    what.add_argument(
        "--reencode", action="store_true",
        help="with --profile lossless: store PNGs and other images than JPEGs as JPEGs of quality 95, of which only the crop is "
        "decoded, instead of without loss",
    )  # fmt: skip
    what.add_argument(
        "--format", choices=FORMATS, default="webdataset",
        help="webdataset (default): tar files; ffcv: one .beton file per split, for FFCV; both: tar files and .beton files",
    )  # fmt: skip
    what.add_argument("--shard-size", type=positive, default=1000, help="images in a shard (default: 1000)")
    what.add_argument("--seed", type=int, default=0, help="seed of the order of the training images (default: 0)")
    what.add_argument("--strict", action="store_true", help="stop at an image that cannot be used, instead of leaving it out")
    what.add_argument("--skip-md5", dest="check_md5", action="store_false", help="do not verify the official tars first")
    ffcv = parser.add_argument_group("for --format ffcv and both")
    ffcv.add_argument(
        "--ffcv-mode", dest="mode", choices=MODES, default="region",
        help="region (default): the same JPEGs as in the tar files; stock FFCV decodes them in full, Cropfeed only the crop. "
        "jpg, raw and proportion: the modes of FFCV's RGBImageField",
    )  # fmt: skip
    ffcv.add_argument(
        "--ffcv-max-resolution", dest="max_resolution", type=positive,
        help="with the modes jpg, raw and proportion: shrink larger images to this longest side, pixels (default: no limit)",
    )  # fmt: skip
    ffcv.add_argument(
        "--ffcv-quality", dest="quality", type=positive, default=90,
        help="with the modes jpg and proportion: JPEG quality (default: 90)",
    )  # fmt: skip
    ffcv.add_argument(
        "--ffcv-proportion", dest="proportion", type=float, default=0.5,
        help="with the mode proportion: fraction of the images that are stored as JPEG, the others raw (default: 0.5)",
    )  # fmt: skip


def _chosen(options: type[T], args: argparse.Namespace, **others: object) -> T:
    """Options with the values of the flags. others: further fields."""
    names = {field.name for field in fields(options) if field.name in args}  # type: ignore[arg-type]
    return options(**{name: getattr(args, name) for name in names}, **others)


def shards(arguments: Sequence[str] | None, prog: str) -> None:
    """`cropfeed shards`, and tools/make_shards.py, which also has --verify. arguments: None for those of the script."""
    is_script = arguments is None
    parser = _parser(prog, f"{prog} --verify" if is_script else "cropfeed verify")
    if is_script:
        parser.add_argument(
            "--verify", metavar="OUT", help="verify a finished data set against its manifest, and name damaged files"
        )
    args = parser.parse_args(arguments)
    if is_script and args.verify:
        _verify(args.verify, args.workers)
        return
    if not args.src or not args.out:
        raise UserError(f"give SRC and --out{', or --verify OUT' if is_script else ''}", "see --help")
    args.field_column = tuple(args.field_column)
    images, beton = _chosen(SourceOptions, args), _chosen(BetonSettings, args)
    options = _chosen(ConvertOptions, args, images=images, beton=beton)
    try:
        lines = make_shards(options, lambda line: print(line, flush=True))
    except StorageError as error:
        raise UserError(error.problem, f"{error.remedy}, then repeat the command: finished shards are kept") from error
    print(parser.with_flags("\n".join(lines)))


def verify(arguments: Sequence[str]) -> None:
    """`cropfeed verify`."""
    parser = Parser("Verify a data set against its manifest, and name damaged files.", "cropfeed verify")
    parser.add_argument("data", metavar="SHARDS", help="folder or URL of shards")
    parser.add_argument("--workers", type=positive, default=usable_cores(), help="threads (default: one per core)")
    args = parser.parse_args(arguments)
    _verify(args.data, args.workers)


def _verify(data: str, workers: int) -> None:
    problems = problems_of(files.absolute(data), workers)
    print("\n".join(problems) or f"{data}: every byte is as it was written")
    if problems:
        raise UserError(f"{data}: {len(problems)} damaged", "repeat the command that made it: it replaces damaged shards")
