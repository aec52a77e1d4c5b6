"""The profiler end to end, with planted faults: it finds the bottleneck, and the predicted gain is near the measured one.

Slow parts wait instead of computing, so that the speed of the machine and its load hardly matter.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from pipeline.cli import with_flags
from pipeline.errors import UserError
from pipeline.pixels.decoder import Decoder
from pipeline.plan.geometry import ScaleJitter
from pipeline.spec import LoaderSpec
from tests.helpers import ROOT, run_script, without_progress
from tools import profile_pipeline
from tools.profiler import profile as profiling
from tools.profiler.html import html
from tools.profiler.options import ProfileOptions
from tools.profiler.planted import Planted
from tools.profiler.profile import profile
from tools.profiler.table import sections, table

SCHEMA = json.loads((ROOT / "tools" / "profiler" / "schema.json").read_text())
DEMAND = 500.0  # images a second
NEAR = 0.2  # tolerance of predicted over measured gain


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores on any machine, and fewer loaders, to save time."""
    monkeypatch.setattr(profiling, "usable_cores", lambda: 2)
    monkeypatch.setattr(profiling, "PREFETCHES", (2,))


@pytest.fixture
def slow_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding takes 2.5 ms longer per image and thread."""

    def slowed(method: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any) -> Any:
            time.sleep(0.0025)
            return method(*arguments)

        return slow

    for name in ("make_views", "decode_region"):
        monkeypatch.setattr(Decoder, name, slowed(getattr(Decoder, name)))


def options(shards: Path, **changes: Any) -> ProfileOptions:
    spec = LoaderSpec(shards, batch_size=8, image_size=32, geometry=ScaleJitter(36, 68), engine="cpu", threads=2)
    return replace(ProfileOptions(spec, engines=("cpu",), repeats=3, seconds=0.2, apply=True), **changes)


def checked(found: dict[str, Any]) -> dict[str, Any]:
    """Assert that the profile is valid by the schema, and that terminal and HTML show the same figures. Returns it."""
    jsonschema.validate(found, SCHEMA)
    text = " ".join(table(found).split())
    page = " ".join(re.sub(r"<[^>]*>", " ", html(found, {})).split())
    for section in sections(found):
        for row in section.rows:
            for cell in row.cells:
                assert cell in text
                assert cell in page
    return found


def assert_predicted(found: dict[str, Any], repeats: int = 3) -> None:
    applied = found["applied"]
    assert applied["predicted_gain"] == found["verdict"]["predicted_gain"]
    assert len(applied["gains"]) == repeats
    assert abs(applied["predicted_gain"] / applied["measured_gain"] - 1) <= NEAR, applied


@pytest.mark.slow
def test_slow_storage(small_shards: Path) -> None:
    """Reading is slow, but a copy in memory is not slowed down. The emulated train step waits instead of computing."""
    found = checked(profile(options(small_shards, demand=DEMAND / 2, planted=Planted("reader", 0.2))))
    verdict = found["verdict"]
    assert (verdict["limit"], verdict["stage"], verdict["remedy"]) == ("input", "read warm", "cache")
    assert "The slowest stage is reading" in verdict["text"]
    assert found["demand"]["wait_share"] > 0.5
    assert 0.12e6 < found["storage"]["bytes_per_s"] < 0.24e6
    assert found["made"]["planted"] == "reads limited to 0.2 MB/s"
    assert_predicted(found)


@pytest.mark.slow
@pytest.mark.usefixtures("slow_decoding")
def test_one_decoding_thread(small_shards: Path) -> None:
    """Five repeats: with three, a gain of 1.9 is not significant if another test occupies the cores during one of them."""
    spec = replace(options(small_shards).spec, threads=1)
    found = checked(profile(options(small_shards, spec=spec, demand=4 * DEMAND, repeats=5)))
    verdict = found["verdict"]
    assert (verdict["limit"], verdict["stage"], verdict["remedy"]) == ("input", "decode", "threads")
    assert verdict["change"] == "--threads 2"
    assert "with 1 thread on 2 cores" in verdict["text"]
    assert_predicted(found, repeats=5)


@pytest.mark.slow
def test_slow_model(small_shards: Path) -> None:
    found = checked(profile(options(small_shards, demand=DEMAND, planted=Planted("model", 10))))
    verdict = found["verdict"]
    assert (verdict["limit"], verdict["stage"], verdict["remedy"]) == ("compute", "model", "device")
    assert 60 < found["demand"]["images_per_s"] < 84  # 12 ms per image
    assert found["demand"]["wait_share"] < 0.05
    assert_predicted(found)


@pytest.mark.slow
@pytest.mark.usefixtures("slow_decoding")
def test_without_a_demand_the_verdict_is_on_the_loader(small_shards: Path) -> None:
    found = checked(profile(options(small_shards)))
    assert found["demand"] is None
    assert (found["verdict"]["limit"], found["verdict"]["stage"]) == ("input", "decode")
    assert 300 < found["images_per_s"] < 800  # two threads, 2.5 ms per image
    assert found["images_per_s"] == next(
        row["images_per_s"] for row in found["loaders"] if (row["threads"], row["prefetch"]) == (2, 2)
    )


@pytest.mark.slow
def test_the_script_with_model_tuning_and_plan(small_shards: Path, tmp_path: Path) -> None:
    """JSON, report, tuned settings, the plan of a cluster, and a real model."""
    file, report, tuned = tmp_path / "out" / "p.json", tmp_path / "report", tmp_path / "tuned.json"
    result = without_progress(
        run_script(
            "tools/profile_pipeline.py", small_shards, "--arch", "resnet18", "--batch-size", 8, "--image-size", 32,
            "--scale", 36, 68, "--engines", "cpu", "--repeats", 2, "--seconds", 0.1, "--tune", "--gpus", 8, "--hosts", 4,
            "--json", file, "--report", report, CROPFEED_TUNED=str(tuned),
        )
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert re.match(r"profiling takes about \d+ seconds", result.stderr)
    found = checked(json.loads(file.read_text()))
    assert found["demand"]["what"] == "resnet18, float32"
    assert found["ahead"]["images_per_s"] == pytest.approx(32 * found["demand"]["images_per_s"])
    (entry,) = json.loads(tuned.read_text()).values()
    assert (entry["threads"], entry["prefetch"]) == (found["tuned"]["threads"], found["tuned"]["prefetch"])
    assert table(found) in result.stdout
    assert {path.name for path in report.iterdir()} == {"report.html"}


@pytest.mark.slow
def test_a_folder_of_images(image_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    result = run_script(
        "tools/profile_pipeline.py", image_folder / "train", "--batch-size", 8, "--image-size", 32, "--scale", 36, 68,
        "--engines", "cpu", "--repeats", 2, "--seconds", 0.05, "--json", file,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = checked(json.loads(file.read_text()))
    assert (found["data"]["profile"], found["data"]["images"]) == ("lossless", 60)


@pytest.mark.slow
def test_padded_crops(small_shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    result = run_script(
        "tools/profile_pipeline.py", small_shards, "--geometry", "pad", "--batch-size", 8, "--image-size", 32,
        "--engines", "cpu", "--repeats", 2, "--seconds", 0.05, "--json", file,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = checked(json.loads(file.read_text()))
    assert found["spec"]["geometry"] == "PaddedCrop(padding=4)"
    assert "8 of 32 px, PaddedCrop(padding=4), float32 on cpu" in result.stdout


def test_wrong_command_lines_are_refused(small_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments, words in (
        ([], ("DATA",)),
        ([small_shards, "--arch", "resnet19"], ("resnet19", "resnet18")),
        ([small_shards, "--arch", "resnet18", "--demand", 5], ("--arch", "--demand")),
        ([small_shards, "--plant", "reader=0"], ("reader=0", "MB/S")),
        ([small_shards, "--repeats", 1], ("--repeats", "at least 2")),
        ([small_shards, "--seconds", 0], ("--seconds", "above 0")),
        ([small_shards, "--demand", "inf"], ("--demand", "above 0")),
        ([small_shards, "--geometry", "pad", "--scale", 36, 68], ("--scale", "--geometry jitter")),
        ([small_shards, "--geometry", "pad", "--batch-size", 8, "--image-size", 4], ("padding 4", "image size (4)")),
        ([small_shards, "--json", tmp_path], (str(tmp_path), "is a folder")),
        ([small_shards, "--report", tmp_path / "file" / "report"], (str(tmp_path / "file"), "cannot be created")),
        ([tmp_path / "nothing"], (str(tmp_path / "nothing"),)),
        ([small_shards, "--batch-size", 1000], ("60 images", "batch of 1000")),
        ([small_shards, "--gpus", 8, "--batch-size", 8, "--image-size", 32, "--scale", 36, 68], ("--demand",)),
    ):
        with pytest.raises(UserError) as refused:
            profile_pipeline.run(profile_pipeline.parse([str(argument) for argument in arguments]))
        assert all(word in with_flags(str(refused.value)) for word in words), refused.value


def test_options_are_validated() -> None:
    spec = LoaderSpec("shards")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"arch": "resnet19"}, "unknown `arch` 'resnet19'; choose from plain18"),
        ({"precision": "fp8"}, "`precision`: there is no 'fp8'; choose from no, fp16, bf16"),
        ({"cache_state": "tepid"}, "`cache_state`: there is no 'tepid'"),
        ({"engines": ("cpu", "gpu")}, "`engines`: there is no 'gpu'"),
        ({"repeats": 1}, "`repeats` must be at least 2"),
        ({"seconds": 0.0}, "`seconds` must be above 0, not 0.0"),
        ({"demand": -1.0}, "`demand` must be above 0"),
        ({"gpus": 0, "demand": 1.0}, "`gpus` must be above 0"),
        ({"hosts": 4}, "`gpus` and `hosts` needs the demand of one GPU"),
        ({"arch": "resnet18", "demand": 3.0}, "leave one of them out"),
    ]
    for changes, words in wrong:
        with pytest.raises(UserError) as refused:
            ProfileOptions(spec, **changes)
        assert words in str(refused.value)
    ProfileOptions(spec, arch="resnet18", demand=3.0, gpus=8)


@pytest.mark.gpu
def test_on_a_gpu(small_shards: Path) -> None:
    """The model trains on the GPU, with the CPU engine. Times are from the device's clock."""
    spec = replace(options(small_shards).spec, device="cuda", dtype=torch.bfloat16)
    found = checked(profile(options(small_shards, spec=spec, arch="resnet18", precision="bf16")))
    assert next(stage for stage in found["stages"] if stage["name"] == "copy")["used"]
    assert 0 <= found["demand"]["wait_share"] <= 1
