"""The reference that defines augmentation, in Pillow and NumPy. Engines are tested against `apply`.

One view of an image is made as He et al. 2015 (section 3.4) and Krizhevsky et al. 2012 (section 4.1) describe it:

1. resample a window with an antialiased bilinear (triangle) filter, as uint8: for scale jitter, that is resizing so that the
   short side is S and taking a whole-pixel crop (`pipeline.plan.geometry` has the other windows);
2. mirror left to right if the view says so; move by whole pixels if it says that, zeros coming in at the border: that is how a
   crop that reaches into the padding is made from one inside the image;
3. add the lighting (PCA colour) shift, a constant per channel;
4. subtract the mean, per pixel or per channel, and divide by the standard deviation where one is given (the paper has none).

Steps 3 and 4 are `pipeline.pixels.normalize`'s. The contract suite holds every engine to a mean absolute difference of 1 and a
99.9th percentile of 4, out of 255.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from .normalize import Floats, Normalization, Pixels, lighting, translate


def resample(image: Image.Image, window: npt.ArrayLike, flip: bool, size: tuple[int, int]) -> Pixels:
    """Steps 1 and 2 of one view in Pillow: uint8 (height, width, 3).

    image: any mode, any orientation tag. window: top, left, bottom, right, source pixels. size: height and width.
    Pillow resamples the window with support outside it, which is resizing the whole image and cropping, without doing all of it.
    """
    top, left, bottom, right = np.asarray(window, np.float64).tolist()
    small = image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR, box=(left, top, right, bottom))
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
) -> Floats:
    """The reference: one augmented view, float32 (height, width, 3). alphas: (3,). normalization: at `size`. shift: as one of
    `translate`'s.
    """
    pixels = translate(resample(image, window, flip, size)[None], np.asarray(shift)[None])[0].astype(np.float32)
    return np.asarray((pixels + lighting(alphas[None], basis) - normalization.mean) / normalization.std, np.float32)
