"""The wheel, installed with its dependencies into an empty environment outside the checkout, as users install the library."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT, clean_environment, write_image_folder

USE = """
import sys, torch
from cropfeed import CentreCrop, LoaderSpec, RandomResizedCrop, ScaleJitter, UserError, open_loader

spec = LoaderSpec(sys.argv[1], batch_size=8, image_size=32, geometry=ScaleJitter(36, 60), seed=3)
loader = open_loader(spec)
batches = []
for batch in loader:
    batches.append(batch)
    if len(batches) == 2:
        state = loader.state_dict()
assert len(batches) == len(loader) == 4, len(batches)
assert batches[0].images.shape == (8, 3, 32, 32) and batches[0].images.is_contiguous(memory_format=torch.channels_last)

resumed = open_loader(spec)
resumed.load_state_dict(state)
rest = list(resumed)
assert [batch.ids.tolist() for batch in rest] == [batch.ids.tolist() for batch in batches[2:]]
assert all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(rest, batches[2:]))

validation = list(open_loader(spec.evaluation()))
assert sorted(sum((batch.ids.tolist() for batch in validation), [])) == list(range(9))
try:
    open_loader(LoaderSpec("/nowhere"))
except UserError as error:
    assert error.remedy
for module in ("pipeline", "model", "training", "accelerate"):
    try:
        __import__(module)
    except ImportError:
        continue
    raise AssertionError(module)
"""


def build(kind: str, out: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    bin_folder = folder / "bin"
    command = [str(bin_folder / "python"), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    result = subprocess.run([*command, str(wheel)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return bin_folder


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean_environment(), capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"cropfeed", f"{wheel.name.split('-py3')[0]}.dist-info"}
    inside = {name.removeprefix("cropfeed/") for name in names if name.startswith("cropfeed/")}
    there = {str(path.relative_to(ROOT / "pipeline")) for path in (ROOT / "pipeline").rglob("*.py")}
    assert inside == there | {"py.typed", "store/imagenet_classes.txt"}


@pytest.mark.slow
def test_a_wheel_can_be_built_from_the_sdist(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path / "sdist")) as tar:
        tar.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("cropfeed-*")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "wheel"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (made,) = (tmp_path / "wheel").iterdir()
    assert {"cropfeed/engines/cpu.py", "cropfeed/store/imagenet_classes.txt"} <= set(zipfile.ZipFile(made).namelist())


@pytest.mark.slow
def test_images_are_converted_loaded_and_a_loader_resumed(environment: Path, tmp_path: Path) -> None:
    write_image_folder(tmp_path / "images", classes=3, train=11, val=3)
    command = environment / "cropfeed"
    made = run(command, "shards", "images", "--out", "shards", "--shard-size", 8, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "42 images" in made.stdout
    verified = run(command, "verify", "shards", cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr
    assert "every byte is as it was written" in verified.stdout
    used = run(environment / "python", "-c", USE, "shards", cwd=tmp_path)
    assert used.returncode == 0, used.stderr
    examined = run(command, "doctor", "shards", cwd=tmp_path)
    assert examined.returncode == 0, examined.stdout + examined.stderr
    assert "42 images" in examined.stdout
    tar = tmp_path / "shards" / "train" / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:-9000] + bytes(9000))
    damaged = run(command, "verify", "shards", cwd=tmp_path)
    assert damaged.returncode == 2
    assert "damaged" in damaged.stderr


@pytest.mark.slow
def test_an_unknown_command_is_refused_in_one_line(environment: Path, tmp_path: Path) -> None:
    result = run(environment / "cropfeed", "shard", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (
        2,
        "error: cropfeed has no command 'shard'; choose from shards, verify, doctor, profile\n",
    )
    helped = run(environment / "cropfeed", cwd=tmp_path)
    assert helped.returncode == 0
    assert "cropfeed verify" in helped.stdout
