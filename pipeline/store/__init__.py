"""Stored data: `files` reads and writes local paths and URLs, `shards` opens data sets, `cache` keeps local copies of remote
shards, and `prefetch` reads shards ahead.
"""
