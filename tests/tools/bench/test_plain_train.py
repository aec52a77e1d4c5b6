"""The typical training script in tools/bench/peers/plain_train.py and plain_images.py: images, learning rates and steps."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model import ARCHS
from pipeline.errors import UserError
from tests.helpers import random_image
from tools.bench.peers import plain_images, plain_train
from tools.bench.peers.plain_train import PlainOptions
from training.metrics import read_metrics
from training.options import TrainOptions, make_schedule

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_learning_rates_equal_train_pys(kind: str) -> None:
    schedule = make_schedule(TrainOptions(data="D", schedule=kind, epochs=3, warmup=0.7, lr=0.5), 10)
    rates = [0.5 * plain_train.learning_rate(step, kind, 7.0, 30) for step in range(30)]
    assert rates == pytest.approx([schedule.rate(step, ()) for step in range(30)])


def normalized(pixels: Any) -> Any:
    """(H, W, 3) in 0..255 -> (3, H, W), normalized with ImageNet's published mean and standard deviation."""
    return ((np.asarray(pixels, np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1)


def test_jitter_draws_crops_uniformly() -> None:
    image = Image.fromarray(random_image(20, 24))
    resized = image.resize((12, 10), Image.Resampling.BILINEAR)
    expected = {}
    for top in range(2):
        for left in range(4):
            crop = np.asarray(resized)[top : top + 9, left : left + 9]
            expected[(top, left, False)], expected[(top, left, True)] = normalized(crop), normalized(crop[:, ::-1])
    random.seed(1)
    seen: Counter[tuple[int, int, bool]] = Counter()
    for _ in range(800):
        found = plain_images.training_transform(image, partial(plain_images.jitter, size=9, low=10, high=10)).numpy()
        (which,) = [key for key, pixels in expected.items() if np.abs(pixels - found).max() < 1e-5]
        seen[which] += 1
    assert sum((seen[key] - 50) ** 2 / 50 for key in expected) < 37.7  # chi-squared of 15 degrees of freedom, p = 0.001


def test_jitter_draws_short_sides_uniformly() -> None:
    image = Image.fromarray(random_image(40, 50))
    random.seed(2)
    # A crop of 8 x 8 pixels occurs in exactly one of the resized images, so it identifies the short side.
    sizes = {short: np.asarray(image.resize((int(short * 50 / 40), short), Image.Resampling.BILINEAR)) for short in (8, 9, 10)}
    seen: Counter[int] = Counter()
    for _ in range(300):
        crop = np.asarray(plain_images.jitter(image, 8, 8, 10))
        for short, pixels in sizes.items():
            windows = np.lib.stride_tricks.sliding_window_view(pixels, (8, 8, 3)).reshape(-1, 8, 8, 3)
            seen[short] += bool((windows == crop).all((1, 2, 3)).any())
    assert sum(seen.values()) == 300
    assert sum((count - 100) ** 2 / 100 for count in seen.values()) < 13.8  # 2 degrees of freedom, p = 0.001


def test_resized_crops_lie_in_their_ranges() -> None:
    height, width, size = 160, 200, 20
    y, x = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))  # a pixel's value is its position
    random.seed(0)
    shares, aspects = [], []
    for _ in range(400):
        pixels = np.asarray(plain_images.resized_crop(image, size, 0.08, 1)).astype(float)
        wide, high = (np.ptp(pixels[2:-2, 2:-2, channel]) / (size - 5) * size for channel in (0, 1))
        shares.append(wide * high / (width * height))
        aspects.append(wide / high)
    assert 0.07 < min(shares) < 0.11
    assert 0.9 < max(shares) < 1.05
    assert 0.7 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.4
    strip = Image.fromarray(random_image(20, 1000))
    middle = strip.crop((486, 0, 513, 20)).resize((size, size), Image.Resampling.BILINEAR)  # 4:3, torchvision's fallback
    assert np.array_equal(np.asarray(plain_images.resized_crop(strip, size, 0.08, 1)), np.asarray(middle))


def test_validation_takes_the_centre(tmp_path: Path) -> None:
    pixels = random_image(50, 70)
    transform = plain_train.evaluation_transform(options(tmp_path, eval_size=28))
    found = transform(Image.fromarray(pixels)).numpy()
    resized = np.asarray(Image.fromarray(pixels).resize((44, 32), Image.Resampling.BILINEAR))  # 28 * 256 / 224; int(32 * 70 / 50)
    assert np.abs(found - normalized(resized[2:30, 8:36])).max() < 1e-5
    assert transform(Image.fromarray(pixels.transpose(1, 0, 2))).shape == (3, 28, 28)


def options(images: Path, **more: Any) -> PlainOptions:
    return PlainOptions(images, **{"arch": "resnet20", "image_size": 32, "batch_size": 20, "workers": 0, **more})


def test_the_plain_script_trains(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    forward = plain_train.Trainer.step

    def step(self: plain_train.Trainer, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(images.shape))
        return forward(self, images, labels)

    monkeypatch.setattr(plain_train.Trainer, "step", step)
    more = {"epochs": 2, "start_size": 16, "ramp": (0, 1), "scale": (32, 40), "log_every": 2, "channels_last": True}
    plain_train.train(options(image_folder, **more), tmp_path)
    assert shapes == [(20, 3, 16, 16)] * 3 + [(20, 3, 32, 32)] * 3
    rows = read_metrics(tmp_path / "metrics.csv")
    kinds = [("2", True), ("3", False), ("4", True), ("6", True), ("6", False)]
    assert [(row["step"], bool(row["train_loss"])) for row in rows] == kinds
    assert [float(row["epoch"]) for row in rows if row["val_top1"]] == [1, 2]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    model = ARCHS["resnet20"](num_classes=3).eval()
    model.load_state_dict(torch.load(tmp_path / "model.pt"))
    right = count = 0
    for label, folder in enumerate(sorted((image_folder / "val").iterdir())):
        for path in folder.iterdir():
            with torch.inference_mode():
                image = plain_images.validation_transform(Image.open(path).convert("RGB"), 32, 37)
                right += int(model(image[None]).argmax()) == label
            count += 1
    assert float(rows[-1]["val_top1"]) == pytest.approx(right / count)


def test_smoothing_average_and_decay(image_folder: Path) -> None:
    more = {"epochs": 2, "label_smoothing": 0.3, "ema": 0.2, "weight_decay": 0.5, "no_norm_decay": True}
    trainer = plain_train.Trainer(options(image_folder, **more))
    images, labels = torch.randn(20, 3, 32, 32), torch.arange(20) % 3
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    logits = trainer.model(images).detach()
    shares = 0.7 * torch.eye(3)[labels] + 0.3 / 3
    assert float(trainer.step(images, labels)) == pytest.approx(float(-(shares * logits.log_softmax(1)).sum(1).mean()), rel=1e-5)
    rate = 0.1 * plain_train.learning_rate(0, "cosine", 0, 6)
    for name, value in trainer.model.named_parameters():
        decay = 0.5 if value.ndim > 1 else 0.0
        assert value.grad is not None
        expected = before[name] - rate * (value.grad + decay * before[name])
        torch.testing.assert_close(value, expected)
    average = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for decay in (2 / 11, 0.2):  # (1 + t) / (10 + t) at the t-th update, at most 0.2
        trainer.step(images, labels)
        assert trainer.average is not None
        for name, value in trainer.average.module.state_dict().items():
            if value.is_floating_point():
                average[name] = decay * average[name] + (1 - decay) * trainer.model.state_dict()[name]
                torch.testing.assert_close(value, average[name])


def test_flip_test_adds_the_mirror_images_logits(image_folder: Path) -> None:
    """The model sees only the left half of an image, and with the mirror image both halves."""
    trainer = plain_train.Trainer(options(image_folder, flip_test=True))

    class Left(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            half = images[:, :, :, :16].mean((1, 2, 3))
            return torch.stack([half, torch.zeros_like(half), -half], dim=1)

    trainer.compiled = Left()
    right = 0
    val_set = trainer.val_loader.dataset
    for image, label in (val_set[index] for index in range(21)):
        right += (0 if float(image.mean()) > 0 else 2) == label
    assert trainer.validate() == pytest.approx(right / 21)


def test_unsuitable_image_folders_are_refused(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images there"):
        plain_train.Trainer(options(tmp_path))
    with pytest.raises(UserError, match="do not fill a batch of 200"):
        plain_train.Trainer(options(image_folder, batch_size=200))
