"""Command lines: the console command `cropfeed`, and what all of our scripts share.

    cropfeed shards /imagenet --out /data/shards      convert labelled images
    cropfeed verify /data/shards                      re-read every byte of a data set
    cropfeed doctor [/data/shards]                    is this machine ready?

`cropfeed COMMAND --help` has the rest.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .errors import UserError

_parser: Parser | None = None  # the one that has parsed this process's arguments


class Parser(argparse.ArgumentParser):
    """argparse with its errors in one line; --help shows the module's docstring as it is written."""

    def __init__(self, description: str | None, prog: str | None = None, fields: dict[str, str] | None = None) -> None:
        """fields: the flag for a field of the library whose name is not the flag's."""
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self._fields = fields or {}

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        global _parser
        _parser = self
        return super().parse_known_args(*args, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message, "see --help")

    def with_flags(self, text: str) -> str:
        """A message of the library with the names in backticks as this command line's flags."""
        flags = {action.dest: action.option_strings[-1] for action in self._actions if action.option_strings} | self._fields
        return re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[1]), text)


def positive(text: str) -> int:
    """An option's whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def one_line(error: UserError) -> str:
    """What a command line says of an error."""
    text = " ".join(str(error).split())
    return _parser.with_flags(text) if _parser else text


def run_cli(main: Callable[[], None]) -> NoReturn:
    """Run a command-line program: exit 0 when done, 2 with one line on a UserError, 130 on Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


SHARDS = """Turn ImageNet, or any labelled images, into shards.

    {prog} /imagenet --out /data/shards
    {prog} /imagenet --out /data/compact --profile compact     half the bytes, half the decoding
    {prog} /imagenet --out /data/both --format both            a .beton for FFCV beside the tars
    {prog} s3://bucket/tars --out s3://bucket/shards --workers 32
    {verify} /data/shards     is every byte as it was written?

SRC, a local path or any fsspec URL, is one of
  - folders of images: SRC/train/<class>/*.JPEG and SRC/val/<class>/*.JPEG, or SRC/<class>/*.JPEG (then training only);
  - the official tars: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12.tar.gz, never unpacked;
  - WebDataset tars: SRC/train/*.tar and SRC/val/*.tar, or SRC/*.tar with "val" in the names of the validation's.
Labels are the class names' places in sorted order (WebDataset: the number in .cls).

Every image is decoded in full once. Those that cannot be are left out and listed with the reason in OUT/report.json, which also
names CMYK images, disguised PNGs, broken metadata and exact duplicates.

Stopped or killed? The same command continues where it was: finished shards are checked and kept. The same source and options
give the same bytes, for any number of workers, on one machine or many, interrupted or not.

Many machines: --shards 0-63 makes only these (of all splits' shards, counted through) in a job array on a shared OUT; whichever
job ends last completes the data set. --engine ray spreads the shards over a running Ray cluster.
"""


def shard_range(text: str) -> range:
    """FIRST-LAST, both included, or one number."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not found or int(found[2] or found[1]) < int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST-LAST, such as 0-63")
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def _shards_parser(prog: str, verify: str) -> Parser:
    from .convert.beton import MODES
    from .convert.images import PROFILES
    from .convert.make import ENGINES, FORMATS

    parser = Parser(SHARDS.format(prog=prog, verify=verify), prog, {"check_md5": "--skip-md5", "mode": "--ffcv-mode"})
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
        "--ffcv-mode", choices=MODES, default="region",
        help="region (default): the tars' own JPEGs, which stock FFCV decodes whole and Cropfeed at the crop; "
        "jpg, raw, proportion: as FFCV's RGBImageField writes them",
    )  # fmt: skip
    ffcv.add_argument("--ffcv-max-resolution", type=positive, help="longest side of jpg, raw and proportion (default: as it is)")
    ffcv.add_argument("--ffcv-quality", type=positive, default=90, help="of jpg and proportion (default: 90)")
    ffcv.add_argument("--ffcv-proportion", type=float, default=0.5, help="of images that proportion compresses (default: 0.5)")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes (default: one a core)")
    how.add_argument("--engine", choices=ENGINES, default="local", help="where shards are made (default: local)")
    how.add_argument("--ray-address", default="auto", help="of the Ray cluster (default: the one this machine belongs to)")
    how.add_argument("--shards", type=shard_range, metavar="FIRST-LAST", help="make only these of all shards")
    return parser


def shards(arguments: Sequence[str] | None = None, prog: str = "python tools/make_shards.py") -> None:
    """`cropfeed shards`, and tools/make_shards.py, which also has --verify."""
    from .convert.beton import BetonSettings
    from .convert.make import ConvertOptions, make_shards

    is_script = arguments is None
    parser = _shards_parser(prog, f"{prog} --verify" if is_script else "cropfeed verify")
    if is_script:
        parser.add_argument(
            "--verify", metavar="OUT", help="re-read a finished OUT against its manifest, and name what is damaged"
        )
    args = parser.parse_args(arguments)
    if is_script and args.verify:
        _verify(args.verify, args.workers)
        return
    if not args.src or not args.out:
        raise UserError(f"give SRC and --out{', or --verify OUT' if is_script else ''}; see --help")
    beton = BetonSettings(args.ffcv_mode, args.ffcv_max_resolution, args.ffcv_quality, args.ffcv_proportion)
    options = ConvertOptions(
        args.src, args.out, args.profile, args.format, args.shard_size, args.seed, args.strict, not args.skip_md5, beton,
        args.workers, args.engine, args.ray_address, args.shards,
    )  # fmt: skip
    print("\n".join(make_shards(options)))


def verify(arguments: Sequence[str]) -> None:
    """`cropfeed verify`."""
    parser = Parser("Re-read a data set against its manifest, and name what is damaged.", "cropfeed verify")
    parser.add_argument("data", metavar="SHARDS", help="folder or URL of shards")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="threads (default: one a core)")
    args = parser.parse_args(arguments)
    _verify(args.data, args.workers)


def _verify(data: str, workers: int) -> None:
    from .convert.verify import verify as verified
    from .store import files

    problems = verified(files.absolute(data), workers)
    print("\n".join(problems) or f"{data}: every byte is as it was written")
    if problems:
        raise UserError(f"{data}: {len(problems)} damaged", "the command that made it makes damaged shards again")


def doctor(arguments: Sequence[str]) -> None:
    """`cropfeed doctor`."""
    from .doctor import main as examine

    examine(arguments, "cropfeed doctor")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "shards": lambda arguments: shards(arguments, "cropfeed shards"),
    "verify": verify,
    "doctor": doctor,
}


def _command() -> None:
    name, arguments = sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]
    if name in ("", "-h", "--help"):
        print(__doc__.partition("\n\n")[2].strip("\n"))
        return
    if name not in COMMANDS:
        raise UserError(f"cropfeed has no command {name!r}", f"choose from {', '.join(COMMANDS)}")
    COMMANDS[name](arguments)


def main() -> None:
    """The console command `cropfeed`."""
    run_cli(_command)
