"""Export weights for other programs: python tools/export.py runs/latest --out exported --formats safetensors onnx torch-export

WEIGHTS_OR_RUN is the same as for tools/evaluate.py: the folder of a run, a weight file, a folder in timm's format, or
hf://user/repo. The script writes to the folder --out: README.md (a model card); config.json in timm's format; mean.npy, if the
model subtracts a mean image; and for each of the --formats

- safetensors: model.safetensors, with torchvision's keys. Its header contains the model's config;
- onnx: model.onnx. The script runs it in ONNX Runtime and compares the logits with torch's;
- torch-export: model.pt2. The script loads it again and compares the logits in the same way.

The graphs (onnx, torch-export) take raw pixels, uint8 (N, 3, H, W) in RGB, and normalize them. N is dynamic. H and W are dynamic,
too, unless the model subtracts a mean image. The folder is written atomically. --push uploads it to the Hugging Face Hub; this
needs HF_TOKEN, or `hf auth login`.

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

import _path  # noqa: F401
import numpy as np
from torch import nn

from model.card import CardDetails, model_card, timm_config
from model.exporting import check_packages, export_onnx, export_program
from model.loading import load_model
from model.make import classes_of
from model.weights import ModelConfig, save_weights
from pipeline.cli import Parser, run_cli
from pipeline.errors import UserError, storage_error
from pipeline.pixels.normalize import Normalization
from pipeline.progress import announce_if_slow
from pipeline.store.files import PARTIAL, sync

FORMATS = ("safetensors", "onnx", "torch-export")


def read_figures(path: Path) -> tuple[dict[str, tuple[float, float]], int]:
    """The accuracies that tools/evaluate.py --json wrote for one model: top-1 and top-5 rates by testing scheme, and the number
    of images."""
    remedy = "give a file that tools/evaluate.py --json wrote"
    try:
        content = json.loads(path.read_text("utf-8"))
        if "members" in content:
            raise UserError(f"{path}: holds the accuracies of an ensemble", "give those of one model")
        schemes = content.get("schemes") or {"centre": content}
        return {name: (float(rates["top1"]), float(rates["top5"])) for name, rates in schemes.items()}, int(content["images"])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", remedy) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: holds no top1, top5 and images", remedy) from error


def dataset_of(config: ModelConfig) -> str | None:
    """The data's name on the Hub, if it is ImageNet-1k: 1000 classes with its first and last synsets."""
    classes = config.classes
    return "imagenet-1k" if len(classes) == 1000 and (classes[0], classes[-1]) == ("n01440764", "n15075141") else None


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder to fill. If the block ends without an error, it is renamed to `out`, otherwise it is removed."""
    scratch = out.with_name(f".{out.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        for file in scratch.iterdir():
            with file.open("rb") as stream:
                sync(stream)
        scratch.rename(out)
    except UserError:
        raise
    except Exception as error:
        shutil.rmtree(scratch, ignore_errors=True)  # first, so that the message tells the space that is then free
        explained = storage_error(error, out)
        if explained is None:
            raise
        raise explained from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_files(model: nn.Module, config: ModelConfig, details: CardDetails, folder: Path) -> list[str]:
    """Write all files of an export to `folder`. Returns lines to print: how much the graphs' logits differ from torch's."""
    lines = []
    if "safetensors" in details.formats:
        save_weights(folder / "model.safetensors", model.state_dict(), config.header())
    if config.mean.ndim == 3:
        np.save(folder / "mean.npy", Normalization.of(config.mean, config.std).at(config.image_size).mean)
    (folder / "config.json").write_text(json.dumps(timm_config(model, config), indent=1) + "\n", "utf-8")
    (folder / "README.md").write_text(model_card(model, config, details), "utf-8")
    for form, name, export in (("onnx", "model.onnx", export_onnx), ("torch-export", "model.pt2", export_program)):
        if form in details.formats:
            with announce_if_slow(f"exporting {name} and comparing it with torch, which takes up to a minute"):
                difference = export(model, config, folder / name)
            lines.append(f"{name}: its logits differ from torch's by at most {difference:.2g}")
    return lines


def check_out(out: Path, formats: tuple[str, ...]) -> None:
    """Raise UserError, before any work, if a package is missing or the folder exists."""
    check_packages(["safetensors", *formats])  # the model card needs the package of safetensors in any case
    if os.path.lexists(out):
        raise UserError(f"{out}: exists already", "give another --out")


def check_push(repo: str) -> None:
    """Raise UserError, before any work, if the Hub does not allow the name, or if there is no token."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise UserError(f"--push {repo}: is not a valid name on the Hugging Face Hub", "give user/name")
    except HFValidationError as error:
        raise UserError(f"--push {repo}: is not a valid name on the Hugging Face Hub ({error})", "give user/name") from error
    if get_token() is None:
        raise UserError(f"--push {repo}: no token for the Hugging Face Hub", "run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder's files to the Hub, and create the repository if needed. Returns its address."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        with announce_if_slow(f"uploading {size:,.0f} MB to {repo}, a minute at {size / 60:.2g} MB/s"):
            address = str(api.create_repo(repo, private=private or None, exist_ok=True))
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Exported by Cropfeed")
    except Exception as error:  # from the network, the server, the token's rights
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--push {repo}: the upload failed ({why})", f"{folder} is complete; try again: hf upload {repo} {folder}"
        ) from error
    return address


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("weights", metavar="WEIGHTS_OR_RUN", help="model to export")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to create; required")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["safetensors"], metavar="FORMAT", help="formats to "
                        f"write: {', '.join(FORMATS)} (default: safetensors)")  # fmt: skip
    parser.add_argument("--arch", help="architecture, for weights that do not name it: a model of train.py --list, or timm/NAME")
    parser.add_argument("--results", type=Path, metavar="FILE", help="accuracies for the model card, written by "
                        "tools/evaluate.py --json")  # fmt: skip
    parser.add_argument("--dataset", metavar="NAME", help="name of the training data on the Hub, for the model card (default: "
                        "imagenet-1k if the model has its classes)")  # fmt: skip
    parser.add_argument("--license", help="license of the weights, for the model card: apache-2.0, cc-by-nc-4.0, ...")
    parser.add_argument("--push", metavar="USER/NAME", help="upload the folder to this repository of the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", help="if --push creates the repository, make it private")
    return parser


def main() -> None:
    args = parser().parse_args()
    formats = tuple(args.formats)
    check_out(args.out, formats)
    if args.push:
        check_push(args.push)
    figures, images = read_figures(args.results) if args.results else ({}, 0)
    model, config = load_model(args.weights, args.arch, None)
    details = CardDetails(formats, args.dataset or dataset_of(config), args.license, args.push, figures, images)
    with atomic_folder(args.out) as folder:
        lines = write_files(model, config, details, folder)
    names = ", ".join(sorted(path.name for path in args.out.iterdir()))
    print("\n".join([*lines, f"{args.out}: {config.arch} of {classes_of(model)} classes: {names}"]))
    if args.push:
        print(f"pushed to {push(args.out, args.push, args.private)}")


if __name__ == "__main__":
    run_cli(main)
