"""From an encoded image to normalized pixels.

`reference` defines the result with Pillow; `decoder` decodes what a crop needs, `resample` scales it, and `normalize` adds the
lighting shift and normalizes. The last three are compiled and hold no GIL.
"""
