"""Augmentation, defined once: the reference in Pillow and NumPy, and its last steps on torch tensors.

One picture is made as He et al. 2015 (section 3.4) and Krizhevsky et al. 2012 (section 4.1) describe it:

1. resample a window with an antialiased bilinear (triangle) filter, as uint8: for scale jitter, that is resizing so that the
   short side is S and taking a whole-pixel crop (`pipeline.geometry` has the other windows);
2. mirror left to right if the view says so; move by whole pixels if it says that, black coming in at the border: so a crop that
   reaches into the padding is made of one inside the image;
3. add the lighting (PCA colour) shift, a constant per channel;
4. subtract the mean, per pixel or per channel, and divide by the standard deviation where one is given (the paper has none).

Steps 3 and 4 are the colour tail: `(pixels + lighting - mean) / std`, in float32, nothing clipped. Every engine must agree
with `apply` (the tests hold it to a mean absolute difference of 1 and a 99.9th percentile of 4, out of 255).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

if TYPE_CHECKING:  # the converter's workers use this module and need no torch
    import torch

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Normalization:
    """What the colour tail subtracts and divides by, in units of 0..255.

    mean: float32 (3,) per channel or (H, W, 3) per pixel. std: float32 (3,); ones where the recipe has none.
    """

    mean: Floats
    std: Floats

    @staticmethod
    def of(mean: Any, std: Any = (1.0, 1.0, 1.0)) -> Normalization:
        return Normalization(np.ascontiguousarray(mean, np.float32), np.ascontiguousarray(std, np.float32))

    def at(self, size: int) -> Normalization:
        """The same for size x size crops: a per-pixel mean of another size is resized (bilinear), per channel stays as it is."""
        if self.mean.ndim == 1 or self.mean.shape[:2] == (size, size):
            return self
        planes = [
            np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BILINEAR))
            for plane in self.mean.transpose(2, 0, 1)
        ]
        return Normalization(np.ascontiguousarray(np.stack(planes, axis=-1)), self.std)

    def per_channel(self) -> Normalization:
        """The same with a mean per channel: a per-pixel mean's own mean."""
        return Normalization(self.mean.reshape(-1, 3).mean(axis=0), self.std)


# What torchvision's published weights expect: its ImageNet channel mean and standard deviation, times 255.
TORCHVISION = Normalization.of(
    np.array([0.485, 0.456, 0.406], np.float32) * 255, np.array([0.229, 0.224, 0.225], np.float32) * 255
)


def lighting_basis(covariance: npt.ArrayLike) -> Floats:
    """The matrix B of the lighting shift B @ alphas, float32 (3, 3), in units of 0..255 (Krizhevsky et al. 2012, section 4.1).

    covariance: (3, 3) of RGB in units of 0..1. B's columns are its eigenvectors, each times its eigenvalue times 255. As in
    every published implementation the eigenvalue (not its root) is taken in 0..1 units: ImageNet's are 0.2175, 0.0188, 0.0045.
    """
    values, vectors = eigenbasis(covariance)
    return np.ascontiguousarray(vectors * values * 255.0, np.float32)


def eigenbasis(covariance: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Eigenvalues (3,), largest first, and eigenvectors (3, 3) as columns, each with its largest component positive."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    values, vectors = values[::-1].clip(min=0.0), vectors[:, ::-1]
    largest = np.abs(vectors).argmax(axis=0)
    return values, vectors * np.sign(vectors[largest, np.arange(3)])


def lighting(alphas: Floats, basis: Floats) -> Floats:
    """The lighting shift of N pictures, float32 (N, 3), in 0..255. alphas: (N, 3). basis: as `lighting_basis` gives it."""
    return np.ascontiguousarray(alphas @ basis.T)


def resample(image: Image.Image, window: npt.ArrayLike, flip: bool, size: tuple[int, int]) -> Pixels:
    """Steps 1 and 2 of one view in Pillow: uint8 (height, width, 3).

    image: any mode, any orientation tag. window: top, left, bottom, right, source pixels. size: height and width.
    Pillow resamples the window with support outside it, which is resizing the whole image and cropping, without doing all of it.
    """
    top, left, bottom, right = np.asarray(window, np.float64).tolist()
    small = image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    pixels = np.asarray(small)
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels


def translate(pictures: Pixels, shift: npt.NDArray[np.int64]) -> Pixels:
    """V pictures, uint8 (V, H, W, 3), each moved by whole pixels; what comes in from outside is black, 0 before the mean is
    subtracted, as torchvision pads. shift: int64 (V, 2), down and right, of a smaller size than the pictures.
    """
    height, width = pictures.shape[1:3]
    moved = np.zeros_like(pictures)
    for picture, out, (down, right) in zip(pictures, moved, shift.tolist(), strict=True):
        rows, columns = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
        out[rows, columns] = picture[max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)]
    return moved


def apply(
    image: Image.Image,
    window: npt.ArrayLike,
    flip: bool,
    alphas: Floats,
    size: tuple[int, int],
    basis: Floats,
    normalization: Normalization,
    shift: npt.ArrayLike = (0, 0),
) -> Floats:
    """The reference: one augmented picture, float32 (height, width, 3). alphas: (3,). normalization: at `size`. shift: as one of
    `translate`'s.
    """
    pixels = translate(resample(image, window, flip, size)[None], np.asarray(shift)[None])[0].astype(np.float32)
    return np.asarray((pixels + lighting(alphas[None], basis) - normalization.mean) / normalization.std, np.float32)


def translate_tensor(pixels: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """What `translate` does, on the tensors' device, without waiting for it. pixels: uint8 (V, H, W, 3). shift: int64 (V, 2)."""
    import torch  # here: the converter's workers need none

    height, width = pixels.shape[1:3]
    views = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    rows = torch.arange(height, device=pixels.device) - shift[:, :1]  # (V, H): which row of its picture comes to each row
    columns = torch.arange(width, device=pixels.device) - shift[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    moved = pixels[views, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    return moved * inside[..., None]


def colour_tail(
    pixels: torch.Tensor, shift: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Steps 3 and 4 on a batch: uint8 (N, H, W, 3) to `dtype` (N, 3, H, W) in channels-last memory, on the tensors' device.

    shift: float32 (N, 3). mean: float32 (3,) or (H, W, 3). std: float32 (3,). Computed in float32, rounded once.
    """
    images = (pixels.float() + shift[:, None, None, :] - mean) / std
    return images.to(dtype).permute(0, 3, 1, 2)
