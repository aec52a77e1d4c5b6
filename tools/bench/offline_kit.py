"""Files for a GPU machine without a package registry: python tools/bench/offline_kit.py kit

Downloads the wheels that gpu_check.py needs, most needed first, without those in --present, by default what a machine with torch
for CUDA, torchvision, timm, accelerate and numba has. Adds the checkout as a tar file, and prints the commands for the GPU
machine. Files above 60 MB, such as DALI's wheel, are split. The checks also run with a part of the wheels: without DALI, its rows
are left out.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import _path  # noqa: F401

from pipeline.cli import Parser, run_cli
from pipeline.errors import UserError
from tools import ROOT

# Most needed first; DALI, the largest, and what it alone needs come last.
WHEELS = (
    "simplejpeg", "nvidia-ml-py", "psutil", "safetensors", "accelerate", "llvmlite", "numba", "scipy",
    "six", "gast", "astunparse", "makefun", "optree", "libcst", "nvtx", "packaging", "nvidia-nvjpeg", "nvidia-nvimgcodec-cu13",
    "nvidia-nvjpeg2k-cu13", "nvidia-nvtiff-cu13", "nvidia-libnvcomp-cu13", "nvidia-dali-cuda130",
)  # fmt: skip
PRESENT = ("psutil", "safetensors", "accelerate", "llvmlite", "numba", "packaging")
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64")
PART = 60 * 10**6  # bytes


def download(package: str, folder: Path, python: str) -> None:
    """Download the wheel of a package, in the version of constraints.txt, for another Python version than this one."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--python-version", python, *platforms, "--constraint", str(ROOT / "constraints.txt"), "--dest", str(folder), package,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{package} cannot be downloaded for Python {python} ({reason})", "check the network")


def split(file: Path) -> list[Path]:
    """Split a file above PART bytes into parts, which replace it; returns them, or the file."""
    if file.stat().st_size <= PART:
        return [file]
    parts: list[Path] = []
    with file.open("rb") as stream:
        while piece := stream.read(PART):
            parts.append(file.with_name(f"{file.name}.part-{len(parts):02d}"))
            parts[-1].write_bytes(piece)
    file.unlink()
    return parts


def pack_checkout(folder: Path) -> str:
    """Write the committed files as cropfeed.tar.gz; returns the commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if commit.returncode:
        raise UserError(f"{ROOT}: is no git checkout", "run this in one")
    packed = ["git", "archive", "--format", "tar.gz", "--output", str((folder / "cropfeed.tar.gz").resolve()), "HEAD"]
    subprocess.run(packed, cwd=ROOT, check=True)
    return commit.stdout.strip()


COMMANDS = """\
# On the GPU machine, in this folder. A part of the wheels will do. Run the loop once all parts of a wheel are there.
sha256sum --check --ignore-missing SHA256SUMS
for first in *.part-00; do [ -e "$first" ] && cat "${{first%00}}"* > "${{first%.part-00}}"; done
mkdir -p cropfeed && tar -xzf cropfeed.tar.gz -C cropfeed
python{python} -m pip install --no-index --no-deps --upgrade --target packages *.whl
export PYTHONPATH=$PWD/packages CROPFEED_COMMIT={commit}
python{python} cropfeed/tools/bench/gpu_check.py --results gpu.csv
"""


def make_kit(folder: Path, python: str, wheels: list[str]) -> None:
    """Fill the folder, and print the sizes of its files in the order in which they are needed, and the commands."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty", "give another folder")
    commit = pack_checkout(folder)
    files = [folder / "cropfeed.tar.gz"]
    for package in wheels:
        download(package, folder, python)
        (wheel,) = set(folder.glob("*.whl")) - set(files)
        files += split(wheel)
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (folder / "SHA256SUMS").write_text("".join(sums))
    (folder / "README").write_text(COMMANDS.format(python=python, commit=commit))
    for file in files:
        print(f"# {file.stat().st_size / 1e6:8.2f} MB  {file.name}")
    print((folder / "README").read_text(), end="")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="empty or new folder for the kit")
    parser.add_argument("--python", default="3.12", help="the GPU machine's Python (default: 3.12)")
    parser.add_argument("--present", nargs="*", default=list(PRESENT), choices=WHEELS, metavar="PACKAGE",
                        help=f"packages that the GPU machine has (default: {' '.join(PRESENT)})")  # fmt: skip
    args = parser.parse_args()
    make_kit(args.folder, args.python, [package for package in WHEELS if package not in args.present])


if __name__ == "__main__":
    run_cli(main)
