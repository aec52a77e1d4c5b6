"""Stored data sets, on a local disk or in an object store.

- `shards`: the format of a data set; writing a shard; `ShardSet`, random access to the encoded images of a split.
- `files`: reads, listings and atomic writes by local path or URL.
- `cache`: local copies of remote shards, within a size limit.
- `prefetch`: background threads that read shards ahead.
- `class_names`: readable names of classes.
"""
