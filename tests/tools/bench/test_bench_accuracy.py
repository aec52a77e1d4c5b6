"""tools/bench/bench_accuracy.py: curves into rows, and the same recipe for both sides."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from tests.helpers import ROOT
from tools.bench import bench_accuracy as bench
from tools.bench.peers import plain_train
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
