"""Options that are completed and validated, and recipes that the command line overrides."""

from __future__ import annotations

import json
import tarfile
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from tests.helpers import ROOT
from training.command_line import RECIPES, parse_arguments, parser, recipes
from training.options import DEFAULT_EPOCHS, TrainOptions, make_schedule
from training.run_folder import arguments_of

DATA = ("--data", "x")


def test_the_command_line_overrides_a_recipe() -> None:
    options = parse_arguments(None, [*DATA, "--recipe", "cifar"])
    assert (options.iterations, options.epochs, options.batch_size, options.geometry, options.alpha_std) == (
        64000,
        None,
        128,
        "pad",
        0,
    )
    options = parse_arguments(None, ["--recipe=cifar", *DATA, "--lr", "0.2", "--epochs", "10"])
    assert (options.lr, options.epochs, options.iterations, options.batch_size) == (0.2, 10, None, 128)


def test_the_recipe_paper_follows_section_3_4() -> None:
    """The expected values are copied from the text of the paper. They include defaults that the recipe does not set."""
    options = parse_arguments(None, [*DATA, "--recipe", "paper"])
    assert (options.batch_size, options.lr, options.weight_decay, options.momentum, options.iterations) == (
        256,
        0.1,
        1e-4,
        0.9,
        600_000,
    )
    assert (options.schedule, options.image_size, options.geometry, options.mean, options.warmup) == (
        "plateau",
        224,
        "jitter",
        "pixel",
        0,
    )
    assert (options.alpha_std, options.scale) == (0.1, None)  # None: [256, 480] at 224, see choose_geometry


def test_the_cifar_recipes_rates_follow_section_4_2() -> None:
    options = parse_arguments(None, [*DATA, "--recipe", "cifar"])
    schedule = make_schedule(options, 391)
    steps = (0, 31_999, 32_000, 47_999, 48_000, 63_999)
    assert [schedule.rate(step, ()) for step in steps] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    schedule = make_schedule(parse_arguments(None, [*DATA, "--recipe", "cifar110"]), 391)
    assert [schedule.rate(step, ()) for step in (0, 399, 400, 31_999, 32_000)] == pytest.approx([0.01, 0.01, 0.1, 0.1, 0.01])


def test_milestones_and_warmup_are_in_the_runs_unit_and_milestones_may_be_shares() -> None:
    def rates(*words: str) -> list[float]:
        schedule = make_schedule(parse_arguments(None, [*DATA, *words]), 10)
        return [round(schedule.rate(step, ()), 6) for step in range(schedule.steps)]

    assert rates("--epochs", "3", "--milestones", "1", "2.5") == [0.1] * 10 + [0.01] * 15 + [0.001] * 5
    assert rates("--iterations", "15", "--milestones", "4", "0.8") == [0.1] * 4 + [0.01] * 8 + [0.001] * 3
    assert rates("--iterations", "6", "--warmup", "2", "--warmup-lr", "0.5") == [0.5] * 2 + [0.01] * 2 + [0.001] * 2
    assert rates("--epochs", "3") == [0.1] * 10 + [0.01] * 10 + [0.001] * 10
    assert len(rates()) == 900


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_can_be_read_and_starts_with_its_command(name: str) -> None:
    options = parse_arguments(None, [*DATA, "--recipe", name])
    assert options.recipe == name
    head = (RECIPES / f"{name}.toml").read_text()
    assert f"train.py --recipe {name} --arch" in head
    assert "Time and accuracy:" in head


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--recipe", "fast-and-loose"),
            "no recipe 'fast-and-loose'; choose from cifar, cifar110, fast, imagenette, paper, strong",
        ),
        (("--recipe", "cifar", "--milestones", "64000"), "`milestones`: 64000 lies outside the run's 64000 iterations"),
        (("--recipe", "cifar110", "--epochs", "3"), "`warmup` 400 must be shorter than the run's 3 epochs"),
        (("--epochs", "3", "--iterations", "9"), "both set the length of the run"),
        (("--momentum", "1"), "`momentum` must lie in"),
        (("--alpha-std", "-1"), "`alpha_std` must not be negative"),
        (("--warmup-lr", "0"), "`warmup_lr` must be positive"),
        (("--arch", "resnet19"), "unknown `arch` 'resnet19'"),
        (("--arch", "plain18", "--blurpool"), "`blurpool`: there is no plain18_blur; choose from resnet18_blur"),
        (("--label-smoothing", "1"), "`label_smoothing`, `drop_path` and `ema` must lie in [0, 1)"),
        (("--drop-path", "-0.1"), "must lie in [0, 1)"),
        (("--arch", "plain18", "--drop-path", "0.1"), "`drop_path`: plain18 has no residual branches to drop"),
        (("--ema", "1"), "must lie in [0, 1)"),
        (("--ramp", "1", "2"), "`ramp` needs `start_size`"),
        (("--trackers", "neptune"), "unknown tracker 'neptune'"),
        (("--mixup", "-1"), "`mixup` and `cutmix` must not be negative"),
        (("--compile", "reduce-overhead", "--accumulate", "2"), "do not work with `accumulate`; set `accumulate` 1, or"),
        (("--compile", "max-autotune", "--accumulate", "4"), "`compile` max-autotune uses CUDA graphs"),
    ],
)
def test_contradictory_options_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(None, [*DATA, *words])
    assert message in str(caught.value)


def test_compilation_without_cuda_graphs_allows_accumulation_and_with_them_an_average() -> None:
    assert parse_arguments(None, [*DATA, "--compile", "--accumulate", "2"]).accumulate == 2
    assert parse_arguments(None, [*DATA, "--compile", "reduce-overhead", "--ema", "0.9"]).accumulate == 1


def test_a_custom_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('arch = "resnet18"\nepochs = 5\nscale = [300, 400]\ncompile = true\n')
    options = parse_arguments(None, [*DATA, "--recipe", str(path), "--iterations", "7"])
    assert (options.arch, options.epochs, options.iterations, options.scale, options.compile) == (
        "resnet18",
        None,
        7,
        (300, 400),
        "default",
    )
    path.write_text("epochs = 5\ncompile = false\n")
    assert parse_arguments(None, [*DATA, "--recipe", str(path)]).compile is None

    for content, message in (("batchsize = 3", "batchsize is not an option"), ("resume = true", "resume is not an option"),
                             ("epochs = ", "cannot be read as TOML"), ("epochs = 1.5", "--epochs")):  # fmt: skip
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            parse_arguments(None, [*DATA, "--recipe", str(path)])
    with pytest.raises(UserError, match="no recipe"):
        parse_arguments(None, [*DATA, "--recipe", str(tmp_path / "none.toml")])


def test_config_json_keeps_its_keys(tmp_path: Path) -> None:
    """The keys under "arguments" in config.json are those that version 0.1 wrote."""
    with tarfile.open(ROOT / "tests" / "compatibility" / "run.tar.gz") as tar:
        tar.extract("run/config.json", tmp_path, filter="data")
    before = json.loads((tmp_path / "run" / "config.json").read_text())["arguments"]
    assert list(arguments_of(TrainOptions(data="x"))) == list(before)


def test_options_are_complete_and_frozen() -> None:
    options = TrainOptions(data="x", arch="resnet18", blurpool=True)
    assert (options.arch, options.epochs, options.iterations) == ("resnet18_blur", DEFAULT_EPOCHS, None)
    assert TrainOptions(data="x", iterations=5).epochs is None
    assert parse_arguments(None, DATA) == TrainOptions(data="x")
    with pytest.raises(FrozenInstanceError):
        options.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"log_every": 0}, "`log_every` must be at least 1, not 0"),
        ({"threads": -1}, "`threads` must be at least 1, not -1"),
        ({"optimizer": "adam"}, "`optimizer` must be one of sgd, lars, not 'adam'"),
        ({"resume": "first"}, "`resume` must be one of last, auto, not 'first'"),
    ],
)
def test_values_that_the_parser_would_not_accept_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainOptions(data="x", **given)


def test_error_messages_name_fields_and_the_command_line_shows_flags() -> None:
    with pytest.raises(UserError) as caught:
        TrainOptions(data="x", arch="resnet19")
    assert parser().with_flags(str(caught.value)).startswith("unknown --arch 'resnet19'; choose from plain18, plain34")
    assert parser().with_flags("`amp`, `threads`, `batch_size`, `normalization`") == "--amp, --threads, --batch-size, --mean"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [field.name for field in fields(TrainOptions) if "float" in str(field.type)])
def test_numbers_must_be_finite(name: str, value: float) -> None:
    pair = {"milestones": (value,), "ramp": (0.0, value), "area": (0.1, value)}
    with pytest.raises(UserError, match=f"`{name}` must be a finite number, not "):
        TrainOptions(data="x", **{name: pair.get(name, value)})  # type: ignore[arg-type]


def test_counts_beyond_32_bits_are_refused() -> None:
    for name in ("epochs", "batch_size", "image_size"):
        with pytest.raises(UserError, match=f"`{name}` must be at most 2147483647, not "):
            TrainOptions(data="x", **{name: 10**20})  # type: ignore[arg-type]
