"""Check whether this machine is ready to load and train: python tools/doctor.py [SHARDS]

The same as `cropfeed doctor`, but it runs from a checkout, before anything is installed. For details see --help.
"""

import _path  # noqa: F401

from pipeline.cli import run_cli
from pipeline.doctor import main

if __name__ == "__main__":
    run_cli(main)
