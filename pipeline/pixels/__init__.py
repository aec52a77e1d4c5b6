"""From an encoded image to normalized pixels.

- `reference`: defines the result, with Pillow and NumPy. All engines are tested against it.
- `decoder`: decodes the region that a crop needs, with `jpeg.decode`, libjpeg-turbo or Pillow.
- `resample`: resizes a window with an antialiased bilinear filter.
- `normalize`: PCA lighting and normalization, compiled for the CPU, and on torch tensors.

Decoding of region-addressable JPEGs, resampling, and normalization on the CPU are compiled and run without the GIL.
"""
