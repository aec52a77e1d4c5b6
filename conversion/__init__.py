"""Turning images into shards: sources, what becomes of one image, the task of one shard, manifest, report, verification."""
