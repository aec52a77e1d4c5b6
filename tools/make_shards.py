"""Turn ImageNet, or any labelled images, into shards.

    python tools/make_shards.py /imagenet --out /data/shards
    python tools/make_shards.py /imagenet --out /data/compact --profile compact     half the bytes, half the decoding
    python tools/make_shards.py /imagenet --out /data/both --format both            a .beton for FFCV beside the tars
    python tools/make_shards.py s3://bucket/tars --out s3://bucket/shards --workers 32
    python tools/make_shards.py --verify /data/shards                               is every byte as it was written?

SRC, a local path or any fsspec URL, is one of
  - folders of images: SRC/train/<class>/*.JPEG and SRC/val/<class>/*.JPEG, or SRC/<class>/*.JPEG (then training only);
  - the official tars: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12.tar.gz, never unpacked;
  - WebDataset tars: SRC/train/*.tar and SRC/val/*.tar, or SRC/*.tar with "val" in the names of the validation's.
Labels are the class names' places in sorted order (WebDataset: the number in .cls).

Every image is decoded in full once. Those that cannot be are left out and listed with the reason in OUT/report.json, which also
names CMYK images, disguised PNGs, broken metadata and exact duplicates.

Stopped or killed? The same command goes on where it was: finished shards are checked and kept. The same source and options give
the same bytes, for any number of workers, on one machine or many, interrupted or not.

Many machines: --shards 0-63 makes only these (of all splits' shards, counted through) in a job array on a shared OUT; whichever
job ends last completes the data set. --engine ray spreads the shards over a running Ray cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time

import _path  # noqa: F401

from pipeline.convert import betons, conversion, run, sources, tars, verify
from pipeline.convert.conversion import Settings
from pipeline.convert.images import PROFILES
from pipeline.convert.report import summary
from pipeline.convert.sources import Listing
from pipeline.convert.task import ShardTask
from pipeline.errors import Parser, UserError, positive, run_cli
from pipeline.store import files

FORMATS = ("webdataset", "ffcv", "both")


def shard_range(text: str) -> range:
    """FIRST-LAST, both included, or one number."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not found or int(found[2] or found[1]) < int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST-LAST, such as 0-63")
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("src", metavar="SRC", nargs="?", help="images to convert")
    parser.add_argument("--out", help="folder or URL to make")
    what = parser.add_argument_group("what is stored")
    what.add_argument(
        "--profile", choices=PROFILES, default="lossless",
        help="lossless (default): the same pixels, and each image opens at the crop, about the original's bytes; compact: short "
        "side at most 480, quality 90, 4:2:0, opens at the crop, half the bytes; original: files as they are, which do not",
    )  # fmt: skip
    what.add_argument(
        "--format", choices=FORMATS, default="webdataset", help="tars (default), a .beton a split for FFCV, or both"
    )
    what.add_argument("--shard-size", type=positive, default=1000, help="images in a shard (default: 1000)")
    what.add_argument("--seed", type=int, default=0, help="of the training images' order over the shards (default: 0)")
    what.add_argument("--strict", action="store_true", help="stop at an image that cannot be used, instead of leaving it out")
    what.add_argument("--skip-md5", action="store_true", help="trust the official tars without reading them whole first")
    ffcv = parser.add_argument_group("--format ffcv")
    ffcv.add_argument(
        "--ffcv-mode", choices=("region", "jpg", "raw", "proportion"), default="region",
        help="region (default): the tars' own JPEGs, which stock FFCV decodes whole and Cropfeed at the crop; "
        "jpg, raw, proportion: as FFCV's RGBImageField writes them",
    )  # fmt: skip
    ffcv.add_argument("--ffcv-max-resolution", type=positive, help="longest side of jpg, raw and proportion (default: as it is)")
    ffcv.add_argument("--ffcv-quality", type=positive, default=90, help="of jpg and proportion (default: 90)")
    ffcv.add_argument("--ffcv-proportion", type=float, default=0.5, help="of images that proportion compresses (default: 0.5)")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes (default: one a core)")
    how.add_argument("--engine", choices=("local", "ray"), default="local", help="where shards are made (default: local)")
    how.add_argument("--ray-address", default="auto", help="of the Ray cluster (default: the one this machine belongs to)")
    how.add_argument("--shards", type=shard_range, metavar="FIRST-LAST", help="make only these of all shards")
    parser.add_argument("--verify", metavar="OUT", help="re-read a finished OUT against its manifest, and name what is damaged")
    return parser


def list_sources(src: str, skip_md5: bool) -> Listing:
    """What SRC holds, whichever kind of source it is."""
    if not files.is_folder(src):
        raise UserError(f"{src}: no such folder; give the folder that holds train/<class>/*.JPEG and val/<class>/*.JPEG")
    if official := tars.official_files(src):
        for name in () if skip_md5 else official:
            tars.check_md5(src, name)
        return tars.list_official(src, official)
    if found := tars.find_webdataset(src):
        return tars.list_webdataset(src, found)
    return sources.list_image_folder(src)


def make_shards(args: argparse.Namespace) -> None:
    """Convert `args.src` into `args.out`, from the beginning or from where a run before this one stopped."""
    src, out = files.absolute(args.src), files.absolute(args.out)
    settings = Settings(args.profile, args.shard_size, args.seed)
    listing = list_sources(src, args.skip_md5)
    tasks = conversion.plan_tasks(listing, out, settings, args.strict)
    conversion.begin(out, conversion.fingerprint(listing, settings))
    if conversion.is_complete(out):
        repair(args, out, tasks)
    elif not convert(args, out, listing, settings, tasks):
        return
    if args.format != "webdataset":
        mode = betons.BetonSettings(args.ffcv_mode, args.ffcv_max_resolution, args.ffcv_quality, args.ffcv_proportion)
        betons.write_betons(out, mode, args.workers)
    if args.format == "ffcv":
        betons.remove_tars(out)


def convert(args: argparse.Namespace, out: str, listing: Listing, settings: Settings, tasks: dict[str, list[ShardTask]]) -> bool:
    """Make the chosen shards; return whether the data set is complete then."""
    every = [task for split in tasks.values() for task in split]
    chosen = every if args.shards is None else every[args.shards.start : args.shards.stop]
    if not chosen:
        raise UserError(f"--shards {args.shards.start}-{args.shards.stop - 1}: there are only shards 0-{len(every) - 1}")
    started = time.perf_counter()
    run_tasks(args, chosen)
    seconds = time.perf_counter() - started
    missing = conversion.complete(out, listing, settings, tasks, alone=args.shards is None)
    images = sum(len(task.sources) for task in chosen)
    print(f"{out}: {len(chosen)} shards, {images} images in {seconds:.1f} s, {images / seconds:.0f} images/s")
    if missing:
        print(f"{missing} shards are still to be made; whichever job makes the last one completes the data set")
        return False
    print("\n".join(summary(json.loads(files.read(files.join(out, "report.json"))))))
    return True


def repair(args: argparse.Namespace, out: str, tasks: dict[str, list[ShardTask]]) -> None:
    """Check a complete data set's shards, and make those again that are damaged."""
    damaged = conversion.damaged(out, tasks)
    if damaged:
        run_tasks(args, damaged)
    conversion.remove_records(
        out, alone=args.shards is None
    )  # these shards', or those of a run that was killed while it removed them
    if damaged:
        damaged_still = conversion.damaged(out, {"": damaged})
        if damaged_still:
            raise UserError(f"{damaged_still[0].tar}: its source is no longer what it was made of; remove {out} and start anew")
    print(f"{out}: complete already; {len(damaged)} damaged shards made again")


def run_tasks(args: argparse.Namespace, tasks: list[ShardTask]) -> None:
    if args.engine == "ray":
        run.run_ray(tasks, args.ray_address)
    else:
        run.run_local(tasks, args.workers)


def verify_shards(out: str, workers: int) -> None:
    problems = verify.verify(files.absolute(out), workers)
    print("\n".join(problems) or f"{out}: every byte is as it was written")
    if problems:
        raise UserError(f"{out}: {len(problems)} damaged; the command that made it makes damaged shards again")


def main() -> None:
    args = parser().parse_args()
    if args.verify:
        verify_shards(args.verify, args.workers)
    elif not args.src or not args.out:
        raise UserError("give SRC and --out, or --verify OUT; see --help")
    else:
        make_shards(args)


if __name__ == "__main__":
    run_cli(main)
