"""tools/doctor.py: this machine, machines planted below a folder, and faults planted in packages and limits."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import doctor
import doctor_checks as checks
import fsspec
import pytest
from doctor_checks import Asked, Line

from tests.helpers import ROOT, assert_refused, clean_environment, run_script

SHOWN = re.compile(r"(ok|warning|failed) +(\S+(?: \S+)*?)  +(\S.*)")
GIB = 2**30


def shown(stdout: str) -> dict[str, tuple[str, str, str]]:
    """What was printed: name -> status, found, remedy. Nothing else may be there but the sum, which must be right."""
    *lines, total = stdout.splitlines()
    result: dict[str, tuple[str, str, str]] = {}
    name = ""
    for line in lines:
        if line.startswith(" "):
            status, found, remedy = result[name]
            assert status != "ok"
            assert remedy == ""
            assert line.strip().startswith("-> ")
            result[name] = status, found, line.strip().removeprefix("-> ")
        else:
            match = SHOWN.fullmatch(line)
            assert match, line
            status, name, found = match.groups()
            assert name not in result
            result[name] = status, found, ""
    assert all(remedy for status, _, remedy in result.values() if status != "ok")
    counted = [sum(status == wanted for status, _, _ in result.values()) for wanted in ("ok", "warning", "failed")]
    assert [int(number) for number in re.findall(r"\d+", total)] == counted
    return result


def plant(root: Path, **files: str) -> Asked:
    """A machine below `root`. files: path, with __ for /, and content."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return Asked(root=root)


def only(lines: list[Line]) -> Line:
    assert len(lines) == 1, lines
    assert bool(lines[0].remedy) == (lines[0].status != "ok")
    return lines[0]


def test_here_with_data(small_shards: Path, tmp_path: Path) -> None:
    result = run_script("tools/doctor.py", small_shards, "--json", tmp_path / "lines.json")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    lines = shown(result.stdout)
    wanted = {"python", "torch", "driver", "dali", "nvjpeg", "ffcv", "numba", "libjpeg-turbo", "processor", "cores", "numa"}
    assert wanted | {"shm", "open files", "ram", "disk", "data", "page cache", "data disk"} <= set(lines)
    assert float(re.findall(r"decodes ([\d.]+) times", lines["libjpeg-turbo"][1])[0]) > 0.5
    assert lines["python"][:2] == ("ok", sys.version.split()[0])
    size = sum(path.stat().st_size for path in small_shards.glob("*/*.tar")) / 1e9
    assert lines["data"][1].startswith(f"81 images in 6 files of {size:.3g} GB, profile original")
    written = json.loads((tmp_path / "lines.json").read_text())
    assert [(line["status"], line["name"], line["found"], line["remedy"]) for line in written] == [
        (status, name, found, remedy) for name, (status, found, remedy) in lines.items()
    ]


def test_planted_faults_in_one_run(tmp_path: Path) -> None:
    """Without FFCV and what compiles it, SIMD off, few open files, no data: each has its line and its remedy."""
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
    assert lines["ffcv"][0] == "warning"
    assert lines["ffcv"][2] == (
        "apt-get install --no-install-recommends g++ pkg-config libopencv-dev libturbojpeg0-dev && pip install ffcv pillow"
    )
    assert lines["libjpeg-turbo"] == ("warning", "SIMD is off: JSIMD_FORCENONE=1 is set", "unset JSIMD_FORCENONE")
    assert lines["open files"][0] == "warning"
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert lines["open files"][2] == f"ulimit -n {65536 if hard == resource.RLIM_INFINITY else min(65536, hard)}"
    assert lines["data"] == (
        "failed", f"{tmp_path}/nowhere: no such folder",
        f"make shards first: python tools/make_shards.py SRC --out {tmp_path}/nowhere",
    )  # fmt: skip


def test_where_nothing_is_installed(small_shards: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    result = subprocess.run(
        [tmp_path / "bare" / "bin" / "python", ROOT / "tools" / "doctor.py", small_shards],
        env=clean_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    lines = shown(result.stdout)
    assert {name for name, (status, _, _) in lines.items() if status == "failed"} >= {"torch", "numba", "libjpeg-turbo", "data"}
    assert lines["torch"][1:] == (
        "cannot be imported: ModuleNotFoundError: No module named 'torch'", "pip install --constraint constraints.txt -e .",
    )  # fmt: skip


OK, WARNING, FAILED = Line("ok", "a", "fine"), Line("warning", "b", "slow", "hurry"), Line("failed", "c", "broken", "mend it")


@pytest.mark.parametrize(
    ("lines", "options", "code"),
    [
        ([OK], [], 0), ([OK], ["--strict"], 0), ([OK, WARNING], [], 0), ([OK, WARNING], ["--strict"], 1),
        ([FAILED, OK], [], 1), ([FAILED, WARNING], ["--strict"], 1),
    ],
)  # fmt: skip
def test_exit_codes(lines: list[Line], options: list[str], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKS", {"one": lambda _: lines})
    monkeypatch.setattr(sys, "argv", ["doctor.py", *options])
    with pytest.raises(SystemExit) as exit:
        doctor.main()
    assert exit.value.code == code


def test_usage_errors(tmp_path: Path) -> None:
    assert_refused(run_script("tools/doctor.py", "--cache-gb", "much"), "--cache-gb")
    assert_refused(run_script("tools/doctor.py", "--stric"), "--stric")


def test_json_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKS", {"one": lambda _: [OK]})
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--json", str(tmp_path / "no" / "lines.json")])
    with pytest.raises(doctor.UserError, match="--json"):
        doctor.main()


def test_a_check_that_breaks_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(_: Asked) -> list[Line]:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(checks, "CHECKS", {"numa": breaks, "one": lambda _: [OK]})
    monkeypatch.setattr(sys, "argv", ["doctor.py"])
    with pytest.raises(SystemExit) as exit:
        doctor.main()
    lines = shown(capsys.readouterr().out)
    assert exit.value.code == 0
    assert lines["numa"][:2] == ("warning", "this check broke: ZeroDivisionError: two lines")
    assert lines["a"] == ("ok", "fine", "")


def test_colours() -> None:
    assert doctor.text(FAILED, colour=True).startswith("\x1b[31mfailed")
    assert doctor.text(FAILED, colour=False).startswith("failed   c ")


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, status in (((3, 10, 9), "failed"), ((3, 11, 0), "ok"), ((3, 13, 5), "ok"), ((3, 14, 0), "warning")):
        monkeypatch.setattr(sys, "version_info", found)
        assert only(checks.check_python(Asked())).status == status


# number, CUDA of the build, GPUs seen, GPUs there -> status, words
@pytest.mark.parametrize(
    ("number", "cuda", "names", "gpu", "status", "words"),
    [
        ("2.13.0+cpu", None, [], False, "ok", "no GPU here"),
        ("2.13.0+cpu", None, [], True, "failed", "CPU build"),
        ("2.13.0+cu130", "13.0", [], False, "ok", "no GPU here"),
        ("2.13.0+cu130", "13.0", [], True, "failed", "driver too old, says CUDA"),
        ("2.13.0+cu130", "13.0", ["H100"] * 2, True, "ok", "2 x H100"),
        ("2.9.1+cu130", "13.0", ["H100"], True, "failed", "older than 2.11"),
        ("2.11.0", "13.0", ["H100"], True, "ok", "1 x H100"),
    ],
)
def test_torch(
    number: str, cuda: str | None, names: list[str], gpu: bool, status: str, words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    answer = {"version": number, "cuda": cuda, "names": names, "why": "driver too old, says CUDA"}
    monkeypatch.setattr(checks, "probe", lambda *_, **__: (answer, ""))
    line = only(checks.check_torch(plant(tmp_path, **({"dev__nvidia0": ""} if gpu else {}))))
    assert line.status == status
    assert words in line.found
    if "CPU build" in words:
        assert line.remedy == "pip uninstall -y torch && pip install --constraint constraints.txt torch"
    if "too old" in words:
        assert "driver 580 or later" in line.remedy


CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Jan  7 2025\nGCC version:  gcc version 12.3.0 (Ubuntu)\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder)  Tue Jan  7 2025\n"


@pytest.mark.parametrize(
    ("text", "cuda_of_libcuda", "dali", "status"),
    [
        (CLOSED.format("580.65.06"), 0, ("nvidia-dali-cuda130 2.4.0", 13), "ok"),
        (OPEN.format("595.12"), 0, ("nvidia-dali-cuda130 2.4.0", 13), "ok"),
        (CLOSED.format("575.57.08"), 12090, ("nvidia-dali-cuda130 2.4.0", 13), "failed"),
        (OPEN.format("535.261.03"), 13000, ("nvidia-dali-cuda130 2.4.0", 13), "ok"),  # with cuda-compat
        (CLOSED.format("535.261.03"), 12020, ("nvidia-dali-cuda120 1.50.0", 12), "ok"),
        (CLOSED.format("470.256.02"), 11040, ("nvidia-dali-cuda120 1.50.0", 12), "failed"),
        (CLOSED.format("470.256.02"), 11040, ("", 0), "ok"),
    ],
)
def test_driver_against_dali(
    text: str, cuda_of_libcuda: int, dali: tuple[str, int], status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "driver_cuda", lambda: cuda_of_libcuda)
    monkeypatch.setattr(checks, "dali_build", lambda: dali)
    line = only(checks.check_driver(plant(tmp_path, dev__nvidia0="", proc__driver__nvidia__version=text)))
    assert line.status == status
    version = re.search(r"\d{3}\.[\d.]+", text)
    assert version is not None
    assert line.found.startswith(version[0])
    if status == "failed":
        assert ("580 or later" if dali[1] == 13 else "525 or later") in line.remedy


def test_driver_by_nvml_or_without_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(nvmlInit=lambda: None, nvmlSystemGetDriverVersion=lambda: b"470.1.2")
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(checks, "driver_cuda", lambda: 0)
    monkeypatch.setattr(checks, "dali_build", lambda: ("nvidia-dali-cuda130 2.4.0", 13))
    line = only(checks.check_driver(plant(tmp_path, dev__nvidia0="")))
    assert line.status == "failed"
    assert line.found.startswith("470.1.2 ")
    line = only(checks.check_driver(Asked(root=tmp_path / "other")))
    assert line.status == "warning"
    assert "--gpus all" in line.remedy
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    assert only(checks.check_driver(Asked(root=tmp_path / "other"))).status == "ok"
    assert only(checks.check_driver(plant(tmp_path, dev__nvidia0=""))).status == "warning"


def test_dali_missing_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, with_gpu = Asked(root=tmp_path / "cpu"), plant(tmp_path / "gpu", dev__nvidia0="")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    package = tmp_path / "nvidia" / "dali"
    package.mkdir(parents=True)
    (tmp_path / "nvidia" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'nvidia.dali'\")")
    assert only(checks.check_dali(here)).status == "ok"
    line = only(checks.check_dali(with_gpu))
    assert (line.status, line.remedy) == ("warning", "pip install -e '.[dali]'")
    (package / "__init__.py").write_text("import os; os.abort()")
    assert only(checks.check_dali(here)).status == "warning"
    line = only(checks.check_dali(with_gpu))
    assert line.status == "failed"
    assert "SIGABRT" in line.found
    (package / "__init__.py").write_text("import sys; __version__ = '0'; print('noise'); print('noise', file=sys.stderr)")
    assert only(checks.check_dali(with_gpu)).status == "ok"


def test_ffcv_that_no_longer_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ffcv.py").write_text("raise ImportError('libopencv_core.so.406: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(checks, "missing_for_ffcv", lambda: ["libopencv-dev"])
    line = only(checks.check_ffcv(Asked()))
    assert "libopencv_core.so.406" in line.found
    assert line.remedy == (
        "apt-get install --no-install-recommends libopencv-dev && "
        "pip install --force-reinstall --no-deps --no-cache-dir ffcv"
    )  # fmt: skip


def test_what_compiles_ffcv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, script in (("g++", "exit 0"), ("pkg-config", '[ "$2" = libturbojpeg ]')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks.missing_for_ffcv() == ["libopencv-dev"]


ENGINE = """
int nvjpegCreateEx(int backend, void *a, void *b, unsigned flags, void **handle) { return backend == 3 ? CREATE : 2; }
int nvjpegGetHardwareDecoderInfo(void *handle, unsigned *engines, unsigned *cores) { *engines = ENGINES; *cores = 5; return 0; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("create", "engines", "status", "words"),
    [
        (0, 7, "ok", "7 engines of 5 cores"),
        (0, 0, "ok", "no JPEG engine"),
        (7, 7, "ok", "no JPEG engine"),
        (1, 7, "warning", "status 1"),
    ],
)
def test_nvjpeg_engine(
    create: int, engines: int, status: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "nvidia" / "cu99" / "lib"
    folder.mkdir(parents=True)
    (tmp_path / "engine.c").write_text(ENGINE)
    defined = [f"-DCREATE={create}", f"-DENGINES={engines}"]
    command = ["cc", *defined, "-shared", "-fPIC", "-o", f"{folder}/libnvjpeg.so.13", f"{tmp_path}/engine.c"]
    subprocess.run(command, check=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    line = only(checks.check_nvjpeg(plant(tmp_path, dev__nvidia0="")))
    assert line.status == status
    assert words in line.found


@pytest.mark.parametrize(("plain", "status"), [(3e-3, "ok"), (1.1e-3, "warning")])
def test_simd(plain: float, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(_code: str, **environment: str) -> tuple[float, str]:
        return (plain if environment == {"JSIMD_FORCENONE": "1"} else 1e-3), ""

    monkeypatch.delenv("JSIMD_FORCENONE", raising=False)
    monkeypatch.setattr(checks, "probe", probe)
    line = only(checks.check_jpeg(Asked()))
    assert line.status == status
    assert f"decodes {plain * 1e3:.2g} times as fast as without SIMD" in line.found


def test_numba_without_a_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "probe", lambda *_: ({"version": "1", "folder": "/proc/none"}, ""))
    line = only(checks.check_numba(Asked()))
    assert (line.status, line.remedy) == ("warning", "export NUMBA_CACHE_DIR=$HOME/.cache/numba")


def test_processors(tmp_path: Path) -> None:
    zen = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: sse2 avx avx2 avx512bw avx512_bf16\n"
    line = only(checks.check_processor(plant(tmp_path, proc__cpuinfo=zen)))
    assert (line.status, line.found) == ("ok", "AMD EPYC: AVX2, AVX-512; bfloat16 (avx512_bf16)")
    arm = "processor\t: 0\nFeatures\t: fp asimd bf16\n"
    assert "NEON; bfloat16 (bf16)" in only(checks.check_processor(plant(tmp_path, proc__cpuinfo=arm))).found
    line = only(checks.check_processor(plant(tmp_path, proc__cpuinfo=zen.replace("avx", "xxx"))))
    assert line.status == "warning"
    assert "no bfloat16" in line.found


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu.max": "200000 100000\n"}, 2),
        ({"proc__self__cgroup": "0::/a/b\n", "sys__fs__cgroup__a__cpu.max": "350000 100000\n",
          "sys__fs__cgroup__a__b__cpu.max": "600000 100000\n"}, 3.5),
        ({"proc__self__cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/1\n", "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "50000\n",
          "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"proc__self__cgroup": "3:cpu:/\n", "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "-1\n",
          "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000\n"}, None),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu.max": "max 100000\n"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_core_quota(files: dict[str, str], quota: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    line = only(checks.check_cores(plant(tmp_path, **files)))
    if quota is None:
        assert (line.status, line.found) == ("ok", "8 of 8")
    else:
        assert line.status == "warning"
        assert line.found.endswith(f" {quota}")
        assert re.findall(r"--threads (\d+)", line.remedy) == [str({2: 2, 3.5: 3, 0.5: 1}[quota])]


def test_affinity_of_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert "taskset -pc 0-63 $$" in only(checks.check_cores(Asked(root=tmp_path))).remedy
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 6})
    assert only(checks.check_cores(Asked(root=tmp_path))).found == "2 of 64"


def test_numa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "sys__bus__pci__devices__0000:41:00.0__"
    asked = plant(
        tmp_path,
        sys__devices__system__node__node0__cpulist="0-3,8\n",
        sys__devices__system__node__node1__cpulist="4-7\n",
        **{f"{device}vendor": "0x10de\n", f"{device}class": "0x030200\n", f"{device}numa_node": "1\n"},
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 8})
    line = only(checks.check_numa(asked))
    assert (line.status, line.remedy) == ("warning", "numactl --cpunodebind=1 --membind=1 before the command")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 7})
    line = only(checks.check_numa(asked))
    assert (line.status, line.found) == ("ok", "2 nodes, the affinity has cores of 0, 1; GPUs at 1")
    assert only(checks.check_numa(Asked(root=tmp_path / "none"))).found == "1 node"


def fake_disk(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=total, free=free))


def test_shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = plant(tmp_path, dev__shm__x="")
    fake_disk(monkeypatch, 64 << 20, 0)
    line = only(checks.check_shm(asked))
    assert line.status == "warning"
    assert "0.062 GiB" in line.found
    assert "--shm-size" in line.remedy
    fake_disk(monkeypatch, GIB, 0)
    assert only(checks.check_shm(asked)).status == "ok"
    assert only(checks.check_shm(Asked(root=tmp_path / "none"))).status == "warning"


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: (1024, 2048), resource.RLIMIT_MEMLOCK: (8 << 20, 8 << 20)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    assert "--ulimit nofile=65536" in only(checks.check_limits(Asked(root=tmp_path))).remedy
    limits[resource.RLIMIT_NOFILE] = (4096, 4096)
    assert only(checks.check_limits(Asked(root=tmp_path))).status == "ok"
    _, memlock = checks.check_limits(plant(tmp_path, dev__nvidia0=""))
    assert (memlock.status, memlock.found) == ("ok", "8192 KiB")
    _, memlock = checks.check_limits(plant(tmp_path, sys__class__infiniband__mlx5_0=""))
    assert (memlock.status, memlock.remedy) == ("warning", "ulimit -l unlimited (docker run --ulimit memlock=-1 ...)")
    limits[resource.RLIMIT_MEMLOCK] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert checks.check_limits(Asked(root=tmp_path))[1].status == "ok"


def meminfo(kilobytes: int) -> str:
    return f"MemTotal:       99999999 kB\nMemFree:  1 kB\nMemAvailable:   {kilobytes} kB\n"


def test_memory(tmp_path: Path) -> None:
    line = only(checks.check_ram(plant(tmp_path, proc__meminfo=meminfo(8_000_000))))
    assert (line.status, line.found) == ("ok", "8.19 GB available")
    new = {"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__memory.max": "2000000000\n"}
    old = {"proc__self__cgroup": "4:memory:/x\n", "sys__fs__cgroup__memory__memory.limit_in_bytes": "2000000000\n"}
    for index, files in enumerate((new, old)):
        line = only(checks.check_ram(plant(tmp_path / str(index), proc__meminfo=meminfo(8_000_000), **files)))
        assert line.status == "warning"
        assert line.found.startswith("2 GB ")


def by_name(asked: Asked) -> dict[str, Line]:
    return {line.name: line for line in checks.check_data(asked)}


def test_data_larger_than_memory(small_shards: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in small_shards.glob("*/*.tar"))
    for kilobytes, status in ((size // 1024 + 1, "ok"), (size // 1024 - 1, "warning")):
        asked = plant(tmp_path, proc__meminfo=meminfo(kilobytes))
        line = by_name(Asked(root=asked.root, data=str(small_shards)))["page cache"]
        assert line.status == status
    assert "--order blocks" in line.remedy
    assert "--profile compact" in line.remedy


def test_damaged_data(small_shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(small_shards, copy)
    first = sorted(copy.glob("train/*.tar"))[0]
    os.truncate(first, first.stat().st_size - 512)
    line = only(checks.check_data(Asked(data=str(copy))))
    assert line.status == "failed"
    assert line.found == f"missing or of another size: 1 of 8 files, first {first}"
    first.unlink()
    assert only(checks.check_data(Asked(data=str(copy)))).found.endswith(f" 1 of 8 files, first {first}")
    samples = copy / "val" / "samples.npy"
    shutil.copy(small_shards / first.relative_to(copy), first)
    samples.unlink()
    assert only(checks.check_data(Asked(data=str(copy)))).found.endswith(f" 1 of 8 files, first {samples}")
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["profile"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "profile" in only(checks.check_data(Asked(data=str(copy)))).found
    (copy / "manifest.json").write_text("{")
    line = only(checks.check_data(Asked(data=str(copy))))
    assert (line.status, line.remedy) == ("failed", "make the shards again")


def test_data_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    line = only(checks.check_data(Asked(data="nosuch://bucket/shards")))
    assert line.status == "failed"
    assert "nosuch" in line.found
    monkeypatch.setitem(sys.modules, "s3fs", None)  # importing it fails
    line = only(checks.check_data(Asked(data="s3://bucket/shards-without-s3fs")))
    assert (line.status, line.remedy) == ("failed", "pip install -e '.[s3]'")


def test_room_on_disks(small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_disk(monkeypatch, 10**12, 3 * 10**8)
    assert only(checks.check_disk(Asked())).status == "warning"
    line = by_name(Asked(data=str(small_shards)))["data disk"]
    assert (line.status, line.found) == ("warning", f"0.3 GB free on the disk of {small_shards}")
    fake_disk(monkeypatch, 10**12, 3 * 10**9)
    assert only(checks.check_disk(Asked())).status == "ok"
    assert by_name(Asked(data=str(small_shards)))["data disk"].status == "ok"


def test_room_for_the_cache(small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a remote data set: larger than the disk, than the bound, than nothing, and its shards larger than the bound."""
    files = fsspec.filesystem("memory")
    files.put(str(small_shards), "/doctor", recursive=True)
    sizes = [path.stat().st_size for path in small_shards.glob("*/*.tar")]
    total, cache = sum(sizes), tmp_path / "cache"

    def line(bound: int | None, free: int) -> Any:
        fake_disk(monkeypatch, 10**12, free)
        gigabytes = None if bound is None else bound / 1e9
        return by_name(Asked(data="memory://doctor", cache=cache, cache_gb=gigabytes))["cache"]

    try:
        assert line(2 * total, 10 * total).status == "ok"
        full = line(2 * total, total // 2)
        assert full.status == "failed"
        bound = re.match(r"--cache-gb (\S+), or --cache FOLDER", full.remedy)
        assert bound is not None
        assert float(bound[1]) == pytest.approx(0.4 * total / 1e9, rel=0.02)  # 80 % of what is free
        assert line(max(sizes), 10 * total).status == "warning"
        assert line(max(sizes), max(sizes) + 1).status == "warning"  # the bound fits the disk, if all the data do not
        large = line(max(sizes) // 2, 10 * total)
        assert (large.status, large.remedy) == ("failed", "raise --cache-gb (CROPFEED_CACHE_GB)")
        cache.mkdir()
        (cache / "held").write_bytes(bytes(total))  # what is cached already needs no room again
        assert line(2 * total, total // 2).status == "ok"
    finally:
        files.rm("/doctor", recursive=True)
