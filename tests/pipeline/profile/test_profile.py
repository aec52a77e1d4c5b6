"""`cropfeed profile`, from the command line to the verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline import cli
from pipeline.convert.make import ConvertOptions, make_shards
from pipeline.errors import UserError
from pipeline.profile import measure
from pipeline.profile.verdict import lines
from pipeline.store.shards import ShardSet
from tests.helpers import ROOT, assert_ends, run_script, write_image_folder

LOADERS = """
import ctypes, multiprocessing, os, time
import numpy as np

def paced():
    "At most 400 images/s, and a child process that lives."
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,), daemon=True).start()
    while True:
        time.sleep(0.01)
        yield {"image": np.zeros((4, 3, 8, 8), np.float32), "label": np.zeros(4)}

def crash():
    yield np.zeros((4, 3, 8, 8))
    ctypes.string_at(0)

def hang():
    time.sleep(1000)

def ends():
    os._exit(7)

def workers():
    import torch
    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 10_000
        def __getitem__(self, index):
            began = time.process_time()
            while time.process_time() < began + 0.003:
                pass
            return torch.zeros(3, 32, 32), index
    return torch.utils.data.DataLoader(Images(), 16, num_workers=2)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the module `loaders`. Turns are short."""
    (tmp_path / "loaders.py").write_text(LOADERS)
    monkeypatch.chdir(tmp_path)
    for name, seconds in {"WARM": 0.1, "SHORTEST": 0.2, "LONGEST": 0.2, "FIRST": 0.5}.items():
        monkeypatch.setattr(measure, name, seconds)
    return tmp_path


def test_a_paced_loader_is_measured_and_its_children_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = set(psutil.Process().children(recursive=True))  # of tests before this one
    arguments = ["--loader", "loaders:paced", "--demand", "1600", "--repeats", "2", "--budget", "60", "--json", "out.json"]
    cli.profile(arguments)
    found = json.loads((folder / "out.json").read_text())
    own = found["loader"]
    assert 200 < own["images_per_s"]["median"] < 400
    assert 0.7 < own["wait_share"]["median"] < 0.9  # a step takes 2.5 ms, a batch at least 10 ms
    assert own["cpu_s_per_image"] < 0.003
    assert (own["batch"]["count"], own["batch"]["shape"], own["epochs"]) == (4, [4, 3, 8, 8], 0)
    assert found["cropfeed"] is found["gain"] is None
    printed = capsys.readouterr().out
    assert "A training that could process 1,600 images/s waits for your loader" in printed
    assert "Give --images" in printed
    assert not [one for one in set(psutil.Process().children(recursive=True)) - others if one.status() != "zombie"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("crash", "its process ended, killed by SIGSEGV; run it on its own to see why"),
        ("ends", "its process ended, exit code 7"),
        ("hang", "no batch within 0 s; does it hang?"),
    ],
)
def test_a_loader_whose_process_ends_or_hangs_is_one_line(folder: Path, name: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        measure.profile(measure.ProfileOptions(f"loaders:{name}", budget=0.4 if name == "hang" else 60.0))
    assert str(caught.value).startswith(f"`loader` loaders:{name}: {words}")


def test_a_loader_is_paused_between_its_turns_and_ends_with_a_profile_that_is_killed(folder: Path) -> None:
    code = "import sys; from pipeline.profile.runner import Runner; r = Runner('x'); r.ask('open', 'loaders:paced', timeout=60)"
    command = [sys.executable, "-c", f"{code}; print(r.process.pid, flush=True); sys.stdin.read()"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        loader = psutil.Process(int(process.stdout.readline()))
        assert loader.status() == psutil.STATUS_STOPPED
        (child,) = loader.children()
        process.kill()
    assert_ends(loader.pid)
    assert_ends(child.pid)


def test_images_that_cannot_be_converted_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`images` /no/such/folder: no such folder; give the folder above"):
        measure.ProfileOptions("a:b", images="/no/such/folder")
    refused = pytest.raises(UserError, match=f"{tmp_path}: .*empty folder; give the folder above train/ and val/, or convert it")
    with refused, measure.shards_of(str(tmp_path), 8):
        pass


@pytest.mark.parametrize("options", [{"demand": 0.0}, {"demand": float("nan")}, {"budget": -1.0}, {"repeats": 1}])
def test_options_outside_their_ranges_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"`{next(iter(options))}` must be"):
        measure.ProfileOptions("a:b", **options)


def figures(speed: float, wait: float, cores_used: float = 2.0) -> dict[str, Any]:
    return {
        "images_per_s": {"median": speed, "low": speed - 1, "high": speed + 1}, "cpu_s_per_image": cores_used / speed,
        "cores_used": cores_used, "first_batch_s": 2.0, "memory_bytes": 10**9, "peak_rss_bytes": 2 * 10**9, "epochs": 0,
        "wait_share": {"median": wait, "low": wait, "high": wait},
        "batch": {"count": 64, "shape": [64, 3, 224, 224], "dtype": "uint8", "device": "cpu"},
    }  # fmt: skip


def verdict(own: dict[str, Any], ours: dict[str, Any] | None, demand: float | None) -> str:
    gain = ours and ours["images_per_s"]["median"] / own["images_per_s"]["median"]
    spread = gain and {"median": gain, "low": gain - 0.01, "high": gain + 0.01}
    options = {"demand": demand, "geometry": "rrc"}
    found = {"loader": own, "cropfeed": ours, "gain": spread, "training_gain": spread, "cores": 2, "options": options}
    return "\n".join(lines(found))


def test_the_verdict_says_what_a_change_would_gain() -> None:
    text = verdict(figures(500, 0.75), figures(2000, 0.0), 2000)
    assert "your loader: 500 images/s (499 to 501), 4 ms of CPU time per image, 2 of 2 cores" in text
    assert "Cropfeed would be 4.00 times as fast (3.99 to 4.01)." in text
    assert "waits for your loader 75 % of the time (75 % to 75 %); for Cropfeed it would be 0 % (0 % to 0 %)." in text
    assert "The training would run 4.00 times as fast." in text


def test_the_verdict_says_when_a_change_gains_nothing() -> None:
    assert "Your loader is fast enough for it" in verdict(figures(500, 0.01), figures(2000, 0.0), 300)
    assert "would be slower here: 0.50 times as fast" in verdict(figures(500, 0.0), figures(250, 0.0), None)
    assert "not worth a change" in verdict(figures(500, 0.0), figures(520, 0.0), None)
    assert "used only 0.3 of 2 cores" in verdict(figures(500, 0.0, cores_used=0.3), figures(2000, 0.0), None)
    assert "used only" not in verdict(figures(500, 0.0, cores_used=1.9), figures(2000, 0.0), None)


@pytest.mark.slow
def test_a_sample_is_evenly_spread(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "images", classes=4, train=6, val=1)
    make_shards(ConvertOptions(str(tmp_path / "images"), str(tmp_path / "shards"), "original", workers=1), sample=8)
    shards = ShardSet(tmp_path / "shards", "train")
    assert sorted(shards.samples["label"].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert list(shards.manifest.splits) == ["train"]


@pytest.mark.slow
def test_a_loader_with_workers_is_compared_with_cropfeed(tmp_path: Path) -> None:
    """Its CPU time is that of its workers. Cropfeed's batches are like the loader's."""
    (tmp_path / "loaders.py").write_text(LOADERS)
    write_image_folder(tmp_path / "images", classes=2, train=20, val=1)
    options = ("--loader", "loaders:workers", "--images", "images", "--demand", 1000, "--budget", 12, "--repeats", 2)
    result = run_script("tools/profile_pipeline.py", *options, "--json", "out.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Cropfeed would be" in result.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    own, ours = found["loader"], found["cropfeed"]
    assert 0.003 <= own["cpu_s_per_image"] <= 0.006
    assert ours["batch"] == own["batch"] | {"device": "cpu"}
    assert found["gain"]["median"] > 1
    assert found["training_gain"]["median"] > 1
    assert ours["wait_share"]["median"] < own["wait_share"]["median"]
