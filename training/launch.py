"""What launchers do to a process: two launches that look parallel and are not, and threads taken away on a CPU."""

from __future__ import annotations

import os

import psutil

from pipeline.errors import UserError


def core_share() -> int:
    """Cores that this process may use, when it shares them with the others on its machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def check_launch(processes: int) -> None:
    """Raise UserError in the two known traps. processes: how many Accelerate says there are."""
    environment = os.environ
    started = int(environment.get("WORLD_SIZE", 1))
    if started > 1 and processes == 1:
        raise UserError(
            f"torchrun started {started} processes, but each would train alone; "
            "on a CPU set ACCELERATE_USE_CPU=true before torchrun"
        )
    # `accelerate launch --cpu --num_processes 2` sets an address for its processes to meet at, then starts a single one.
    if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        launcher = psutil.Process().parent()
        if launcher is not None and "MASTER_ADDR" not in launcher.environ():
            raise UserError(
                "accelerate launch was asked for several CPU processes but started one; "
                "use: ACCELERATE_USE_CPU=true torchrun --nproc_per_node N train.py ..."
            )
