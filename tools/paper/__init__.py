"""The experiments of He et al. 2015 that are not training recipes: degradation with depth, and layer responses."""
