"""The plan: which sample comes when, and every random draw of its augmentation, as pure functions without generator state.

- `sampling`: the draws of a sample, and the windows and regions of the source image that follow from them.
- `random`: the counter-based generator (Philox) and the permutations that `sampling` uses.
- `geometry`: which views are taken of an image: scale jitter, random resized crops, ten crops and others.
- `order`: the order of the samples: sequential, shuffled, shuffled in blocks of shards, or grouped by shape.
- `substitutes`: the replacement of samples that cannot be decoded.
"""
