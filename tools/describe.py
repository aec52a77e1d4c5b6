"""What the nets consist of: python tools/describe.py lists them all; with names, prints each one's stages as in Table 1.

Sources: He et al. 2015, "Deep residual learning for image recognition". Multiply-adds are what the paper calls FLOPs.
"""

from __future__ import annotations

import _path  # noqa: F401

from model import ARCHS
from model.describe import describe, table, table_1
from pipeline.cli import Parser, positive, run_cli
from pipeline.errors import UserError


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("arch", nargs="*", help="names of nets; all of them, a line each, where none is given")
    parser.add_argument("--image-size", type=positive, help="side of the pictures, pixels (224; 32 for CIFAR's nets)")
    args = parser.parse_args()
    for arch in args.arch:
        if arch not in ARCHS:
            raise UserError(f"unknown net {arch!r}; choose from {', '.join(ARCHS)}")
    if args.arch:
        print("\n\n".join(table_1(describe(arch, args.image_size)) for arch in args.arch))
    else:
        print(table([describe(arch, args.image_size) for arch in ARCHS]))


if __name__ == "__main__":
    run_cli(main)
