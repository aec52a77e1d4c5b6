"""PyTorch's DataLoader with worker processes: WebDataset or files as the source, decoded by OpenCV, Pillow, libvips or
torchcodec.

Settings follow these projects' documentation:
- WebDataset: each worker resamples shards endlessly and has a shuffle buffer; the workers form batches (`batched`, and
  batch_size=None in the loader), so that processes exchange only batches;
- PyTorch and timm: one worker per core, persistent_workers, prefetch_factor 2; timm's fast_collate, which fills one uint8 tensor,
  and its normalization after the loader;
- OpenCV: one thread in each worker, since the workers share the cores; bilinear without antialiasing, which OpenCV lacks; RGB
  directly from the decoder; crop before resizing, as albumentations' crops do;
- Pillow: `resize(box=)`, which resamples only the crop; `draft`, which lets libjpeg decode at a reduced size;
- libvips: sequential access (decoding ends below the crop), one thread in each worker, no operation cache;
- torchcodec: decode_jpeg, which keeps the channels last, and interpolation with antialiasing, as torchvision's resized_crop.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from math import floor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tools.bench.peers.job import Job, Window, draw

PREFETCH = 2  # batches that each worker prefetches, the default
Pixels = npt.NDArray[np.uint8]  # (size, size, 3)
Transform = Callable[[Job, bytes], Pixels]  # from an encoded image to its crop
Sample = tuple[Pixels, int]


def files_vips(job: Job) -> Iterator[tuple[Any, Any]]:
    os.environ["VIPS_CONCURRENCY"] = "1"  # read when libvips is loaded
    import pyvips

    pyvips.cache_set_max(0)
    return file_batches(job, vips)


def one_opencv_thread(worker: int) -> None:
    """DataLoader's worker_init_fn. (Torch itself seeds Python's `random`, which `draw` uses, in each worker.)"""
    if find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)


def workers(job: Job) -> dict[str, Any]:
    """The DataLoader's options for its workers, one per core."""
    settings = {"num_workers": job.threads, "persistent_workers": True, "prefetch_factor": PREFETCH}
    return {**settings, "worker_init_fn": one_opencv_thread}


# From an encoded image to a crop


def opencv(job: Job, encoded: bytes) -> Pixels:
    import cv2

    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise ValueError("OpenCV cannot decode an image")
    height, width = image.shape[:2]
    window = draw(height, width, job)
    left, top, right, bottom = window.whole()
    crop = cv2.resize(image[top:bottom, left:right], (job.size, job.size), interpolation=cv2.INTER_LINEAR)
    return np.asarray(cv2.flip(crop, 1) if window.flip else crop, np.uint8)


def pillow(job: Job, encoded: bytes) -> Pixels:
    image = Image.open(io.BytesIO(encoded))
    return resample(image, draw(image.height, image.width, job), job)


def pillow_draft(job: Job, encoded: bytes) -> Pixels:
    """`draft` reduces the image by 2, 4 or 8 while decoding, if neither side becomes smaller than requested."""
    image = Image.open(io.BytesIO(encoded))
    width, height = image.size
    window = draw(height, width, job)
    scale = (window.right - window.left) / job.size
    image.draft("RGB", (floor(width / scale), floor(height / scale)))
    x, y = image.width / width, image.height / height
    return resample(image, Window(window.left * x, window.top * y, window.right * x, window.bottom * y, window.flip), job)


def resample(image: Image.Image, window: Window, job: Job) -> Pixels:
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    crop = rgb.resize((job.size, job.size), Image.Resampling.BILINEAR, box=window[:4])
    return np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if window.flip else crop)


def vips(job: Job, encoded: bytes) -> Pixels:
    import pyvips

    image = pyvips.Image.new_from_buffer(encoded, "", access="sequential")
    window = draw(image.height, image.width, job)
    left, top, right, bottom = window.whole()
    crop = image.crop(left, top, right - left, bottom - top)
    crop = crop.resize(job.size / crop.width, vscale=job.size / crop.height, kernel="linear")
    if window.flip:
        crop = crop.fliphor()
    if crop.interpretation != "srgb":
        crop = crop.colourspace("srgb")
    return np.asarray(crop.numpy(), np.uint8)


def torchcodec(job: Job, encoded: bytes) -> Pixels:
    from torchcodec.decoders import decode_jpeg

    image = decode_jpeg(encoded)
    _, height, width = image.shape
    window = draw(height, width, job)
    left, top, right, bottom = window.whole()
    region = image[None, :, top:bottom, left:right]
    crop = torch.nn.functional.interpolate(region, (job.size, job.size), mode="bilinear", antialias=True)[0]
    return np.asarray((crop.flip(-1) if window.flip else crop).permute(1, 2, 0).numpy(), np.uint8)


# Loaders


def webdataset_batches(job: Job, transform: Transform) -> Iterator[tuple[Any, Any]]:
    import webdataset as wds

    dataset = (
        wds.WebDataset(job.tars(), resampled=True, shardshuffle=False)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(partial(transform, job), int)
        .batched(job.batch_size, collation_fn=fast_collate, partial=False)
    )
    return normalized(wds.WebLoader(dataset, batch_size=None, **workers(job)), job)


class ImageFolder(Dataset[Sample]):
    """A folder of class folders, read as torchvision's ImageFolder reads it."""

    def __init__(self, job: Job, transform: Transform) -> None:
        self.job = job
        self.transform = transform
        self.files = job.files()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.files[index]
        with open(path, "rb") as stream:
            return self.transform(self.job, stream.read()), label


class Endless(torch.utils.data.Sampler[int]):
    """Epoch after epoch, each in a new random order, so that workers do not stop between epochs."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from random.sample(range(self.count), self.count)


def file_batches(job: Job, transform: Transform) -> Iterator[tuple[Any, Any]]:
    dataset = ImageFolder(job, transform)
    loader = DataLoader(dataset, job.batch_size, sampler=Endless(len(dataset)), collate_fn=fast_collate, **workers(job))
    return normalized(loader, job)


def fast_collate(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (N, size, size, 3), which is channels-last, and int64 (N,)."""
    images = torch.empty((len(samples), *samples[0][0].shape), dtype=torch.uint8)
    target = images.numpy()
    for i, (pixels, _) in enumerate(samples):
        target[i] = pixels
    return images, torch.tensor([label for _, label in samples])


def normalized(loader: Any, job: Job) -> Iterator[tuple[Any, Any]]:
    """Normalize after the loader, as timm's PrefetchLoader does."""
    mean = torch.tensor(job.mean)
    for images, labels in loader:
        yield (images.float().sub_(mean) if job.out == "float32" else images), labels


webdataset_opencv, webdataset_pillow = (partial(webdataset_batches, transform=transform) for transform in (opencv, pillow))
files_pillow, files_torchcodec = (partial(file_batches, transform=transform) for transform in (pillow_draft, torchcodec))
