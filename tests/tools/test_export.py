from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from model import ARCHS
from model.exporting import ExportedModel, check_packages, export_onnx, export_program
from model.loading import load_model
from model.weights import ModelConfig, save_weights
from pipeline.errors import UserError
from tests.helpers import assert_refused, run_forked
from tools.export import atomic_folder

pytestmark = pytest.mark.usefixtures("one_core")

CLASSES = ["n01", "n02", "n03"]
SHA = "0123456789" * 4


def model_of(arch: str) -> torch.nn.Module:
    """A model in evaluation mode. Its running statistics and the classifier's bias differ from a new model's."""
    torch.manual_seed(1)
    model = ARCHS[arch](num_classes=len(CLASSES)).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name == "fc.bias":
            tensor.normal_()
    return model


def model_config_of(arch: str, size: int, mean: Any) -> ModelConfig:
    short = size if size == 32 else size * 143 // 112
    return ModelConfig(arch, CLASSES, size, short, np.array(mean, np.float32), np.array([60, 55, 50], np.float32))


def channels(arch: str = "resnet18", size: int = 112) -> ModelConfig:
    return model_config_of(arch, size, [120, 110, 100])


def mean_image(arch: str = "resnet20", size: int = 32) -> ModelConfig:
    return model_config_of(arch, size, np.random.default_rng(0).uniform(60, 180, (size, size, 3)))


def pixels(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))


def plain_logits(model: torch.nn.Module, config: ModelConfig, images: torch.Tensor) -> torch.Tensor:
    """The logits of uint8 images (N, 3, H, W), normalized by NumPy."""
    floats = (images.numpy().transpose(0, 2, 3, 1).astype(np.float64) - config.mean) / config.std
    with torch.inference_mode():
        return model(torch.from_numpy(floats.transpose(0, 3, 1, 2)).float())


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.01
    assert (found - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))


def export(source: Path, out: Path, *options: Any, **environment: Any) -> Path:
    result = run_forked("tools/export.py", source, "--out", out, *options, **environment)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Cropfeed's weight files: a resnet18 with a mean per channel, and a resnet20 with a mean image."""
    folder = tmp_path_factory.mktemp("saved")
    for config in (channels(), mean_image()):
        save_weights(folder / f"{config.arch}.safetensors", model_of(config.arch).state_dict(), config.header())
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def exported(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models of `saved`, exported in all formats, the resnet18 with figures."""
    folder = tmp_path_factory.mktemp("exported")
    figures = {"top1": 0.7654, "top5": 0.9321, "images": 50, "schemes": {}}
    figures["schemes"] = {"centre": {"top1": 0.7654, "top5": 0.9321}, "ten-crop": {"top1": 0.7777, "top5": 0.9444}}
    (folder / "figures.json").write_text(json.dumps(figures))
    options = ("--formats", "safetensors", "onnx", "torch-export")
    for arch, more in (
        ("resnet18", ("--results", folder / "figures.json", "--license", "cc0-1.0", "--dataset", "me/shapes")),
        ("resnet20", ()),
    ):
        export(saved[arch], folder / arch, *options, *more)
    return {arch: folder / arch for arch in saved}


@pytest.mark.slow
@pytest.mark.parametrize("config", [channels(), mean_image()], ids=lambda config: config.arch)
def test_graphs_take_raw_pixels(config: ModelConfig, exported: dict[str, Path]) -> None:
    folder, model = exported[config.arch], model_of(config.arch)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    extra = {"recipe.json": ""}
    program = torch.export.load(folder / "model.pt2", extra_files=extra).module()
    size = config.image_size
    shapes = [(1, size, size), (5, size, size)] + ([(2, 64, 97), (1, 224, 160)] if config.mean.ndim == 1 else [])
    for shape in shapes:
        images = pixels(*shape)
        expected = plain_logits(model, config, images)
        assert_close(torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]), expected)
        with torch.inference_mode():
            assert_close(program(images), expected)
    sides = [size, size] if config.mean.ndim == 3 else ["height", "width"]
    assert session.get_inputs()[0].shape == ["batch", 3, *sides]
    facts = {"arch": config.arch, "classes": json.dumps(CLASSES), "image_size": str(size), "eval_short": str(config.eval_short)}
    assert session.get_modelmeta().custom_metadata_map == facts
    assert json.loads(extra["recipe.json"]) == facts


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "size"), [("resnet18_a", 32), ("resnet20", 32)])
def test_graphs_of_other_models_and_of_small_images(arch: str, size: int, tmp_path: Path) -> None:
    """At 32 pixels, the last feature map of a resnet18 is a single pixel. torch.export then allows no other sizes."""
    model, config = ARCHS[arch](num_classes=3), channels(arch, size)
    assert export_onnx(model, config, tmp_path / "model.onnx") < 0.1
    assert export_program(model, config, tmp_path / "model.pt2") < 0.1
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    images = pixels(2, 96, 40)
    assert_close(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), plain_logits(model.eval(), config, images))


def test_a_graph_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = channels("resnet20", 32), model_of("resnet20")
    original = torch.export.export

    def broken(exported: ExportedModel, *args: Any, **options: Any) -> Any:
        other = ExportedModel(ARCHS["resnet20"](num_classes=3), config)
        return original(other, *args, **options)

    monkeypatch.setattr(torch.export, "export", broken)
    with pytest.raises(UserError, match="program differ from torch's by up to"):
        export_program(model, config, tmp_path / "model.pt2")


@pytest.mark.slow
def test_safetensors_card_and_config(exported: dict[str, Path]) -> None:
    folder = exported["resnet18"]
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "model.onnx", "model.pt2",
    }  # fmt: skip
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    model, config = load_model(folder, None, CLASSES)
    assert (config.image_size, config.eval_short, config.mean.tolist()) == (112, 143, [120, 110, 100])
    state = model_of("resnet18").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    card = (folder / "README.md").read_text()
    for words in (
        "license: cc0-1.0", "- me/shapes", "value: 0.7654", "value: 0.9444", "name: top-5, ten-crop", "- timm",
        "| centre | 76.54% | 93.21% |", "of 50 validation images", "short side is 143 pixels", "central 112 x 112",
        "subtract the mean (120, 110, 100), divide by (60, 55, 50)", "11,178,051 parameters, 3 classes",
        "timm.create_model", "from torchvision.models import resnet18", "uint8 (N, 3, H, W)", "from cropfeed import CentreCrop",
    ):  # fmt: skip
        assert words in card, words

    small = exported["resnet20"]
    card = (small / "README.md").read_text()
    for words in ("mean image (`mean.npy`, float32 (32, 32, 3)", "timm and torchvision have no `resnet20`", "(N, 3, 32, 32)"):
        assert words in card, words
    assert "license" not in card
    assert np.array_equal(np.load(small / "mean.npy"), mean_image().mean)
    assert np.array_equal(load_model(small, None, CLASSES)[1].mean, mean_image().mean)
    content = json.loads((small / "config.json").read_text())
    assert content["pretrained_cfg"]["mean"] == pytest.approx((mean_image().mean.mean(axis=(0, 1)) / 255).tolist())


@pytest.mark.slow
def test_the_config_says_what_the_header_says(exported: dict[str, Path], tmp_path: Path) -> None:
    """If the folder is read as a timm folder, without Cropfeed's header, the config is the same."""
    folder = exported["resnet18"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    config, expected = load_model(tmp_path, None, None)[1], channels()
    assert (config.arch, config.classes, config.image_size) == ("resnet18", CLASSES, 112)
    assert config.eval_short == expected.eval_short == 143
    assert config.mean == pytest.approx(expected.mean)
    assert config.std == pytest.approx(expected.std)


def test_torchvision_files_are_exported_without_names(tmp_path: Path) -> None:
    torch.save(model_of("resnet18").state_dict(), tmp_path / "resnet18-0123abcd.pth")
    folder = export(tmp_path / "resnet18-0123abcd.pth", tmp_path / "deep" / "out")
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert "label_names" not in json.loads((folder / "config.json").read_text())
    assert load_model(folder, None, ["x", "y", "z"])[1].classes == ["x", "y", "z"]


def test_bad_arguments_are_refused_and_leave_nothing(saved: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("{}")
    (tmp_path / "several.json").write_text('{"top1": 1, "top5": 1, "images": 1, "members": []}')
    source, out = saved["resnet20"], ("--out", tmp_path / "out")
    offline: dict[str, Any] = {"HF_TOKEN": "", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    before = {path.name for path in tmp_path.iterdir()}
    for options, words in (
        ((source, "--out", tmp_path / "there"), "there: exists already"),
        ((tmp_path / "absent.pth", *out), "absent.pth: contains no weights"),
        ((source, *out, "--arch", "resnet18"), "holds a resnet20, but --arch is resnet18"),
        ((source, *out, "--results", tmp_path / "file"), "file: holds no top1"),
        ((source, *out, "--results", tmp_path / "several.json"), "accuracies of an ensemble"),
        ((source, *out, "--push", "me/model"), "no token"),
        ((source, *out, "--push", "model"), "give user/name"),
        ((source, *out, "--push", "me/a--b"), "give user/name"),
        ((source, "--out", tmp_path / "file" / "out"), "cannot be written"),
    ):
        assert_refused(run_forked("tools/export.py", *options, **offline), words)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "model.safetensors").write_bytes(b"half")
            assert not (tmp_path / "out").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_packages(["safetensors", "onnx", "torch-export"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    check_packages(["safetensors", "torch-export"])
    with pytest.raises(UserError, match=r"needs onnxscript; pip install -e '\.\[export\]'"):
        check_packages(["onnx"])


class Hub(BaseHTTPRequestHandler):
    """Imitates the parts of the Hugging Face Hub that are needed to create, fill and download one repository. It accepts all
    files as part of the commit."""

    files: dict[str, bytes]
    created: list[dict[str, Any]]

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if self.headers["Authorization"] != "Bearer right":
            self.answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/repos/create":
            self.created.append(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/me/model"}, 200 if len(self.created) == 1 else 409)
        elif path == "/api/models/me/model/preupload/main":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.answer({"files": files})
        elif path == "/api/models/me/model/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"http://{self.headers['Host']}/me/model/commit/{SHA}", "commitOid": SHA})
        else:  # validate-yaml
            self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/me/model/resolve/{SHA}/")
        if path.startswith("/api/models/me/model/tree"):
            oids = {name: hashlib.sha1(content).hexdigest() for name, content in self.files.items()}
            self.answer([{"type": "file", "path": name, "size": len(self.files[name]), "oid": oid} for name, oid in oids.items()])
        elif path.startswith("/api/models/me/model"):
            self.answer({"id": "me/model", "sha": SHA, "siblings": [{"rfilename": name} for name in self.files]})
        elif name in self.files:
            self.answer(self.files[name], ETag=f'"{hashlib.sha1(self.files[name]).hexdigest()}"', X_Repo_Commit=SHA)
        else:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    """The address of a hub, and its class, which records what the hub received."""
    kind = type("OneHub", (Hub,), {"files": {}, "created": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", kind
    server.shutdown()


LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from model.loading import load_model
model, config = load_model("hf://me/model", None, ["n01", "n02", "n03"])
torch.save((model.state_dict(), torch.from_numpy(config.mean)), sys.argv[2])
"""


def test_pushed_and_loaded_back(saved: dict[str, Path], hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    """Push, download, and load again offline, with the real huggingface_hub and a local hub."""
    address, given = hub
    there: dict[str, Any] = {
        "HF_ENDPOINT": address,
        "HF_TOKEN": "right",
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    folder = export(saved["resnet20"], tmp_path / "out", "--push", "me/model", "--private", **there)
    assert given.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert (given.created[0]["name"], given.created[0]["organization"]) == ("model", "me")
    assert given.created[0].get("visibility", "private" if given.created[0].get("private") else None) == "private"
    assert b'load_model("hf://me/model", None, None)' in given.files["README.md"]
    export(saved["resnet20"], tmp_path / "again", "--push", "me/model", **there)  # the repository exists

    (tmp_path / "load.py").write_text(LOAD)
    state = model_of("resnet20").state_dict()
    for more in (there, there | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:1"}):
        result = run_forked(tmp_path / "load.py", Path(__file__).parents[2], tmp_path / "state.pt", **more)
        assert result.returncode == 0, result.stderr
        found, mean = torch.load(tmp_path / "state.pt")
        (tmp_path / "state.pt").unlink()
        assert found.keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
        assert np.array_equal(mean.numpy(), mean_image().mean)
    names = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*")}
    assert names == {"config.json", "model.safetensors"}  # nothing else was downloaded

    options = ("tools/export.py", saved["resnet20"], "--out", tmp_path / "third", "--push", "me/model")
    there["HF_TOKEN"] = "wrong"
    result = run_forked(*options, **there)
    assert_refused(result, "--push me/model: the upload failed", "401", "third is complete; try again: hf upload me/model")
    assert (tmp_path / "third" / "model.safetensors").is_file()
