"""Scripts for users; `python tools/NAME.py --help` describes each. In the order of use:

- doctor.py: checks the machine. make_shards.py: converts images to shards. make_demo_data.py: draws a small data set.
- profile_pipeline.py: finds the bottleneck of input and training; its parts are in profiler/.
- evaluate.py: accuracy of models and ensembles. export.py: safetensors, ONNX and torch.export. report.py: training runs on one
  HTML page; its parts are in reporting/.
- pages.py: what HTML pages share. launch/: configurations for accelerate and Slurm. install.sh: installs packages.

bench/ and paper/ are the laboratory: benchmarks and the paper's experiments. Nothing else imports them.
"""

import os
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # figures are only saved; the backend of a notebook, if set here, might not be installed
ROOT = Path(__file__).resolve().parents[1]
