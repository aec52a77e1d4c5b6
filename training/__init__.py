"""The parts of train.py, which contains the training loop. In reading order:

- options: `TrainOptions`, the frozen options of a run. command_line: the flags of train.py and the recipes in recipes/.
- launch: checks how the processes were started, and gives each its share of the cores.
- loaders: the training and validation loader. tuned: threads and prefetch depth that the profiler has found.
- learner: the training step, with the optimizer (optimizers), mixup and CutMix (mixing), stochastic depth, and a moving average
  of the weights (averaging). compiling: torch.compile with a fallback to eager mode. uniforms: reproducible random numbers.
- schedule: learning rates and image sizes as functions of the step.
- metrics: loss, accuracy, throughput and data wait, in metrics.csv. trackers: TensorBoard, W&B and others.
- checkpoint: atomic checkpoints. stopping: SIGTERM.
- run_folder: config.json. provenance: commit, versions, hardware and environment.
"""
