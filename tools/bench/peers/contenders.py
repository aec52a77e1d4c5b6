"""All contenders, by name. Each family of peers has a module. Its docstring names the documentation that the settings follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.bench.peers.job import Job

DECODE = "decode-of-the-cut-alone"
TARS, BETON, FILES = "shards/train/*.tar", "shards/train.beton", "images/*/*"


@dataclass(frozen=True)
class Contender:
    """One input pipeline on one kind of data.

    data: "original" (unchanged files) or "500" (longest side at most 500 pixels, quality 90, 4:2:0); for Cropfeed also "lossless"
    and "compact". function: module:name of a function from a Job to endless batches. packages: its packages on PyPI, recorded
    with their versions. ahead: number of batches that it may have prefetched before the clock starts, with two threads. reads:
    the files that hold its images, as a pattern below the job's `data`. kind: "peer", "raw" (a peer that stores pixels in several
    times the bytes), "cropfeed", or "decode" (decoding of the cuts alone, in one thread).
    """

    name: str
    data: str
    function: str
    packages: tuple[str, ...]
    ahead: int
    reads: str = TARS
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
        return self.reads == BETON

    @property
    def install(self) -> str:
        if self.packages == _SLIPSTREAM:
            return "build github.com/harvard-visionlab/slipstream, and name its Python with --python-for"
        return f"pip install {' '.join(self.packages)}"

    def kb_per_image(self, job: Job) -> float:
        """Kilobytes (1,000 bytes) on disk of what it reads, per image."""
        return sum(path.stat().st_size for path in Path(job.data).glob(self.reads)) / 1e3 / job.images


_OPENCV = ("torch", "opencv-python")
_SLIPSTREAM = ("visionlab-slipstream", "torch", "numba")
_DALI = ("nvidia-dali-cuda130",)
_FFCV = ("ffcv", "opencv-python", "numba")
_CROPFEED = ("torch", "numba", "simplejpeg")
_ENGINES = (("cpu", "lossless"), ("cpu", "compact"), ("cpu", "original"), ("dali", "lossless"), ("dali", "compact"),
            ("ffcv", "lossless"), ("ffcv", "compact"))  # fmt: skip


def _peers(data: str) -> Iterator[Contender]:
    workers = 4  # ahead: two workers, two batches each
    for name, function, packages, ahead, reads in (
        ("dali-plain", "dali:plain", _DALI, 2, TARS),
        ("dali-resize-crop-mirror", "dali:resize_crop_mirror", _DALI, 2, TARS),
        ("dali-roi", "dali:roi", _DALI, 2, TARS),
        ("dali-rrc", "dali:random_resized_crop", _DALI, 2, TARS),
        ("ffcv-rrc", "ffcv:random_resized_crop", _FFCV, 3, BETON),
        ("ffcv-jitter", "ffcv:scale_jitter", _FFCV, 3, BETON),
        ("ffcv-raw", "ffcv:raw", _FFCV, 3, "raw.beton"),
        ("slipstream-jpeg", "slipstream:jpeg", _SLIPSTREAM, 3, "slipstream-jpeg/*/image.*"),
        ("slipstream-yuv420", "slipstream:yuv420", _SLIPSTREAM, 3, "slipstream-yuv420/*/image_yuv420.*"),
        ("webdataset-opencv", "torch_loaders:webdataset_opencv", ("webdataset", *_OPENCV), workers, TARS),
        ("webdataset-pillow", "torch_loaders:webdataset_pillow", ("webdataset", "torch", "pillow"), workers, TARS),
        ("litdata", "stores:litdata", ("litdata", *_OPENCV), workers, "litdata/*.bin"),
        ("mosaicml-streaming", "stores:mosaic", ("mosaicml-streaming", *_OPENCV), workers, "mds/*.mds"),
        ("datasets", "stores:hugging_face", ("datasets", *_OPENCV), workers, "datasets/*.arrow"),
        ("torch-pillow", "torch_loaders:files_pillow", ("torch", "pillow"), workers, FILES),
        ("torch-vips", "torch_loaders:files_vips", ("pyvips-binary", "pyvips", "torch", "pillow"), workers, FILES),
        ("torch-torchcodec", "torch_loaders:files_torchcodec", ("torchcodec", "torch", "pillow"), workers, FILES),
        ("spdl", "spdl:threads", ("spdl", "spdl-core", "spdl-io"), 5, FILES),
        ("tf-data", "tf_data:decode_and_crop", ("tensorflow-cpu", "psutil"), 4, FILES),
    ):
        kind = "raw" if name in ("ffcv-raw", "slipstream-yuv420") else "peer"
        yield Contender(name, data, f"tools.bench.peers.{function}", packages, ahead, reads, kind)


def _cropfeed() -> Iterator[Contender]:
    for engine, data in _ENGINES:
        reads = BETON if engine == "ffcv" else TARS
        function = f"tools.bench.peers.cropfeed:{engine}"
        yield Contender(f"cropfeed-{engine}-{data}", data, function, _CROPFEED, 4, reads, "cropfeed")
    for data in ("lossless", "compact"):
        yield Contender(DECODE, data, "tools.bench.peers.cuts:decode", ("simplejpeg",), 0, kind="decode")


CONTENDERS = (*_peers("original"), *_peers("500"), *_cropfeed())
