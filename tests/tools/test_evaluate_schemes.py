"""The paper's testing schemes and ensembles, compared with a plain evaluation."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from model import ARCHS, ResNet
from model.weights import ModelConfig, load_weights, save_weights
from pipeline import open_loader
from pipeline.convert.make import ConvertOptions, make_shards
from pipeline.engines.multiview import MultiViewBatch, ViewSpec
from pipeline.errors import UserError
from pipeline.loader import Loader
from pipeline.plan.geometry import TorchvisionCrop, WholeImage
from pipeline.spec import LoaderSpec
from pipeline.store.shards import Manifest, ShardSet
from tests.helpers import random_image, run_forked
from tools import evaluate
from tools.reporting import evaluation
from tools.reporting.evaluation import EvaluateOptions, open_batches

pytestmark = pytest.mark.usefixtures("one_core")


SCHEMES = ("centre", "ten-crop", "multi-scale")


@pytest.fixture(scope="module")
def models(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two untrained models, each with a mean image. They differ in depth and in their image sizes."""
    folder = tmp_path_factory.mktemp("models")
    paths = sorted((image_folder / "train").glob("*/*"))[::3]
    for seed, (name, arch, size, short) in enumerate((("a", "resnet18", 48, 56), ("b", "resnet34", 40, 40))):
        mean = np.random.default_rng(seed).uniform(60, 140, (size, size, 3)).astype(np.float32)
        classes = [f"n{label:08d}" for label in range(3)]
        config = ModelConfig(arch, classes, size, short, mean, np.array([55, 60, 65], np.float32))
        write_model(folder / f"{name}.safetensors", config, paths, seed)
    return {name: folder / f"{name}.safetensors" for name in ("a", "b")}


def write_model(file: Path, config: ModelConfig, images: list[Path], seed: int) -> None:
    """Save a model with random weights. Its batch norms have the statistics of `images`, and its mean logits on them are 0, so
    that its predictions differ between images."""
    torch.manual_seed(seed)
    model = ARCHS[config.arch](num_classes=len(config.classes))
    size = config.image_size
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB").resize((size, size))) for path in images])
    inputs = torch.from_numpy((pixels - config.mean) / config.std).permute(0, 3, 1, 2)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # its statistics become the plain mean over batches
    with torch.no_grad():
        model.train()(inputs)
        logits = model.eval()(inputs)
        factor = 1 / logits.std(dim=0).mean()
        model.fc.weight.mul_(factor)
        model.fc.bias.sub_(logits.mean(dim=0) * factor)
    save_weights(file, model.state_dict(), config.header())


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that runs the script in this process and returns the content of its --json."""

    def run(*arguments: object) -> dict[str, Any]:
        figures = tmp_path / "figures.json"
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments), "--json", str(figures), "--threads", "1"])
        evaluate.main()
        content: dict[str, Any] = json.loads(figures.read_text())
        return content

    return run


def plain_probabilities(weights: Path, folder: Path, scales: Sequence[int] = ()) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Probabilities (N, 3) by scheme, and labels (N,), of an ImageFolder's validation images, computed with Pillow and torch."""
    config = ModelConfig.from_header(load_weights(weights)[1])
    assert config is not None
    model = ARCHS[config.arch](num_classes=len(config.classes))
    model.load_state_dict(load_file(weights))
    model.eval()
    size, short = config.image_size, config.eval_short
    shorts = scales or [max(round(scale * size / 224), size) for scale in (224, 256, 384, 480, 640)]
    paths = sorted((folder / "val").glob("*/*"))
    found: dict[str, list[np.ndarray]] = {}
    for path in paths:
        image = Image.open(path).convert("RGB")
        crops = [crop_at(image, short, size, place) for place in ((0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5))]
        found.setdefault("centre", []).append(plain_average(model, config, crops[-1:], config.mean))
        mirrored = [crop[:, ::-1] for crop in crops]
        found.setdefault("ten-crop", []).append(plain_average(model, config, crops + mirrored, config.mean))
        by_scale = []
        for scale in shorts:
            sides = [int(side * scale / min(image.size) + 0.5) for side in image.size]
            whole = np.asarray(image.resize((sides[0], sides[1]), Image.Resampling.BILINEAR))
            by_scale.append(plain_average(model, config, [whole, whole[:, ::-1]], config.mean.mean(axis=(0, 1))))
            found.setdefault(f"scale-{scale}", []).append(by_scale[-1])
        found.setdefault("multi-scale", []).append(np.mean(by_scale, axis=0))
    labels = np.array([config.classes.index(path.parent.name) for path in paths])
    return {scheme: np.stack(rows) for scheme, rows in found.items()}, labels


def plain_average(model: torch.nn.Module, config: ModelConfig, views: list[np.ndarray], mean: np.ndarray) -> np.ndarray:
    images = torch.from_numpy((np.stack(views) - mean) / config.std).float().permute(0, 3, 1, 2)
    with torch.inference_mode():
        return np.asarray(torch.softmax(model(images).double(), dim=1).mean(dim=0))


def crop_at(image: Image.Image, short: int, size: int, place: tuple[float, float]) -> np.ndarray:
    """A crop of the image resized to `short`. place: the crop's offset down and to the right, as shares of the free space. The
    resized image is centred on the original, because its scale is exact, but its sides are whole pixels."""
    scale = min(image.size) / short
    ranges = []
    for side, part in zip(image.size, reversed(place), strict=True):
        out = int(side / scale + 0.5)
        low = (int((out - size) * part) - out / 2) * scale + side / 2
        ranges.append((max(low, 0), min(low + size * scale, side)))
    (left, right), (top, bottom) = ranges
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)))


def by_sample(data: Path, paths: list[Path]) -> list[int]:
    """The index of each of the split's samples among the sorted paths."""
    shards = ShardSet(data, "val")
    names = [f"{path.parent.name}/{path.stem}" for path in paths]
    keys = [shards.key(sample) for sample in range(len(shards))]
    return [next(place for place, name in enumerate(names) if key.endswith(name.split("/")[1])) for key in keys]


@pytest.mark.slow
def test_schemes_equal_a_plain_evaluation(
    image_folder: Path, small_shards: Path, models: dict[str, Path], tmp_path: Path, evaluated: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    figures = evaluated(
        models["a"], "--data", small_shards, "--schemes", *SCHEMES, "--save", tmp_path / "a.npz", "--batch-size", 4,
        "--per-class", tmp_path / "classes.csv",
    )  # fmt: skip
    expected, labels = plain_probabilities(models["a"], image_folder)
    order = by_sample(small_shards, sorted((image_folder / "val").glob("*/*")))
    assert sorted(order) == list(range(21))
    with np.load(tmp_path / "a.npz") as saved:
        assert saved["labels"].tolist() == labels[order].tolist()
        assert saved["ids"].tolist() == list(range(21))
        assert saved["schemes"].tolist() == list(SCHEMES)
        assert saved["classes"].tolist() == ["n00000000", "n00000001", "n00000002"]
        assert str(saved["fingerprint"]) == Manifest(small_shards).fingerprint
        assert (str(saved["split"]), str(saved["net"])) == ("val", str(models["a"]))
        found = {scheme: saved[f"probabilities/{scheme}"] for scheme in SCHEMES}
    assert figures["schemes"].keys() == expected.keys()
    for scheme in SCHEMES:
        assert found[scheme].dtype == np.float32
        np.testing.assert_allclose(found[scheme], expected[scheme][order], atol=0.05)
        assert np.abs(found[scheme] - expected[scheme][order]).mean() < 0.01
        assert figures["schemes"][scheme]["top1"] == pytest.approx((found[scheme].argmax(axis=1) == labels[order]).mean())
    assert np.abs(expected["centre"] - expected["ten-crop"]).mean() > 0.1  # the schemes differ
    assert np.abs(expected["multi-scale"] - expected["ten-crop"]).mean() > 0.1
    for scheme, rates in figures["schemes"].items():
        assert abs(rates["top1"] - (expected[scheme].argmax(axis=1) == labels).mean()) < 1.5 / 21
        assert rates["top5"] == 1
    assert figures["images"] == 21
    assert figures["top1"] == figures["schemes"]["centre"]["top1"]
    used, *lines = capsys.readouterr().out.splitlines()
    assert used.startswith(f"{models['a']}: short side 56, crop 48, mean image of average (")
    assert [line.split()[1] for line in lines] == list(figures["schemes"])
    for line, rates in zip(lines, figures["schemes"].values(), strict=True):
        assert f"top-1 {rates['top1']:.2%}" in line
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    right = found["centre"].argmax(axis=1) == labels[order]
    assert [float(row["top1"]) for row in rows] == pytest.approx([right[labels[order] == label].mean() for label in range(3)])


@pytest.mark.slow
def test_tables_show_the_first_scheme_and_scales_can_be_chosen(
    image_folder: Path, small_shards: Path, models: dict[str, Path], tmp_path: Path, evaluated: Callable[..., dict[str, Any]]
) -> None:
    figures = evaluated(
        models["a"], "--data", small_shards, "--schemes", "multi-scale", "centre", "--scales", 60, 50,
        "--save", tmp_path / "a.npz", "--confusion", tmp_path / "confusion.csv",
    )  # fmt: skip
    expected, labels = plain_probabilities(models["a"], image_folder, [60, 50])
    order = by_sample(small_shards, sorted((image_folder / "val").glob("*/*")))
    assert list(figures["schemes"]) == ["multi-scale", "scale-60", "scale-50", "centre"]
    with np.load(tmp_path / "a.npz") as saved:
        multi = saved["probabilities/multi-scale"]
    np.testing.assert_allclose(multi, expected["multi-scale"][order], atol=0.05)
    assert figures["top1"] == figures["schemes"]["multi-scale"]["top1"]
    counts = np.zeros((3, 3), int)
    np.add.at(counts, (labels[order], multi.argmax(axis=1)), 1)
    assert [[int(n) for n in row[1:]] for row in list(csv.reader((tmp_path / "confusion.csv").open()))[1:]] == counts.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["cpu", "dali"])
def test_any_engine_can_load_one_scheme(
    engine: str, small_shards: Path, models: dict[str, Path], tmp_path: Path, evaluated: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if engine == "dali":
        pytest.importorskip("nvidia.dali")
    opened = []

    def noted(spec: LoaderSpec) -> Loader:
        opened.append(open_loader(spec))
        return opened[-1]

    monkeypatch.setattr(evaluation, "open_loader", noted)
    evaluated(models["a"], "--data", small_shards, "--schemes", "ten-crop", "--engine", engine, "--save", tmp_path / "one.npz")
    assert [loader.engine for loader in opened] == [engine]
    evaluated(models["a"], "--data", small_shards, "--schemes", "centre", "ten-crop", "--save", tmp_path / "two.npz")
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert one["schemes"].tolist() == ["ten-crop"]
        np.testing.assert_allclose(one["probabilities/ten-crop"], two["probabilities/ten-crop"], atol=0.05)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Shards of square images, stored losslessly, and shards of their mirror images."""
    root = tmp_path_factory.mktemp("squares")
    found = []
    for name in ("given", "mirrored"):
        for split, sides in (("train", (230, 240)), ("val", (120, 224, 301))):
            for label in range(2):
                folder = root / name / split / f"n{label:08d}"
                folder.mkdir(parents=True)
                for index, side in enumerate(sides):
                    pixels = random_image(side, side, 10 * label + index)
                    image = Image.fromarray(pixels if name == "given" else np.ascontiguousarray(pixels[:, ::-1]))
                    image.save(folder / f"{label}_{index}.JPEG", "PNG")
        out = root / f"{name}-shards"
        assert run_forked("tools/make_shards.py", root / name, "--out", out, "--profile", "original").returncode == 0
        found.append(out)
    return found[0], found[1]


@pytest.mark.slow
def test_fully_convolutional_testing_at_224_equals_the_centre_crop(
    squares: tuple[Path, Path], tmp_path: Path, evaluated: Callable[..., dict[str, Any]]
) -> None:
    """The central crop of a square image resized to 224 is the whole image. Fully convolutional testing also sees its mirror
    image, which is the central crop of the image in the mirrored shards."""
    mean, std = np.full(3, 120, np.float32), np.full(3, 60, np.float32)
    config = ModelConfig("resnet18", ["n00000000", "n00000001"], 224, 224, mean, std)
    write_model(tmp_path / "model.safetensors", config, sorted((squares[0].parent / "given").glob("*/*/*")), seed=5)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, data in zip(("given", "mirrored"), squares, strict=True):
        evaluated(
            tmp_path / "model.safetensors", "--data", data, "--schemes", "centre", "multi-scale", "--scales", 224,
            "--save", tmp_path / f"{name}.npz",
        )  # fmt: skip
        with np.load(tmp_path / f"{name}.npz") as saved:
            found[name] = {scheme: saved[f"probabilities/{scheme}"] for scheme in ("centre", "multi-scale")}
    given, mirrored = found["given"], found["mirrored"]
    assert np.abs(given["centre"] - mirrored["centre"]).max() > 0.01
    np.testing.assert_allclose(given["multi-scale"], (given["centre"] + mirrored["centre"]) / 2, atol=1e-4)
    np.testing.assert_allclose(mirrored["multi-scale"], given["multi-scale"], atol=1e-4)


@pytest.mark.slow
def test_ensembles_of_models_and_saved_predictions_are_weighted_averages(
    small_shards: Path, models: dict[str, Path], tmp_path: Path, evaluated: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    schemes = ("--schemes", "centre", "multi-scale")
    for name, weights in models.items():
        evaluated(weights, "--data", small_shards, *schemes, "--save", tmp_path / f"{name}.npz")
    alone = {name: predictions(tmp_path / f"{name}.npz") for name in models}
    with np.load(tmp_path / "a.npz") as saved:
        labels = saved["labels"]
    capsys.readouterr()
    together = evaluated(*models.values(), "--data", small_shards, *schemes, "--shares", 1, 3, "--save", tmp_path / "models.npz")
    lines = capsys.readouterr().out.splitlines()[2:]  # after one line of preprocessing for each model
    assert [line.split("  ")[0] for line in lines] == [*[str(models["a"])] * 7, *[str(models["b"])] * 7, *["all, averaged"] * 2]
    saved_only = evaluated(tmp_path / "a.npz", tmp_path / "b.npz", "--shares", 0.5, 1.5, "--save", tmp_path / "saved.npz")
    evaluated(models["a"], tmp_path / "b.npz", "--data", small_shards, "--shares", 1, 3, "--save", tmp_path / "mixed.npz")
    equal = evaluated(tmp_path / "a.npz", tmp_path / "b.npz", "--save", tmp_path / "equal.npz", "--schemes", "centre")
    for scheme in schemes[1:]:
        expected = (alone["a"][scheme].astype(np.float64) + 3 * alone["b"][scheme]) / 4
        for file in ("models.npz", "saved.npz", "mixed.npz"):
            np.testing.assert_allclose(predictions(tmp_path / file)[scheme], expected, atol=1e-5, err_msg=file)
        right = (predictions(tmp_path / "saved.npz")[scheme].argmax(axis=1) == labels).mean()
        assert saved_only["schemes"][scheme]["top1"] == pytest.approx(right)
        assert abs(together["schemes"][scheme]["top1"] - right) < 1.5 / 21
        for index, name in enumerate(models):
            top1 = (alone[name][scheme].argmax(axis=1) == labels).mean()
            assert saved_only["members"][index]["schemes"][scheme]["top1"] == pytest.approx(top1)
    assert saved_only["top1"] == saved_only["schemes"]["centre"]["top1"]
    assert [member["share"] for member in saved_only["members"]] == [0.5, 1.5]
    assert equal["schemes"].keys() == equal["members"][0]["schemes"].keys() == {"centre"}
    plain = (alone["a"]["centre"] + alone["b"]["centre"]) / 2
    np.testing.assert_allclose(predictions(tmp_path / "equal.npz")["centre"], plain, atol=1e-6)
    assert np.abs(plain - expected).max() > 0.01


def predictions(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as saved:
        return {scheme: saved[f"probabilities/{scheme}"] for scheme in saved["schemes"].tolist()}


def test_saved_predictions_are_evaluated_without_data_or_models(
    small_shards: Path, models: dict[str, Path], tmp_path: Path, evaluated: Callable[..., dict[str, Any]]
) -> None:
    first = evaluated(models["a"], "--data", small_shards, "--save", tmp_path / "a.npz", "--confusion", tmp_path / "one.csv")
    second = evaluated(tmp_path / "a.npz", "--confusion", tmp_path / "two.csv")
    assert figures_of(first) == figures_of(second)
    assert (first["name"], first["data"], first["split"]) == (str(models["a"]), small_shards.name, "val")
    assert (second["name"], second["data"]) == (f"{tmp_path / 'a.npz'} ({models['a']})", None)
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "two.csv").read_text()
    train = evaluated(models["a"], "--data", small_shards, "--split", "train", "--save", tmp_path / "train.npz")
    assert train["images"] == 60
    assert figures_of(evaluated(tmp_path / "train.npz", "--split", "train")) == figures_of(train)


def figures_of(content: dict[str, Any]) -> dict[str, Any]:
    return {name: content[name] for name in ("top1", "top5", "images", "schemes")}


def test_mismatches_are_refused(
    small_shards: Path, squares: tuple[Path, Path], models: dict[str, Path], tmp_path: Path,
    evaluated: Callable[..., dict[str, Any]],
) -> None:  # fmt: skip
    data = ("--data", small_shards)
    evaluated(models["a"], *data, "--save", tmp_path / "a.npz")
    evaluated(models["a"], *data, "--schemes", "centre", "ten-crop", "--save", tmp_path / "two.npz")
    evaluated(models["a"], *data, "--split", "train", "--save", tmp_path / "train.npz")
    with np.load(tmp_path / "a.npz") as file:
        content = dict(file)
    np.savez(tmp_path / "other.npz", **content | {"fingerprint": "0123"})
    np.savez(tmp_path / "classes.npz", **content | {"classes": content["classes"][::-1]})
    np.savez(tmp_path / "ids.npz", **content | {"ids": content["ids"][::-1]})
    np.savez(tmp_path / "short.npz", **content | {"probabilities/centre": content["probabilities/centre"][:-1]})
    np.savez(tmp_path / "foreign.npz", probabilities=content["probabilities/centre"])
    (tmp_path / "junk.npz").write_text("junk")
    np.save((tmp_path / "array.npz").open("wb"), np.zeros(3))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for members, options, words in (
        (["a.npz", "other.npz"], (), r"other\.npz: was saved for another data set than .*a\.npz"),
        (["a.npz", "classes.npz"], (), r"classes\.npz: was saved for another list of classes"),
        (["train.npz"], (), r"train\.npz: was saved for another split .*\(train, not val\)"),
        (["a.npz", "train.npz"], (), r"train\.npz: was saved for another split"),
        (["ids.npz"], (), r"ids\.npz: its ids are not 0 to "),
        (["a.npz", "two.npz"], (), r"two\.npz .*: contains the schemes centre, ten-crop, not centre; give --schemes"),
        (["two.npz"], ("--schemes", "multi-scale"), r"two\.npz .*: contains the schemes centre, ten-crop, not multi-scale"),
        (["a.npz"], ("--data", squares[0]), r"a\.npz: was saved for another data set than --data .*given-shards"),
        (["a.npz"], (*data, "--split", "test"), "has no split 'test', only train, val"),
        (["foreign.npz"], (), r"foreign\.npz: was not written by evaluate\.py --save"),
        (["short.npz"], (), r"short\.npz: was not written by"),
        (["junk.npz"], (), r"junk\.npz: was not written by"),
        (["array.npz"], (), r"array\.npz: was not written by"),
        (["cut.npz"], (), r"cut\.npz: was not written by"),
        (["nowhere.npz"], (), r"nowhere\.npz: not found"),
        (["a.npz", "a.npz"], ("--shares", 1), "1 --shares for 2 members"),
        (["a.npz", "a.npz"], ("--shares", 1, 0), "above 0"),
        (["a.npz", "a.npz"], ("--shares", 1, "inf"), "above 0"),
        (["a.npz"], ("--scales", 64), "--scales only applies to"),
        ([models["a"]], (*data, "--scales", 64), "--scales only applies to"),
        ([models["a"]], (), "a.safetensors: running a model needs --data"),
        ([models["a"]], (*data, "--save", "there"), "--save there: the name must end with .npz"),
        ([models["a"]], (*data, "--schemes", "centre", "ten-crop", "--engine", "dali"), "`engine` dali makes only one kind"),
        (list(models.values()), (*data, "--engine", "ffcv"), "`engine` ffcv makes only one kind"),
        ([models["a"]], (*data, "--schemes", "five-crop"), "invalid choice: 'five-crop'"),
        (["a.npz"], ("--resize", 64), "--preset, --resize, --crop, .* only apply to models"),
        ([models["a"]], (*data, "--resize", 40), r"short side \(40\) must be at least the image size \(48\)"),
        ([models["a"]], (*data, "--mean", 124, 116, 104), "`mean` must lie in 0..1; divide"),
        ([models["a"]], (*data, "--std", 0.2, "nan", 0.2), "`std` must be above 0 and at most 1"),
        ([models["a"]], (*data, "--batch-size", 10**30), "`batch_size` must be at most 1000000"),
        ([models["a"]], (*data, "--device", "gpu"), "`device` gpu: not supported; use cpu, cuda or cuda:N"),
        ([models["a"]], (*data, "--device", "mps"), "`device` mps: not supported"),
        ([models["a"]], (*data, "--device", "cuda:-1"), "`device` cuda:-1: not supported"),
        ([models["a"]], (*data, "--device", "cuda:99"), "`device` cuda:99: torch sees no such CUDA GPU"),
    ):  # fmt: skip
        paths = [tmp_path / member if isinstance(member, str) else member for member in members]
        with pytest.raises(UserError, match=words):
            evaluated(*paths, *options)


def test_options_are_validated() -> None:
    for wrong, words in (
        ({"batch_size": 0}, "`batch_size` must be at least 1, not 0"),
        ({"threads": 0}, "`threads` must be at least 1"),
        ({"scales": (224, 0)}, "`scales` must be at least 1, not 0"),
        ({"scales": (224, 100_000)}, "`scales` must be at most 4096, not 100000"),
        ({"resize": 0}, "`resize` must be at least 1, not 0"),
        ({"crop": 10**30}, "`crop` must be at most 4096"),
        ({"schemes": ("centre", "five-crop")}, "unknown scheme 'five-crop' in `schemes`; choose from centre"),
        ({"precision": "fp8"}, "`precision` is no, fp16, bf16, not 'fp8'"),
        ({"arch": "vgg"}, "unknown `arch` 'vgg'; choose from plain18"),
        ({"shares": (1.0, math.nan)}, "`shares` must be above 0"),
    ):
        options: dict[str, Any] = wrong
        with pytest.raises(UserError, match=words):
            EvaluateOptions(**options)


def test_precision_and_batch_size_reach_the_model(
    small_shards: Path, models: dict[str, Path], tmp_path: Path, evaluated: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[tuple[torch.dtype, int]] = []
    forward = ResNet.forward

    def noted(self: ResNet, x: torch.Tensor) -> torch.Tensor:
        seen.append((x.dtype, len(x)))
        return forward(self, x)

    monkeypatch.setattr(ResNet, "forward", noted)
    evaluated(models["a"], "--data", small_shards, "--schemes", "centre", "ten-crop", "--precision", "bf16", "--batch-size", 6)
    assert {dtype for dtype, _ in seen} == {torch.bfloat16}
    assert max(count for _, count in seen) == 6
    assert sum(count for _, count in seen) == 21 * 11


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict of three classes without a header."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(ARCHS["resnet18"](num_classes=3).state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("file", "options", "short", "crop", "printed"),
    [
        ("resnet18.tv2_in1k.pth", (), 232, 224, "(123.68, 116.28, 103.53), std (58.395, 57.12, 57.375), from the file's name"),
        ("resnet18.pth", (), 256, 224, "from torchvision's V1 weights, as the file does not tell; --preset, --resize, --crop, "),
        ("resnet18.pth", ("--preset", "torchvision-v2"), 232, 224, "from the preset torchvision-v2\n"),
        ("resnet18.pth", ("--preset", "none"), 224, 224, "mean (0, 0, 0), std (255, 255, 255), from the preset none\n"),
        ("resnet18.pth", ("--resize", 80, "--crop", 64), 80, 64, "from the options and torchvision's V1 weights"),
        ("resnet18.pth", ("--resize", 80, "--crop", 64, "--mean", 0, 0.5, 1, "--std", 0.5, 0.5, 1), 80, 64,
         "short side 80, crop 64, mean (0, 127.5, 255), std (127.5, 127.5, 255), from the options\n"),
    ],
)  # fmt: skip
def test_preprocessing_is_that_of_the_file_or_the_options_and_is_printed(
    file: str, options: tuple[object, ...], short: int, crop: int, printed: str, small_shards: Path, plain_weights: Path,
    tmp_path: Path, evaluated: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / file).symlink_to(plain_weights)
    opened: list[ViewSpec] = []

    def noted(options: EvaluateOptions, view_specs: Sequence[ViewSpec], _: str) -> tuple[list[MultiViewBatch], int]:
        opened.extend(view_specs)
        return [
            MultiViewBatch({view_specs[0]: torch.zeros(1, crop, crop, 3, dtype=torch.uint8)}, torch.tensor([0]), np.arange(1))
        ], 1

    monkeypatch.setattr(evaluate, "open_batches", noted)
    evaluated(tmp_path / file, "--data", small_shards, *options)
    assert opened == [ViewSpec(TorchvisionCrop(short), crop)]
    assert f"{tmp_path / file}: short side {short}, crop {crop}, mean (" in (out := capsys.readouterr().out)
    assert printed in out


@pytest.mark.slow
def test_of_a_panorama_multi_scale_tests_the_centre_and_says_so(
    tmp_path: Path, evaluated: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture, models: dict[str, Path]
) -> None:
    """Resized whole to a short side of 60, the strip of 3 x 20000 pixels would have 24 million pixels."""
    strip = random_image(3, 20_000)
    for split, name, pixels in (("train", "a", strip[:, :40]), ("val", "a", random_image(40, 640)), ("val", "strip", strip)):
        for label in range(3):
            folder = tmp_path / "images" / split / f"n{label:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{name}{label}.png")
    make_shards(ConvertOptions(str(tmp_path / "images"), str(tmp_path / "data"), workers=1, profile="original"))
    figures = evaluated(models["a"], "--data", tmp_path / "data", "--schemes", "multi-scale", "--scales", 48, 60)
    assert figures["images"] == 6
    assert "longer than 16 times their short side: 3 of 6, such as " in caplog.text
    assert "(20000 x 3)" in caplog.text

    view = ViewSpec(WholeImage(48, mirrored=True), 48)
    batches, _ = open_batches(EvaluateOptions(data=str(tmp_path / "data"), threads=1), [view])
    found = torch.cat([batch.images[view] for batch in batches]).numpy()
    middle = Image.fromarray(strip).resize((768, 48), Image.Resampling.BILINEAR, box=(9976, 0, 10024, 3))
    assert found.shape == (12, 48, 768, 3)
    assert min(np.abs(one.astype(int) - np.asarray(middle)).max() for one in found) <= 1
