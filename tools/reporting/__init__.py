"""The parts of tools/report.py, in reading order:

- runs: reads config.json and metrics.csv. curves: the charts.
- evaluation: options and batches of an evaluation, also for tools/evaluate.py. worst: evaluates the runs' models, and keeps the
  images with the lowest probabilities for their labels.
- page: the HTML.
"""
