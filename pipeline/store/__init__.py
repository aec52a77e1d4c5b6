"""Stored data sets, on a local disk or in an object store.

- `shards`: the format of a data set; writing a shard; `ShardSet`, random access to the encoded images of a split.
- `manifest`: manifest.json; `checks`: of samples.npy.
- `files`: reads, listings and atomic writes by local path or URL.
- `waiting`: remote storage that does not answer.
- `cache`: local copies of remote shards, within a size limit.
- `prefetch`: background threads that read shards ahead.
- `class_names`: readable names of classes.
"""
