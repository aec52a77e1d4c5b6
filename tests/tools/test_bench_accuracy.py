"""tools/bench_accuracy.py: curves into rows, the same recipe for both sides; and tools/peers/plain_train.py, the other side."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import bench_accuracy as bench
import numpy as np
import pytest
import torch
from peers import plain_pictures, plain_train
from PIL import Image

from model import ARCHS
from pipeline.errors import UserError
from tests.helpers import ROOT, picture
from training.metrics import read_metrics
from training.options import make_schedule, make_sizes, parse_arguments

pytestmark = pytest.mark.usefixtures("one_core")

RECIPE = """
arch = "resnet20"
epochs = 1
batch-size = 20
lr = 0.1
schedule = "cosine"
warmup = 0.5
weight-decay = 0.002
image-size = 32
scale = [36, 48]
alpha-std = 0
mean = "channel"
mixed-precision = "bf16"
log-every = 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def run_main(monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_accuracy.py", *map(str, words)])
    bench.main()


def rows_of(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    with path.open(newline="") as stream:
        return {(row["engine"], row["metric"]): row for row in csv.DictReader(stream)}


# Rows


def write_run(work: Path, contender: str, seed: int, tops: list[float], seconds_per_epoch: float, start: float) -> None:
    """A finished run as the scripts leave it: a row of training and one of validation in each epoch."""
    folder = bench.run_folder(work, contender, seed)
    (folder / "run").mkdir(parents=True)
    lines = ["step,epoch,seconds,lr,train_loss,val_top1"]
    for number, top1 in enumerate(tops, 1):
        lines += [f"{10 * number},{number},{seconds_per_epoch * number - 1},0.1,2.0,"]
        lines += [f"{10 * number},{number},{seconds_per_epoch * number},,,{top1}"]
    (folder / "run" / "metrics.csv").write_text("\n".join(lines) + "\n")
    wall = seconds_per_epoch * len(tops) + start
    (folder / "finished.json").write_text(json.dumps({"command": [], "cores": [0], "wall_seconds": wall}))


def test_rows_of_hand_made_curves(tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    write_run(work, "cropfeed", 0, [0.5, 0.8, 0.79, 0.91], 60, 30)
    write_run(work, "cropfeed", 1, [0.6, 0.7, 0.85, 0.88], 66, 36)
    write_run(work, "plain", 0, [0.5, 0.799, 0.8, 0.9], 120, 12)
    write_run(work, "plain", 1, [0.6, 0.7, 0.8, 0.84], 132, 12)
    given = ("--shards", "SHARDS", "--images", "IMAGES", "--work", work, "--recipe", recipe, "--seeds", 0, 1, "--rows-only")
    run_main(monkeypatch, *given, "--results", tmp_path / "rows.csv")
    rows = rows_of(tmp_path / "rows.csv")

    def values(engine: str, metric: str) -> tuple[float, float, float, int]:
        row = rows[(engine, metric)]
        return float(row["value"]), float(row["low"]), float(row["high"]), int(row["repeats"])

    assert {engine for engine, _ in rows} == {"cropfeed", "plain", "cropfeed / plain"}
    assert values("cropfeed", "epochs to 80 %") == (2.5, 2, 3, 2)
    assert values("cropfeed", "minutes to 80 %") == pytest.approx((2.65, 2, 3.3, 2))
    assert values("cropfeed", "minutes to 80 %, mean")[0] == pytest.approx(2.65)
    assert values("cropfeed", "minutes to 80 %, standard deviation")[0] == pytest.approx(1.3 / math.sqrt(2), rel=1e-5)
    # 90 % by one seed alone: said so, not dropped, and no mean over the lucky ones.
    assert values("cropfeed", "runs reaching 90 %")[0] == 1
    assert values("cropfeed", "minutes to 90 %") == (math.inf, 4, math.inf, 2)
    assert ("cropfeed", "minutes to 90 %, mean") not in rows
    assert values("plain", "runs reaching 85 %")[0] == 1
    assert values("plain", "last top-1, %") == pytest.approx((87, 84, 90, 2))
    assert values("plain", "minutes") == pytest.approx((8.4, 8, 8.8, 2))
    assert values("plain", "minutes, start included") == pytest.approx((8.6, 8.2, 9, 2))
    both = "cropfeed / plain"
    assert values(both, "minutes to 80 %, ratio") == pytest.approx((5 / 12, 2 / 6, 0.5, 2), rel=1e-5)
    assert values(both, "seeds with which both reach 90 %")[0] == 1
    assert values(both, "minutes to 90 %, ratio") == (0.5, 0.5, 0.5, 1)
    assert values(both, "minutes, ratio") == (0.5, 0.5, 0.5, 2)
    assert values(both, "minutes, start included, ratio")[1:3] == pytest.approx((270 / 492, 300 / 540), rel=1e-5)


def test_missing_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no finished run there; start this without --rows-only"):
        bench.finished_runs(tmp_path, bench.CONTENDERS, [0])
    write_run(tmp_path, "plain", 0, [0.5], 1, 1)
    with pytest.raises(UserError, match=r"plain-seed1: no finished run"):
        bench.finished_runs(tmp_path, bench.CONTENDERS, [0, 1])
    (tmp_path / "plain-seed0" / "run" / "metrics.csv").write_text("step,epoch,seconds,val_top1\n")
    with pytest.raises(UserError, match="holds no validation"):
        bench.finished_runs(tmp_path, ["plain"], [0])


# The runs


def test_a_run_is_done_once_and_a_stopped_one_anew(tmp_path: Path) -> None:
    code = """
import os, pathlib, sys
output = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
assert not output.exists()
output.mkdir()
(output / "seen").write_text(f"{sorted(os.sched_getaffinity(0))} {os.environ['OMP_NUM_THREADS']}")
sys.exit(sys.argv[1])
"""
    core = min(os.sched_getaffinity(0))
    good, bad = ["-c", code, ""], ["-c", code, "the disk is full"]
    good[1] = code.replace("sys.exit(sys.argv[1])", "")
    before, folder = os.sched_getaffinity(0), tmp_path / "one"
    with pytest.raises(UserError, match=r"log.txt: the run ended with exit code 1: the disk is full"):
        bench.bring_to_end(folder, bad, [core], 1)
    assert (folder / "run").exists()
    bench.bring_to_end(folder, good, [core], 1)  # the stopped one is gone, else it would fail
    assert (folder / "run" / "seen").read_text() == f"[{core}] 1"
    assert os.sched_getaffinity(0) == before
    (folder / "run" / "seen").write_text("kept")
    bench.bring_to_end(folder, good, [core], 1)
    assert (folder / "run" / "seen").read_text() == "kept"
    with pytest.raises(UserError, match="was made by another command"):
        bench.bring_to_end(folder, bad, [core], 1)
    with pytest.raises(UserError, match="--cores 4095"), bench.pinned([4095]):
        pass


def plain_options(words: list[str], with_net: bool) -> Any:
    return plain_train.parser().parse_args(["--data", "D", "--output", "O", *bench.plain_words(words, with_net)])


def test_both_sides_have_the_recipe(recipe: Path) -> None:
    words = [
        "--recipe",
        str(recipe),
        "--data",
        "D",
        "--seed",
        "3",
        "--lr",
        "0.2",
        "--scale-lr",
        "-b",
        "512",
        "--start-size",
        "16",
    ]
    words += ["--label-smoothing", "0.1", "--ema", "0.99", "--no-norm-decay", "--flip-test", "--eval-size", "40", "--compile"]
    words += ["--epochs", "8", "--ramp", "0.25", "0.75", "--image-size", "48", "--scale", "48", "64"]
    args = parse_arguments(None, words)
    sizes = make_sizes(args, 1)
    assert isinstance(sizes, tuple)
    for with_net in (False, True):
        plain = plain_options(words, with_net)
        for name in bench.SAME:
            if name != "area":
                assert getattr(plain, name) == getattr(args, name), name
        assert plain.lr == 0.4
        assert plain.seed == 3
        assert (plain.precision, plain.channels_last) == (("bf16", True) if with_net else ("no", False))
        assert plain.compile == ("default" if with_net else None)
        changes = [(epoch, plain_train.size_at(plain, epoch)) for epoch in range(8)]
        assert changes == [(epoch, dict(sizes).get(epoch, changes[epoch - 1][1]) if with_net else 48) for epoch in range(8)]


def test_what_the_plain_script_cannot_follow_is_refused(recipe: Path) -> None:
    words = ["--recipe", str(recipe), "--data", "D"]
    for more in (
        ["--accumulate", "2"],
        ["--schedule", "step"],
        ["--mixup", "0.2"],
        ["--optimizer", "lars"],
        ["--drop-path", "0.1"],
    ):
        with pytest.raises(UserError, match=f"no {more[0]}"):
            bench.plain_words([*words, *more], True)
    with pytest.raises(UserError, match="--seed may not stand behind"):
        bench.split_command(["--work", "W", "--", "--seed=1"])


def test_contenders_take_turns() -> None:
    assert [bench.turn(bench.CONTENDERS, number)[0] for number in range(4)] == ["cropfeed", "plain", "plain bf16", "cropfeed"]


def test_ours_is_train_py_with_the_recipe(tmp_path: Path) -> None:
    args = bench.parser().parse_args(["--shards", "S", "--images", "I", "--work", str(tmp_path), "--cores", "0", "1"])
    found = bench.command("cropfeed", 2, args, ["--epochs", "3"])
    assert found == [str(ROOT / "train.py"), "--recipe", "imagenette", "--data", "S", "--seed", "2", "--epochs", "3"]


def test_a_plain_run_from_start_to_rows(
    image_folder: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, work = min(os.sched_getaffinity(0)), tmp_path / "work"
    given = ("--shards", "SHARDS", "--images", image_folder, "--work", work, "--recipe", recipe, "--seeds", 5, "--cores", core)
    more = ("--contenders", "plain bf16", "--levels", 1, 101, "--results", tmp_path / "rows.csv")
    run_main(monkeypatch, *given, *more)
    rows = rows_of(tmp_path / "rows.csv")
    assert rows[("plain bf16", "runs reaching 1 %")]["value"] == "1"
    assert rows[("plain bf16", "minutes to 101 %")]["value"] == "inf"
    whole, training = (float(rows[("plain bf16", name)]["value"]) for name in ("minutes, start included", "minutes"))
    assert whole > training > 0
    folder = bench.run_folder(work, "plain bf16", 5)
    schedule = make_schedule(parse_arguments(None, ["--recipe", str(recipe), "--data", "D"]), 3)
    found = [(row["step"], float(row["lr"])) for row in read_metrics(folder / "run" / "metrics.csv") if row["lr"]]
    assert [step for step, _ in found] == ["1", "2", "3"]
    assert [rate for _, rate in found] == pytest.approx([schedule.rate(step, ()) for step in range(3)])
    command = json.loads((folder / "finished.json").read_text())["command"]
    assert command[-4:] == ["--workers", "1", "--threads", "1"]


# The plain script


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_learning_rates_are_train_pys(kind: str) -> None:
    words = ["--data", "D", "--schedule", kind, "--epochs", "3", "--warmup", "0.7", "--lr", "0.5"]
    schedule = make_schedule(parse_arguments(None, words), 10)
    rates = [0.5 * plain_train.learning_rate(step, kind, 7.0, 30) for step in range(30)]
    assert rates == pytest.approx([schedule.rate(step, ()) for step in range(30)])


def normalized(pixels: Any) -> Any:
    """(H, W, 3) of 255 -> (3, H, W), by ImageNet's published mean and deviation."""
    return ((np.asarray(pixels, np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1)


def test_jitter_draws_every_crop_alike() -> None:
    image = Image.fromarray(picture(20, 24))
    resized = image.resize((12, 10), Image.Resampling.BILINEAR)
    expected = {}
    for top in range(2):
        for left in range(4):
            crop = np.asarray(resized)[top : top + 9, left : left + 9]
            expected[(top, left, False)], expected[(top, left, True)] = normalized(crop), normalized(crop[:, ::-1])
    random.seed(1)
    seen: Counter[tuple[int, int, bool]] = Counter()
    for _ in range(800):
        found = plain_pictures.training_transform(image, partial(plain_pictures.jitter, size=9, low=10, high=10)).numpy()
        (which,) = [key for key, pixels in expected.items() if np.abs(pixels - found).max() < 1e-5]
        seen[which] += 1
    assert sum((seen[key] - 50) ** 2 / 50 for key in expected) < 37.7  # chi-squared of 15 degrees of freedom, p = 0.001


def test_jitter_draws_every_short_side_alike() -> None:
    image = Image.fromarray(picture(40, 50))
    random.seed(2)
    # A crop as large as the lowest short side: the rows that differ from the whole image tell the scale.
    sizes = {short: np.asarray(image.resize((int(short * 50 / 40), short), Image.Resampling.BILINEAR)) for short in (8, 9, 10)}
    seen: Counter[int] = Counter()
    for _ in range(300):
        crop = np.asarray(plain_pictures.jitter(image, 8, 8, 10))
        for short, pixels in sizes.items():
            windows = np.lib.stride_tricks.sliding_window_view(pixels, (8, 8, 3)).reshape(-1, 8, 8, 3)
            seen[short] += bool((windows == crop).all((1, 2, 3)).any())
    assert sum(seen.values()) == 300
    assert sum((count - 100) ** 2 / 100 for count in seen.values()) < 13.8  # 2 degrees of freedom, p = 0.001


def test_resized_crops_lie_in_their_ranges() -> None:
    height, width, size = 160, 200, 20
    y, x = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))  # pixels that know where they are
    random.seed(0)
    shares, aspects = [], []
    for _ in range(400):
        pixels = np.asarray(plain_pictures.resized_crop(image, size, 0.08, 1)).astype(float)
        wide, high = (np.ptp(pixels[2:-2, 2:-2, channel]) / (size - 5) * size for channel in (0, 1))
        shares.append(wide * high / (width * height))
        aspects.append(wide / high)
    assert 0.07 < min(shares) < 0.11
    assert 0.9 < max(shares) < 1.05
    assert 0.7 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.4
    strip = Image.fromarray(picture(20, 1000))
    middle = strip.crop((486, 0, 513, 20)).resize((size, size), Image.Resampling.BILINEAR)  # 4:3, torchvision's last resort
    assert np.array_equal(np.asarray(plain_pictures.resized_crop(strip, size, 0.08, 1)), np.asarray(middle))


def test_validation_takes_the_centre(tmp_path: Path) -> None:
    pixels = picture(50, 70)
    transform = plain_train.evaluation_transform(options(tmp_path, tmp_path, "--eval-size", 28))
    found = transform(Image.fromarray(pixels)).numpy()
    resized = np.asarray(Image.fromarray(pixels).resize((44, 32), Image.Resampling.BILINEAR))  # 28 * 256 / 224; int(32 * 70 / 50)
    assert np.abs(found - normalized(resized[2:30, 8:36])).max() < 1e-5
    assert transform(Image.fromarray(pixels.transpose(1, 0, 2))).shape == (3, 28, 28)


def options(images: Path, output: Path, *more: Any) -> Any:
    given = ("--data", images, "--output", output, "--arch", "resnet20", "--image-size", 32, "--batch-size", 20, "--workers", 0)
    return plain_train.parser().parse_args([*map(str, given), *map(str, more)])


def test_the_plain_script_trains(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    forward = plain_train.Trainer.step

    def step(self: plain_train.Trainer, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(images.shape))
        return forward(self, images, labels)

    monkeypatch.setattr(plain_train.Trainer, "step", step)
    more = ("--epochs", 2, "--start-size", 16, "--ramp", 0, 1, "--scale", 32, 40, "--log-every", 2, "--channels-last")
    plain_train.train(options(image_folder, tmp_path, *more))
    assert shapes == [(20, 3, 16, 16)] * 3 + [(20, 3, 32, 32)] * 3
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(row["step"], bool(row["train_loss"])) for row in rows] == [
        ("2", True),
        ("3", False),
        ("4", True),
        ("6", True),
        ("6", False),
    ]
    assert [float(row["epoch"]) for row in rows if row["val_top1"]] == [1, 2]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    net = ARCHS["resnet20"](num_classes=3).eval()
    net.load_state_dict(torch.load(tmp_path / "model.pt"))
    right = count = 0
    for label, folder in enumerate(sorted((image_folder / "val").iterdir())):
        for path in folder.iterdir():
            with torch.inference_mode():
                image = plain_pictures.validation_transform(Image.open(path).convert("RGB"), 32, 37)
                right += int(net(image[None]).argmax()) == label
            count += 1
    assert float(rows[-1]["val_top1"]) == pytest.approx(right / count)


def test_smoothing_average_and_decay(image_folder: Path, tmp_path: Path) -> None:
    more = ("--epochs", 2, "--label-smoothing", 0.3, "--ema", 0.2, "--weight-decay", 0.5, "--no-norm-decay")
    trainer = plain_train.Trainer(options(image_folder, tmp_path, *more))
    images, labels = torch.randn(20, 3, 32, 32), torch.arange(20) % 3
    before = {name: value.clone() for name, value in trainer.net.named_parameters()}
    logits = trainer.net(images).detach()
    shares = 0.7 * torch.eye(3)[labels] + 0.3 / 3
    assert float(trainer.step(images, labels)) == pytest.approx(float(-(shares * logits.log_softmax(1)).sum(1).mean()), rel=1e-5)
    rate = 0.1 * plain_train.learning_rate(0, "cosine", 0, 6)
    for name, value in trainer.net.named_parameters():
        decay = 0.5 if value.ndim > 1 else 0.0
        assert value.grad is not None
        expected = before[name] - rate * (value.grad + decay * before[name])
        torch.testing.assert_close(value, expected)
    average = {name: value.clone() for name, value in trainer.net.state_dict().items()}
    for decay in (2 / 11, 0.2):  # (1 + t) / (10 + t) at the t-th update, at most 0.2
        trainer.step(images, labels)
        assert trainer.average is not None
        for name, value in trainer.average.module.state_dict().items():
            if value.is_floating_point():
                average[name] = decay * average[name] + (1 - decay) * trainer.net.state_dict()[name]
                torch.testing.assert_close(value, average[name])


def test_flip_test_adds_the_mirror_images_logits(image_folder: Path, tmp_path: Path) -> None:
    """A net that sees the left half alone: with the mirror image, both."""
    trainer = plain_train.Trainer(options(image_folder, tmp_path, "--flip-test"))

    class Left(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            half = images[:, :, :, :16].mean((1, 2, 3))
            return torch.stack([half, torch.zeros_like(half), -half], dim=1)

    trainer.model = Left()
    right = 0
    val_set = trainer.val_loader.dataset
    for image, label in (val_set[index] for index in range(21)):
        right += (0 if float(image.mean()) > 0 else 2) == label
    assert trainer.validate() == pytest.approx(right / 21)


def test_folders_that_do_not_fit_are_refused(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images there"):
        plain_train.Trainer(options(tmp_path, tmp_path))
    with pytest.raises(UserError, match="do not fill a batch of 200"):
        plain_train.Trainer(options(image_folder, tmp_path, "--batch-size", 200))
