"""Checks of the GPU software: torch, NVIDIA's driver, DALI and nvJPEG."""

from __future__ import annotations

import ctypes
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..cores import read
from ..errors import PIP_CONSTRAINT, install_command
from .lines import PACKAGES, DoctorOptions, Line, Status, has_gpu, probe

TORCH = (2, 11)
# CUDA major version -> the oldest driver branch that runs its builds, from DALI's installation guide and support matrix.
DRIVERS = {12: 525, 13: 580}
TORCH_BUILD = f"pip uninstall -y torch && pip install {PIP_CONSTRAINT}torch"
DALI = install_command("gpu")

_TORCH_PROBE = """
import json, torch
seen = torch.cuda.is_available()
names, why = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if seen else [], ""
if torch.version.cuda and not seen:
    try:
        torch.cuda.init()
    except Exception as error:
        why = str(error).splitlines()[0]
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "names": names, "why": why}))
"""


def check_torch(options: DoctorOptions) -> list[Line]:
    found, error = probe(_TORCH_PROBE)
    if error:
        remedy = PACKAGES if error.startswith("ModuleNotFoundError") else TORCH_BUILD
        return [Line("failed", "torch", f"cannot be imported: {error}", remedy)]
    number, cuda, names = found["version"], found["cuda"], found["names"]
    if tuple(int(part) for part in number.split(".")[:2]) < TORCH:
        return [Line("failed", "torch", f"{number}, older than {'.'.join(map(str, TORCH))}", TORCH_BUILD)]
    if names:
        return [Line("ok", "torch", f"{number} for CUDA {cuda}, sees {len(names)} x {names[0]}")]
    if not has_gpu(options.root):
        return [Line("ok", "torch", f"{number}, no GPU here: trains on the CPU")]
    if not cuda:
        return [Line("failed", "torch", f"{number} is a CPU build, but there is an NVIDIA GPU", TORCH_BUILD)]
    remedy = f"install driver {DRIVERS[int(cuda.split('.')[0])]} or later, and unset CUDA_VISIBLE_DEVICES; check with nvidia-smi"
    return [Line("failed", "torch", f"{number} for CUDA {cuda} sees no GPU, but there is one: {found['why']}", remedy)]


def check_driver(options: DoctorOptions) -> list[Line]:
    driver, (dali, cuda) = driver_version(options.root), dali_build()
    if not has_gpu(options.root):
        if not driver:
            return [Line("ok", "driver", "none, no NVIDIA GPU here")]
        found = f"{driver}, but no GPU is accessible here (no /dev/nvidia0)"
        return [Line("warning", "driver", found, "in a container: docker run --gpus all ...; else run nvidia-smi once as root")]
    if not driver:
        found = "there is a GPU, but the driver's version cannot be read"
        return [Line("warning", "driver", found, "check that nvidia-smi lists the GPU; if not, install the driver again")]
    if not dali:
        return [Line("ok", "driver", driver)]
    needed = DRIVERS[cuda]
    if int(driver.split(".")[0]) >= needed:
        return [Line("ok", "driver", f"{driver}, {dali} needs {needed} or later")]
    if driver_cuda() >= 1000 * cuda:
        return [Line("ok", "driver", f"{driver} with a libcuda for CUDA {cuda}, as {dali} needs")]
    remedy = f"install NVIDIA's driver {needed} or later: https://www.nvidia.com/drivers"
    return [Line("failed", "driver", f"{driver} is too old for {dali}, which needs {needed} or later", remedy)]


def driver_version(root: Path) -> str:
    """The version of NVIDIA's kernel driver; "" if there is none."""
    if match := re.search(r"\s(\d{3,}(\.\d+)+)\s", read(root / "proc" / "driver" / "nvidia" / "version")):
        return match[1]
    try:  # sandboxes may have a GPU without that file
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # not installed, or NVML finds no driver
        return ""


def driver_cuda() -> int:
    """The CUDA version of libcuda, such as 13000; 0 without libcuda. With NVIDIA's cuda-compat it is newer than the driver's."""
    number = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return 0
    return number.value


def dali_build() -> tuple[str, int]:
    """Package and version of the installed DALI, and its major CUDA version; ("", 0) if there is none."""
    for cuda in DRIVERS:
        name = f"nvidia-dali-cuda{cuda}0"
        try:
            return f"{name} {version(name)}", cuda
        except PackageNotFoundError:
            continue
    return "", 0


def check_dali(options: DoctorOptions) -> list[Line]:
    _, error = probe("import nvidia.dali; print(0)")
    dali, _ = dali_build()
    if not error:
        return [Line("ok", "dali", dali)]
    if error.startswith("ModuleNotFoundError"):
        if not has_gpu(options.root):
            return [Line("ok", "dali", "not installed, only needed with a GPU")]
        return [Line("warning", "dali", f"not installed, so images are decoded on the CPU ({error})", DALI)]
    # With a GPU, engine "auto" imports DALI, which would crash or hang.
    status: Status = "failed" if has_gpu(options.root) else "warning"
    return [Line(status, "dali", f"cannot be imported: {error}", f"pip uninstall -y {dali.split()[0]} && {DALI}")]


# Asks nvJPEG, DALI's JPEG decoder, for its version, for the hardware engines that it can use, and whether it would decode a
# baseline JPEG on them (0: yes). It opens them through libnvcuvid. Versions of nvJPEG may lack some of the functions.
_NVJPEG_PROBE = """
import ctypes, glob, json, sys
here = [path for folder in sys.path for path in glob.glob(folder + "/nvidia/*/lib/libnvjpeg.so.*")]
library = ctypes.CDLL([*here, "libnvjpeg.so.13"][0])
number, engines, cores, unsupported = ctypes.c_int(), ctypes.c_uint(), ctypes.c_uint(), ctypes.c_int(-1)
handle, stream = ctypes.c_void_p(), ctypes.c_void_p()
found = {"version": "", "engines": 0, "cores": 0, "unsupported": None, "cuvid": ""}
try:
    ctypes.CDLL("libnvcuvid.so.1")
except OSError as error:
    found["cuvid"] = str(error)
try:
    parts = []
    for part in range(3):
        library.nvjpegGetProperty(part, ctypes.byref(number))
        parts.append(str(number.value))
    found["version"] = ".".join(parts)
except AttributeError:
    pass
found["status"] = library.nvjpegCreateEx(3, None, None, 0, ctypes.byref(handle))  # 3: NVJPEG_BACKEND_HARDWARE
if found["status"] == 0:
    found["status"] = library.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(cores))
    found |= {"engines": engines.value, "cores": cores.value}
    try:
        import numpy, simplejpeg
        jpeg = simplejpeg.encode_jpeg(numpy.zeros((256, 256, 3), numpy.uint8), 90, "RGB", "420")
        calls = [
            library.nvjpegJpegStreamCreate(handle, ctypes.byref(stream)),
            library.nvjpegJpegStreamParseHeader(handle, jpeg, ctypes.c_size_t(len(jpeg)), stream),
            library.nvjpegDecodeBatchedSupported(handle, stream, ctypes.byref(unsupported)),
        ]
        found["unsupported"] = unsupported.value if not any(calls) else max(calls)
    except (AttributeError, ImportError):
        pass
print(json.dumps(found))
"""
_ARCH_MISMATCH, _NOT_SUPPORTED = 7, 9  # nvjpeg.h
_CUVID = "install the driver's libnvcuvid; in a container: docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=all ..."


def check_nvjpeg(options: DoctorOptions) -> list[Line]:
    if not has_gpu(options.root):
        return [Line("ok", "nvjpeg", "no GPU, no JPEG engine")]
    found, error = probe(_NVJPEG_PROBE)
    if error:
        return [Line("warning", "nvjpeg", f"cannot report its hardware engine: {error}", DALI)]
    name, status = f"nvJPEG {found['version']}".strip(), found["status"]
    if status not in (0, _ARCH_MISMATCH, _NOT_SUPPORTED):
        remedy = "first fix what the lines torch and driver report"
        return [Line("warning", "nvjpeg", f"{name} cannot start (status {status})", remedy)]
    if found["cuvid"]:
        return [Line("warning", "nvjpeg", f"{name} cannot use a JPEG engine without libnvcuvid ({found['cuvid']})", _CUVID)]
    if status or not found["engines"]:
        return [Line("ok", "nvjpeg", f"{name}; this GPU has no JPEG engine that it can use: it decodes on the CUDA cores")]
    hardware = f"{name}, hardware: {found['engines']} engines of {found['cores']} cores"
    if found["unsupported"] is None:
        return [Line("ok", "nvjpeg", f"{hardware}, not tried")]
    if found["unsupported"]:
        remedy = "update the driver; until then, LoaderSpec(hw_decoder_load=0) spares the attempts"
        return [Line("warning", "nvjpeg", f"{hardware}, which do not decode a baseline JPEG", remedy)]
    return [Line("ok", "nvjpeg", f"{hardware}, which decode baseline JPEGs; libnvcuvid found")]
