"""Input pipelines side by side: what `tools/bench/compare.py` runs.

contenders.py lists them. dali.py, torch_loaders.py, spdl.py, ffcv.py, tf_data.py and cropfeed.py implement them, each as a
function from a Job to endless batches. data.py writes their input. worker.py is the process that a contender runs in, and
runner.py controls it. turns.py measures all in turns, compare.py puts this together, and report.py writes the figures. cuts.py
measures what our format alone costs.

plain_train.py, with plain_images.py, is a whole training script, for bench_accuracy.py.
"""
