"""Weights for others: python tools/export.py runs/latest --out exported --formats safetensors onnx torch-export

WEIGHTS_OR_RUN is what tools/evaluate.py takes: a run's folder, a weight file, a timm folder, hf://user/repo. FOLDER gets
README.md (a model card) and config.json as timm writes it; mean.npy where a mean image is subtracted; and for each format

- safetensors: model.safetensors, with torchvision's keys and our recipe in its header;
- onnx: model.onnx, compared with torch by ONNX Runtime;
- torch-export: model.pt2, read back and compared.

The graphs take plain pixels, uint8 (N, 3, H, W) in RGB, and subtract the mean themselves; N is free, and so are H and W except
with a mean image. FOLDER appears whole or not at all. --push uploads it to the Hugging Face Hub (HF_TOKEN, or `hf auth login`).
Needs the extra `export`: pip install -e '.[export]'
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import numpy as np

from model.card import About, model_card, timm_config
from model.exporting import check_packages, write_onnx, write_program
from model.loading import load_model
from model.resnet import ARCHS, ResNet
from model.weights import ModelConfig, save_weights
from pipeline.cli import Parser, run_cli
from pipeline.errors import UserError
from pipeline.pixels.normalize import Normalization
from pipeline.store.files import PARTIAL

FORMATS = ("safetensors", "onnx", "torch-export")


def read_figures(path: Path) -> tuple[dict[str, tuple[float, float]], int]:
    """What tools/evaluate.py --json wrote of one net: top-1 and top-5 by testing scheme, and how many images there were."""
    try:
        content = json.loads(path.read_text())
        if "members" in content:
            raise UserError(f"{path}: holds the figures of an ensemble; give those of the one net")
        schemes = content.get("schemes") or {"centre": content}
        return {name: (float(rates["top1"]), float(rates["top5"])) for name, rates in schemes.items()}, int(content["images"])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give what tools/evaluate.py --json wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: holds no top1, top5 and images; give what tools/evaluate.py --json wrote") from error


def dataset_of(recipe: ModelConfig) -> str | None:
    """The Hub's name of the data, if it is ImageNet-1k: its first and last synsets among 1000 classes."""
    classes = recipe.classes
    return "imagenet-1k" if len(classes) == 1000 and (classes[0], classes[-1]) == ("n01440764", "n15075141") else None


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A folder to fill. When the block ends well it is `out`, whole; else nothing of it remains."""
    scratch = out.with_name(f".{out.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        for file in scratch.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        scratch.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); give another --out") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write(net: ResNet, recipe: ModelConfig, about: About, folder: Path) -> list[str]:
    """All files of an export into `folder`; lines that say how far the graphs are from torch."""
    found = []
    if "safetensors" in about.formats:
        save_weights(folder / "model.safetensors", net.state_dict(), recipe.header())
    if recipe.mean.ndim == 3:
        np.save(folder / "mean.npy", Normalization.of(recipe.mean, recipe.std).at(recipe.image_size).mean)
    (folder / "config.json").write_text(json.dumps(timm_config(net, recipe), indent=1) + "\n")
    (folder / "README.md").write_text(model_card(net, recipe, about))
    for form, name, writer in (("onnx", "model.onnx", write_onnx), ("torch-export", "model.pt2", write_program)):
        if form in about.formats:
            found.append(f"{name}: its logits differ from torch's by at most {writer(net, recipe, folder / name):.2g}")
    return found


def check_push(repo: str) -> None:
    """Refuse, before any work, a name that the Hub does not allow, and a missing token."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise UserError(f"--push {repo}: is no name on the Hugging Face Hub; give user/name")
    except HFValidationError as error:
        raise UserError(f"--push {repo}: is no name on the Hugging Face Hub ({error}); give user/name") from error
    if get_token() is None:
        raise UserError(f"--push {repo}: no token of the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder's files to the Hub, creating the repository where there is none; its address."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(repo, private=private or None, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Exported by Cropfeed")
    except Exception as error:  # of the network, the server, the token's rights
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--push {repo}: failed ({why}); {folder} is complete, try again: hf upload {repo} {folder}") from error
    return address


def parser() -> Parser:
    parse = Parser(__doc__)
    parse.add_argument("weights", metavar="WEIGHTS_OR_RUN")
    parse.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parse.add_argument("--formats", nargs="+", choices=FORMATS, default=["safetensors"])
    parse.add_argument("--arch", help="for weights that do not name it: " + ", ".join(ARCHS))
    parse.add_argument("--results", type=Path, help="figures for the card, from tools/evaluate.py --json")
    parse.add_argument("--dataset", help="the data's name on the Hub, for the card (imagenet-1k where the classes are its)")
    parse.add_argument("--license", help="of the weights, for the card: apache-2.0, cc-by-nc-4.0, ...")
    parse.add_argument("--push", metavar="USER/NAME", help="upload the folder to the Hugging Face Hub")
    parse.add_argument("--private", action="store_true", help="a repository that --push creates is private")
    return parse


def check_arguments(args: Any) -> None:
    check_packages(["safetensors", *args.formats])  # every folder gets a card
    if os.path.lexists(args.out):
        raise UserError(f"{args.out}: exists already; give another --out")
    if args.push:
        check_push(args.push)


def main() -> None:
    args = parser().parse_args()
    check_arguments(args)
    figures, images = read_figures(args.results) if args.results else ({}, 0)
    net, recipe = load_model(args.weights, args.arch, None)
    about = About(args.formats, args.dataset or dataset_of(recipe), args.license, args.push, figures, images)
    with atomic_folder(args.out) as folder:
        lines = write(net, recipe, about, folder)
    names = ", ".join(sorted(path.name for path in args.out.iterdir()))
    print("\n".join([*lines, f"{args.out}: {recipe.arch} of {net.fc.out_features} classes: {names}"]))
    if args.push:
        print(f"pushed to {push(args.out, args.push, args.private)}")


if __name__ == "__main__":
    run_cli(main)
