"""Input pipelines side by side: what `profile_pipeline.py --compare` runs.

contenders.py names them all; dali.py, torch_loaders.py, spdl.py, ffcv.py, tf_data.py and ours.py are the contenders, a function
each: Job -> endless batches. data.py writes what they read; worker.py is the process that a contender runs in, runner.py its
other end; compare.py takes the turns and writes the figures; cuts.py measures what our format alone costs.

plain_train.py, with plain_pictures.py, is a whole training script, for bench_accuracy.py.
"""
