"""Every recipe trains for a few steps on small images, with all of its options."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tests.helpers import run_forked
from training.command_line import RECIPES, parse_arguments, parser, recipes
from training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes())
def test_a_few_steps_of_each_recipe(name: str, small_shards: Path, tmp_path: Path) -> None:
    """Length, batch size and image sizes are reduced. Compilation, which takes minutes on a CPU, is made to fail."""
    recipe = tomllib.loads((RECIPES / f"{name}.toml").read_text())
    small = {"batch-size": [20], "image-size": [32], "start-size": [16], "eval-size": [40], "warmup": [1], "ramp": [0, 0]}
    reduced = [word for key, values in small.items() if key in recipe for word in (f"--{key}", *map(str, values))]
    words = ["--data", str(small_shards), "--recipe", name, "--iterations", "3", "--threads", "1", "--log-every", "1", *reduced]
    arch = "resnet20" if recipe.get("blurpool") is None else "resnet18"
    result = run_forked(
        "train.py", *words, "--arch", arch, "--output", tmp_path / "run", PATH="/nowhere", TORCHINDUCTOR_CACHE_DIR=str(tmp_path)
    )
    assert result.returncode == 0, result.stderr
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert len([row for row in rows if row["train_loss"]]) == 3
    assert rows[-1]["val_top1"]
    assert ("torch.compile does not work here" in result.stdout) == ("compile" in recipe)


@pytest.mark.parametrize("name", recipes())
def test_parsed_options_equal_the_recipe(name: str) -> None:
    """Each key is an option and has the value in the file."""
    recipe = tomllib.loads((RECIPES / f"{name}.toml").read_text())
    options = parse_arguments(None, ["--data", "x", "--recipe", name, "--arch", "resnet18"])
    actions = {option: action.dest for action in parser()._actions for option in action.option_strings}
    for key, value in recipe.items():
        found = getattr(options, actions[f"--{key}"])
        expected = tuple(value) if isinstance(value, list) else value
        assert found == ("default" if key == "compile" else expected), key


def test_the_recipe_paper_has_no_later_additions() -> None:
    """Everything that is not in the paper is off."""
    options = parse_arguments(None, ["--data", "x", "--recipe", "paper"])
    off = {
        "label_smoothing": 0, "mixup": 0, "cutmix": 0, "drop_path": 0, "ema": None, "blurpool": False, "start_size": None,
        "no_norm_decay": False, "flip_test": False, "compile": None, "optimizer": "sgd", "scale_lr": False, "amp": None,
    }  # fmt: skip
    assert {name: getattr(options, name) for name in off} == off
