"""The laboratory: benchmarks against other input pipelines, checks that need a GPU, and their results.

Each `bench_*.py` measures one claim, `gpu_*.py` need a GPU, `peers/` contains the other pipelines, and `recording.py` appends
rows to `results/*.csv`. Neither the library nor the application imports anything from this package.
"""
