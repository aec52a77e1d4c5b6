"""All contenders, by name. Each family of peers has a module. Its docstring names the documentation that the settings follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

DECODE = "decode-of-the-cut-alone"


@dataclass(frozen=True)
class Contender:
    """One input pipeline on one kind of data.

    data: "original" (unchanged files) or "500" (longest side at most 500 pixels, quality 90, 4:2:0); for Cropfeed also "lossless"
    and "compact". function: module:name of a function from a Job to endless batches. packages: its packages on PyPI, recorded
    with their versions. ahead: number of batches that it may have prefetched before the clock starts, with two threads. kind:
    "peer", "cropfeed", or "decode" (decoding of the cuts alone, in one thread).
    """

    name: str
    data: str
    function: str
    packages: tuple[str, ...]
    ahead: int
    kind: str = "peer"

    @property
    def group(self) -> str:
        """The data of the peers with which this contender is compared."""
        return {"lossless": "original", "compact": "500"}.get(self.data, self.data)

    @property
    def key(self) -> str:
        return f"{self.name}:{self.data}"

    @property
    def reads_beton(self) -> bool:
        return self.function.startswith("tools.bench.peers.ffcv:") or self.function == "tools.bench.peers.cropfeed:ffcv"

    @property
    def install(self) -> str:
        return f"pip install {' '.join(self.packages)}"


_DALI = ("nvidia-dali-cuda130",)
_FFCV = ("ffcv", "opencv-python", "numba")
_CROPFEED = ("torch", "numba", "simplejpeg")
_ENGINES = (("cpu", "lossless"), ("cpu", "compact"), ("cpu", "original"), ("dali", "lossless"), ("dali", "compact"),
            ("ffcv", "lossless"), ("ffcv", "compact"))  # fmt: skip


def _peers(data: str) -> tuple[Contender, ...]:
    loader, ahead = "tools.bench.peers.torch_loaders", 4  # two workers, two batches each
    return (
        Contender("dali-plain", data, "tools.bench.peers.dali:plain", _DALI, 2),
        Contender("dali-resize-crop-mirror", data, "tools.bench.peers.dali:resize_crop_mirror", _DALI, 2),
        Contender("dali-roi", data, "tools.bench.peers.dali:roi", _DALI, 2),
        Contender("ffcv-rrc", data, "tools.bench.peers.ffcv:random_resized_crop", _FFCV, 3),
        Contender("ffcv-jitter", data, "tools.bench.peers.ffcv:scale_jitter", _FFCV, 3),
        Contender("webdataset-opencv", data, f"{loader}:webdataset_opencv", ("webdataset", "torch", "opencv-python"), ahead),
        Contender("webdataset-pillow", data, f"{loader}:webdataset_pillow", ("webdataset", "torch", "pillow"), ahead),
        Contender("torch-pillow", data, f"{loader}:files_pillow", ("torch", "webdataset", "pillow"), ahead),
        Contender("torch-vips", data, f"{loader}:files_vips", ("pyvips-binary", "pyvips", "torch", "webdataset"), ahead),
        Contender("spdl", data, "tools.bench.peers.spdl:threads", ("spdl", "spdl-core", "spdl-io"), 5),
        Contender("tf-data", data, "tools.bench.peers.tf_data:decode_and_crop", ("tensorflow-cpu", "psutil"), 4),
    )


def _cropfeed() -> Iterator[Contender]:
    for engine, data in _ENGINES:
        yield Contender(f"cropfeed-{engine}-{data}", data, f"tools.bench.peers.cropfeed:{engine}", _CROPFEED, 4, "cropfeed")
    for data in ("lossless", "compact"):
        yield Contender(DECODE, data, "tools.bench.peers.cuts:decode", ("simplejpeg",), 0, "decode")


CONTENDERS = (*_peers("original"), *_peers("500"), *_cropfeed())
