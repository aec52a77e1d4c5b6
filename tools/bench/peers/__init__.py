"""The input pipelines ("contenders") that `tools/bench/compare.py` compares.

contenders.py lists them. dali.py, torch_loaders.py, spdl.py, ffcv.py, tf_data.py and cropfeed.py implement them as functions
from a Job to endless batches. data.py writes their input. turns.py measures all contenders in turns, each in a process of its own
(pipeline/profile, to which job.py makes it a user's loader). compare.py runs the whole comparison, and report.py writes the
figures. cuts.py measures the cost of the format alone.

plain_train.py, with plain_images.py, is a complete training script for bench_accuracy.py.
"""
