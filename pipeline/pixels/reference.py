"""The reference that defines augmentation, in Pillow and NumPy. Engines are tested against `apply`.

One view of an image is made as He et al. 2015 (section 3.4) and Krizhevsky et al. 2012 (section 4.1) describe it:

1. Resample a window to uint8 with an antialiased filter, bilinear (a triangle) or bicubic. For scale jitter this equals resizing
   the image so that its short side is S, then taking a whole-pixel crop. (`plan.geometry` has the other windows.)
2. Mirror left to right if the view has `flip`. Move by whole pixels if it has a `shift`, filling the border with zeros. In this
   way a crop that reaches into the padding is made from a crop inside the image.
3. Add the PCA lighting shift, a constant per channel.
4. Subtract the mean, per pixel or per channel. Divide by the standard deviation, if there is one (the paper has none).

Steps 3 and 4 are those of `pixels.normalize`. The contract tests allow every engine a mean absolute difference of 1 and a 99.9th
percentile of 4, out of 255.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from .normalize import Floats, Normalization, Pixels, lighting, translate


def resample(
    image: Image.Image, window: npt.ArrayLike, flip: bool, size: tuple[int, int], interpolation: str = "bilinear"
) -> Pixels:
    """Steps 1 and 2 of one view in Pillow: uint8 (height, width, 3).

    image: any mode, any orientation tag. window: top, left, bottom, right, source pixels. size: height and width.
    Pillow's filter uses pixels outside the window, so the result equals resizing the whole image and cropping it.

    Bicubic is horizontal, then vertical. Both passes clip, so at black and white edges the order matters, and Pillow's own
    differs from version to version.
    """
    top, left, bottom, right = np.asarray(window, np.float64).tolist()
    if image.mode != "RGB":
        image = image.convert("RGB")
    rgb = image
    if interpolation == "bilinear":
        small = rgb.resize(size[::-1], Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    else:
        wide = rgb.resize((size[1], rgb.height), Image.Resampling.BICUBIC, box=(left, 0, right, rgb.height))
        small = wide.resize(size[::-1], Image.Resampling.BICUBIC, box=(0, top, size[1], bottom))
    pixels = np.asarray(small)
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels


def apply(
    image: Image.Image,
    window: npt.ArrayLike,
    flip: bool,
    alphas: Floats,
    size: tuple[int, int],
    basis: Floats,
    normalization: Normalization,
    shift: npt.ArrayLike = (0, 0),
    interpolation: str = "bilinear",
) -> Floats:
    """The reference: one augmented view, float32 (height, width, 3). alphas: (3,). normalization: for `size`. shift: (2,), see
    `translate`.
    """
    moved = translate(resample(image, window, flip, size, interpolation)[None], np.asarray(shift)[None])
    pixels = moved[0].astype(np.float32)
    return np.asarray((pixels + lighting(alphas[None], basis) - normalization.mean) / normalization.std, np.float32)
