"""Measures a loader, and beside it Cropfeed's on the same kind of images, in turns within a budget of time."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..cores import usable_cores
from ..errors import UserError
from ..progress import announce_if_slow, progress_bar
from ..store import files
from .batches import Images
from .runner import PATIENCE, Runner
from .worker import DRAIN, Opened, Turn

if TYPE_CHECKING:
    from ..spec import LoaderSpec

SAMPLE = 512  # images to convert, at least one batch
BATCHES = 32  # in a turn, if the budget allows it: an end of a turn between two batches then makes a small error
SHORTEST, LONGEST = 0.5, 3.0  # seconds of a turn, if its batches are quick
WARM = 2.0  # seconds of warm-up
EXPECTED = "give the folder above train/ and val/"
FIRST = 120.0  # seconds in which a first batch must come, or the budget if it is longer
LEAST = 2  # repeats


@dataclass(frozen=True)
class ProfileOptions:
    """What to measure.

    - loader: MODULE:FUNCTION, see `target.find`.
    - images: a folder of images, of which a sample is converted, or of shards; None to measure the loader alone.
    - demand: images per second of a training that takes the batches; None for none.
    - image_size: side of Cropfeed's crops; None for that of the loader's images.
    - geometry: of Cropfeed's crops, a name in `GEOMETRIES`.
    - repeats: of each measurement. budget: seconds for all.
    """

    loader: str
    images: str | None = None
    demand: float | None = None
    image_size: int | None = None
    geometry: str = "rrc"
    repeats: int = 5
    budget: float = 180.0

    def __post_init__(self) -> None:
        if self.demand is not None and not 0 < self.demand < float("inf"):
            raise UserError(f"`demand` must be above 0, not {self.demand:g}")
        if not 0 < self.budget < float("inf"):
            raise UserError(f"`budget` must be above 0, not {self.budget:g}")
        if self.repeats < LEAST:
            raise UserError(f"`repeats` must be at least {LEAST}, not {self.repeats}", "one repeat shows no spread")
        if self.images is not None and not files.is_remote(self.images) and not files.is_folder(files.absolute(self.images)):
            raise UserError(f"`images` {self.images}: no such folder", EXPECTED)


@dataclass
class Measured:
    """A loader, and its turns at full speed (`alone`) and with a consumer (`fed`), one for each repeat."""

    name: str
    runner: Runner
    opened: Opened
    alone: list[Turn] = field(default_factory=list)
    fed: list[Turn] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        used = [turn.cpu_seconds / turn.images for turn in self.alone]
        return {
            "name": self.name,
            "first_batch_s": self.opened.seconds,
            "batch": asdict(self.opened.batch),
            "images_per_s": spread(turn.images / turn.seconds for turn in self.alone),
            "cpu_s_per_image": median(used),
            "cores_used": median(turn.cpu_seconds / turn.seconds for turn in self.alone),
            "wait_share": spread(turn.waited / turn.seconds for turn in self.fed),
            "fed_images_per_s": spread(turn.images / turn.seconds for turn in self.fed),
            "memory_bytes": self.runner.memory,
            "peak_rss_bytes": self.runner.peak,
            "epochs": sum(turn.epochs for turn in self.alone),
        }


def ratios(before: list[Turn], after: list[Turn]) -> Iterator[float]:
    """How many times as many images per second, in each repeat."""
    return (b.images / b.seconds * a.seconds / a.images for a, b in zip(before, after, strict=True))


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Median, lowest and highest value; None if there are none."""
    found = list(values)
    return {"median": median(found), "low": min(found), "high": max(found)} if found else None


def profile(options: ProfileOptions) -> dict[str, Any]:
    """Measure. Returns the figures: `loader` and `cropfeed` (or None) as `Measured.json` gives them; of Cropfeed over the loader,
    the `gain` in images/s at full speed and the `training_gain` with the demand; options and `cores`. Raises UserError."""
    began = time.perf_counter()
    until = began + options.budget
    with ExitStack() as stack:
        loaders = [_open(f"`loader` {options.loader}", options.loader, options, stack)]
        if options.images is not None:
            batch = loaders[0].opened.batch
            if options.image_size is None and batch.side is None:
                raise UserError(f"the loader's batches have the shape {batch.shape}, not that of images", "give `image_size`")
            data = stack.enter_context(shards_of(options.images, max(SAMPLE, batch.count)))
            spec = _spec(data, batch, options)
            loaders.append(_open("Cropfeed", spec, options, stack))
        repeats = _measure(loaders, options, until)
    own, ours = (one.json() for one in loaders) if len(loaders) > 1 else (loaders[0].json(), None)
    first, last = loaders[0], loaders[-1]
    return {
        "version": 1,
        "options": asdict(options) | {"repeats": repeats},
        "cores": usable_cores(),
        "loader": own,
        "cropfeed": ours,
        "gain": spread(ratios(first.alone, last.alone)) if ours else None,
        "training_gain": spread(ratios(first.fed, last.fed)) if ours else None,
        "seconds": time.perf_counter() - began,
    }


def _open(name: str, what: str | LoaderSpec, options: ProfileOptions, stack: ExitStack) -> Measured:
    """Start a loader's process, and wait for its first batch."""
    runner = Runner(name)
    stack.callback(runner.close)
    label = what if isinstance(what, str) else name
    with announce_if_slow(f"waiting for the first batch of {label}"):
        opened = runner.ask("open", what, timeout=max(options.budget, FIRST))
    return Measured(label, runner, opened)


def _measure(loaders: list[Measured], options: ProfileOptions, until: float) -> int:
    """Measure all loaders in turns, in a new order in each repeat. Returns the number of repeats."""
    demands = [None, options.demand] if options.demand else [None]
    ways = [(one, demand) for one in loaders for demand in demands]
    seconds = {}
    with progress_bar(total=len(loaders) + options.repeats * len(ways), desc="measuring", unit=" measurements") as bar:
        for one in loaders:
            warm = one.runner.ask("warm", WARM, timeout=options.budget + PATIENCE)
            bar.update()
            each = warm.seconds / warm.batches
            wished = max(LONGEST, BATCHES * each / (1 - DRAIN))
            seconds[one.name] = max(SHORTEST, min(wished, (until - time.perf_counter()) / (options.repeats * len(ways))))
        order, started = random.Random(0), time.perf_counter()
        for repeat in range(options.repeats):
            now = time.perf_counter()
            if repeat >= LEAST and now + (now - started) / repeat > until:
                return repeat
            for one, demand in order.sample(ways, len(ways)):
                turn = one.runner.ask("run", seconds[one.name], demand, timeout=seconds[one.name] + options.budget + PATIENCE)
                (one.fed if demand else one.alone).append(turn)
                bar.update()
    return options.repeats


def _spec(data: str, batch: Images, options: ProfileOptions) -> LoaderSpec:
    """Cropfeed's batches with the size, dtype and device of the loader's."""
    import torch

    from ..plan.geometry import choose_geometry
    from ..spec import PRECISIONS, LoaderSpec
    from ..store.shards import Manifest

    splits = Manifest(data).splits
    split = "train" if "train" in splits else next(iter(splits))
    size = options.image_size or batch.side or 0
    dtypes = [*PRECISIONS.values(), torch.uint8]
    return LoaderSpec(
        data,
        split,
        batch_size=batch.count,
        image_size=size,
        geometry=choose_geometry(options.geometry, None, size),
        normalization="channel",
        alpha_std=0.0,
        dtype=next((dtype for dtype in dtypes if str(dtype) == f"torch.{batch.dtype}"), torch.float32),
        device=batch.device if batch.device.startswith("cuda") else "cpu",
        threads=usable_cores(),
    )


@contextmanager
def shards_of(images: str, count: int) -> Iterator[str]:
    """`images` itself if it is a data set of shards; otherwise temporary shards of a sample of its training images."""
    if files.exists(files.join(images, "manifest.json")):
        yield images
        return
    from ..convert.make import ConvertOptions, make_shards
    from ..engines.warm_up import warm_up

    def tell(line: str) -> None:
        print(f"{line}; converting at most {count} of them to temporary shards", file=sys.stderr)

    with tempfile.TemporaryDirectory(prefix="cropfeed-profile-") as folder:
        out = str(Path(folder) / "shards")
        try:
            make_shards(ConvertOptions(images, out, shard_size=max(1, count // 8)), tell, count)
        except UserError as error:
            raise UserError(error.problem, f"{EXPECTED}, or convert it (cropfeed shards --help) and give the shards") from error
        warm_up()  # compiling, which happens once on a machine, is not part of the first batch
        yield out
