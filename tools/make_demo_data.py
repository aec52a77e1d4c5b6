"""Draw a small data set whose classes differ only in shape: python tools/make_demo_data.py demo/images

Eight classes of shapes in random colours on random backgrounds, in folders train/CLASS and val/CLASS. The JPEGs resemble those of
ImageNet: sizes around 500 x 375 with a long tail; 76 % 4:4:4, 20 % 4:2:0, 2 % 4:2:2, 2 % grey. The same seed draws the same
images.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import _path  # noqa: F401
import numpy as np
from PIL import Image, ImageDraw

from pipeline.cli import Parser, positive, run_cli
from pipeline.convert.run import end_with_parent
from pipeline.cores import usable_cores
from pipeline.errors import UserError
from pipeline.progress import progress_bar

Canvas = ImageDraw.ImageDraw


def polygon(canvas: Canvas, x: float, y: float, r: float, turn: float, corners: Sequence[float]) -> None:
    """Fill a polygon around (x, y) with corners at equal angles, at these distances in units of r."""
    step = 2 * math.pi / len(corners)
    angles = (turn + i * step for i in range(len(corners)))
    canvas.polygon([(x + r * c * math.cos(a), y + r * c * math.sin(a)) for a, c in zip(angles, corners, strict=True)], fill=255)


def disc(canvas: Canvas, x: float, y: float, r: float, turn: float) -> None:
    canvas.ellipse((x - r, y - r, x + r, y + r), fill=255)


def ring(canvas: Canvas, x: float, y: float, r: float, turn: float) -> None:
    canvas.ellipse((x - r, y - r, x + r, y + r), outline=255, width=max(int(r * 0.35), 1))


triangle = partial(polygon, corners=(1,) * 3)
square = partial(polygon, corners=(1,) * 4)
star = partial(polygon, corners=(1, 0.4) * 5)


def cross(canvas: Canvas, x: float, y: float, r: float, turn: float) -> None:
    for angle in (turn, turn + math.pi / 2):
        dx, dy = r * math.cos(angle), r * math.sin(angle)
        canvas.line((x - dx, y - dy, x + dx, y + dy), fill=255, width=max(int(r * 0.35), 1))


def bars(canvas: Canvas, x: float, y: float, r: float, turn: float) -> None:
    for offset in (-0.8, -0.3, 0.2, 0.7):
        canvas.rectangle((x - r, y + offset * r, x + r, y + (offset + 0.25) * r), fill=255)


def dots(canvas: Canvas, x: float, y: float, r: float, turn: float) -> None:
    for i in range(6):
        cx, cy = x + 0.75 * r * math.cos(turn + i * math.pi / 3), y + 0.75 * r * math.sin(turn + i * math.pi / 3)
        disc(canvas, cx, cy, 0.22 * r, turn)


SHAPES: dict[str, Callable[[Canvas, float, float, float, float], None]] = {
    "bars": bars, "cross": cross, "disc": disc, "dots": dots, "ring": ring, "square": square, "star": star, "triangle": triangle,
}  # fmt: skip


def random_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height: mostly about 500 x 375 in either orientation, some far smaller or larger."""
    long = int(np.clip(500 * math.exp(rng.normal(0, 0.25)), 120, 1600))
    short = int(long * rng.uniform(0.6, 1.0))
    return (long, short) if rng.random() < 0.7 else (short, long)


def background(rng: np.random.Generator, width: int, height: int, colour: np.ndarray) -> Image.Image:
    """`colour` with smooth blotches and fine noise, so that neither colour nor texture identifies the class."""
    blotches = rng.normal(0, 25, (6, 8, 3)) + colour
    image = Image.fromarray(blotches.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.normal(0, 8, (height // 2 + 1, width // 2 + 1, 1)).repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def draw_image(shape: str, rng: np.random.Generator) -> bytes:
    """One JPEG of four copies of a shape."""
    width, height = random_size(rng)
    colours = rng.uniform(0, 255, (2, 3))
    while colours[1].mean() - colours[0].mean() < 70:  # bright on dark, visible in grey, too
        colours = rng.uniform(0, 255, (2, 3))
    image = background(rng, width, height, colours[0])
    mask = Image.new("L", (width, height))
    canvas = ImageDraw.Draw(mask)
    radius = min(width, height) * rng.uniform(0.16, 0.22)
    for row in range(2):  # four copies, so that every crop contains some
        for column in range(2):
            dx, dy = rng.uniform(-0.1, 0.1, 2)
            x, y = (column + 0.5 + dx) * width / 2, (row + 0.5 + dy) * height / 2
            SHAPES[shape](canvas, x, y, radius, rng.uniform(0, 2 * math.pi))
    image.paste(background(rng, width, height, colours[1]), mask=mask)
    kind = rng.random()
    if kind < 0.02:
        image = image.convert("L")
    stream = io.BytesIO()
    subsampling = "4:2:0" if kind > 0.80 else "4:2:2" if kind > 0.78 else "4:4:4"
    image.save(stream, "JPEG", quality=int(rng.integers(75, 97)), **({} if image.mode == "L" else {"subsampling": subsampling}))
    return stream.getvalue()


def draw_class(job: tuple[Path, str, int, int, int]) -> int:
    """Write one class of one split. job: folder, shape, number of images, seed, split number."""
    folder, shape, count, seed, split = job
    folder.mkdir(parents=True)
    for index in range(count):
        rng = np.random.default_rng([seed, split, list(SHAPES).index(shape), index])
        (folder / f"{shape}_{index:05d}.JPEG").write_bytes(draw_image(shape, rng))
    return count


def make_demo_data(out: Path, train: int, val: int, seed: int, workers: int) -> None:
    """Write `out` atomically. train, val: images per class."""
    if out.exists():
        raise UserError(f"{out}: exists already", "give another folder")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    jobs = [
        (partial / split / shape, shape, count, seed, number)
        for number, (split, count) in enumerate((("train", train), ("val", val)))
        for shape in SHAPES
    ]
    total = (train + val) * len(SHAPES)
    bar = progress_bar(total=total, desc="drawing", unit=" images", delayed=False)
    with multiprocessing.get_context("spawn").Pool(workers, end_with_parent) as pool, bar:
        for count in pool.imap_unordered(draw_class, jobs):
            bar.update(count)
    partial.rename(out)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    parser.add_argument("--train", type=positive, default=120, metavar="N", help="training images per class (default: 120)")
    parser.add_argument("--val", type=positive, default=32, metavar="N", help="validation images per class (default: 32)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random numbers (default: 0)")
    parser.add_argument("--workers", type=positive, default=usable_cores(), metavar="N",
                        help="processes that draw images (default: one per usable core)")  # fmt: skip
    args = parser.parse_args()
    make_demo_data(args.out.absolute(), args.train, args.val, args.seed, args.workers)
    print(f"{args.out}: {len(SHAPES)} classes, {args.train} training and {args.val} validation images each")


if __name__ == "__main__":
    run_cli(main)
