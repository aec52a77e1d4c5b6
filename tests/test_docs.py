"""README.md, CHANGELOG.md and docs/: commands are accepted by their programs, commands and Python code run, links resolve.

Every command is parsed by its own program. What can run here does, on small images, with the paths of the pages replaced;
training is cut to a few steps. The rest (GPUs, clusters, buckets, installations, hours) is only parsed.

Scripts run in processes forked from one that has imported their modules. Behind `accelerate launch`, train.py itself runs: the
launcher's words are parsed by its own parser, and CI and tests/training/test_launch.py really launch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from pipeline import cli
from tests.helpers import ROOT, clean_environment, run_forked, write_image_folder
from training.command_line import parse_arguments
from training.options import TrainOptions

PAGES = [page for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
README_LINES = 170
SKIPPED = {"pip", "apt-get", "make", "sbatch", "git", "cd"}  # programs that are not run
# Buckets, the Hub, downloads, clusters, GPUs, users' loaders, and the benchmarks, which take minutes and have tests of their own.
NOT_HERE = re.compile(
    r"s3://|hf://|\.pth|--push|--engine ray|--config_file|--nproc_per_node 8|-m gpu|--loader|tools/(bench|paper)/"
)
SMALL = {  # what is appended to a script's command
    "make_shards.py": "--workers 1",
    "profile_pipeline.py": "--seconds 0.02 --repeats 2 --budget 10 --batch-size 16 --image-size 32 --scale 36 68",
    "make_demo_data.py": "--train 4 --val 2",
}
ONCE = re.compile("doctor|.*profile_pipeline.*")  # what other commands do not depend on: equal matches run on one page only
RAN: set[str] = set()  # the matches that have run


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The commands of a page, one line each, without comments."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.join(words) for words in (shlex.split(line, comments=True) for line in lines) if words]


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """Environment variables in front of a command, and its words."""
    words = shlex.split(command)
    count = next(index for index, word in enumerate(words) if not re.fullmatch(r"[A-Z_]+=.*", word))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


class Parsed(BaseException):
    """Raised instead of returning from a script's parser: the words are accepted, and the script is not to run."""


def accept_script(script: str, words: Sequence[str], main: Callable[[], Any] | None = None) -> None:
    """Run a script until its parser has accepted the words. Raises UserError if it does not."""
    original = cli.Parser.parse_args

    def parse_args(*args: Any, **options: Any) -> Any:
        original(*args, **options)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.Parser, "parse_args", parse_args)
        patch.setattr(cli, "run_cli", lambda main: main())
        patch.setattr(cli, "_parser", None)  # restored afterwards
        patch.setattr(sys, "argv", [script, *words])
        with pytest.raises(Parsed):
            main() if main else runpy.run_path(script, run_name="__main__")


def accept_train(words: Sequence[str]) -> TrainOptions:
    """The validated options of a command line of train.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_parser", None)
        return parse_arguments(None, list(words))


def accept_python(words: list[str]) -> None:
    if words[0] == "-c":
        compile(words[1], "command", "exec")
    elif words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests"))
    elif words == ["train.py", "--list"]:
        return
    elif words[0] == "train.py":
        accept_train(words[1:])
    else:
        accept_script(words[0], words[1:])


def accept_launch(args: argparse.Namespace) -> None:
    """args: of accelerate launch or torchrun."""
    assert args.training_script == "train.py"
    assert not getattr(args, "config_file", None) or Path(args.config_file).exists()
    accept_train(args.training_script_args)


def accept_pip(words: list[str]) -> None:
    assert words[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for found in re.findall(r"\[(.*?)\]", " ".join(words)):
        assert set(found.split(",")) <= set(extras), found
    assert "--constraint" not in words or Path(words[words.index("--constraint") + 1]).exists()


def accept_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets), (words, targets)


ACCEPT: dict[str, Callable[[list[str]], Any]] = {
    "python": accept_python,
    "accelerate": lambda words: accept_launch(launch_command_parser().parse_args(words[1:])),
    "torchrun": lambda words: accept_launch(get_args_parser().parse_args(words)),
    "cropfeed": lambda words: accept_script("cropfeed", words, cli.main),
    "pip": accept_pip,
    "make": accept_make,
    "sbatch": lambda words: (Path(words[0]).stat(), accept_train(words[1:])),
    "apt-get": lambda words: words.index("install"),
    "git": lambda words: words.index("clone"),
    "cd": lambda words: words.index("cropfeed"),
}


@pytest.mark.parametrize(("page", "command"), [(name(page), command) for page in PAGES for command in commands(page)])
def test_commands_are_accepted(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert not re.search(r"<\w+>|\.\.\.", command), "a placeholder"
    words = split(command)[1]
    assert words[0] in ACCEPT, "an unknown program"
    ACCEPT[words[0]](words[1:])


def put(folder: Path, text: str) -> str:
    """Text with the paths of the pages replaced by those in `folder`."""
    text = re.sub(r"(?<![\w/.])/imagenet", f"{folder}/images", text)
    text = re.sub(r"(?<![\w/.])/(flowers|photos)", f"{folder}/images/train", text)  # class folders without splits
    text = re.sub(r"(?<![\w/.])/crawled", f"{folder}/crawled", text)
    text = re.sub(r"(?<![\w/.])/data/", f"{folder}/data/", text)
    return text.replace('device="cuda"', 'device="cpu"')


def run(folder: Path, words: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder`, where `runs/` is, with the checkout's scripts and files."""
    settings = {"CROPFEED_TUNED": str(folder / "tuned.json"), "TORCHDYNAMO_DISABLE": "1"}
    words = [str(ROOT / word) if not word.startswith("runs") and (ROOT / word).exists() else word for word in words]
    if not words[0].startswith("-"):
        return run_forked(*words, cwd=folder, **settings, **environment)
    env = clean_environment() | settings | environment
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)


def small_training(words: list[str]) -> list[str]:
    """Words of train.py, and what makes them a short training of ResNet-18."""
    options = accept_train(words)
    output = options.output or f"runs/{options.arch}"
    more = f"--arch resnet18 --output {output} --batch-size 20 --image-size 32 --threads 1 --log-every 1 --warmup 0 --lr 0.001"
    more += " --epochs 1" if "--epochs" in words else " --iterations 2"
    more += " --start-size 16 --ramp 0 0" if options.start_size else ""
    more += " --eval-size 40" if options.eval_size else ""
    more += " --scale 36 68" if options.scale else ""
    more += " --amp no" if options.amp else ""  # bf16 takes ten times as long on processors without instructions for it
    return [*words, *more.split()]


def runnable(words: list[str]) -> list[str] | None:
    """What Python runs in place of a command; None if it cannot run here."""
    program, rest = words[0], words[1:]
    without_ffcv = importlib.util.find_spec("ffcv") is None and re.search("both|ffcv", " ".join(rest))
    if program in SKIPPED or NOT_HERE.search(" ".join(words)) or without_ffcv:
        return None
    if program == "cropfeed":
        return [str(Path(sys.executable).with_name("cropfeed")), *rest, *(["--workers", "1"] if rest[0] == "shards" else [])]
    if program in ("accelerate", "torchrun"):
        at = rest.index("train.py")
        torchrun = ["-m", "torch.distributed.run", *rest[:at], "--master_port", "29671"] if program == "torchrun" else []
        return [*torchrun, "train.py", *small_training(rest[at + 1 :])]
    if rest[:2] == ["-m", "pytest"]:
        return None  # CI runs these tests
    more = SMALL.get(Path(rest[0]).name, "")
    more += " --arch resnet20 --precision no" if "profile_pipeline" in rest[0] and "--arch" in rest else ""
    return [*rest, *more.split()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, data/shards, data/tagged with fields, and runs/resnet50, a run that can be resumed."""
    folder = tmp_path_factory.mktemp("docs")
    write_image_folder(folder / "images", classes=4, train=70, val=2)  # enough for a batch of 256
    result = run_forked("tools/make_shards.py", folder / "images", "--out", folder / "data" / "shards", "--workers", 2)
    assert result.returncode == 0, result.stderr
    photos = sorted((folder / "images" / "train").rglob("*.JPEG"))
    (folder / "crawled").mkdir()
    with tarfile.open(folder / "crawled" / "00000.tar", "w") as tar, (folder / "labels.csv").open("w") as labels:
        labels.write("path,species,caption\n")
        for number, path in enumerate(photos):
            labels.write(f"{path.relative_to(folder / 'images' / 'train')},{path.parent.name},number {number}\n")
            tar.add(path, f"{number:05}.jpg")
            (folder / "one.json").write_text(json.dumps({"category": path.parent.name, "tags": ["dog", "tree"]}))
            tar.add(folder / "one.json", f"{number:05}.json")
    tagged = ("--out", folder / "data" / "tagged", "--label-column", "category", "--workers", 1)
    result = run_forked("tools/make_shards.py", folder / "crawled", *tagged)
    assert result.returncode == 0, result.stderr
    for other in ("imagenette", "cifar"):
        (folder / "data" / other).symlink_to("shards")
    result = run(folder, ["train.py", *small_training(["--data", f"{folder}/data/shards", "--output", "runs/resnet50"])])
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "work", symlinks=True))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_run(page: Path, folder: Path) -> None:
    """In the order of the page."""
    for command in commands(page):
        environment, words = split(put(folder, command))
        runs = runnable(words)
        once = ONCE.search(command)
        if runs is None or (once and once[0] in RAN):
            continue
        if "--output" in runs and "--resume" not in runs:  # train.py does not overwrite a run
            shutil.rmtree(folder / runs[len(runs) - runs[::-1].index("--output")], ignore_errors=True)
        result = run(folder, runs, **environment)
        codes = (0, 1) if "doctor" in command else (0,)  # the doctor may find something on this machine
        assert result.returncode in codes, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        if once:
            RAN.add(once[0])


@pytest.mark.slow
@pytest.mark.parametrize(("page", "index"), [(name(page), i) for page in PAGES for i in range(len(blocks(page, "python")))])
def test_python_code_runs(page: str, index: int, folder: Path) -> None:
    script = folder / "block.py"
    script.write_text(put(folder, blocks(ROOT / page, "python")[index]))
    result = run(folder, [str(script)])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name)
def test_each_page_has_a_command_and_its_links_resolve(page: Path) -> None:
    assert commands(page)
    for block in blocks(page, "python"):
        compile(block, name(page), "exec")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        assert re.match("https?://", target) or (page.parent / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES
