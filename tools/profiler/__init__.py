"""The parts of tools/profile_pipeline.py. They measure stages, loaders and training, and derive what to change. In reading order:

- options: `ProfileOptions`. profile: the whole procedure. schema.json: the format of its result.
- measuring: confidence intervals, utilization, interleaved repeats. storage: read speed, page cache.
- stages: each stage of the loader alone. loaders: loaders end to end. training: the train step alone, and with the loader.
- remedies: possible changes and their predicted gains. verdict: the bottleneck and the change to try first.
- convert: temporary shards of images, and samples of other shard profiles. apply: --apply. tune: --tune. ahead: --gpus and
  --hosts. planted: --plant.
- figures: formatting. table: the terminal's tables. charts, html: the report.
"""
