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
    with their versions. reads: the files that hold its images, as a pattern below the job's `data`. kind: "peer", "raw" (a peer
    that stores pixels in several times the bytes), "cropfeed", or "decode" (decoding of the cuts alone, in one thread).
    """

    name: str
    data: str
    function: str
    packages: tuple[str, ...]
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
    for name, function, packages, reads in (
        ("dali-plain", "dali:plain", _DALI, TARS),
        ("dali-resize-crop-mirror", "dali:resize_crop_mirror", _DALI, TARS),
        ("dali-roi", "dali:roi", _DALI, TARS),
        ("dali-rrc", "dali:random_resized_crop", _DALI, TARS),
        ("ffcv-rrc", "ffcv:random_resized_crop", _FFCV, BETON),
        ("ffcv-jitter", "ffcv:scale_jitter", _FFCV, BETON),
        ("ffcv-raw", "ffcv:raw", _FFCV, "raw.beton"),
        ("slipstream-jpeg", "slipstream:jpeg", _SLIPSTREAM, "slipstream-jpeg/*/image.*"),
        ("slipstream-yuv420", "slipstream:yuv420", _SLIPSTREAM, "slipstream-yuv420/*/image_yuv420.*"),
        ("webdataset-opencv", "torch_loaders:webdataset_opencv", ("webdataset", *_OPENCV), TARS),
        ("webdataset-pillow", "torch_loaders:webdataset_pillow", ("webdataset", "torch", "pillow"), TARS),
        ("litdata", "stores:litdata", ("litdata", *_OPENCV), "litdata/*.bin"),
        ("mosaicml-streaming", "stores:mosaic", ("mosaicml-streaming", *_OPENCV), "mds/*.mds"),
        ("datasets", "stores:hugging_face", ("datasets", *_OPENCV), "datasets/*.arrow"),
        ("torch-pillow", "torch_loaders:files_pillow", ("torch", "pillow"), FILES),
        ("torch-vips", "torch_loaders:files_vips", ("pyvips-binary", "pyvips", "torch", "pillow"), FILES),
        ("torch-torchcodec", "torch_loaders:files_torchcodec", ("torchcodec", "torch", "pillow"), FILES),
        ("spdl", "spdl:threads", ("spdl", "spdl-core", "spdl-io"), FILES),
        ("tf-data", "tf_data:decode_and_crop", ("tensorflow-cpu",), FILES),
    ):
        kind = "raw" if name in ("ffcv-raw", "slipstream-yuv420") else "peer"
        yield Contender(name, data, f"tools.bench.peers.{function}", packages, reads, kind)


def _cropfeed() -> Iterator[Contender]:
    for engine, data in _ENGINES:
        reads = BETON if engine == "ffcv" else TARS
        function = f"tools.bench.peers.cropfeed:{engine}"
        yield Contender(f"cropfeed-{engine}-{data}", data, function, _CROPFEED, reads, "cropfeed")
    for data in ("lossless", "compact"):
        yield Contender(DECODE, data, "tools.bench.peers.cuts:decode", ("simplejpeg",), kind="decode")


CONTENDERS = (*_peers("original"), *_peers("500"), *_cropfeed())
