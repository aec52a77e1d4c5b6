"""Stored data sets, on a local disk or in an object store.

- `shards`: the format of a data set; `ShardSet`, random access to the encoded images of a split.
- `tar`: one shard. `manifest`, `entries`: manifest.json. `checks`: samples.npy.
- `files`: reads, listings and atomic writes by local path or URL. `local`: reads of local shards.
- `waiting`: remote storage that does not answer.
- `cache`: local copies of remote shards, within a size limit.
- `prefetch`: background threads that read shards ahead.
- `class_names`: readable names of classes.
"""
