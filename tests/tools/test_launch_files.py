"""The files in tools/launch, read by accelerate's own parser, and the Slurm script, run with fake Slurm commands."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from tests.helpers import ROOT
from training.command_line import parse_arguments

FOLDER = ROOT / "tools" / "launch"


@pytest.mark.parametrize(
    ("name", "machines", "processes", "several"),
    [("one_gpu", 1, 1, False), ("eight_gpus", 1, 8, True), ("two_hosts", 2, 16, True)],
)
def test_accelerate_reads_the_config_files(name: str, machines: int, processes: int, several: bool) -> None:
    """They are read as by `accelerate launch --config_file`."""
    file = str(FOLDER / f"{name}.yaml")
    words = (
        ["--config_file", file, "--machine_rank", "1", "--main_process_ip", "10.0.0.1"]
        if machines > 1
        else ["--config_file", file]
    )
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "train.py", "--arch", "resnet50"]))
    assert (args.num_machines, args.num_processes, args.mixed_precision) == (machines, processes, "bf16")
    assert (bool(args.multi_gpu), bool(args.use_cpu)) == (several, False)
    if machines > 1:
        assert (args.machine_rank, args.main_process_ip, args.main_process_port) == (1, "10.0.0.1", 29500)
    assert load_config_from_file(file).mixed_precision == "bf16"


# srun records its arguments. If the file `long` exists, srun waits for SIGTERM, like a training run.
COMMANDS = {
    "scontrol": 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; else echo "$@" > {folder}/requeued; fi',
    "srun": 'printf "%s\\n" "$@" > {folder}/words; if [ -e {folder}/long ]; then trap "echo > {folder}/saved; exit 143" TERM; '
    "echo > {folder}/ready; while true; do sleep 0.05; done; fi; exit 3",
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for name, body in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/bash\n" + body.format(folder=tmp_path) + "\n")
        path.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "77"}
    return os.environ | slurm | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}


def test_the_slurm_script_starts_torchrun_on_each_node(environment: dict[str, str], tmp_path: Path) -> None:
    words = ("--recipe", "strong", "--data", "a b")
    result = subprocess.run([FOLDER / "slurm.sh", *words], env=environment, check=False, timeout=20)
    assert result.returncode == 3  # from srun
    assert not (tmp_path / "requeued").exists()
    started = (tmp_path / "words").read_text().splitlines()
    at = started.index("train.py")
    args = parse_arguments(None, started[at + 1 :])  # train.py accepts them
    assert (args.data, args.resume, args.amp, args.recipe) == ("a b", "auto", "bf16", "strong")
    for option, value in (("--nnodes", "2"), ("--nproc-per-node", "8"), ("--rdzv-endpoint", "n1:29500"), ("--rdzv-id", "77")):
        assert started[started.index(option) + 1] == value


def test_the_job_saves_and_is_requeued_at_the_time_limit(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "long").touch()
    process = subprocess.Popen([FOLDER / "slurm.sh", "--data", "x"], env=environment)
    deadline = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
