"""Region-addressable JPEGs in stock FFCV: a field that stores their bytes, and decoders that decode only the crop."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit
from PIL import Image

from ..jpeg.region import cut_into
from ..pixels.decoder import decode_by_pillow

JPEG, RAW = 0, 1  # ffcv.fields.rgb_image.IMAGE_MODES


class StoredImage(NamedTuple):
    """One image of a .beton file. mode: 0 (JPEG) or 1 (raw). height, width: pixels. crc32: zlib's, of data."""

    mode: int
    height: int
    width: int
    data: bytes
    crc32: int


def store_encoded(destination: Any, image: StoredImage, malloc: Any) -> None:
    """Store an encoded image as RGBImageField.encode does. destination: its metadata. malloc: size -> address, uint8 (size,)."""
    destination["mode"], destination["height"], destination["width"] = image.mode, image.height, image.width
    destination["data_ptr"], storage = malloc(len(image.data))
    storage[:] = np.frombuffer(image.data, np.uint8)


def jpeg_size(image: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that FFCV's decoder (libjpeg-turbo to RGB) can decode; None for other images."""
    try:
        header = Image.open(io.BytesIO(image), formats=("JPEG",))
    except OSError:
        return None
    return (header.height, header.width) if header.mode in ("RGB", "L") else None


class _KeepsJpeg:
    """The methods of RegionField that differ from RGBImageField's."""

    def encode(self, destination: Any, image: bytes, malloc: Any) -> None:
        """Store the bytes of a JPEG unchanged, of other images the pixels. Raises CorruptImageError."""
        if size := jpeg_size(image):
            stored = StoredImage(JPEG, size[0], size[1], image, 0)
        else:
            pixels = decode_by_pillow(np.frombuffer(image, np.uint8))
            stored = StoredImage(RAW, pixels.shape[0], pixels.shape[1], pixels.tobytes(), 0)
        store_encoded(destination, stored, malloc)


@cache
def _region_field_class() -> type:
    from ffcv.fields.rgb_image import RGBImageField

    return type("RegionField", (_KeepsJpeg, RGBImageField), {})


def region_field() -> Any:
    """A RegionField: like RGBImageField, but `encode` takes an encoded image. It stores the bytes of a JPEG unchanged, in mode
    jpg, and of other images the pixels, in mode raw.

    Its records have the layout of RGBImageField's. Files written by `write_beton` name RGBImageField as the type, so stock FFCV
    opens them without custom_fields. FFCV's DatasetWriter has no type id for this class; its files have to be opened with
    custom_fields={"image": RGBImageField}.
    """
    return _region_field_class()()


@cache
def _decode_at() -> Any:
    """A compiled (data, bytes, top, left, bottom, right, scratch, pixels, place) -> 0, or a negative number if decoding fails.

    It decodes the region to `pixels`, uint8 RGB (height, width, 3); or the whole image, if the JPEG has no intact table. data,
    pixels: addresses. scratch: int8 (bytes,), for the cut. place: int64 (4,): 0, 0, height, width of the image; receives the
    top, left, height, width of the decoded region.

    It takes addresses instead of uint8 arrays. Each new Loader of FFCV (in OSCacheManager) sets `mutable` to False on numba's
    shared type of uint8 arrays. Code compiled afterwards could not write to them. And a function compiled for writable and for
    read-only arrays would have two equal keys in its table of overloads, which sends numba's finalizer into an endless loop.
    """
    from ffcv.libffcv import imdecode
    from ffcv.utils import cast_int_to_byte_ptr

    imdecode_c = njit(nogil=True)(imdecode)

    @njit("int64(int64, int64, int64, int64, int64, int64, int8[::1], int64, int64[::1])", nogil=True)
    def decode_at(
        data: Any, size: Any, top: Any, left: Any, bottom: Any, right: Any, scratch: Any, pixels: Any, place: Any
    ) -> Any:
        whole = carray(cast_int_to_byte_ptr(data), (size,))
        region = carray(cast_int_to_byte_ptr(scratch.ctypes.data), (size,))
        target = carray(cast_int_to_byte_ptr(pixels), (1,))
        height, width = place[2], place[3]
        length = cut_into(whole, top, left, bottom, right, region, place)
        if length < 0:
            place[0], place[1], place[2], place[3] = 0, 0, height, width
        jpeg = whole if length < 0 else region[:length]
        return imdecode_c(jpeg, target, place[2], place[3], place[2], place[3], 0, 0, 1, 1, False, False)

    return decode_at


class _DecodesRegion:
    """The method of a region decoder that differs from the ResizedCropRGBImageDecoder that it extends."""

    def generate_code(self) -> Callable[..., Any]:
        from ffcv.fields.rgb_image import resize_crop
        from ffcv.pipeline.compiler import Compiler

        decoder: Any = self
        mem_read, my_range, decode_at, jpeg_mode = decoder.memory_read, Compiler.get_iterator(), _decode_at(), JPEG
        resize_crop_c, get_crop_c = Compiler.compile(resize_crop), Compiler.compile(decoder.get_crop_generator)
        scale, ratio = (np.array(value) if isinstance(value, tuple) else value for value in (decoder.scale, decoder.ratio))

        def decode(batch_indices: Any, my_storage: Any, metadata: Any, storage_state: Any) -> Any:
            destination, temp_storage = my_storage
            for dst_ix in my_range(len(batch_indices)):
                field = metadata[batch_indices[dst_ix]]
                image_data = mem_read(field["data_ptr"], storage_state)
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                i, j, h, w = get_crop_c(height, width, scale, ratio)
                place = np.zeros(4, np.int64)
                place[2], place[3] = height, width
                if field["mode"] == jpeg_mode:
                    scratch, temp = np.empty(len(image_data), np.int8), temp_storage[dst_ix].reshape(-1)
                    decode_at(image_data.ctypes.data, len(image_data), i, j, i + h, j + w, scratch, temp.ctypes.data, place)
                    pixels = temp[: 3 * place[2] * place[3]].reshape(place[2], place[3], 3)
                else:
                    pixels = image_data.reshape(height, width, 3)
                top, left = i - place[0], j - place[1]
                resize_crop_c(pixels, top, top + h, left, left + w, destination[dst_ix])
            return destination[: len(batch_indices)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode


@cache
def region_decoder(stock: type) -> Any:
    """A decoder that draws the same crops as `stock`, a ResizedCropRGBImageDecoder or a subclass, and decodes only the crops.

    region_decoder(RandomResizedCropRGBImageDecoder)((224, 224)) replaces the stock decoder in a Loader's pipeline. It gives the
    same pixels for the same crop. Images without a table are decoded as a whole; raw images need no decoding.
    """
    return type(f"Region{stock.__name__}", (_DecodesRegion, stock), {})
