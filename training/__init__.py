"""The parts of train.py: options, loaders, the training step, schedules, checkpoints, metrics."""
