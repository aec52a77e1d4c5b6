from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from training.options import make_schedule, parse_arguments, recipes

DATA = ("--data", "x")


def test_a_recipe_gives_options_and_the_command_line_overrides_them() -> None:
    args = parse_arguments(None, [*DATA, "--recipe", "cifar"])
    assert (args.iterations, args.epochs, args.batch_size, args.geometry, args.alpha_std) == (64000, None, 128, "pad", 0)
    args = parse_arguments(None, ["--recipe=cifar", *DATA, "--lr", "0.2", "--epochs", "10"])
    assert (args.lr, args.epochs, args.iterations, args.batch_size) == (0.2, 10, None, 128)


def test_the_paper_is_sections_3_4() -> None:
    """Written out here from the text; the defaults that a recipe leaves alone count as well."""
    args = parse_arguments(None, [*DATA, "--recipe", "paper"])
    assert (args.batch_size, args.lr, args.weight_decay, args.momentum, args.iterations) == (256, 0.1, 1e-4, 0.9, 600_000)
    assert (args.schedule, args.image_size, args.geometry, args.mean, args.warmup) == ("plateau", 224, "jitter", "pixel", 0)
    assert (args.alpha_std, args.scale) == (0.1, None)  # None: [256, 480] at 224, see choose_geometry


def test_the_cifar_recipes_rates_are_section_4_2s() -> None:
    args = parse_arguments(None, [*DATA, "--recipe", "cifar"])
    schedule = make_schedule(args, 391)
    steps = (0, 31_999, 32_000, 47_999, 48_000, 63_999)
    assert [schedule.rate(step, ()) for step in steps] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    schedule = make_schedule(parse_arguments(None, [*DATA, "--recipe", "cifar110"]), 391)
    assert [schedule.rate(step, ()) for step in (0, 399, 400, 31_999, 32_000)] == pytest.approx([0.01, 0.01, 0.1, 0.1, 0.01])


def test_milestones_and_warmup_are_in_the_runs_unit_or_shares_of_it() -> None:
    def rates(*words: str) -> list[float]:
        schedule = make_schedule(parse_arguments(None, [*DATA, *words]), 10)
        return [round(schedule.rate(step, ()), 6) for step in range(schedule.steps)]

    assert rates("--epochs", "3", "--milestones", "1", "2.5") == [0.1] * 10 + [0.01] * 15 + [0.001] * 5
    assert rates("--iterations", "15", "--milestones", "4", "0.8") == [0.1] * 4 + [0.01] * 8 + [0.001] * 3
    assert rates("--iterations", "6", "--warmup", "2", "--warmup-lr", "0.5") == [0.5] * 2 + [0.01] * 2 + [0.001] * 2
    assert rates("--epochs", "3") == [0.1] * 10 + [0.01] * 10 + [0.001] * 10
    assert len(rates()) == 900


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_read_and_has_its_command_in_its_head(name: str) -> None:
    args = parse_arguments(None, [*DATA, "--recipe", name])
    assert args.recipe == name
    head = (Path(parse_arguments.__code__.co_filename).with_name("recipes") / f"{name}.toml").read_text()
    assert f"train.py --recipe {name} --arch" in head
    assert "Time and accuracy:" in head


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--recipe", "fast-and-loose"),
            "no recipe 'fast-and-loose'; choose from cifar, cifar110, fast, imagenette, paper, strong",
        ),
        (("--recipe", "cifar", "--milestones", "64000"), "--milestones: 64000 lies outside the run's 64000 iterations"),
        (("--recipe", "cifar110", "--epochs", "3"), "--warmup 400 must be shorter than the run's 3 epochs"),
        (("--epochs", "3", "--iterations", "9"), "two ways to give the run's length"),
        (("--momentum", "1"), "--momentum in"),
        (("--alpha-std", "-1"), "--alpha-std not negative"),
        (("--warmup-lr", "0"), "--warmup-lr positive"),
        (("--arch", "resnet19"), "unknown --arch 'resnet19'"),
        (("--arch", "plain18", "--blurpool"), "--blurpool: there is no plain18_blur; choose from resnet18_blur"),
        (("--label-smoothing", "1"), "--label-smoothing, --drop-path and --ema must lie in [0, 1)"),
        (("--drop-path", "-0.1"), "must lie in [0, 1)"),
        (("--arch", "plain18", "--drop-path", "0.1"), "--drop-path: plain18 has no residual branches to drop"),
        (("--ema", "1"), "must lie in [0, 1)"),
        (("--ramp", "1", "2"), "--ramp belongs to --start-size"),
        (("--trackers", "neptune"), "unknown tracker 'neptune'"),
        (("--mixup", "-1"), "--mixup and --cutmix must not be negative"),
    ],
)
def test_what_does_not_go_together_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(None, [*DATA, *words])
    assert message in str(caught.value)


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('arch = "resnet18"\nepochs = 5\nscale = [300, 400]\ncompile = true\n')
    args = parse_arguments(None, [*DATA, "--recipe", str(path), "--iterations", "7"])
    assert (args.arch, args.epochs, args.iterations, args.scale, args.compile) == ("resnet18", None, 7, [300, 400], "default")
    path.write_text("epochs = 5\ncompile = false\n")
    assert parse_arguments(None, [*DATA, "--recipe", str(path)]).compile is None

    for content, message in (("batchsize = 3", "batchsize is no option"), ("resume = true", "resume is no option"),
                             ("epochs = ", "cannot be read as TOML"), ("epochs = 1.5", "--epochs")):  # fmt: skip
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            parse_arguments(None, [*DATA, "--recipe", str(path)])
    with pytest.raises(UserError, match="no recipe"):
        parse_arguments(None, [*DATA, "--recipe", str(tmp_path / "none.toml")])
