"""The plan: which sample comes when, and every random draw of its augmentation, as pure functions without generator state.

`random` has the counter-based generator and permutations, `sampling` the draws, `geometry` the ways to place crops in an image,
`order` the ways to shuffle a split, and `substitutes` the replacement of samples that cannot be decoded.
"""
