"""For gpu_check.py: what the GPU and its machine are, and how fast lighting and normalization run there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.cores import usable_cores
from pipeline.doctor.gpu import check_nvjpeg, driver_version
from pipeline.doctor.lines import DoctorOptions
from pipeline.pixels.normalize import normalize_tensor
from tools import ROOT
from tools.bench.gpu_setting import Setting
from tools.profiler.loaders import repeated

COPIED = 2**28  # bytes of a copy
GPU_RATE = "pinned_copy_gb_per_s"


def probe(setting: Setting) -> Iterator[bool]:
    """Print the doctor's report. Record the number of usable cores and the speed of copies to the device, with the driver and
    nvJPEG in the rows."""
    subprocess.run([sys.executable, str(ROOT / "tools" / "doctor.py")], check=False)
    device = setting.spec.device
    source = torch.empty(COPIED if setting.gpu else COPIED // 16, dtype=torch.uint8, pin_memory=setting.gpu)
    target = torch.empty_like(source, device=device)
    copy = partial(target.copy_, source, non_blocking=True)
    copy()
    rates = [len(source) / 1e9 * repeated(copy, 0.1, device)[0] for _ in range(setting.repeats)]
    nvjpeg = "; ".join(line.found for line in check_nvjpeg(DoctorOptions()))
    more = f"driver {driver_version(Path('/')) or 'none'}, nvJPEG: {nvjpeg}"
    figures = {"cores": [float(usable_cores())], GPU_RATE if setting.gpu else "copy_gb_per_s": rates}
    setting.record("probe", "none", figures, more=more)
    yield True


def measure_tail(setting: Setting) -> Iterator[bool]:
    """Record lighting and normalization of a batch on the device, with a mean image: eager, in one kernel of ours (fused), which
    the loaders use, and compiled by torch."""
    spec = setting.spec
    count, size, device = spec.batch_size, spec.final_size, spec.device
    pixels = torch.randint(256, (count, size, size, 3), dtype=torch.uint8).to(device)
    shift, mean, std = torch.randn(count, 3).to(device), torch.rand(size, size, 3).to(device), torch.ones(3).to(device)
    tails = {"eager": normalize_tensor, "fused": _fused_tail, "compiled": torch.compile(normalize_tensor)}
    for name, tail in tails.items():
        try:
            tail(pixels, shift, mean, std, spec.dtype)  # compiles it
        except Exception as error:  # compilers and drivers raise all kinds
            print(f"tail, {name}: does not work here ({str(error).strip().splitlines()[0][:200]})", flush=True)
            continue
        call = partial(tail, pixels, shift, mean, std, spec.dtype)
        speeds = [repeated(call, setting.seconds / 8, device)[0] for _ in range(setting.repeats)]
        figures = {"milliseconds": [1e3 / speed for speed in speeds], "images_per_s": [count * speed for speed in speeds]}
        setting.record(f"tail, {name}", "torch", figures)
        yield True


def _fused_tail(*arguments: Any) -> torch.Tensor:
    """`normalize_fused`, which only this imports, as that fails without Triton."""
    from pipeline.pixels.fused import normalize_fused

    return normalize_fused(*arguments)
