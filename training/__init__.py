"""What `train.py` is made of: launch checks, schedules, checkpoints, the metrics file."""
