"""Turn ImageNet, or any labelled images, into shards: python tools/make_shards.py /imagenet --out /data/shards

The same as `cropfeed shards`, but it runs from a checkout. For details see --help.
"""

import _path  # noqa: F401

from pipeline.cli import run_cli, shards

if __name__ == "__main__":
    run_cli(shards)
