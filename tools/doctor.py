"""Is this machine ready to load and train? python tools/doctor.py [SHARDS]

The same as `cropfeed doctor`, from a checkout, before anything is installed; --help has the rest.
"""

import _path  # noqa: F401

from pipeline.cli import run_cli
from pipeline.doctor import main

if __name__ == "__main__":
    run_cli(main)
