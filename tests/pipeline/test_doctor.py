"""The doctor: on this machine, on fake machines below a folder, and with planted faults in packages and limits."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import venv
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from pipeline import doctor
from pipeline.convert.beton import BetonSettings
from pipeline.doctor import gpu, machine, packages
from pipeline.doctor.lines import DoctorOptions, Line
from tests.helpers import ROOT, assert_refused, clean_environment, run_script

SHOWN = re.compile(r"^(ok|warning|failed) +(\S+(?: \S+)*?)  +(\S.*)\n(?: +-> (\S.*)\n)?", re.MULTILINE)
INSTALL = "pip install --constraint constraints.txt"


def shown(stdout: str) -> dict[str, list[Line]]:
    """The printed lines by name, for `expect`. Asserts that nothing else is printed but a correct summary."""
    matches, total = list(SHOWN.finditer(stdout)), stdout.splitlines()[-1]
    assert "".join(match[0] for match in matches) + total + "\n" == stdout
    statuses: list[Any] = [match[1] for match in matches]
    assert [int(number) for number in re.findall(r"\d+", total)] == [statuses.count(s) for s in ("ok", "warning", "failed")]
    lines = [Line(status, match[2], match[3], match[4] or "") for status, match in zip(statuses, matches, strict=True)]
    assert all((line.status == "ok") == (not line.remedy) for line in lines)
    return {line.name: [line] for line in lines}


def plant(root: Path, **files: str) -> DoctorOptions:
    """Write a fake machine below `root`. files: path, with __ for /, and content."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return DoctorOptions(root=root)


def expect(lines: list[Line], status: str, found: str = "", remedy: str = "") -> None:
    """Assert that there is a single line with this status and these words, and that it has a remedy unless all is well."""
    assert len(lines) == 1, lines
    line = lines[0]
    assert line.status == status, line
    assert found in line.found, line
    assert remedy in line.remedy, line
    assert bool(line.remedy) == (status != "ok"), line


@pytest.mark.slow
def test_this_machine_with_data(small_shards: Path, tmp_path: Path) -> None:
    result = run_script("tools/doctor.py", small_shards, "--json", tmp_path / "lines.json")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    lines = shown(result.stdout)
    wanted = {"python", "torch", "driver", "dali", "nvjpeg", "ffcv", "numba", "libjpeg-turbo", "processor", "cores", "numa"}
    assert wanted | {"shm", "open files", "ram", "disk", "data", "page cache", "data disk"} <= set(lines)
    assert float(re.findall(r"decodes ([\d.]+) times", lines["libjpeg-turbo"][0].found)[0]) > 0.5
    expect(lines["python"], "ok", sys.version.split()[0])
    size = sum(path.stat().st_size for path in small_shards.glob("*/*.tar")) / 1e9
    expect(lines["data"], "ok", f"81 images in 6 files of {size:.3g} GB, profile original")
    assert [[Line(**line)] for line in json.loads((tmp_path / "lines.json").read_text())] == list(lines.values())


def test_planted_faults_in_one_run(tmp_path: Path) -> None:
    """A broken torch, no FFCV and no compiler, SIMD off, few open files, no data: each has a line with a remedy."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    (tmp_path / "ffcv.py").write_text("raise ModuleNotFoundError(\"No module named 'ffcv'\")")
    limited = (
        "import resource, runpy, sys; hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard)); sys.argv.pop(0); "
        "sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    result = run_script(
        "tools/doctor.py", tmp_path / "nowhere",
        launcher=("-c", limited), PYTHONPATH=str(tmp_path), PATH="/nonexistent", JSIMD_FORCENONE="1",
    )  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    lines = shown(result.stdout)
    expect(lines["torch"], "failed", "OSError: libcudart.so.13: cannot open", f"pip uninstall -y torch && {INSTALL} torch")
    wanted = f"g++ pkg-config libopencv-dev libturbojpeg0-dev && {INSTALL} -e '.[ffcv]'"
    expect(lines["ffcv"], "warning", "No module named 'ffcv'", f"apt-get install --no-install-recommends {wanted}")
    expect(lines["libjpeg-turbo"], "warning", "SIMD is off: JSIMD_FORCENONE=1 is set", "unset JSIMD_FORCENONE")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    expect(lines["open files"], "warning", "1024, each shard", f"ulimit -n {min(65536, hard)}")
    remedy = f"make shards first: cropfeed shards SRC --out {tmp_path}/nowhere"
    expect(lines["data"], "failed", f"{tmp_path}/nowhere: no such folder", remedy)


def test_without_any_package(small_shards: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    result = subprocess.run(
        [tmp_path / "bare" / "bin" / "python", ROOT / "tools" / "doctor.py", small_shards],
        env=clean_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    lines = shown(result.stdout)
    for name in ("torch", "numba", "libjpeg-turbo", "data"):
        expect(lines[name], "failed", "No module named")
    expect(lines["torch"], "failed", "ModuleNotFoundError: No module named 'torch'", f"{INSTALL} -e '.'")


OK, WARNING, FAILED = Line("ok", "a", "fine"), Line("warning", "b", "slow", "hurry"), Line("failed", "c", "broken", "fix it")


def test_exit_codes_and_colours() -> None:
    for found, plain, strict in (([OK], 0, 0), ([OK, WARNING], 0, 1), ([FAILED, OK], 1, 1)):
        assert (doctor.exit_code(found, strict=False), doctor.exit_code(found, strict=True)) == (plain, strict)
    assert doctor.text(FAILED, colour=True).startswith("\x1b[31mfailed")
    assert doctor.text(FAILED, colour=False).startswith("failed   c ")


def test_usage_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(run_script("tools/doctor.py", "--cache-gb", "much"), "--cache-gb")
    monkeypatch.setattr(doctor, "CHECKS", {"one": lambda _: [OK]})
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--json", str(tmp_path / "no" / "lines.json")])
    with pytest.raises(doctor.UserError, match="--json"):
        doctor.main()


def test_a_check_that_raises_becomes_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(_: DoctorOptions) -> list[Line]:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(doctor, "CHECKS", {"numa": breaks, "one": lambda _: [OK]})
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--strict"])
    with pytest.raises(SystemExit, match="1"):
        doctor.main()
    printed = shown(capsys.readouterr().out)
    expect(printed["numa"], "warning", "this check failed to run: ZeroDivisionError: two lines", "by hand")
    expect(printed["a"], "ok", "fine")


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, status in (((3, 10, 9), "failed"), ((3, 11, 0), "ok"), ((3, 13, 5), "ok"), ((3, 14, 0), "warning")):
        monkeypatch.setattr(sys, "version_info", found)
        expect(packages.check_python(DoctorOptions()), status)


def test_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu, without = plant(tmp_path / "gpu", dev__nvidia0=""), DoctorOptions(root=tmp_path / "cpu")
    reinstall = f"pip uninstall -y torch && {INSTALL} torch"
    seen: list[str] = ["H100"] * 2
    for options, version, cuda, names, status, found, remedy in (
        (without, "2.13.0+cu130", "13.0", [], "ok", "no GPU here", ""),
        (with_gpu, "2.13.0+cpu", None, [], "failed", "CPU build", reinstall),
        (with_gpu, "2.13.0+cu130", "13.0", [], "failed", "says CUDA itself", "driver 580 or later"),
        (with_gpu, "2.11.0+cu130", "13.0", seen, "ok", "2 x H100", ""),
        (with_gpu, "2.9.1+cu130", "13.0", seen, "failed", "older than 2.11", reinstall),
    ):
        answer = {"version": version, "cuda": cuda, "names": names, "why": "says CUDA itself"}
        monkeypatch.setattr(gpu, "probe", lambda _, answer=answer: (answer, ""))
        expect(gpu.check_torch(options), status, found, remedy)


CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Jan  7 2025\nGCC version:  gcc version 12.3.0 (Ubuntu)\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder)  Tue Jan  7 2025\n"
DALI_13, DALI_12, NO_DALI = ("nvidia-dali-cuda130 2.4.0", 13), ("nvidia-dali-cuda120 2.4.0", 12), ("", 0)


def test_driver_against_dali(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, driver, cuda_of_libcuda, dali, status, remedy in (
        (CLOSED, "580.65.06", 0, DALI_13, "ok", ""),
        (OPEN, "595.12", 0, DALI_13, "ok", ""),
        (CLOSED, "575.57.08", 12090, DALI_13, "failed", "580 or later"),
        (OPEN, "535.261.03", 13000, DALI_13, "ok", ""),  # with cuda-compat
        (CLOSED, "470.256.02", 11040, DALI_12, "failed", "525 or later"),
        (CLOSED, "470.256.02", 11040, NO_DALI, "ok", ""),
    ):
        monkeypatch.setattr(gpu, "driver_cuda", lambda cuda=cuda_of_libcuda: cuda)
        monkeypatch.setattr(gpu, "dali_build", lambda dali=dali: dali)
        options = plant(tmp_path, dev__nvidia0="", proc__driver__nvidia__version=text.format(driver))
        expect(gpu.check_driver(options), status, driver, remedy)


def test_driver_by_nvml_or_without_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(nvmlInit=lambda: None, nvmlSystemGetDriverVersion=lambda: "470.1.2")
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(gpu, "driver_cuda", lambda: 0)
    monkeypatch.setattr(gpu, "dali_build", lambda: DALI_13)
    with_gpu, without = plant(tmp_path / "gpu", dev__nvidia0=""), DoctorOptions(root=tmp_path / "cpu")
    expect(gpu.check_driver(with_gpu), "failed", "470.1.2 ")
    expect(gpu.check_driver(without), "warning", "470.1.2, but no GPU", "--gpus all")
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    expect(gpu.check_driver(without), "ok")
    expect(gpu.check_driver(with_gpu), "warning", "cannot be read")


def test_dali_missing_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu, without = plant(tmp_path / "gpu", dev__nvidia0=""), DoctorOptions(root=tmp_path / "cpu")
    package = tmp_path / "nvidia" / "dali.py"
    package.parent.mkdir()
    package.with_name("__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "dali_build", lambda: DALI_13)
    package.write_text("raise ModuleNotFoundError(\"No module named 'nvidia.dali'\")")
    expect(gpu.check_dali(without), "ok", "not installed")
    expect(gpu.check_dali(with_gpu), "warning", "not installed", f"{INSTALL} -e '.[gpu]'")
    package.write_text("import os; os.abort()")
    expect(gpu.check_dali(without), "warning")
    remedy = f"pip uninstall -y nvidia-dali-cuda130 && {INSTALL} -e '.[gpu]'"
    expect(gpu.check_dali(with_gpu), "failed", "crashed with SIGABRT", remedy)
    package.write_text("import sys; print('noise'); print('noise', file=sys.stderr)")
    expect(gpu.check_dali(with_gpu), "ok", "nvidia-dali-cuda130 2.4.0")
    package.write_text("import time; time.sleep(9)")
    monkeypatch.setattr("pipeline.doctor.lines.PROBE_S", 0.2)
    expect(gpu.check_dali(with_gpu), "failed", "did not end within 0.2 s")


ENGINE = """
#include <stddef.h>
int nvjpegCreateEx(int backend, void *a, void *b, unsigned flags, void **handle) { return backend == 3 ? CREATE : 2; }
int nvjpegGetHardwareDecoderInfo(void *handle, unsigned *engines, unsigned *cores) { *engines = ENGINES; *cores = 5; return 0; }
int nvjpegGetProperty(int type, int *value) { *value = 13 - type; return 0; }
#ifdef UNSUPPORTED
int nvjpegJpegStreamCreate(void *handle, void **stream) { return 0; }
int nvjpegJpegStreamParseHeader(void *handle, const unsigned char *data, size_t length, void *stream)
{ return data[0] != 0xff || data[length - 1] != 0xd9; }
int nvjpegDecodeBatchedSupported(void *handle, void *stream, int *result) { *result = UNSUPPORTED; return 0; }
#endif
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_nvjpeg_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = plant(tmp_path, dev__nvidia0="", **{"engine.c": ENGINE, "cuvid.c": ""})
    library = tmp_path / "nvidia" / "cu99" / "lib" / "libnvjpeg.so.13"
    library.parent.mkdir(parents=True)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libnvcuvid.so.1", tmp_path / "cuvid.c"], check=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    none, cuvid = "no JPEG engine", "without libnvcuvid (libnvcuvid.so.1: cannot open"
    cases: tuple[tuple[int, int, int | None, bool, str, str], ...] = (
        (0, 7, 0, True, "ok", "nvJPEG 13.12.11, hardware: 7 engines of 5 cores, which decode baseline JPEGs"),
        (0, 7, 1, True, "warning", "7 engines of 5 cores, which do not decode"),
        (0, 7, None, True, "ok", "7 engines of 5 cores, not tried"),  # an nvJPEG that lacks the function
        (0, 7, 0, False, "warning", cuvid),
        (9, 7, 0, False, "warning", cuvid),
        (0, 0, 0, True, "ok", none),
        (7, 7, 0, True, "ok", none),
        (1, 7, 0, True, "warning", "nvJPEG 13.12.11 cannot start (status 1)"),
    )
    for create, engines, unsupported, has_cuvid, status, found in cases:
        defined = [f"-DCREATE={create}", f"-DENGINES={engines}"]
        defined += [f"-DUNSUPPORTED={unsupported}"] if unsupported is not None else []
        subprocess.run(["cc", *defined, "-shared", "-fPIC", "-o", library, tmp_path / "engine.c"], check=True)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path) if has_cuvid else "")
        expect(gpu.check_nvjpeg(options), status, found)


def test_ffcv_built_for_another_opencv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV was built for another libopencv, and libopencv-dev, which compiling it needs, is missing."""
    (tmp_path / "ffcv.py").write_text("raise ImportError('libopencv_core.so.406: cannot open shared object file')")
    for name, script in (("g++", "exit 0"), ("pkg-config", '[ "$2" = libturbojpeg ]')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    apt = "apt-get install --no-install-recommends libopencv-dev"
    remedy = f"{apt} && pip install --force-reinstall --no-deps --no-cache-dir ffcv"
    expect(packages.check_ffcv(DoctorOptions()), "warning", "libopencv_core.so.406", remedy)


def test_simd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JSIMD_FORCENONE", raising=False)
    for plain, status in ((3e-3, "ok"), (1.1e-3, "warning")):
        answers = iter([(1e-3, ""), (plain, "")])
        monkeypatch.setattr(packages, "probe", lambda _, answers=answers, **environment: next(answers))
        expect(packages.check_jpeg(DoctorOptions()), status, f"decodes {plain * 1e3:.2g} times as fast as without SIMD")


def test_numba_without_a_cache_folder_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    error = "RuntimeError: cannot cache function 'permute': no locator available for file '/opt/pipeline/random.py'"
    monkeypatch.setattr(packages, "probe", lambda _: (None, error))
    expect(packages.check_numba(DoctorOptions()), "failed", error, "export NUMBA_CACHE_DIR=$HOME/.cache/numba")
    monkeypatch.setattr(packages, "probe", lambda _: (None, "crashed with SIGILL"))
    expect(packages.check_numba(DoctorOptions()), "failed", "crashed with SIGILL", "numba llvmlite numpy")


def test_processors(tmp_path: Path) -> None:
    zen = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: sse2 avx avx2 avx512bw avx512_bf16\n"
    arm = "processor\t: 0\nFeatures\t: fp asimd bf16\n"
    for info, status, found in (
        (zen, "ok", "AMD EPYC: AVX2, AVX-512; bfloat16 (avx512_bf16)"),
        (arm, "ok", "NEON; bfloat16 (bf16)"),
        (zen.replace("avx", "xxx"), "warning", "neither AVX2 nor NEON; no bfloat16"),
    ):
        expect(machine.check_processor(plant(tmp_path, proc__cpuinfo=info)), status, found)


def test_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = "sys__fs__cgroup__", "sys__fs__cgroup__cpu__cpu"
    nested = {f"{new}a__cpu.max": "350000 100000\n", f"{new}a__b__cpu.max": "600000 100000\n"}
    halved = {f"{old}.cfs_quota_us": "50000\n", f"{old}.cfs_period_us": "100000\n"}
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for index, (group, files, status, found, remedy) in enumerate((
        ("0::/a/b\n", nested, "warning", "CPU time to 3.5 cores", "--threads 3, "),
        ("4:memory:/x\n3:cpu,cpuacct:/docker/1\n", halved, "warning", "CPU time to 0.5 cores", "--threads 1, "),
        ("0::/\n", {f"{new}cpu.max": "max 100000\n"}, "ok", "8 of 64", ""),
    )):  # fmt: skip
        expect(machine.check_cores(plant(tmp_path / str(index), proc__self__cgroup=group, **files)), status, found, remedy)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    expect(machine.check_cores(DoctorOptions(root=tmp_path)), "warning", "1 of 64", "taskset -pc 0-63 $$")


def test_numa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "sys__bus__pci__devices__0000:41:00.0__"
    card = {f"{device}vendor": "0x10de\n", f"{device}class": "0x030200\n", f"{device}numa_node": "1\n"}
    nodes = {f"sys__devices__system__node__node{node}__cpulist": cores for node, cores in enumerate(("0-3,8\n", "4-7\n"))}
    options = plant(tmp_path, **card, **nodes)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 8})
    expect(machine.check_numa(options), "warning", remedy="numactl --cpunodebind=1 --membind=1 before the command")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 7})
    expect(machine.check_numa(options), "ok", "2 nodes; the CPU affinity allows cores of 0, 1; GPUs at 1")
    expect(machine.check_numa(DoctorOptions(root=tmp_path / "none")), "ok", "1 node")


def fake_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """An empty disk."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=free, free=free))


def test_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_disk(monkeypatch, 64 << 20)
    expect(machine.check_shm(DoctorOptions()), "warning", "0.062 GiB", "--shm-size")
    fake_disk(monkeypatch, 1 << 30)
    expect(machine.check_shm(DoctorOptions()), "ok")


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: (1024, 2048), resource.RLIMIT_MEMLOCK: (8 << 20, 8 << 20)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    expect(machine.check_open_files(DoctorOptions()), "warning", "1024", "--ulimit nofile=65536")
    limits[resource.RLIMIT_NOFILE] = (4096, 4096)
    expect(machine.check_open_files(DoctorOptions()), "ok")
    assert machine.check_memlock(DoctorOptions(root=tmp_path)) == []
    expect(machine.check_memlock(plant(tmp_path, dev__nvidia0="")), "ok", "8192 KiB")
    options = plant(tmp_path, sys__class__infiniband__mlx5_0="")
    expect(machine.check_memlock(options), "warning", "8192 KiB", "ulimit -l unlimited")
    limits[resource.RLIMIT_MEMLOCK] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    expect(machine.check_memlock(options), "ok")


def meminfo(kilobytes: int) -> str:
    return f"MemTotal:       99999999 kB\nMemFree:  1 kB\nMemAvailable:   {kilobytes} kB\nHugePages_Total:       0\n"


def test_memory_of_machine_and_control_groups(tmp_path: Path) -> None:
    """Available are the group's limit minus its usage plus the page cache: 6 - 5 + 1 GB. The parent group has no limit."""
    info, new, old = meminfo(8_000_000), "sys__fs__cgroup__", "sys__fs__cgroup__memory__memory"
    expect(machine.check_ram(plant(tmp_path, proc__meminfo=info)), "ok", "8.19 GB available")
    limit, used, cached = "6000000000\n", "5000000000\n", "active_file 400000000\n{}inactive_file 600000000\n"
    version_2 = {
        "proc__self__cgroup": "0::/a\n", f"{new}memory.max": "max\n", f"{new}a__memory.max": limit,
        f"{new}a__memory.current": used, f"{new}a__memory.stat": cached.format(""),
    }  # fmt: skip
    version_1 = {
        "proc__self__cgroup": "4:memory:/x\n3:cpu:/\n", f"{old}.limit_in_bytes": limit, f"{old}.usage_in_bytes": used,
        f"{old}.stat": f"active_file 0\ninactive_file 7\ntotal_{cached.format('total_')}",
    }  # fmt: skip
    for name, files in (("2", version_2), ("1", version_1)):
        options = plant(tmp_path / name, proc__meminfo=info, **files)
        expect(machine.check_ram(options), "warning", "2 GB available, which is little for training")


def check_data(name: str, data: Path | str, **options: Any) -> list[Line]:
    """The lines with this name."""
    return [line for line in doctor.check_data(DoctorOptions(data=str(data), **options)) if line.name == name]


def test_data_larger_than_memory(small_shards: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in small_shards.glob("*/*.tar"))
    for kilobytes, status in ((size // 1024 + 1, "ok"), (size // 1024 - 1, "warning")):
        root = plant(tmp_path, proc__meminfo=meminfo(kilobytes)).root
        remedy = "" if status == "ok" else "--order blocks; or shards of profile compact"
        expect(check_data("page cache", small_shards, root=root), status, remedy=remedy)


def test_damaged_data(small_shards: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(small_shards, data)
    tar, samples = data / "train" / "000000.tar", data / "val" / "samples.npy"
    os.truncate(tar, tar.stat().st_size - 512)
    expect(check_data("data", data), "failed", f"missing or of the wrong size: 1 of 8 files, first {tar}")
    tar.unlink()
    samples.unlink()
    expect(check_data("data", data), "failed", f"2 of 8 files, first {tar}")
    manifest = json.loads((data / "manifest.json").read_text())
    for name, split in manifest["splits"].items():  # FFCV files only
        beton = {"file": f"{name}.beton", "sha256": "0" * 64, "settings": asdict(BetonSettings())}
        split |= {"shards": [], "beton": beton, "samples": "train/samples.npy"}
    (data / "manifest.json").write_text(json.dumps(manifest))
    (data / "train.beton").write_bytes(bytes(5 * 10**6))
    expect(check_data("data", data), "failed", "val.beton")
    (data / "val.beton").write_bytes(bytes(10**6))
    expect(check_data("data", data), "ok", "81 images in 2 files of 0.006 GB")
    (data / "manifest.json").write_text("{")
    expect(check_data("data", data), "failed", "manifest.json", "make the shards again")


def test_unreachable_data(monkeypatch: pytest.MonkeyPatch) -> None:
    expect(check_data("data", "nosuch://bucket/shards"), "failed", "nosuch")

    def without_s3fs(path: str) -> None:
        raise ImportError("Install s3fs to access S3")  # fsspec's message

    monkeypatch.setattr(fsspec.core, "url_to_fs", without_s3fs)
    expect(check_data("data", "s3://bucket/shards-without-s3fs"), "failed", remedy=f"{INSTALL} -e '.[s3]'")


def test_free_space_on_disks(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_disk(monkeypatch, 3 * 10**8)
    expect(machine.check_disk(DoctorOptions()), "warning", "0.3 GB free for runs")
    expect(check_data("data disk", small_shards), "warning", f"0.3 GB free on the disk of {small_shards}")
    fake_disk(monkeypatch, 3 * 10**9)
    expect(machine.check_disk(DoctorOptions()), "ok")
    expect(check_data("data disk", small_shards), "ok")


def test_size_of_the_cache(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data that fit, data larger than the disk or than the limit, and shards larger than the limit."""
    sizes = [path.stat().st_size for path in small_shards.glob("*/*.tar")]
    total, cache = sum(sizes), tmp_path / "cache"

    def check(limit: int, free: int) -> list[Line]:
        """Run the command line, which names flags."""
        fake_disk(monkeypatch, free)
        monkeypatch.setattr(doctor, "CHECKS", {"page cache": doctor.check_data})
        with pytest.raises(SystemExit):
            doctor.main([str(small_shards), "--cache", str(cache), "--cache-gb", str(limit / 1e9)])
        return shown(capsys.readouterr().out)["cache"]

    expect(check(2 * total, 10 * total), "ok")
    expect(check(2 * total, total // 2), "failed", remedy=f"--cache-gb {0.8 * (total // 2) / 1e9:.3g}, or --cache FOLDER")
    expect(check(max(sizes), 10 * total), "warning", remedy="raise --cache-gb")
    expect(check(max(sizes), max(sizes) + 1), "warning")  # the limit fits the disk, even if the data does not
    expect(check(max(sizes) // 2, 10 * total), "failed", "do not fit", "raise --cache-gb (CROPFEED_CACHE_GB)")
    cache.mkdir()
    (cache / "held").write_bytes(bytes(total))  # cached files need no more space
    expect(check(2 * total, total // 2), "ok")
    monkeypatch.setattr(os, "access", lambda *_: False)
    expect(check(2 * total, 10 * total), "failed", f"{cache} cannot be written", "give another --cache")
