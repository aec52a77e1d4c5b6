"""Turn ImageNet, or any labelled images, into shards: python tools/make_shards.py /imagenet --out /data/shards

The same as `cropfeed shards`, from a checkout; --help has the rest.
"""

import _path  # noqa: F401

from pipeline.cli import run_cli, shards

if __name__ == "__main__":
    run_cli(shards)
