"""Example profiles for the tests of tables, charts and reports. Each is a variation of `input_bound`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Profile = dict[str, Any]


def speeds(images_per_s: float, spread: float = 0.021) -> Profile:
    return {"images_per_s": images_per_s, "low": images_per_s * (1 - spread), "high": images_per_s * (1 + spread)}


def stage(name: str, milliseconds: float, used: bool, ways: tuple[int, ...]) -> Profile:
    """A stage that slows down a little with more threads."""
    took = {threads: milliseconds * (1 + 0.03 * (threads - 1)) for threads in ways}
    at = [{"threads": n, **speeds(1e3 * n / took[n]), "ms_per_image": took[n]} for n in ways]
    return {"name": name, "used": used, "at": at}


def loader(engine: str, threads: int, prefetch: int, images_per_s: float, **others: Any) -> Profile:
    shares = {"cpu_share": min(threads / 2, 1.0) * 0.97, "gpu_share": None, "jpeg_share": None, "error": None}
    rest = {"bytes_per_s": images_per_s * 110_000, **shares, **others}
    return {"engine": engine, "threads": threads, "prefetch": prefetch, **speeds(images_per_s), **rest}


def failed(engine: str, threads: int, prefetch: int, error: str) -> Profile:
    names = ("images_per_s", "low", "high", "cpu_share", "bytes_per_s", "gpu_share", "jpeg_share")
    return {"engine": engine, "threads": threads, "prefetch": prefetch, **dict.fromkeys(names), "error": error}


def steps(count: int, waiting: float, computing: float) -> list[Profile]:
    """waiting, computing: seconds per step; every third step waits twice as long."""
    made, now = [], 0.0
    for place in range(count):
        got = now + waiting * (2 if place % 3 == 0 else 0.5)
        made.append({"asked": now, "got": got, "done": got + computing})
        now = got + computing + 0.0002
    return made


def demand(images_per_s: float, training: float, wait_share: float, **others: Any) -> Profile:
    step = 64 / training
    shares = {"wait_share": wait_share, "ready": 0.034, "cpu_share": 0.53, "gpu_share": None, "jpeg_share": None}
    window = steps(64, step * wait_share, step * (1 - wait_share))
    return {
        "what": "4,000 images/s",
        "emulated": True,
        **speeds(images_per_s, 0.004),
        "training": speeds(training, 0.013),
        **shares,
        "steps": window,
        **others,
    }


def input_bound() -> Profile:
    """A full example: decoding in one thread, on two cores."""
    others = [{"remedy": "profile", "change": "shards of --profile compact", "predicted_gain": 1.374}]
    return {
        "format": "cropfeed-profile",
        "version": 2,
        "made": {
            "date": "2026-05-12 14:03",
            "commit": "c31d0e5",
            "command": "tools/profile_pipeline.py /data/shards --threads 1 --demand 4000 --report out",
            "hardware": "AMD EPYC 9R14, 2 cores, 7.6 GiB",
            "versions": "Python 3.11.7, torch 2.11.0, numba 0.62.1",
            "planted": None,
        },
        "data": {
            "path": "/data/imagenet/lossless",
            "split": "train",
            "profile": "lossless",
            "images": 12_811,
            "bytes": 1_409_210_000,
            "mean_bytes": 110_004.2,
            "cache": "warm",
            "cache_why": "the shards (1.4 GB) fit into the memory available (5.1 GB)",
        },
        "spec": {
            "threads": 1,
            "prefetch": 4,
            "batch_size": 64,
            "image_size": 224,
            "geometry": "scale jitter 256..480",
            "dtype": "float32",
            "device": "cpu",
            "cores": 2,
        },
        "engine": "cpu",
        **speeds(2_038.4),
        "stages": [
            stage("read cold", 0.2213, False, (1, 2)),
            stage("read warm", 0.01134, True, (1, 2)),
            stage("cut", 0.0717, False, (1, 2)),
            stage("decode", 0.3301, True, (1, 2)),
            stage("resample", 0.0893, True, (1, 2)),
            stage("normalize", 0.0412, True, (1, 2)),
            stage("assembly", 0.00312, True, (1,)),
        ],
        "loaders": [
            *(loader("cpu", n, p, 2_038.4 * n**0.96 * (1 - 0.02 / p)) for n in (1, 2) for p in (2, 4, 8)),
            *(failed("ffcv", n, 4, "ffcv is not installed") for n in (1, 2)),
        ],
        "storage": {"bytes_per_s": 1.913e9, "low": 1.87e9, "high": 1.95e9, "streams": 4, "cold_bytes_per_image": 131_072.0},
        "demand": demand(4_009.3, 1_987.6, 0.504),
        "ceilings": [
            {"name": "decoding", "images_per_s": 5_712.0, "why": "2 cores that only decode"},
            {"name": "storage", "images_per_s": 14_595.0, "why": "1.9 GB/s over 131 kB read per image"},
        ],
        "verdict": {
            "text": "Training waits for data half of the time: the loader delivers 2,038 images/s, the demand is 4,009. "
            "The slowest stage is decoding, 0.330 ms per image in the only thread, while one of the two cores idles. With "
            "--threads 2 training should become 1.91 times as fast.",
            "limit": "input",
            "stage": "decode",
            "remedy": "threads",
            "change": "--threads 2",
            "predicted_gain": 1.9142,
            "others": others,
        },
        "applied": None,
        "tuned": None,
        "ahead": None,
    }


def no_demand() -> Profile:
    return input_bound() | {"demand": None}


def compute_bound() -> Profile:
    """ResNet-50 on a CPU. Its throughput is a fortieth of the loader's."""
    made = input_bound()
    made["demand"] = demand(50.93, 50.41, 0.0062, what="resnet50, bf16, batch 64, on cpu", emulated=False, ready=0.97)
    text = "The demand is 50.9 images/s, the loader delivers 40 times that. No change to the input would make training faster."
    change = "--mixed-precision bf16"
    made["verdict"] |= {"text": text, "limit": "compute", "stage": "model", "remedy": "precision", "change": change}
    made["verdict"]["others"] = []
    return made


def throttled() -> Profile:
    """A cold page cache and a slow disk."""
    made = input_bound()
    made["stages"] = [stage("read cold", 5.612, True, (1, 2)), *made["stages"][1:]]
    made["stages"][1]["used"] = False
    made |= speeds(176.3, 0.08)
    made["loaders"] = [loader("cpu", n, p, 176.3 + n + p / 4) for n in (1, 2) for p in (2, 4)]
    made["storage"] |= {"bytes_per_s": 20.1e6, "low": 19.9e6, "high": 20.2e6}
    made["ceilings"] = [
        {"name": "decoding", "images_per_s": 5_712.0, "why": "2 cores that only decode"},
        {"name": "storage", "images_per_s": 182.7, "why": "20 MB/s over 110 kB"},
    ]
    made["demand"] = demand(4_009.3, 175.1, 0.956)
    text = "Training waits for the storage, which delivers 20 MB/s: 183 images/s. A local cache would give 11.4 times that."
    made["verdict"] |= {"text": text, "stage": "read cold", "remedy": "cache", "change": "--cache /ssd", "predicted_gain": 11.43}
    made["made"]["planted"] = "reads limited to 20 MB/s"
    made["data"] |= {"cache": "cold"}
    return made


def applied() -> Profile:
    gains = {"predicted_gain": 1.9142, "measured_gain": 1.8527, "low": 1.7913, "high": 1.9118, "error": None}
    return input_bound() | {"applied": {"remedy": "threads", "change": "--threads 2", **gains}}


def not_applied() -> Profile:
    gains = {"predicted_gain": 1.9142, "measured_gain": None, "low": None, "high": None, "error": "the cores are taken"}
    return input_bound() | {"applied": {"remedy": "threads", "change": "--threads 2", **gains}}


def tuned() -> Profile:
    found = {"threads": 2, "prefetch": 8, "images_per_s": 3_961.7, "seconds": 41.38, "file": "/home/me/cropfeed-tuned.json"}
    return input_bound() | {"tuned": found}


def ahead() -> Profile:
    needs = [
        {"name": "images/s", "unit": "images/s", "needed": 24_800.0, "here": 4_009.0, "why": "8 GPUs of 3,100 images/s"},
        {
            "name": "cores",
            "unit": "cores",
            "needed": 13.42,
            "here": 2.0,
            "why": "0.541 ms per image and core, without DALI's share",
        },
        {"name": "storage", "unit": "bytes/s", "needed": 2.728e9, "here": 1.913e9, "why": "110 kB per image"},
        {"name": "memory", "unit": "bytes", "needed": 31.3e9, "here": 7.6e9, "why": "8 processes"},
        {"name": "network", "unit": "bytes/s", "needed": 2.9e9, "here": None, "why": "shards from a bucket"},
    ]
    text = "A host of 8 GPUs needs 13.4 cores and 2.7 GB/s; this machine has 2 cores, which are the first bottleneck."
    plan = {"gpus": 8, "hosts": 4, "demand": 3_100.0, "images_per_s": 99_200.0, "needs": needs, "breaks_first": "cores"}
    return input_bound() | {"ahead": plan | {"text": text}}


def on_a_gpu() -> Profile:
    """DALI on an H100, three engines, up to 64 threads. The CPU's decoding stages are not used."""
    made = input_bound()
    ways = (1, 2, 4, 8, 16, 32, 64)
    made["spec"] |= {"threads": 16, "prefetch": 3, "device": "cuda:0", "cores": 64, "batch_size": 256, "dtype": "bfloat16"}
    made["engine"] = "dali"
    made |= speeds(9_812.0)
    used = {"read warm": 0.0121, "cut": 0.0731, "copy": 0.00921}
    unused = {"read cold": 0.2213, "decode": 0.3301, "resample": 0.0893, "normalize": 0.0412}
    order = ("read cold", "read warm", "cut", "decode", "resample", "normalize", "copy")
    made["stages"] = [stage(name, (used | unused)[name], name in used, ways) for name in order]
    gpu = {"gpu_share": 0.713, "jpeg_share": 0.884, "cpu_share": 0.31}
    made["loaders"] = [
        *(loader("cpu", n, p, 2_000 * n**0.9 * (0.9 + p / 40)) for n in ways for p in (2, 4)),
        *(loader("dali", n, 3, 9_812.0 * min(1.0, (n / 16) ** 0.8) * (1 + n / 5_000), **gpu) for n in ways),
        *(loader("ffcv", n, 3, 1_900 * n**0.85) for n in ways),
        failed("dali", 128, 3, "CUDA out of memory"),
    ]
    made["ceilings"] = [
        {"name": "decoding", "images_per_s": 12_310.0, "why": "nvJPEG's hardware engine, 64 cores"},
        {"name": "storage", "images_per_s": 14_595.0, "why": "1.9 GB/s"},
        {"name": "copy", "images_per_s": 105_431.0, "why": "PCIe"},
    ]
    made["demand"] = demand(3_098.0, 3_051.0, 0.0132, what="resnet50, bf16, batch 256, on an H100", emulated=False)
    made["demand"] |= {"gpu_share": 0.983, "jpeg_share": 0.271, "ready": None, "steps": steps(2_000, 0.0011, 0.0826)}
    text = "Training reaches the demand to 1.3 %: the input does not limit it."
    made["verdict"] |= {"text": text, "limit": "balanced", "stage": "engine", "remedy": "none", "change": "nothing"}
    made["verdict"] |= {"predicted_gain": 1.0, "others": []}
    return made


def extreme() -> Profile:
    """Coinciding levels, a single loader, a single step."""
    made = input_bound()
    made["loaders"] = [loader("cpu", 1, 4, 2_038.4), failed("dali", 1, 4, "no GPU")]
    made["ceilings"] = [{"name": name, "images_per_s": 2_040.0, "why": "as it is"} for name in ("decoding", "storage", "copy")]
    made["demand"] = demand(2_037.0, 2_030.0, 0.0, steps=[{"asked": 0.0, "got": 0.0, "done": 31.2}])
    return made


def far_apart() -> Profile:
    made = input_bound()
    made["stages"][3] = stage("decode", 8_213.0, True, (1, 2))
    made["demand"] = demand(2_511_000.0, 0.0314, 0.9999, steps=steps(7, 2_000.0, 1e-5))
    made |= speeds(0.1222, 0.9)
    made["loaders"] = [loader("cpu", n, 4, 0.1222 * n) for n in range(1, 9)]
    return made


def nothing_measured() -> Profile:
    made = no_demand()
    return made | {"loaders": [failed("cpu", 1, 4, "no memory")], "ceilings": []}


EXAMPLES: list[Callable[[], Profile]] = [
    input_bound,
    no_demand,
    compute_bound,
    throttled,
    applied,
    not_applied,
    tuned,
    ahead,
    on_a_gpu,
    extreme,
    far_apart,
    nothing_measured,
]
