"""The command line of `cropfeed profile`."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import Parser, check_writable, positive
from .measure import ProfileOptions, profile
from .verdict import lines

HELP = """Measure a loader, and find out what Cropfeed would deliver in its place.

    {prog} --loader mypackage.data:make_loader
    {prog} --loader mypackage.data:make_loader --demand 3000      waiting of a training of 3000 images/s
    {prog} --loader mypackage.data:make_loader --demand 3000 --images /imagenet

--loader names a function without arguments that returns an iterable of batches, such as a DataLoader; or the iterable. Its module
is looked for in the current folder first. It runs in a process of its own. A batch is a tensor or an array, or a tuple, a list, a
dictionary or a dataclass of them.

Measured are images/s at full speed; with --demand, the share of its time that a training of so many images/s would wait for data,
with a consumer that sleeps as long as its steps would take; CPU time per image, with all threads and worker processes; the time
from the call of the function to the first batch; and memory.

With --images, a sample of these images is converted to temporary shards (or the shards are used), and Cropfeed's loader makes
batches of the same size from them, on the same cores, in turns with yours.
"""


def main(arguments: Sequence[str], prog: str) -> None:
    """`cropfeed profile`, and tools/profile_pipeline.py --loader."""
    parser = Parser(HELP.format(prog=prog), prog)
    parser.add_argument("--loader", required=True, metavar="MODULE:FUNCTION", help="what makes the loader")
    parser.add_argument("--demand", type=float, metavar="IMAGES_PER_S", help="images/s that a training could process")
    parser.add_argument(
        "--images", metavar="FOLDER", help="folder or URL of images, of any kind that can be converted, or of shards"
    )
    parser.add_argument(
        "--image-size", type=positive, metavar="N", help="side of Cropfeed's crops, pixels (default: that of the loader's images)"
    )
    parser.add_argument(
        "--geometry", choices=("rrc", "jitter", "pad"), default="rrc",
        help="Cropfeed's crops: random resized crops (rrc), scale jitter or crops of the padded image (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=positive, default=5, metavar="N", help="repeats of each measurement, at least 2 (default: %(default)s)"
    )
    parser.add_argument(
        "--budget", type=float, default=180.0, metavar="X",
        help="seconds that everything may take; slow loaders have fewer repeats, but at least 2 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this JSON file")
    args = parser.parse_args(arguments)
    options = ProfileOptions(args.loader, args.images, args.demand, args.image_size, args.geometry, args.repeats, args.budget)
    if args.json:
        check_writable(args.json)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, which ends the loaders and removes temporary files
    found = profile(options)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print("\n".join(lines(found)))
