"""Images for plain_train.py: a folder of images and torchvision's transforms, with Pillow."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from pipeline.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's values for ImageNet's RGB in 0..1
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp")
Transform = Callable[[Image.Image], torch.Tensor]


class ImageFolder(Dataset[tuple[torch.Tensor, int]]):
    """A folder of class folders. transform: from an RGB image to float32 (3, size, size). It may be replaced between epochs."""

    def __init__(self, root: Path, transform: Transform) -> None:
        self.transform = transform
        self.classes = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        self.files = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise UserError(f"{root}: no images there", "give a folder of train/CLASS/IMAGE and val/CLASS/IMAGE")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.files[index]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), label


def resize(image: Image.Image, short: int) -> Image.Image:
    """torchvision's Resize: the short side becomes `short` pixels; antialiased bilinear."""
    longer = int(short * max(image.size) / min(image.size))
    size = (short, longer) if image.width <= image.height else (longer, short)
    return image.resize(size, Image.Resampling.BILINEAR)


def jitter(image: Image.Image, size: int, low: int, high: int) -> Image.Image:
    """Resize to a short side that is uniform on low..high, then RandomCrop."""
    resized = resize(image, random.randint(low, high))
    left, top = random.randint(0, resized.width - size), random.randint(0, resized.height - size)
    return resized.crop((left, top, left + size, top + size))


def resized_crop(image: Image.Image, size: int, low: float, high: float) -> Image.Image:
    """RandomResizedCrop with its default range of aspect ratios. low, high: range of the crop's share of the image's area."""
    for _ in range(10):
        area = image.width * image.height * random.uniform(low, high)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image.width and 0 < height <= image.height:
            left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
            break
    else:  # no attempt fits: the largest central crop within the range of aspect ratios
        width, height = min(image.width, round(image.height * 4 / 3)), min(image.height, round(image.width / (3 / 4)))
        left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """ToTensor and Normalize: RGB image -> float32 (3, height, width)."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.float().div(255).sub(torch.tensor(MEAN).view(3, 1, 1)).div(torch.tensor(STD).view(3, 1, 1))


def training_transform(image: Image.Image, crop: Callable[[Image.Image], Image.Image]) -> torch.Tensor:
    """A random crop, mirrored with probability 1/2."""
    cropped = crop(image)
    return to_tensor(cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else cropped)


def validation_transform(image: Image.Image, size: int, short: int) -> torch.Tensor:
    """The central crop of the image resized to a short side of `short`."""
    resized = resize(image, short)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    return to_tensor(resized.crop((left, top, left + size, top + size)))
