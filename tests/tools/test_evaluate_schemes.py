"""The paper's testing schemes, and ensembles, against a plain evaluation."""

from __future__ import annotations

import csv
import json
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
from pipeline.errors import UserError
from pipeline.loader import Loader
from pipeline.spec import LoaderSpec
from pipeline.store.shards import Manifest, ShardSet
from tests.helpers import picture, run_forked
from tools import evaluate

pytestmark = pytest.mark.usefixtures("one_core")


SCHEMES = ("centre", "ten-crop", "multi-scale")


@pytest.fixture(scope="module")
def nets(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two nets without training, with a mean image each; they differ in depth and in the sizes they take."""
    folder = tmp_path_factory.mktemp("nets")
    paths = sorted((image_folder / "train").glob("*/*"))[::3]
    for seed, (name, arch, size, short) in enumerate((("a", "resnet18", 48, 56), ("b", "resnet34", 40, 40))):
        mean = np.random.default_rng(seed).uniform(60, 140, (size, size, 3)).astype(np.float32)
        classes = [f"n{label:08d}" for label in range(3)]
        recipe = ModelConfig(arch, classes, size, short, mean, np.array([55, 60, 65], np.float32))
        write_net(folder / f"{name}.safetensors", recipe, paths, seed)
    return {name: folder / f"{name}.safetensors" for name in ("a", "b")}


def write_net(file: Path, recipe: ModelConfig, images: list[Path], seed: int) -> None:
    """A net of random weights that is of different opinions about images: its batch norms have seen these, and its mean logits of
    them are 0."""
    torch.manual_seed(seed)
    net = ARCHS[recipe.arch](num_classes=len(recipe.classes))
    size = recipe.image_size
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB").resize((size, size))) for path in images])
    inputs = torch.from_numpy((pixels - recipe.mean) / recipe.std).permute(0, 3, 1, 2)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # of all batches alike
    with torch.no_grad():
        net.train()(inputs)
        logits = net.eval()(inputs)
        factor = 1 / logits.std(dim=0).mean()
        net.fc.weight.mul_(factor)
        net.fc.bias.sub_(logits.mean(dim=0) * factor)
    save_weights(file, net.state_dict(), recipe.header())


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the script in this process; gives its --json."""

    def run(*arguments: object) -> dict[str, Any]:
        figures = tmp_path / "figures.json"
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments), "--json", str(figures), "--threads", "1"])
        evaluate.main()
        content: dict[str, Any] = json.loads(figures.read_text())
        return content

    return run


def plain_probabilities(weights: Path, folder: Path, scales: Sequence[int] = ()) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Probabilities (N, 3) by scheme, and labels (N,), of the validation images in an ImageFolder, by Pillow and torch alone."""
    recipe = ModelConfig.from_header(load_weights(weights)[1])
    assert recipe is not None
    net = ARCHS[recipe.arch](num_classes=len(recipe.classes))
    net.load_state_dict(load_file(weights))
    net.eval()
    size, short = recipe.image_size, recipe.eval_short
    shorts = scales or [max(round(scale * size / 224), size) for scale in (224, 256, 384, 480, 640)]
    paths = sorted((folder / "val").glob("*/*"))
    found: dict[str, list[np.ndarray]] = {}
    for path in paths:
        image = Image.open(path).convert("RGB")
        crops = [crop_at(image, short, size, place) for place in ((0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5))]
        found.setdefault("centre", []).append(plain_average(net, recipe, crops[-1:], recipe.mean))
        mirrored = [crop[:, ::-1] for crop in crops]
        found.setdefault("ten-crop", []).append(plain_average(net, recipe, crops + mirrored, recipe.mean))
        of_scales = []
        for scale in shorts:
            sides = [int(side * scale / min(image.size) + 0.5) for side in image.size]
            whole = np.asarray(image.resize((sides[0], sides[1]), Image.Resampling.BILINEAR))
            of_scales.append(plain_average(net, recipe, [whole, whole[:, ::-1]], recipe.mean.mean(axis=(0, 1))))
            found.setdefault(f"scale-{scale}", []).append(of_scales[-1])
        found.setdefault("multi-scale", []).append(np.mean(of_scales, axis=0))
    labels = np.array([recipe.classes.index(path.parent.name) for path in paths])
    return {scheme: np.stack(rows) for scheme, rows in found.items()}, labels


def plain_average(net: torch.nn.Module, recipe: ModelConfig, pictures: list[np.ndarray], mean: np.ndarray) -> np.ndarray:
    images = torch.from_numpy((np.stack(pictures) - mean) / recipe.std).float().permute(0, 3, 1, 2)
    with torch.inference_mode():
        return np.asarray(torch.softmax(net(images).double(), dim=1).mean(dim=0))


def crop_at(image: Image.Image, short: int, size: int, place: tuple[float, float]) -> np.ndarray:
    """A crop of the image resized to `short`. place: of its room, down and to the right. The resized image is centred on the
    image: its scale is short's exactly, and its sides are whole."""
    scale = min(image.size) / short
    ranges = []
    for side, part in zip(image.size, reversed(place), strict=True):
        out = int(side / scale + 0.5)
        low = (int((out - size) * part) - out / 2) * scale + side / 2
        ranges.append((max(low, 0), min(low + size * scale, side)))
    (left, right), (top, bottom) = ranges
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)))


def by_sample(data: Path, paths: list[Path]) -> list[int]:
    """Where each of the split's samples stands among the paths, which are sorted."""
    shards = ShardSet(data, "val")
    names = [f"{path.parent.name}/{path.stem}" for path in paths]
    keys = [shards.key(sample) for sample in range(len(shards))]
    return [next(place for place, name in enumerate(names) if key.endswith(name.split("/")[1])) for key in keys]


def test_schemes_are_those_of_a_plain_evaluation(
    image_folder: Path, small_shards: Path, nets: dict[str, Path], tmp_path: Path, evaluated: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    figures = evaluated(
        nets["a"], "--data", small_shards, "--schemes", *SCHEMES, "--save", tmp_path / "a.npz", "--batch-size", 4,
        "--per-class", tmp_path / "classes.csv",
    )  # fmt: skip
    expected, labels = plain_probabilities(nets["a"], image_folder)
    order = by_sample(small_shards, sorted((image_folder / "val").glob("*/*")))
    assert sorted(order) == list(range(21))
    with np.load(tmp_path / "a.npz") as saved:
        assert saved["labels"].tolist() == labels[order].tolist()
        assert saved["ids"].tolist() == list(range(21))
        assert saved["schemes"].tolist() == list(SCHEMES)
        assert saved["classes"].tolist() == ["n00000000", "n00000001", "n00000002"]
        assert str(saved["fingerprint"]) == Manifest(small_shards).fingerprint
        assert (str(saved["split"]), str(saved["net"])) == ("val", str(nets["a"]))
        found = {scheme: saved[f"probabilities/{scheme}"] for scheme in SCHEMES}
    assert figures["schemes"].keys() == expected.keys()
    for scheme in SCHEMES:
        assert found[scheme].dtype == np.float32
        np.testing.assert_allclose(found[scheme], expected[scheme][order], atol=0.05)
        assert np.abs(found[scheme] - expected[scheme][order]).mean() < 0.01
        assert figures["schemes"][scheme]["top1"] == pytest.approx((found[scheme].argmax(axis=1) == labels[order]).mean())
    assert np.abs(expected["centre"] - expected["ten-crop"]).mean() > 0.1  # so that they could be told apart
    assert np.abs(expected["multi-scale"] - expected["ten-crop"]).mean() > 0.1
    for scheme, rates in figures["schemes"].items():
        assert abs(rates["top1"] - (expected[scheme].argmax(axis=1) == labels).mean()) < 1.5 / 21
        assert rates["top5"] == 1
    assert figures["images"] == 21
    assert figures["top1"] == figures["schemes"]["centre"]["top1"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == list(figures["schemes"])
    for line, rates in zip(lines, figures["schemes"].values(), strict=True):
        assert f"top-1 {rates['top1']:.2%}" in line
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    right = found["centre"].argmax(axis=1) == labels[order]
    assert [float(row["top1"]) for row in rows] == pytest.approx([right[labels[order] == label].mean() for label in range(3)])


def test_the_first_scheme_is_what_the_tables_show_and_scales_can_be_chosen(
    image_folder: Path, small_shards: Path, nets: dict[str, Path], tmp_path: Path, evaluated: Callable[..., dict[str, Any]]
) -> None:
    figures = evaluated(
        nets["a"], "--data", small_shards, "--schemes", "multi-scale", "centre", "--scales", 60, 50,
        "--save", tmp_path / "a.npz", "--confusion", tmp_path / "confusion.csv",
    )  # fmt: skip
    expected, labels = plain_probabilities(nets["a"], image_folder, [60, 50])
    order = by_sample(small_shards, sorted((image_folder / "val").glob("*/*")))
    assert list(figures["schemes"]) == ["multi-scale", "scale-60", "scale-50", "centre"]
    with np.load(tmp_path / "a.npz") as saved:
        multi = saved["probabilities/multi-scale"]
    np.testing.assert_allclose(multi, expected["multi-scale"][order], atol=0.05)
    assert figures["top1"] == figures["schemes"]["multi-scale"]["top1"]
    counts = np.zeros((3, 3), int)
    np.add.at(counts, (labels[order], multi.argmax(axis=1)), 1)
    assert [[int(n) for n in row[1:]] for row in list(csv.reader((tmp_path / "confusion.csv").open()))[1:]] == counts.tolist()


@pytest.mark.parametrize("engine", ["cpu", "dali"])
def test_one_scheme_comes_from_any_engine(
    engine: str, small_shards: Path, nets: dict[str, Path], tmp_path: Path, evaluated: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if engine == "dali":
        pytest.importorskip("nvidia.dali")
    opened = []

    def noted(spec: LoaderSpec) -> Loader:
        opened.append(open_loader(spec))
        return opened[-1]

    monkeypatch.setattr(evaluate, "open_loader", noted)
    evaluated(nets["a"], "--data", small_shards, "--schemes", "ten-crop", "--engine", engine, "--save", tmp_path / "one.npz")
    assert [loader.engine for loader in opened] == [engine]
    evaluated(nets["a"], "--data", small_shards, "--schemes", "centre", "ten-crop", "--save", tmp_path / "two.npz")
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert one["schemes"].tolist() == ["ten-crop"]
        np.testing.assert_allclose(one["probabilities/ten-crop"], two["probabilities/ten-crop"], atol=0.05)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Shards of square images, stored without loss, and shards of their mirror images."""
    root = tmp_path_factory.mktemp("squares")
    found = []
    for name in ("given", "mirrored"):
        for split, sides in (("train", (230, 240)), ("val", (120, 224, 301))):
            for label in range(2):
                folder = root / name / split / f"n{label:08d}"
                folder.mkdir(parents=True)
                for index, side in enumerate(sides):
                    pixels = picture(side, side, 10 * label + index)
                    image = Image.fromarray(pixels if name == "given" else np.ascontiguousarray(pixels[:, ::-1]))
                    image.save(folder / f"{label}_{index}.JPEG", "PNG")
        out = root / f"{name}-shards"
        assert run_forked("tools/make_shards.py", root / name, "--out", out, "--profile", "original").returncode == 0
        found.append(out)
    return found[0], found[1]


def test_fully_convolutional_testing_at_224_is_the_centre_crops(
    squares: tuple[Path, Path], tmp_path: Path, evaluated: Callable[..., dict[str, Any]]
) -> None:
    """Of square images whose short side becomes 224, the central crop at 224 is all. Fully convolutional testing also sees its
    mirror image, which is the central crop of the mirrored image."""
    mean, std = np.full(3, 120, np.float32), np.full(3, 60, np.float32)
    recipe = ModelConfig("resnet18", ["n00000000", "n00000001"], 224, 224, mean, std)
    write_net(tmp_path / "net.safetensors", recipe, sorted((squares[0].parent / "given").glob("*/*/*")), seed=5)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, data in zip(("given", "mirrored"), squares, strict=True):
        evaluated(
            tmp_path / "net.safetensors", "--data", data, "--schemes", "centre", "multi-scale", "--scales", 224,
            "--save", tmp_path / f"{name}.npz",
        )  # fmt: skip
        with np.load(tmp_path / f"{name}.npz") as saved:
            found[name] = {scheme: saved[f"probabilities/{scheme}"] for scheme in ("centre", "multi-scale")}
    given, mirrored = found["given"], found["mirrored"]
    assert np.abs(given["centre"] - mirrored["centre"]).max() > 0.01
    np.testing.assert_allclose(given["multi-scale"], (given["centre"] + mirrored["centre"]) / 2, atol=1e-4)
    np.testing.assert_allclose(mirrored["multi-scale"], given["multi-scale"], atol=1e-4)


def test_ensembles_of_nets_and_of_saved_predictions_are_weighted_averages(
    small_shards: Path, nets: dict[str, Path], tmp_path: Path, evaluated: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    schemes = ("--schemes", "centre", "multi-scale")
    for name, weights in nets.items():
        evaluated(weights, "--data", small_shards, *schemes, "--save", tmp_path / f"{name}.npz")
    alone = {name: predictions(tmp_path / f"{name}.npz") for name in nets}
    with np.load(tmp_path / "a.npz") as saved:
        labels = saved["labels"]
    capsys.readouterr()
    together = evaluated(*nets.values(), "--data", small_shards, *schemes, "--shares", 1, 3, "--save", tmp_path / "nets.npz")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [*[str(nets["a"])] * 7, *[str(nets["b"])] * 7, *["all, averaged"] * 2]
    saved_only = evaluated(tmp_path / "a.npz", tmp_path / "b.npz", "--shares", 0.5, 1.5, "--save", tmp_path / "saved.npz")
    evaluated(nets["a"], tmp_path / "b.npz", "--data", small_shards, "--shares", 1, 3, "--save", tmp_path / "mixed.npz")
    equal = evaluated(tmp_path / "a.npz", tmp_path / "b.npz", "--save", tmp_path / "equal.npz", "--schemes", "centre")
    for scheme in schemes[1:]:
        expected = (alone["a"][scheme].astype(np.float64) + 3 * alone["b"][scheme]) / 4
        for file in ("nets.npz", "saved.npz", "mixed.npz"):
            np.testing.assert_allclose(predictions(tmp_path / file)[scheme], expected, atol=1e-5, err_msg=file)
        right = (predictions(tmp_path / "saved.npz")[scheme].argmax(axis=1) == labels).mean()
        assert saved_only["schemes"][scheme]["top1"] == pytest.approx(right)
        assert abs(together["schemes"][scheme]["top1"] - right) < 1.5 / 21
        for index, name in enumerate(nets):
            ours = (alone[name][scheme].argmax(axis=1) == labels).mean()
            assert saved_only["members"][index]["schemes"][scheme]["top1"] == pytest.approx(ours)
    assert saved_only["top1"] == saved_only["schemes"]["centre"]["top1"]
    assert [member["share"] for member in saved_only["members"]] == [0.5, 1.5]
    assert equal["schemes"].keys() == equal["members"][0]["schemes"].keys() == {"centre"}
    plain = (alone["a"]["centre"] + alone["b"]["centre"]) / 2
    np.testing.assert_allclose(predictions(tmp_path / "equal.npz")["centre"], plain, atol=1e-6)
    assert np.abs(plain - expected).max() > 0.01


def predictions(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as saved:
        return {scheme: saved[f"probabilities/{scheme}"] for scheme in saved["schemes"].tolist()}


def test_saved_predictions_are_scored_without_data_or_nets(
    small_shards: Path, nets: dict[str, Path], tmp_path: Path, evaluated: Callable[..., dict[str, Any]]
) -> None:
    first = evaluated(nets["a"], "--data", small_shards, "--save", tmp_path / "a.npz", "--confusion", tmp_path / "one.csv")
    second = evaluated(tmp_path / "a.npz", "--confusion", tmp_path / "two.csv")
    assert first == second
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "two.csv").read_text()
    train = evaluated(nets["a"], "--data", small_shards, "--split", "train", "--save", tmp_path / "train.npz")
    assert train["images"] == 60
    assert evaluated(tmp_path / "train.npz", "--split", "train") == train


def test_what_does_not_go_together_is_refused(
    small_shards: Path, squares: tuple[Path, Path], nets: dict[str, Path], tmp_path: Path,
    evaluated: Callable[..., dict[str, Any]],
) -> None:  # fmt: skip
    data = ("--data", small_shards)
    evaluated(nets["a"], *data, "--save", tmp_path / "a.npz")
    evaluated(nets["a"], *data, "--schemes", "centre", "ten-crop", "--save", tmp_path / "two.npz")
    evaluated(nets["a"], *data, "--split", "train", "--save", tmp_path / "train.npz")
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
        (["a.npz", "other.npz"], (), r"other\.npz: predictions of another data set than .*a\.npz"),
        (["a.npz", "classes.npz"], (), r"classes\.npz: predictions of another list of classes"),
        (["train.npz"], (), r"train\.npz: predictions of another split .*\(train, not val\)"),
        (["a.npz", "train.npz"], (), r"train\.npz: predictions of another split"),
        (["ids.npz"], (), r"ids\.npz: its ids are not a whole split's"),
        (["a.npz", "two.npz"], (), r"two\.npz .*: holds centre, ten-crop, not centre; give --schemes"),
        (["two.npz"], ("--schemes", "multi-scale"), r"two\.npz .*: holds centre, ten-crop, not multi-scale"),
        (["a.npz"], ("--data", squares[0]), r"a\.npz: predictions of another data set than --data .*given-shards"),
        (["a.npz"], (*data, "--split", "test"), "has no split 'test', only train, val"),
        (["foreign.npz"], (), r"foreign\.npz: no predictions that evaluate\.py --save wrote"),
        (["short.npz"], (), r"short\.npz: no predictions"),
        (["junk.npz"], (), r"junk\.npz: no predictions"),
        (["array.npz"], (), r"array\.npz: no predictions"),
        (["cut.npz"], (), r"cut\.npz: no predictions"),
        (["nowhere.npz"], (), r"nowhere\.npz: not found"),
        (["a.npz", "a.npz"], ("--shares", 1), "1 --shares for 2 members"),
        (["a.npz", "a.npz"], ("--shares", 1, 0), "above 0"),
        (["a.npz", "a.npz"], ("--shares", 1, "inf"), "above 0"),
        (["a.npz"], ("--scales", 64), "--scales belongs to"),
        ([nets["a"]], (*data, "--scales", 64), "--scales belongs to"),
        ([nets["a"]], (), "a.safetensors: running a net needs --data"),
        ([nets["a"]], (*data, "--save", "there"), "--save there: give a name that ends with .npz"),
        ([nets["a"]], (*data, "--schemes", "centre", "ten-crop", "--engine", "dali"), "--engine dali makes pictures of one kind"),
        (list(nets.values()), (*data, "--engine", "ffcv"), "--engine ffcv makes pictures of one kind"),
        ([nets["a"]], (*data, "--schemes", "five-crop"), "invalid choice: 'five-crop'"),
    ):  # fmt: skip
        paths = [tmp_path / member if isinstance(member, str) else member for member in members]
        with pytest.raises(UserError, match=words):
            evaluated(*paths, *options)


def test_precision_and_batch_size_reach_the_net(
    small_shards: Path, nets: dict[str, Path], tmp_path: Path, evaluated: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[tuple[torch.dtype, int]] = []
    forward = ResNet.forward

    def noted(self: ResNet, x: torch.Tensor) -> torch.Tensor:
        seen.append((x.dtype, len(x)))
        return forward(self, x)

    monkeypatch.setattr(ResNet, "forward", noted)
    evaluated(nets["a"], "--data", small_shards, "--schemes", "centre", "ten-crop", "--precision", "bf16", "--batch-size", 6)
    assert {dtype for dtype, _ in seen} == {torch.bfloat16}
    assert max(count for _, count in seen) == 6
    assert sum(count for _, count in seen) == 21 * 11
