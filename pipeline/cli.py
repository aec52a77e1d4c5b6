"""Command lines: the console command `cropfeed`, and what all scripts share.

    cropfeed shards /imagenet --out /data/shards      convert labelled images
    cropfeed verify /data/shards                      re-read every byte of a data set
    cropfeed doctor [/data/shards]                    check whether this machine is ready
    cropfeed profile --loader mydata:make_loader      measure any loader, and compare it with Cropfeed's

`cropfeed COMMAND --help` shows the options of a command.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import starting
from .cores import usable_cores
from .errors import FULL, StorageError, UserError, storage_error
from .outputs import Outputs
from .store.waiting import TIMEOUT_S, set_timeout

_parser: Parser | None = None  # the parser of this process's arguments


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserErrors. --help shows the description with its line breaks."""

    def __init__(self, description: str | None, prog: str | None = None, fields: dict[str, str] | None = None) -> None:
        """fields: library field -> flag, for flags that are not named like their field."""
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self._fields = fields or {}

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        global _parser
        _parser = self
        found, rest = super().parse_known_args(*args, **options)
        for name, value in vars(found).items():  # shells expand ~ at the beginning of a word only, not in --out=~/shards
            if isinstance(value, str | Path) and (str(value) == "~" or str(value).startswith("~/")):
                setattr(found, name, type(value)(os.path.expanduser(value)))
        return found, rest

    def error(self, message: str) -> NoReturn:
        raise UserError(message, "see --help")

    def with_flags(self, text: str) -> str:
        """A message of the library, with field names in backticks replaced by the flags of this command line."""
        flags = {action.dest: action.option_strings[-1] for action in self._actions if action.option_strings} | self._fields
        return re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[1]), text)


def with_flags(text: str) -> str:
    """A message of the library in one line, with field names in backticks replaced by the flags of the command line."""
    text = " ".join(text.split())
    return _parser.with_flags(text) if _parser else text


def positive(text: str) -> int:
    """The argparse type of an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _timeout(text: str) -> float:
    """The argparse type of --read-timeout. It holds from now on, as manifests are read before a loader opens."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, not {text}")
    set_timeout(value)
    return value


def add_cache_flags(parser: argparse._ActionsContainer) -> None:
    """Add the flags of `LoaderSpec.cache`, `cache_gb` and `read_timeout` to a parser or an argument group."""
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder for copies of remote or slow shards (default: $CROPFEED_CACHE, else ~/.cache/cropfeed)",
    )
    parser.add_argument(
        "--cache-gb", type=float, help="size limit of the cache in GB (default: $CROPFEED_CACHE_GB, else 80 %% of the free disk)"
    )
    parser.add_argument(
        "--read-timeout", type=_timeout, default=TIMEOUT_S, metavar="S",
        help="seconds after which a read is repeated, in case the storage hangs (default: %(default)g)",
    )  # fmt: skip


def add_verify_flag(parser: argparse._ActionsContainer) -> None:
    """Add the flag of `LoaderSpec.verify` to a parser or an argument group."""
    parser.add_argument(
        "--verify-reads", dest="verify", action="store_true",
        help="compare the checksum of each image that is read, for storage that returns wrong bytes without an error",
    )  # fmt: skip


def check_writable(file: Path) -> None:
    """Create the file's folder. Raises UserError if the file could not be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file.parent}: cannot be created ({error.strerror})", "choose another folder") from error
    if file.is_dir():
        raise UserError(f"{file}: is a folder", "give the name of a file")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"{file}: cannot be written", "choose another folder")


def _show_flags(record: logging.LogRecord) -> bool:
    """A logging filter: messages of the library show flags instead of field names."""
    record.msg, record.args = with_flags(record.getMessage()), ()
    return True


def run_cli(main: Callable[[], None], is_log: bool = False) -> NoReturn:
    """Run a command-line program: exit 0 on success, 2 with one line on a UserError or an error of the system, 130 on Ctrl-C.

    is_log: its output is only a log, so that the program succeeds even if that cannot be written.
    """
    logging.getLogger("cropfeed").addFilter(_show_flags)
    if signal.getsignal(signal.SIGINT) is starting.end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    starting.end_as_first_process()
    outputs = Outputs(is_log)
    code = _exit_code(main, outputs)
    lost = outputs.lost()
    if isinstance(lost, BrokenPipeError):  # `... | head`
        outputs.discard()
        code = code or int(not is_log)
    elif lost:
        print(f"error: a part of the output is lost ({lost.strerror})", file=sys.stderr)
        code = code or (0 if is_log else 2)
    sys.exit(code)


def _exit_code(main: Callable[[], None], outputs: Outputs) -> int:
    """Run `main`. Prints errors in one line; returns the exit code."""
    try:
        main()
        return 0
    except UserError as error:
        problem = error
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and outputs.lost() is error:
            return 1
        explained = _explained(error)
        if explained is None:
            raise
        problem = explained
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"error: {with_flags(str(problem))}", file=sys.stderr)
    return 2


_AMOUNT = re.compile(r"(?:tried|unable) to allocate [\d.,]+ \w+", re.IGNORECASE)
_NO_MEMORY = re.compile(r"allocate memory|DefaultCPUAllocator|bad_alloc|CUDA error: out of memory|_STATUS_ALLOC_FAILED")


def _explained(error: Exception) -> UserError | None:
    """An error of the system as a UserError: storage, memory. None for anything else, which is a bug."""
    if isinstance(error, OSError):
        if error.errno is None:
            return None
        if error.errno in FULL:
            return storage_error(error, error.filename or "a file")
        return UserError(f"{error.filename}: {error.strerror}" if error.filename else f"the system says: {error}")
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY.search(text):
        amount, on_gpu = _AMOUNT.search(text), re.search("CUDA|CUBLAS|CUDNN", text)
        names = ("batch_size", "image_size", "scales", *(() if on_gpu else ("workers", "threads")))
        known = {action.dest for action in _parser._actions} if _parser else set()
        remedies = ["lower " + " or ".join(f"`{name}`" for name in names if name in known)] if known & {*names} else []
        remedies += ["raise `accumulate`"] if "accumulate" in known else []
        where = "memory of the GPU" if on_gpu else "memory"
        return UserError(f"{where} ran out" + (f" ({amount[0]})" if amount else ""), ", or ".join(remedies))
    return None


SHARDS = """Turn ImageNet, or any labelled images, into shards.

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


def _shards_parser(prog: str, verify: str) -> Parser:
    from .convert.beton import MODES
    from .convert.images import PROFILES
    from .convert.make import ENGINES, FORMATS

    flags = {"check_md5": "--skip-md5", **{name: f"--ffcv-{name}" for name in ("mode", "quality", "proportion")}}
    parser = Parser(SHARDS.format(prog=prog, verify=verify), prog, flags)
    parser.add_argument("src", metavar="SRC", nargs="?", help="images to convert")
    parser.add_argument("--out", help="folder or URL for the shards")
    _add_source_flags(parser)
    what = parser.add_argument_group("what is stored")
    what.add_argument(
        "--profile", choices=PROFILES, default="lossless",
        help="how images are stored. lossless (default): the same pixels in about the same size; only the crop is decoded. "
        "compact: resized to a short side of at most 480, JPEG quality 90, 4:2:0: half the size; only the crop is decoded. "
        "original: the files unchanged; every image is decoded in full",
    )  # fmt: skip
    formats = "webdataset (default): tar files; ffcv: one .beton file per split, for FFCV; both: tar files and .beton files"
    what.add_argument(
        "--reencode", action="store_true",
        help="with --profile lossless: store PNGs and other images than JPEGs as JPEGs of quality 95, of which only the crop is "
        "decoded, instead of without loss",
    )  # fmt: skip
    what.add_argument("--format", choices=FORMATS, default="webdataset", help=formats)
    what.add_argument("--shard-size", type=positive, default=1000, help="images in a shard (default: 1000)")
    what.add_argument("--seed", type=int, default=0, help="seed of the order of the training images (default: 0)")
    what.add_argument("--strict", action="store_true", help="stop at an image that cannot be used, instead of leaving it out")
    what.add_argument("--skip-md5", action="store_true", help="do not verify the official tars first")
    ffcv = parser.add_argument_group("for --format ffcv and both")
    modes = (
        "region (default): the same JPEGs as in the tar files; stock FFCV decodes them in full, Cropfeed only the crop. jpg, raw "
        "and proportion: the modes of FFCV's RGBImageField"
    )
    ffcv.add_argument("--ffcv-mode", choices=MODES, default="region", help=modes)
    ffcv.add_argument(
        "--ffcv-max-resolution",
        type=positive,
        help="with the modes jpg, raw and proportion: shrink larger images to this longest side, pixels (default: no limit)",
    )
    ffcv.add_argument(
        "--ffcv-quality", type=positive, default=90, help="with the modes jpg and proportion: JPEG quality (default: 90)"
    )
    ffcv.add_argument(
        "--ffcv-proportion",
        type=float,
        default=0.5,
        help="with the mode proportion: fraction of the images that are stored as JPEG, the others raw (default: 0.5)",
    )
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
    from .convert.kinds import KINDS

    source = parser.add_argument_group("the source")
    source.add_argument("--source", choices=KINDS, default="", help="kind of SRC (default: recognized, and printed)")
    source.add_argument(
        "--list", default="", metavar="FILE",
        help=".csv, .tsv, .jsonl or .parquet file that lists the images of SRC: columns path, label, and perhaps split",
    )  # fmt: skip
    source.add_argument(
        "--image-column",
        default="",
        help="column of a list's paths, or of the images in parquet files; of WebDataset tars: the images' extension",
    )
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


def shards(arguments: Sequence[str] | None = None, prog: str = "python tools/make_shards.py") -> None:
    """`cropfeed shards`, and tools/make_shards.py, which also has --verify."""
    from .convert.beton import BetonSettings
    from .convert.make import ConvertOptions, make_shards
    from .convert.sources import SourceOptions

    is_script = arguments is None
    parser = _shards_parser(prog, f"{prog} --verify" if is_script else "cropfeed verify")
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
    images = SourceOptions(
        args.source, not args.skip_md5, args.list, args.image_column, args.label_column, args.split_column, args.val_labels,
        args.val_share, args.val_per_class, tuple(args.field_column),
    )  # fmt: skip
    beton = BetonSettings(args.ffcv_mode, args.ffcv_max_resolution, args.ffcv_quality, args.ffcv_proportion)
    options = ConvertOptions(
        args.src, args.out, args.profile, args.format, args.shard_size, args.seed, args.strict,
        images, beton, args.workers, args.engine, args.ray_address, args.shards, args.reencode,
    )  # fmt: skip
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
    from .convert.verify import verify as verified
    from .store import files

    problems = verified(files.absolute(data), workers)
    print("\n".join(problems) or f"{data}: every byte is as it was written")
    if problems:
        raise UserError(f"{data}: {len(problems)} damaged", "repeat the command that made it: it replaces damaged shards")


def doctor(arguments: Sequence[str]) -> None:
    """`cropfeed doctor`."""
    from .doctor import main as examine

    examine(arguments, "cropfeed doctor")


def profile(arguments: Sequence[str], prog: str = "cropfeed profile") -> None:
    """`cropfeed profile`, and tools/profile_pipeline.py --loader."""
    from .profile.command import main as measure

    measure(arguments, prog)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "shards": lambda arguments: shards(arguments, "cropfeed shards"),
    "verify": verify,
    "doctor": doctor,
    "profile": profile,
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
