"""tools/bench/bench_accuracy.py: the figures of validation curves, and that all contenders train with the same recipe."""

from __future__ import annotations

import csv
import hashlib
import io
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
from tools.bench.recording import COLUMNS, RESULTS
from training.command_line import parse_arguments
from training.metrics import read_metrics
from training.options import make_schedule, make_sizes

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


def joined(values: Path) -> list[dict[str, str]]:
    """Every figure with the description of its run."""
    with values.with_name(f"{values.stem}_runs.csv").open(newline="") as stream:
        runs = {row.pop("id"): row for row in csv.DictReader(stream)}
    with values.open(newline="") as stream:
        return [{**runs[row.pop("run")], **row} for row in csv.DictReader(stream)]


def rows_of(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    return {(row["engine"], row["metric"]): row for row in joined(path)}


# Rows


def write_run(work: Path, contender: str, seed: int, tops: list[float], seconds_per_epoch: float, start: float) -> None:
    """Write a finished run as the scripts do, with a row of training and a row of validation for each epoch."""
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
    # Only one seed reaches 90 %. The rows say so, and there is no mean over the seeds that reach it.
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


def test_a_row_for_each_run_and_rows_are_appended(tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for contender in ("cropfeed", "plain"):
        write_run(tmp_path, contender, 0, [0.5, 0.8], 60, 30)
    given = ("--shards", "SHARDS", "--images", "IMAGES", "--work", tmp_path, "--recipe", recipe, "--seeds", 0, "--rows-only")
    for _ in range(2):
        run_main(monkeypatch, *given, "--results", tmp_path / "rows.csv")
    with (tmp_path / "rows_runs.csv").open(newline="") as stream:
        runs = list(csv.DictReader(stream))
    assert [run["id"] for run in runs] == list("123456")
    assert [run["engine"] for run in runs] == ["cropfeed", "plain", "cropfeed / plain"] * 2
    rows = joined(tmp_path / "rows.csv")
    assert list(rows[0]) == list(COLUMNS)
    assert len(rows) % 2 == 0
    assert rows[: len(rows) // 2] == rows[len(rows) // 2 :]


def test_the_recorded_results_are_complete() -> None:
    """424 rows were recorded before accuracy.csv was split into two tables. Joined, they have the same bytes as before."""
    rows = joined(RESULTS / "accuracy.csv")
    assert len(rows) >= 424
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows[:424])
    assert len({row["engine"] + row["spec"] + row["commit"] for row in rows[:424]}) == 21
    digest = hashlib.sha256(text.getvalue().encode()).hexdigest()
    assert digest == "6f13994aa1dbcecf29b72ebc417e68c45b6982e6370e3f2ad39d4a60d29f9302"


def test_missing_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no finished run there; start this without --rows-only"):
        bench.finished_runs(tmp_path, bench.CONTENDERS, [0])
    write_run(tmp_path, "plain", 0, [0.5], 1, 1)
    with pytest.raises(UserError, match=r"plain-seed1: no finished run"):
        bench.finished_runs(tmp_path, bench.CONTENDERS, [0, 1])
    (tmp_path / "plain-seed0" / "run" / "metrics.csv").write_text("step,epoch,seconds,val_top1\n")
    with pytest.raises(UserError, match="contains no validation"):
        bench.finished_runs(tmp_path, ["plain"], [0])


# The runs


def test_finished_runs_are_kept_and_stopped_ones_start_over(tmp_path: Path) -> None:
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
        bench.run_once(folder, bad, [core])
    assert (folder / "run").exists()
    bench.run_once(folder, good, [core])  # its code asserts that the stopped run's output is gone
    assert (folder / "run" / "seen").read_text() == f"[{core}] 1"
    assert os.sched_getaffinity(0) == before
    (folder / "run" / "seen").write_text("kept")
    bench.run_once(folder, good, [core])
    assert (folder / "run" / "seen").read_text() == "kept"
    with pytest.raises(UserError, match="holds a run of another command"):
        bench.run_once(folder, bad, [core])
    with pytest.raises(UserError, match="--cores 4095"), bench.pinned([4095]):
        pass


def plain_options(words: list[str], like_recipe: bool) -> plain_train.PlainOptions:
    return bench.plain_options(parse_arguments(None, words), Path("D"), like_recipe, 2, 1)


def test_the_plain_script_gets_the_recipe(recipe: Path) -> None:
    words = ["--recipe", str(recipe), "--data", "D", "--seed", "3", "--lr", "0.2", "--scale-lr", "-b", "512"]
    words += ["--start-size", "16"]
    words += ["--label-smoothing", "0.1", "--ema", "0.99", "--no-norm-decay", "--flip-test", "--eval-size", "40", "--compile"]
    words += ["--epochs", "8", "--ramp", "0.25", "0.75", "--image-size", "48", "--scale", "48", "64"]
    args = parse_arguments(None, words)
    sizes = make_sizes(args, 1)
    assert isinstance(sizes, tuple)
    for like_recipe in (False, True):
        plain = plain_options(words, like_recipe)
        assert plain_train.PlainOptions.of(plain.json()) == plain
        for name in bench.SAME:
            if name != "area":
                assert getattr(plain, name) == getattr(args, name), name
        assert plain.lr == 0.4
        assert plain.seed == 3
        assert (plain.precision, plain.channels_last) == (("bf16", True) if like_recipe else ("no", False))
        assert plain.compile == ("default" if like_recipe else None)
        changes = [(epoch, plain_train.size_at(plain, epoch)) for epoch in range(8)]
        assert changes == [(epoch, dict(sizes).get(epoch, changes[epoch - 1][1]) if like_recipe else 48) for epoch in range(8)]


def test_options_that_the_plain_script_lacks_are_refused(recipe: Path) -> None:
    words = ["--recipe", str(recipe), "--data", "D"]
    for more in (
        ["--accumulate", "2"],
        ["--schedule", "step"],
        ["--mixup", "0.2"],
        ["--optimizer", "lars"],
        ["--drop-path", "0.1"],
    ):
        with pytest.raises(UserError, match=f"no {more[0]}"):
            plain_options([*words, *more], True)
    with pytest.raises(UserError, match="--seed is not allowed after"):
        bench.parse(["--shards", "S", "--images", "I", "--work", "W", "--", "--seed=1"])


def test_contenders_take_turns() -> None:
    assert [bench.rotated(bench.CONTENDERS, number)[0] for number in range(4)] == ["cropfeed", "plain", "plain bf16", "cropfeed"]


def test_cropfeed_is_train_py_with_the_recipe() -> None:
    options = bench.parse(["--shards", "S", "--images", "I", "--work", "W", "--cores", "0", "1", "--", "--epochs", "3"])
    found = bench.command("cropfeed", 2, options)
    assert found == [str(ROOT / "train.py"), "--recipe", "imagenette", "--data", "S", "--seed", "2", "--epochs", "3"]


@pytest.mark.slow
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
    options = plain_train.PlainOptions.of(command[-1])
    assert (options.seed, options.workers, options.threads) == (5, 1, 1)
