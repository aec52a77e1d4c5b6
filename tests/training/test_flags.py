"""Every option of train.py does what its help says. Short runs are compared with the same steps in plain torch. Other options
are checked in the loaders and schedules that they create.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from safetensors.torch import load_file

from model import ARCHS
from model.weights import ModelConfig, load_weights
from pipeline.errors import UserError
from pipeline.loader import Loader
from pipeline.plan.geometry import CentreCrop, PaddedCrop, RandomResizedCrop, ScaleJitter
from tests.helpers import assert_refused, run_forked, without_progress
from training import trackers
from training.command_line import parse_arguments, parser
from training.launch import check_exchange
from training.loaders import model_config_of, open_loaders
from training.metrics import read_metrics
from training.mixing import Mixing, mix_images
from training.options import TrainOptions, make_schedule

pytestmark = pytest.mark.usefixtures("one_core")

BATCH, LR = 20, 0.02
BASIC = ("--arch", "resnet20", "--batch-size", BATCH, "--image-size", 32, "--lr", LR, "--threads", 1, "--log-every", 1,
         "--alpha-std", 0, "--milestones", 0.99)  # fmt: skip

covered: set[str] = set()

Test = Callable[..., None]


def covers(*options: str) -> Callable[[Test], Test]:
    """Marks a test as covering these options; `test_every_option_is_covered` checks that none is missing."""

    def mark(test: Test) -> Test:
        covered.update(options)
        return test

    return mark


@dataclass
class Outcome:
    """The folder and the output of a run."""

    folder: Path
    printed: str

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return found

    def column(self, name: str) -> list[float]:
        return [float(row[name]) for row in read_metrics(self.folder / "metrics.csv") if row[name]]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model.safetensors")

    @property
    def model_config(self) -> ModelConfig:
        config = ModelConfig.from_header(load_weights(self.folder / "model.safetensors")[1])
        assert config is not None
        return config


@pytest.fixture
def run(small_shards: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """A function that trains with BASIC and more options, for two steps by default."""

    def start(*options: Any, **environment: str) -> Outcome:
        length = () if "--epochs" in options or "--iterations" in options else ("--iterations", 2)
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        result = run_forked(
            "train.py", "--data", small_shards, "--output", folder, *BASIC, *length, *options, cwd=tmp_path, **environment
        )
        assert result.returncode == 0, result.stderr
        return Outcome(folder, result.stdout + without_progress(result).stderr)

    return start


def parsed(data: Path, *options: Any) -> TrainOptions:
    return parse_arguments(None, [str(word) for word in ("--data", data, *BASIC, *options)])


def opened(data: Path, *options: Any) -> tuple[Loader, Loader]:
    """The training and the validation loader."""
    alone = SimpleNamespace(num_processes=1, process_index=0, mixed_precision="no", device="cpu")
    train, val = open_loaders(parsed(data, *options), alone)
    assert val is not None
    return train, val


class Reference:
    """The first steps of a run in plain torch, as in section 3.4 of He et al. 2015, with the deviations of some options."""

    def __init__(self, data: Path, steps: int = 2, arch: str = "resnet20", seed: int = 0) -> None:
        loader = opened(data, "--seed", seed)[0]
        self.batches = [(batch.images.clone(), batch.labels.clone()) for _, batch in zip(range(steps), loader, strict=False)]
        torch.manual_seed(seed)
        self.model = ARCHS[arch](num_classes=3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.losses: list[float] = []

    def weights(
        self,
        *,
        lr: float = LR,
        momentum: float = 0.9,
        decay: float = 1e-4,
        norm_decay: bool = True,
        parts: int = 1,
        smoothing: float = 0.0,
        ema: float | None = None,
    ) -> dict[str, torch.Tensor]:
        """The weights after all steps."""
        names = dict(self.model.named_parameters())
        velocity = {name: torch.zeros_like(value) for name, value in names.items()}
        average = {name: value.clone() for name, value in self.model.state_dict().items()}
        for step, (images, labels) in enumerate(self.batches):
            self.model.zero_grad()
            losses = []
            for part, targets in zip(images.chunk(parts), labels.chunk(parts), strict=True):
                logs = self.model(part).log_softmax(dim=1)
                own = -logs.gather(1, targets[:, None]).mean()
                loss = (1 - smoothing) * own - smoothing * logs.mean()
                (loss / parts).backward()
                losses.append(loss.item())
            self.losses.append(sum(losses) / parts)
            with torch.no_grad():
                for name, value in names.items():
                    assert value.grad is not None
                    of_norm = value.ndim == 1
                    gradient = value.grad + (0.0 if of_norm and not norm_decay else decay) * value
                    velocity[name] = momentum * velocity[name] + gradient
                    value -= lr * velocity[name]
            if ema is not None:
                share = min(ema, (1 + step) / (10 + step))
                for name, value in self.model.state_dict().items():
                    average[name] = share * average[name] + (1 - share) * value if value.is_floating_point() else value.clone()
        return average if ema is not None else self.model.state_dict()


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-5, msg=name)


@covers("--data", "--output", "--lr", "--iterations", "-b", "--batch-size", "--arch", "--image-size", "--log-every")
def test_two_steps_equal_plain_torch(run: Callable[..., Outcome], small_shards: Path) -> None:
    outcome = run()
    reference = Reference(small_shards)
    assert_equal(outcome.weights, reference.weights())
    assert outcome.column("train_loss") == pytest.approx(reference.losses, rel=1e-3)
    assert outcome.column("lr") == [LR, LR]
    config = outcome.config
    assert config["arguments"]["batch_size"] == BATCH
    assert config["data"]["fingerprint"] == opened(small_shards)[0].shards.manifest.fingerprint
    assert {"command", "commit", "versions", "hardware", "environment", "starts", "engine"} <= config.keys()


@pytest.mark.parametrize(
    ("options", "deviation"),
    [
        (("--momentum", 0.5, "--weight-decay", 0.1), {"momentum": 0.5, "decay": 0.1}),
        (("--no-norm-decay", "--weight-decay", 0.1), {"norm_decay": False, "decay": 0.1}),
        (("--accumulate", 2), {"parts": 2}),
        (("--label-smoothing", 0.3), {"smoothing": 0.3}),
        (("--ema", 0.15), {"ema": 0.15}),
        (("--scale-lr", "--lr", LR * 256 / BATCH), {}),
    ],
    ids=str,
)
@covers("--momentum", "--weight-decay", "--no-norm-decay", "--accumulate", "--label-smoothing", "--ema", "--scale-lr")
def test_two_steps_with_an_option_equal_plain_torch(
    run: Callable[..., Outcome], small_shards: Path, options: tuple[Any, ...], deviation: dict[str, Any]
) -> None:
    reference = Reference(small_shards)
    outcome = run(*options)
    assert_equal(outcome.weights, reference.weights(**deviation))
    assert outcome.column("train_loss") == pytest.approx(reference.losses, rel=1e-3)
    plain = Reference(small_shards).weights()
    if deviation:
        with pytest.raises(AssertionError):
            assert_equal(outcome.weights, plain)


@covers("--seed")
def test_the_seed_decides_initial_weights_and_order(run: Callable[..., Outcome], small_shards: Path) -> None:
    assert_equal(run("--seed", 7).weights, Reference(small_shards, seed=7).weights())


@pytest.mark.parametrize("option", ["--mixup", "--cutmix"])
@covers("--mixup", "--cutmix")
def test_mixed_images_are_trained_on_mixed_labels(run: Callable[..., Outcome], small_shards: Path, option: str) -> None:
    """The loss of the first step weights the log-probabilities of both labels by their shares. test_mixing.py tests mixing."""
    loss = run(option, 1.0, "--iterations", 1).column("train_loss")[0]
    reference = Reference(small_shards, steps=1)
    images, labels = reference.batches[0]
    kind = {option.removeprefix("--"): 1.0}
    mixing = Mixing(kind.get("mixup", 0.0), kind.get("cutmix", 0.0), 0, BATCH)
    mixed, share = mix_images(images, mixing.draw(0, 0, BATCH, (32, 32)))
    logs = reference.model(mixed).log_softmax(dim=1)
    expected = [-(share[i] * logs[i, labels[i]] + (1 - share[i]) * logs[i, labels[i ^ 1]]).item() for i in range(BATCH)]
    assert loss == pytest.approx(sum(expected) / BATCH, rel=1e-3)
    assert not torch.equal(mixed, images)


@covers("--drop-path")
def test_stochastic_depth_drops_the_same_blocks_after_a_restart(
    run: Callable[..., Outcome], small_shards: Path, tmp_path: Path
) -> None:
    plain, dropped, again = run(), run("--drop-path", 0.5), run("--drop-path", 0.5, "--iterations", 1)
    assert plain.column("train_loss")[0] != dropped.column("train_loss")[0]
    result = run_forked("train.py", "--data", small_shards, "--output", again.folder, *BASIC, "--drop-path", 0.5,
                        "--iterations", 2, "--resume")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert again.column("train_loss") == dropped.column("train_loss")


@covers("--optimizer")
def test_lars_moves_each_layer_by_the_trust_coefficient(run: Callable[..., Outcome], small_shards: Path) -> None:
    """In the first step, a layer moves by lr * 0.001 * its norm, if weight decay is negligible (You et al. 2017, equation 6)."""
    after = run("--optimizer", "lars", "--iterations", 1).weights
    before = Reference(small_shards, steps=1).model.state_dict()
    for name in ("conv1.weight", "layer2.0.conv1.weight", "fc.weight"):
        moved = (after[name] - before[name]).norm() / before[name].norm()
        assert float(moved) == pytest.approx(LR * 0.001, rel=0.01), name


@covers("--amp", "--mixed-precision")
def test_autocast_is_close_to_float32(run: Callable[..., Outcome], small_shards: Path) -> None:
    outcome = run("--amp")
    reference = Reference(small_shards)
    reference.weights()
    assert outcome.config["precision"] == "bf16"
    assert outcome.column("train_loss") != pytest.approx(reference.losses, rel=1e-6)
    assert outcome.column("train_loss") == pytest.approx(reference.losses, rel=0.05)
    assert parsed(small_shards, "--mixed-precision", "fp16").amp == "fp16"


@pytest.mark.slow
@covers("--compile")
def test_failing_compilation_is_reported_and_changes_nothing(
    run: Callable[..., Outcome], small_shards: Path, tmp_path: Path
) -> None:
    """This run finds no C++ compiler. test_compiling.py tests successful compilation."""
    outcome = run("--compile", PATH="/nowhere", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert re.search(r"torch.compile does not work here \(.+\); training in eager mode", outcome.printed)
    assert_equal(outcome.weights, Reference(small_shards).weights())


@covers("--compress-gradients")
def test_gradients_are_compressed_only_between_processes_that_can(small_shards: Path, tmp_path: Path) -> None:
    """test_launch.py tests two processes."""
    assert parsed(small_shards, "--compress-gradients").compress_gradients == "bf16"
    folder = tmp_path / "run"
    words = ("train.py", "--data", small_shards, "--output", folder, *BASIC, "--compress-gradients", "fp16")
    assert_refused(run_forked(*words), "--compress-gradients: a single process exchanges no gradients; leave it out")
    assert not folder.exists()
    two_on_a_cpu = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    with pytest.raises(UserError, match="bf16 does not work between processes on a CPU; use fp16"):
        check_exchange("bf16", two_on_a_cpu)
    check_exchange("bf16", SimpleNamespace(num_processes=2, device=torch.device("cuda")))


@covers("--model", "--blurpool")
def test_aliases_of_models(run: Callable[..., Outcome]) -> None:
    assert run("--model", "resnet18", "--blurpool", "--iterations", 1).model_config.arch == "resnet18_blur"


@covers("--weights")
def test_training_starts_from_given_weights(run: Callable[..., Outcome], small_shards: Path) -> None:
    first = run()
    second = run("--weights", first.folder, "--lr", 1e-12)
    assert "training starts from these resnet20 weights, including the classifier" in second.printed
    trained = {name for name in first.weights if name.endswith(("weight", "bias"))}
    assert_equal({name: second.weights[name] for name in trained}, {name: first.weights[name] for name in trained})


def rates(*options: Any) -> list[float]:
    """The learning rate of each step with ten steps per epoch and a base rate of 0.1, if the validation error never changes."""
    schedule = make_schedule(parse_arguments(None, ["--data", "x", *map(str, options)]), 10)
    return [round(schedule.rate(step, (0.5,) * step), 6) for step in range(schedule.steps)]


@covers("--epochs", "--schedule", "--milestones", "--patience", "--warmup", "--warmup-lr")
def test_learning_rates() -> None:
    assert rates("--epochs", 1, "--milestones", 0.2, 0.7) == [0.1] * 2 + [0.01] * 5 + [0.001] * 3
    assert rates("--epochs", 1, "--schedule", "linear") == [round(0.1 * (1 - (i + 0.5) / 10), 6) for i in range(10)]
    assert rates("--epochs", 1, "--schedule", "plateau", "--patience", 3)[:6] == [0.1] * 5 + [0.01]
    warmup = ("--iterations", 10, "--warmup", 2, "--milestones", 8)
    assert rates(*warmup) == [0.025, 0.075] + [0.1] * 6 + [0.01] * 2
    assert rates(*warmup, "--warmup-lr", 0.3)[:3] == [0.3, 0.3, 0.1]


@covers("--geometry", "--scale", "--area", "--interpolation", "--alpha-std", "--mean", "--order", "--block-shards", "--corrupt")
def test_options_of_the_training_images_reach_the_loader(small_shards: Path) -> None:
    """Each option changes the first batch and arrives in the loader's spec."""
    plain = next(iter(opened(small_shards)[0])).images.clone()

    def batch(*options: Any) -> tuple[torch.Tensor, Any]:
        loader = opened(small_shards, *options)[0]
        return next(iter(loader)).images.clone(), loader.spec

    for options, attribute, value in (
        (("--geometry", "rrc"), "geometry", RandomResizedCrop()),
        (("--geometry", "rrc", "--area", 0.5, 1), "geometry", RandomResizedCrop((0.5, 1.0))),
        (("--geometry", "pad"), "geometry", PaddedCrop()),
        (("--interpolation", "bicubic"), "interpolation", "bicubic"),
        (("--scale", 40, 50), "geometry", ScaleJitter(40, 50)),
        (("--alpha-std", 0.5), "alpha_std", 0.5),
        (("--mean", "channel"), "normalization", "channel"),
        (("--order", "blocks", "--block-shards", 2), "block_shards", 2),
    ):
        images, spec = batch(*options)
        assert getattr(spec, attribute) == value
        assert not torch.equal(images, plain), options
    assert batch("--corrupt", "stop")[1].corrupt == "stop"


@covers("--engine", "-j", "--threads", "--workers", "--prefetch")
def test_options_that_affect_only_throughput_change_no_batch(run: Callable[..., Outcome], small_shards: Path) -> None:
    """Options that affect only throughput change no batch."""
    outcome = run("--engine", "dali", "-j", 2, "--prefetch", 3)
    assert outcome.config["engine"] == "dali"
    assert "2 threads, prefetch 3" in outcome.printed
    assert outcome.column("train_loss") == pytest.approx(run().column("train_loss"), rel=0.02)  # pixels of another decoder
    assert parsed(small_shards, "--workers", 5).threads == 5


@covers("--cache", "--cache-gb")
def test_the_cache_of_remote_shards(small_shards: Path, tmp_path: Path) -> None:
    spec = opened(small_shards, "--cache", tmp_path / "cache", "--cache-gb", 0.5)[0].spec
    assert (spec.cache, spec.cache_gb) == (tmp_path / "cache", 0.5)  # filled in tests/pipeline/store/test_remote.py


@covers("--read-timeout")
def test_the_time_out_of_reads(small_shards: Path) -> None:
    for flags, expected in (((), 60), (("--read-timeout", 7.5), 7.5)):
        assert [loader.spec.read_timeout for loader in opened(small_shards, *flags)] == [expected] * 2
    with pytest.raises(UserError, match="`read_timeout` must be a positive number of seconds, not 0"):
        parsed(small_shards, "--read-timeout", 0)


@covers("--verify-reads")
def test_reads_are_verified_in_both_splits(small_shards: Path) -> None:
    for flags, expected in (((), False), (("--verify-reads",), True)):
        assert [loader.spec.verify for loader in opened(small_shards, *flags)] == [expected] * 2


@covers("--start-size", "--ramp")
def test_progressive_resizing(small_shards: Path) -> None:
    """The size is a pure function of the epoch. Validation uses the last epochs' size."""
    train, val = opened(small_shards, "--epochs", 5, "--start-size", 16, "--image-size", 48, "--ramp", 1, 3)
    sides = []
    for _ in range(5):
        sides.append({batch.images.shape[2] for batch in train})
    assert sides == [{16}, {16}, {32}, {48}, {48}]
    assert next(iter(val)).images.shape[2:] == (48, 48)
    train.seek(2, 0)
    assert next(iter(train)).images.shape[2] == 32
    assert opened(small_shards, "--epochs", 11, "--start-size", 16, "--ramp", 0.25, 0.5)[0].spec.sizes == ((0, 16), (5, 32))
    with pytest.raises(UserError, match="the last epoch must have `image_size` 32"):
        opened(small_shards, "--epochs", 3, "--start-size", 16, "--ramp", 1, 3)


@covers("--eval-size", "--flip-test")
def test_options_of_the_validation_images_reach_the_loader(run: Callable[..., Outcome], small_shards: Path) -> None:
    train, val = opened(small_shards, "--eval-size", 64, "--flip-test")
    assert val.spec.geometry == CentreCrop(74, mirrored=True)  # 37 at 32
    config = model_config_of(parsed(small_shards, "--eval-size", 64, "--flip-test"), train)
    assert (config.image_size, config.eval_short, config.mean.shape) == (64, 74, (64, 64, 3))
    both = next(iter(val))
    alone = next(iter(opened(small_shards, "--eval-size", 64)[1]))
    assert torch.equal(both.images[::2], alone.images)
    mean = torch.from_numpy(config.mean).permute(2, 0, 1)  # a mean per pixel position, which is not mirrored with the image
    assert torch.allclose(both.images[1::2], (alone.images + mean).flip(3) - mean, atol=1e-3)
    outcome = run("--eval-size", 64, "--flip-test")
    assert len(outcome.column("val_top1")) == 1


@covers("--eval-every", "--checkpoint-every", "--trackers")
def test_metrics_and_checkpoints_are_written_at_the_given_intervals(run: Callable[..., Outcome]) -> None:
    outcome = run("--epochs", 3, "--eval-every", 2, "--checkpoint-every", 2, "--log-every", 2, "--trackers", "none")
    rows = read_metrics(outcome.folder / "metrics.csv")
    assert [int(row["step"]) for row in rows if row["val_top1"]] == [6, 9]
    assert [int(row["step"]) for row in rows if row["lr"]] == [2, 4, 6, 8]
    assert not (outcome.folder / "tensorboard").exists()
    stopped = run("--iterations", 3, "--checkpoint-every", 2)
    assert list((stopped.folder / "tensorboard").glob("*tfevents*"))


def test_a_tracker_gets_options_and_metrics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    class Recorder(GeneralTracker):
        name = "wandb"
        requires_logging_directory = False

        def __init__(self, project: str, **more: Any) -> None:
            super().__init__()
            calls.append((project, more))

        @property
        def tracker(self) -> Any:
            return None

        def start(self) -> None:
            calls.append("started")

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            calls.append(values)

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            calls.append((values, step))

    with pytest.raises(UserError, match="`trackers` wandb: is not installed; pip install wandb"):
        trackers.check_trackers(["wandb"])
    with pytest.raises(UserError, match=r"unknown tracker 'weights' in `trackers`; choose from .*wandb"):
        trackers.check_trackers(["weights"])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    trackers.check_trackers(["tensorboard", "wandb", "none"])
    accelerator = Accelerator(cpu=True)
    accelerator.log_with = trackers.make_trackers(["wandb", "wandb", "tensorboard"], tmp_path, 0)
    folder = tmp_path / "first"
    trackers.start_trackers(accelerator, {"lr": 0.1, "scale": [1, 2]}, folder, "abc", 0)
    accelerator.log({"loss": 1.5}, step=3)
    given = {"name": "first", "dir": str(folder), "id": "abc", "resume": "allow"}
    assert calls == [("cropfeed", given), "started", {"lr": 0.1, "scale": "[1, 2]"}, ({"loss": 1.5}, 3)]
    assert list((tmp_path / "tensorboard").glob("*tfevents*"))


@covers("--resume")
def test_resume_needs_a_checkpoint_unless_it_is_auto(run: Callable[..., Outcome], small_shards: Path, tmp_path: Path) -> None:
    """tests/test_train_stops.py tests what a resumed run does."""
    folder = tmp_path / "new"
    words = ("train.py", "--data", small_shards, "--output", folder, *BASIC, "--iterations", 2, "--resume")
    assert "no checkpoint to resume from" in run_forked(*words).stderr
    assert run_forked(*words, "auto").returncode == 0
    before = (folder / "metrics.csv").read_text()
    run_id = json.loads((folder / "config.json").read_text())["id"]
    assert run_forked(*words, "auto").returncode == 0  # the run has already ended
    assert (folder / "metrics.csv").read_text() == before
    config = json.loads((folder / "config.json").read_text())
    assert [start["step"] for start in config["starts"]] == [0, 2]
    assert config["id"] == run_id


@pytest.mark.slow
@covers("--recipe", "--list")
def test_options_from_a_recipe_and_the_list_of_models(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse_arguments(None, ["--data", "x", "--recipe", "strong", "--lr", "0.7"])
    assert (options.arch, options.compile, options.amp, options.epochs, options.lr) == (
        "resnet50_blur",
        "default",
        "bf16",
        88,
        0.7,
    )
    with pytest.raises(SystemExit):
        parser().parse_args(["--list"])
    assert "resnet18_blur" in capsys.readouterr().out


def test_every_option_is_covered() -> None:
    options = {option for action in parser()._actions for option in action.option_strings} - {"-h", "--help"}
    assert covered == options


def test_help_is_grouped_and_short(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two screens: fewer than a hundred lines, in groups."""
    monkeypatch.setenv("COLUMNS", "132")
    with pytest.raises(SystemExit):
        parser("Train.").parse_args(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 100
    for group in ("model:", "optimization", "images:", "regularization", "data loading:", "validation, checkpoints and logging:"):
        assert f"\n{group}" in text
