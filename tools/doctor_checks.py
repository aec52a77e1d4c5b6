"""What tools/doctor.py checks: one function a subject, each giving its lines.

Packages are imported in a child process: a build that does not fit the machine may crash its process or print to its streams.
What the kernel tells is read below `Asked.root`, so that a test can put another machine there.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import _path

from pipeline.errors import UserError

GB, GIB = 10**9, 2**30
PYTHONS = ((3, 11), (3, 13))
TORCH = (2, 11)
# CUDA major version -> the first driver branch that runs its builds, as DALI's installation guide and support matrix say.
DRIVERS = {11: 450, 12: 525, 13: 580}
PACKAGES = "pip install --constraint constraints.txt -e ."
TORCH_BUILD = "pip uninstall -y torch && pip install --constraint constraints.txt torch"
DALI = "pip install -e '.[dali]'"
_PROBE_S = 120


@dataclass(frozen=True)
class Line:
    """remedy: an exact command or one sentence; empty where all is well."""

    status: Literal["ok", "warning", "failed"]
    name: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Asked:
    """root: the folder whose proc, sys and dev are read. data, cache, cache_gb: as for train.py."""

    root: Path = Path("/")
    data: str | None = None
    cache: Path | None = None
    cache_gb: float | None = None


Check = Callable[[Asked], list[Line]]


def probe(code: str, **environment: str) -> tuple[Any, str]:
    """Run `code` in a Python of its own: the JSON on its last line, and "" or what went wrong."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", code],
            cwd=_path.ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=_PROBE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"did not end within {_PROBE_S} s"
    if child.returncode < 0:
        return None, f"crashed with {signal.Signals(-child.returncode).name}"
    if child.returncode:
        lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]  # more may be printed behind it
        return None, (errors or lines or [f"exit code {child.returncode}"])[-1]
    return json.loads(child.stdout.splitlines()[-1]), ""


def read(path: Path) -> str:
    """A file of /proc or /sys; "" where this kernel has none."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def gpus(root: Path) -> int:
    """NVIDIA GPUs that this machine, or container, may open."""
    return len(list((root / "dev").glob("nvidia[0-9]*")))


def check_python(_: Asked) -> list[Line]:
    found, (low, high) = sys.version_info[:2], PYTHONS
    if low <= found <= high:
        return [Line("ok", "python", platform.python_version())]
    wanted = f"{'.'.join(map(str, low))} to {'.'.join(map(str, high))}"
    status: Literal["failed", "warning"] = "failed" if found < low else "warning"
    remedy = "make clean && make .venv/.installed PYTHON=python3.13"
    return [Line(status, "python", f"{platform.python_version()}, tested are {wanted}", remedy)]


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


def check_torch(asked: Asked) -> list[Line]:
    found, error = probe(_TORCH_PROBE)
    if error:
        remedy = PACKAGES if error.startswith("ModuleNotFoundError") else TORCH_BUILD
        return [Line("failed", "torch", f"cannot be imported: {error}", remedy)]
    number, cuda, names = found["version"], found["cuda"], found["names"]
    if tuple(int(part) for part in re.findall(r"\d+", number)[:2]) < TORCH:
        return [Line("failed", "torch", f"{number}, older than {'.'.join(map(str, TORCH))}", TORCH_BUILD)]
    if names:
        return [Line("ok", "torch", f"{number} for CUDA {cuda}, sees {len(names)} x {names[0]}")]
    if not gpus(asked.root):
        return [Line("ok", "torch", f"{number}, no GPU here: trains on the CPU")]
    if not cuda:
        return [Line("failed", "torch", f"{number} is a CPU build, but there is an NVIDIA GPU", TORCH_BUILD)]
    remedy = f"driver {DRIVERS.get(int(cuda.split('.')[0]), '?')} or later, and an unset CUDA_VISIBLE_DEVICES; see nvidia-smi"
    return [Line("failed", "torch", f"{number} for CUDA {cuda} sees no GPU, but there is one: {found['why']}", remedy)]


def driver_version(root: Path) -> str:
    """NVIDIA's kernel driver, or ""."""
    if match := re.search(r"\s(\d{3,}(\.\d+)+)\s", read(root / "proc" / "driver" / "nvidia" / "version")):
        return match[1]
    try:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]

        pynvml.nvmlInit()
        return re.findall(r"[\d.]+", str(pynvml.nvmlSystemGetDriverVersion()))[0]  # older ones give bytes
    except Exception:  # not installed, or NVML finds no driver
        return ""


def driver_cuda() -> int:
    """The CUDA that libcuda offers, such as 13000; 0 without one. NVIDIA's cuda-compat package lifts it above the driver's."""
    number = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return 0
    return number.value


def dali_build() -> tuple[str, int]:
    """The installed DALI's package and version, and the CUDA that it is built for; ("", 0) if there is none."""
    for cuda in sorted(DRIVERS, reverse=True):
        name = f"nvidia-dali-cuda{cuda}0"
        try:
            return f"{name} {version(name)}", cuda
        except PackageNotFoundError:
            continue
    return "", 0


def check_driver(asked: Asked) -> list[Line]:
    driver, (dali, cuda) = driver_version(asked.root), dali_build()
    if not gpus(asked.root):
        if not driver:
            return [Line("ok", "driver", "none, no NVIDIA GPU here")]
        found = f"{driver}, but no GPU may be opened here (no /dev/nvidia0)"
        return [Line("warning", "driver", found, "in a container: docker run --gpus all ...; else: nvidia-smi, as root, once")]
    if not driver:
        return [Line("warning", "driver", "there is a GPU, but the driver's version cannot be had", "nvidia-smi must list it")]
    if not cuda:
        return [Line("ok", "driver", driver)]
    needed = DRIVERS[cuda]
    if int(driver.split(".")[0]) >= needed:
        return [Line("ok", "driver", f"{driver}, {dali} needs {needed} or later")]
    if driver_cuda() >= 1000 * cuda:
        return [Line("ok", "driver", f"{driver} with a libcuda for CUDA {cuda}, as {dali} needs")]
    remedy = f"install NVIDIA's driver {needed} or later: https://www.nvidia.com/drivers"
    return [Line("failed", "driver", f"{driver} is too old for {dali}, which needs {needed} or later", remedy)]


def check_dali(asked: Asked) -> list[Line]:
    found, error = probe("import json, nvidia.dali as dali; print(json.dumps(dali.__version__))")
    if not error:
        return [Line("ok", "dali", f"{dali_build()[0] or found}")]
    if error.startswith("ModuleNotFoundError"):
        if not gpus(asked.root):
            return [Line("ok", "dali", "not installed, which only a GPU would miss")]
        return [Line("warning", "dali", f"not installed, so images are decoded on the CPU ({error})", DALI)]
    # With a GPU, --engine auto tries to import it, and would crash or stop there.
    status: Literal["failed", "warning"] = "failed" if gpus(asked.root) else "warning"
    package = dali_build()[0].split()[0] if dali_build()[0] else "nvidia-dali-cuda130"
    return [Line(status, "dali", f"cannot be imported: {error}", f"pip uninstall -y {package} && {DALI}")]


def missing_for_ffcv() -> list[str]:
    """Debian packages without which pip cannot compile FFCV here."""
    missing = [] if shutil.which("g++") else ["g++"]
    libraries = {"opencv4": "libopencv-dev", "libturbojpeg": "libturbojpeg0-dev"}
    if not shutil.which("pkg-config"):
        return [*missing, "pkg-config", *libraries.values()]
    for name, package in libraries.items():
        if subprocess.run(["pkg-config", "--exists", name], check=False).returncode:
            missing.append(package)
    return missing


def check_ffcv(_: Asked) -> list[Line]:
    found, error = probe("import json, ffcv.loader; from importlib.metadata import version; print(json.dumps(version('ffcv')))")
    if not error:
        return [Line("ok", "ffcv", found)]
    missing = missing_for_ffcv()
    apt = f"apt-get install --no-install-recommends {' '.join(missing)} && " if missing else ""
    absent = error.startswith("ModuleNotFoundError")
    # A build against libraries that are no longer there is in pip's cache: only compiling again helps.
    pip = "pip install ffcv pillow" if absent else "pip install --force-reinstall --no-deps --no-cache-dir ffcv"
    return [Line("warning", "ffcv", f"optional, cannot be imported: {error}", apt + pip)]


_NUMBA_PROBE = """
import json, numba
assert numba.njit(lambda x: x + 1)(1) == 2
from pipeline import draws
print(json.dumps({"version": numba.__version__, "folder": draws.permute.stats.cache_path}))
"""


def check_numba(_: Asked) -> list[Line]:
    found, error = probe(_NUMBA_PROBE)
    if error:
        if "no locator available" in error:  # numba's words for: no folder for the cache can be written
            return [Line("failed", "numba", error, "export NUMBA_CACHE_DIR=$HOME/.cache/numba")]
        remedy = "pip install --force-reinstall --constraint constraints.txt numba llvmlite numpy"
        return [Line("failed", "numba", f"cannot compile: {error}", remedy)]
    try:
        with tempfile.TemporaryFile(dir=found["folder"]):
            pass
    except OSError as problem:
        found_text = f"{found['version']}, its cache cannot be written ({problem}): every start compiles again"
        return [Line("warning", "numba", found_text, "export NUMBA_CACHE_DIR=$HOME/.cache/numba")]
    return [Line("ok", "numba", f"{found['version']} compiles, cache in {found['folder']}")]


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


def check_jpeg(_: Asked) -> list[Line]:
    """No call tells whether libjpeg-turbo uses SIMD; JSIMD_FORCENONE=1 turns it off, which must cost time."""
    name = "libjpeg-turbo"
    if os.environ.get("JSIMD_FORCENONE") == "1":
        return [Line("warning", name, "SIMD is off: JSIMD_FORCENONE=1 is set", "unset JSIMD_FORCENONE")]
    usual, error = probe(_JPEG_PROBE)
    if error:
        return [Line("failed", name, f"simplejpeg cannot decode: {error}", PACKAGES)]
    plain, error = probe(_JPEG_PROBE, JSIMD_FORCENONE="1")
    if error:
        raise RuntimeError(error)
    factor = f"decodes {plain / usual:.2g} times as fast as without SIMD"
    if plain > 1.3 * usual:
        return [Line("ok", name, factor)]
    remedy = "pip install --force-reinstall --no-deps --no-cache-dir --only-binary simplejpeg simplejpeg"
    return [Line("warning", name, f"no SIMD: it {factor}", remedy)]


def check_processor(asked: Asked) -> list[Line]:
    info = read(asked.root / "proc" / "cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    name, has = model[1] if model else platform.machine(), set(flags[1].split() if flags else ())
    vectors = [shown for flag, shown in (("avx2", "AVX2"), ("avx512bw", "AVX-512"), ("asimd", "NEON")) if flag in has]
    bfloat16 = [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if flag in has]
    found = f"{name}: {', '.join(vectors) or 'neither AVX2 nor NEON'}; "
    found += f"bfloat16 ({', '.join(bfloat16)})" if bfloat16 else "no bfloat16, so --mixed-precision bf16 is for GPUs only"
    if vectors:
        return [Line("ok", "processor", found)]
    remedy = "a virtual machine may hide them: give it the host's processor (qemu: -cpu host); else decoding is slow here"
    return [Line("warning", "processor", found, remedy)]


# nvJPEG itself says what engines it can use; DALI decodes by this very library.
_NVJPEG_PROBE = """
import ctypes, glob, json, sys
here = [path for folder in sys.path for path in sorted(glob.glob(folder + "/nvidia/*/lib/libnvjpeg.so.*"))]
for name in [*here, "libnvjpeg.so.13", "libnvjpeg.so.12", "libnvjpeg.so"]:
    try:
        library = ctypes.CDLL(name)
        break
    except OSError as error:
        why = error
else:
    raise why
handle, engines, cores = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
status = library.nvjpegCreateEx(3, None, None, 0, ctypes.byref(handle))  # 3: NVJPEG_BACKEND_HARDWARE
if status == 0:
    status = library.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(cores))
print(json.dumps({"status": status, "engines": engines.value, "cores": cores.value}))
"""
_ARCH_MISMATCH, _NOT_SUPPORTED = 7, 9  # nvjpeg.h


def check_nvjpeg(asked: Asked) -> list[Line]:
    if not gpus(asked.root):
        return [Line("ok", "nvjpeg", "no GPU, no JPEG engine")]
    found, error = probe(_NVJPEG_PROBE)
    if error:
        return [Line("warning", "nvjpeg", f"cannot be asked for its hardware engine: {error}", DALI)]
    if found["status"] == 0 and found["engines"]:
        return [Line("ok", "nvjpeg", f"hardware: {found['engines']} engines of {found['cores']} cores")]
    if found["status"] in (0, _ARCH_MISMATCH, _NOT_SUPPORTED):
        return [Line("ok", "nvjpeg", "this GPU has no JPEG engine that nvJPEG uses: its CUDA cores decode")]
    return [Line("warning", "nvjpeg", f"nvJPEG cannot start (status {found['status']})", "mend the lines on torch and driver")]


def cgroups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and those above it, of both versions. In a container some are not there."""
    folders = []
    for line in read(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys" / "fs" / "cgroup" / (controller if controllers else "")
        place = top / path.lstrip("/")
        folders += [folder for folder in (place, *place.parents) if folder.is_relative_to(top)]
    return folders


def core_quota(root: Path) -> float:
    """Cores that the control groups leave this process, by time."""
    quotas = []
    for folder in cgroups(root, "cpu"):
        old = f"{read(folder / 'cpu.cfs_quota_us')} {read(folder / 'cpu.cfs_period_us')}"
        for text in (read(folder / "cpu.max"), old):
            if re.fullmatch(r"\d+ \d+", text):  # else "max", -1 or nothing
                quota, period = map(int, text.split())
                quotas.append(quota / period)
    return min(quotas, default=float("inf"))


def check_cores(asked: Asked) -> list[Line]:
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    found, quota = f"{usable} of {there}", core_quota(asked.root)
    if quota < usable:
        threads = max(1, int(quota))
        remedy = f"--threads {threads}, shared among a machine's processes; or raise the quota: docker run --cpus {usable} ..."
        return [Line("warning", "cores", f"{found}, but a control group gives the time of {quota:.3g}", remedy)]
    if usable == 1 < there:
        remedy = f"taskset -pc 0-{there - 1} $$ in the shell that starts the training"
        return [Line("warning", "cores", f"{found}: the affinity leaves one", remedy)]
    return [Line("ok", "cores", found)]


def _numbers(text: str) -> set[int]:
    """The kernel's lists, such as 0-3,8."""
    numbers: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def check_numa(asked: Asked) -> list[Line]:
    system, usable = asked.root / "sys", os.sched_getaffinity(0)
    nodes = {
        int(folder.name.removeprefix("node")): _numbers(read(folder / "cpulist"))
        for folder in (system / "devices" / "system" / "node").glob("node[0-9]*")
    }
    if len(nodes) < 2:
        return [Line("ok", "numa", "1 node")]
    near = sorted(node for node, cores in nodes.items() if cores & usable)
    cards = [
        int(read(device / "numa_node") or -1)
        for device in (system / "bus" / "pci" / "devices").glob("*")
        if read(device / "vendor") == "0x10de" and read(device / "class").startswith("0x03")  # NVIDIA, display or 3D
    ]
    at = sorted({node for node in cards if node >= 0})
    found = f"{len(nodes)} nodes, the affinity has cores of {', '.join(map(str, near))}"
    found += f"; GPUs at {', '.join(map(str, at))}" if at else ""
    if far := [node for node in at if node not in near]:
        remedy = f"numactl --cpunodebind={far[0]} --membind={far[0]} before the command"
        return [Line("warning", "numa", found, remedy)]
    return [Line("ok", "numa", found)]


def check_shm(asked: Asked) -> list[Line]:
    folder, remedy = asked.root / "dev" / "shm", "docker run --shm-size 8g ... (or --ipc host)"
    if not folder.is_dir():
        return [Line("warning", "shm", "no /dev/shm, which processes share memory through", remedy)]
    size = shutil.disk_usage(folder).total
    if size < GIB:
        return [Line("warning", "shm", f"/dev/shm has {size / GIB:.2g} GiB; NCCL and Ray may want more", remedy)]
    return [Line("ok", "shm", f"/dev/shm has {size / GIB:.3g} GiB")]


def check_limits(asked: Asked) -> list[Line]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    lines = [Line("ok", "open files", "unlimited" if soft == unlimited else str(soft))]
    if soft != unlimited and soft < 4096:
        wish = 65536 if hard == unlimited else min(65536, hard)
        remedy = f"ulimit -n {wish}" if wish >= 4096 else "docker run --ulimit nofile=65536 ..., or /etc/security/limits.conf"
        lines = [Line("warning", "open files", f"{soft}, each shard keeps one open", remedy)]
    if gpus(asked.root):
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        shown = "unlimited" if soft == unlimited else f"{soft >> 10} KiB"
        if soft != unlimited and any((asked.root / "sys" / "class" / "infiniband").glob("*")):
            remedy = "ulimit -l unlimited (docker run --ulimit memlock=-1 ...)"
            lines.append(Line("warning", "memlock", f"{shown}, and NCCL registers memory with InfiniBand", remedy))
        else:
            lines.append(Line("ok", "memlock", shown))
    return lines


def available_memory(root: Path) -> int:
    """Bytes that this process may still take, for itself or as page cache."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", read(root / "proc" / "meminfo"), re.MULTILINE)
    if not match:
        raise ValueError("/proc/meminfo has no MemAvailable")
    texts = [read(folder / name) for folder in cgroups(root, "memory") for name in ("memory.max", "memory.limit_in_bytes")]
    return min([int(match[1]) << 10, *(int(text) for text in texts if text.isdigit())])  # else "max" or nothing


def check_ram(asked: Asked) -> list[Line]:
    free = available_memory(asked.root)
    if free < 4 * GB:
        remedy = "end other programs, or give the container more: docker run --memory 16g ..."
        return [Line("warning", "ram", f"{free / GB:.3g} GB available is little for training", remedy)]
    return [Line("ok", "ram", f"{free / GB:.3g} GB available")]


def free_disk(folder: Path) -> tuple[Path, int]:
    """The folder or the nearest above it that exists, and the bytes free there."""
    exists = next(place for place in (folder, *folder.parents) if place.exists())
    return exists, shutil.disk_usage(exists).free


def check_disk(_: Asked) -> list[Line]:
    place, free = free_disk(Path.cwd())
    found = f"{free / GB:.3g} GB free for runs in {place}"
    if free < 2 * GB:
        remedy = "train.py --output FOLDER on another disk, or make room: a ResNet-50's checkpoint takes 0.2 GB"
        return [Line("warning", "disk", found, remedy)]
    return [Line("ok", "disk", found)]


def broken(name: str, error: UserError) -> Line:
    """A UserError says what is wrong and, behind its last semicolon, what to do."""
    found, _, remedy = " ".join(str(error).split()).rpartition("; ")
    if found:
        return Line("failed", name, found, remedy)
    if isinstance(error.__cause__, ImportError):
        return Line("failed", name, remedy, "pip install -e '.[s3]'" if "s3" in remedy else "install the package that it names")
    return Line("failed", name, remedy, "the address, the credentials and the network must let this machine read it")


def check_data(asked: Asked) -> list[Line]:
    if asked.data is None:
        return []
    try:
        from pipeline import storage
        from pipeline.shards import Manifest
    except ImportError as error:
        return [Line("failed", "data", f"{asked.data}: cannot be read yet ({error})", PACKAGES)]
    try:
        manifest = Manifest(asked.data)
    except UserError as error:
        return [broken("data", error)]
    except (KeyError, TypeError, AttributeError) as error:
        return [Line("failed", "data", f"{asked.data}: manifest.json is damaged ({error!r})", "make the shards again")]
    root = manifest.root
    sizes: dict[str, int] = {}
    for split in manifest.splits.values():
        sizes |= {storage.join(root, shard["file"]): int(shard["bytes"]) for shard in split["shards"]}
        if not split["shards"] and split.get("beton"):
            url = storage.join(root, split["beton"]["file"])
            try:
                sizes[url] = storage.size(url)
            except UserError as error:
                return [broken("data", error)]
    total, images = sum(sizes.values()), sum(split["images"] for split in manifest.splits.values())
    if not storage.is_remote(root):
        wrong = [path for path, size in sizes.items() if not os.path.isfile(path) or os.path.getsize(path) != size]
        total_files = len(sizes) + len(manifest.splits)
        wrong += [path for split in manifest.splits.values() if not os.path.isfile(path := storage.join(root, split["samples"]))]
        if wrong:
            found = f"missing or of another size: {len(wrong)} of {total_files} files, first {wrong[0]}"
            return [Line("failed", "data", found, "give the command that made these shards again: it makes what is damaged")]
    found = f"{images:,} images in {len(sizes):,} files of {total / GB:.3g} GB, profile {manifest.profile}"
    return [Line("ok", "data", found), _page_cache(asked, total, manifest.profile), _data_disk(asked, root, sizes)]


def _page_cache(asked: Asked, total: int, profile: str) -> Line:
    free = available_memory(asked.root)
    found = f"{total / GB:.3g} GB of data, {free / GB:.3g} GB of memory"
    if total <= free:
        return Line("ok", "page cache", found)
    smaller = "" if profile == "compact" else "; or half the bytes: python tools/make_shards.py ... --profile compact"
    return Line("warning", "page cache", f"{found}: every epoch reads the disk", f"train.py --order blocks{smaller}")


def _data_disk(asked: Asked, root: str, sizes: dict[str, int]) -> Line:
    """Room on the cache's disk, if there is to be one, else on the data's."""
    from pipeline import storage
    from pipeline.cache import FREE_SHARE, choose_cache

    if not storage.is_remote(root) and asked.cache is None and asked.cache_gb is None:
        place, free = free_disk(Path(root))
        found = f"{free / GB:.3g} GB free on the disk of {root}"
        if free < GB and os.access(place, os.W_OK):
            return Line(
                "warning", "data disk", found, f"make room: shards made again are written beside the old ones; du -sh {root}"
            )
        return Line("ok", "data disk", found)
    try:
        cache = choose_cache(asked.cache, asked.cache_gb)
        for url, size in sizes.items():
            cache.check(url, size)
    except UserError as error:
        return broken("cache", error)
    place, free = free_disk(cache.folder)
    room = free + sum(path.stat().st_size for path in cache.folder.glob("*"))  # what it holds it may replace
    total = sum(sizes.values())
    found = f"{cache.folder}: bound {cache.limit / GB:.3g} GB, room {room / GB:.3g} GB, data {total / GB:.3g} GB"
    if not os.access(place, os.W_OK):
        return Line("failed", "cache", f"{place} cannot be written", "give another --cache (CROPFEED_CACHE)")
    if min(total, cache.limit) > room:
        return Line("failed", "cache", found, f"--cache-gb {FREE_SHARE * room / GB:.3g}, or --cache FOLDER on a larger disk")
    if total > cache.limit:
        remedy = "raise --cache-gb (CROPFEED_CACHE_GB), or train.py --order blocks: a random order downloads over and over"
        return Line("warning", "cache", found, remedy)
    return Line("ok", "cache", found)


CHECKS: dict[str, Check] = {
    "python": check_python,
    "torch": check_torch,
    "driver": check_driver,
    "dali": check_dali,
    "nvjpeg": check_nvjpeg,
    "ffcv": check_ffcv,
    "numba": check_numba,
    "libjpeg-turbo": check_jpeg,
    "processor": check_processor,
    "cores": check_cores,
    "numa": check_numa,
    "shm": check_shm,
    "limits": check_limits,
    "ram": check_ram,
    "disk": check_disk,
    "data": check_data,
}
