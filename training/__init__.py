"""What `train.py` is made of: schedules, checkpoints, the metrics file. It imports neither `pipeline` nor `model`."""
