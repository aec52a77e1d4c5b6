"""Checks of Python and the packages for the CPU: FFCV, numba, libjpeg-turbo."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys

from ..errors import PIP_CONSTRAINT, install_command
from .lines import PACKAGE, PACKAGES, DoctorOptions, Line, Status, probe

PYTHONS = ((3, 11), (3, 13))


def check_python(_: DoctorOptions) -> list[Line]:
    found, (low, high) = sys.version_info[:2], PYTHONS
    if low <= found <= high:
        return [Line("ok", "python", platform.python_version())]
    wanted = f"{'.'.join(map(str, low))} to {'.'.join(map(str, high))}"
    status: Status = "failed" if found < low else "warning"
    remedy = "make clean && make .venv/installed-dev PYTHON=python3.13"
    return [Line(status, "python", f"{platform.python_version()}; Cropfeed is tested with {wanted}", remedy)]


_FFCV_PROBE = """
import json, ffcv.loader
from importlib.metadata import version
print(json.dumps(version("ffcv")))
"""


def check_ffcv(_: DoctorOptions) -> list[Line]:
    found, error = probe(_FFCV_PROBE)
    if not error:
        return [Line("ok", "ffcv", found)]
    missing = missing_for_ffcv()
    apt = f"apt-get install --no-install-recommends {' '.join(missing)} && " if missing else ""
    absent = error.startswith("ModuleNotFoundError")
    # If it is installed but broken, pip's cache may hold a build for libraries that no longer exist: compile it again.
    pip = install_command("ffcv") if absent else "pip install --force-reinstall --no-deps --no-cache-dir ffcv"
    return [Line("warning", "ffcv", f"optional, cannot be imported: {error}", apt + pip)]


def missing_for_ffcv() -> list[str]:
    """The Debian packages that pip needs to compile FFCV, and that are missing."""
    missing = [program for program in ("g++", "pkg-config") if not shutil.which(program)]
    libraries = {"opencv4": "libopencv-dev", "libturbojpeg": "libturbojpeg0-dev"}
    if "pkg-config" in missing:  # it would find the libraries; apt-get skips installed ones
        return [*missing, *libraries.values()]
    for name, package in libraries.items():
        if subprocess.run(["pkg-config", "--exists", name], check=False).returncode:
            missing.append(package)
    return missing


_NUMBA_PROBE = f"""
import json, numba
assert numba.njit(lambda x: x + 1)(1) == 2
from {PACKAGE.name}.plan import random
print(json.dumps({{"version": numba.__version__, "folder": random.permute.stats.cache_path}}))
"""


def check_numba(_: DoctorOptions) -> list[Line]:
    found, error = probe(_NUMBA_PROBE)
    if not error:
        return [Line("ok", "numba", f"{found['version']} compiles, cache in {found['folder']}")]
    if "no locator available" in error:  # numba's message if it cannot write to any cache folder
        return [Line("failed", "numba", error, "export NUMBA_CACHE_DIR=$HOME/.cache/numba")]
    remedy = f"pip install --force-reinstall {PIP_CONSTRAINT}numba llvmlite numpy"
    return [Line("failed", "numba", f"cannot compile: {error}", remedy)]


_JPEG_PROBE = """
import json, time, numpy as np, simplejpeg
pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8).repeat(32, 0).repeat(32, 1)
data, times = simplejpeg.encode_jpeg(pixels, 90, "RGB", "420"), []
for _ in range(40):
    start = time.perf_counter()
    simplejpeg.decode_jpeg(data)
    times.append(time.perf_counter() - start)
print(json.dumps(min(times)))
"""


def check_jpeg(_: DoctorOptions) -> list[Line]:
    """libjpeg-turbo does not tell whether it uses SIMD. JSIMD_FORCENONE=1 turns SIMD off, which must make it slower."""
    name = "libjpeg-turbo"
    if os.environ.get("JSIMD_FORCENONE") == "1":
        return [Line("warning", name, "SIMD is off: JSIMD_FORCENONE=1 is set", "unset JSIMD_FORCENONE")]
    usual, error = probe(_JPEG_PROBE)
    if error:
        return [Line("failed", name, f"simplejpeg cannot decode: {error}", PACKAGES)]
    plain = probe(_JPEG_PROBE, JSIMD_FORCENONE="1")[0]
    factor = f"decodes {plain / usual:.2g} times as fast as without SIMD"
    if plain > 1.3 * usual:
        return [Line("ok", name, factor)]
    remedy = "pip install --force-reinstall --no-deps --no-cache-dir --only-binary simplejpeg simplejpeg"
    return [Line("warning", name, f"no SIMD: it {factor}", remedy)]
