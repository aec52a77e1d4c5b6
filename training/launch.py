"""Launcher pitfalls: commands that look parallel but are not, too few threads on a CPU, processes that outlive their launcher,
stale addresses in torchrun's store after a restart, and how processes exchange gradients."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch import distributed

from pipeline.errors import UserError


@contextmanager
def launcher_settings() -> Iterator[None]:
    """A context that reads what the launcher has set in the environment. Raises UserError for settings that do not fit."""
    try:
        yield
    except (ValueError, KeyError, RuntimeError) as error:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        found = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        text = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"the launcher's settings do not fit ({found}): {text}", "use accelerate launch or torchrun") from error


def check_launch(processes: int) -> None:
    """Raise UserError if several processes were requested but would train independently, or only one was started.

    processes: the number of processes according to Accelerate.
    """
    environment = os.environ
    started = int(environment.get("WORLD_SIZE", 1))
    if started > 1 and processes == 1:
        raise UserError(
            f"torchrun started {started} processes, but each would train alone",
            "on a CPU set ACCELERATE_USE_CPU=true before torchrun",
        )
    # `accelerate launch --cpu --num_processes 2` sets a rendezvous address for its processes, then starts only one.
    if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        launcher = psutil.Process().parent()
        if launcher is not None and "MASTER_ADDR" not in launcher.environ():
            raise UserError(
                "accelerate launch was asked for several CPU processes but started one",
                "use: ACCELERATE_USE_CPU=true torchrun --nproc_per_node N train.py ...",
            )


def gradient_exchange(accumulate: int, compress: str | None) -> DistributedDataParallelKwargs:
    """How DistributedDataParallel all-reduces gradients. accumulate: parts of a batch. compress: bf16, fp16 or None for float32.

    - gradient_as_bucket_view: gradients are parts of the buffers that are exchanged, which saves a copy and its memory.
    - static_graph: all our models use the same parameters in each step. It fails if the parts of a batch but the last do not
      exchange gradients (no_sync), so it is off with several parts.
    """
    return DistributedDataParallelKwargs(
        gradient_as_bucket_view=True,
        static_graph=accumulate == 1,
        comm_hook=DDPCommunicationHookType(compress or "no"),
    )


def check_exchange(compress: str | None, accelerator: Accelerator) -> None:
    """Raise UserError if gradients cannot be exchanged in this precision. compress: as in `gradient_exchange`."""
    if compress and accelerator.num_processes == 1:
        raise UserError("`compress_gradients`: a single process exchanges no gradients", "leave it out")
    if compress == "bf16" and accelerator.device.type == "cpu":
        raise UserError("`compress_gradients` bf16 does not work between processes on a CPU", "use fp16")


def rejoin_process_group() -> None:
    """Initialize the process group after torchrun has restarted its processes; Accelerate then uses this group.

    Restarted processes get the same key-value store as before. It still holds the addresses of the dead processes (seen in torch
    2.13), so connecting would fail. A key prefix for each restart hides these stale entries.
    """
    environment = os.environ
    restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    on_cpu = "ACCELERATE_USE_CPU" in environment or not torch.cuda.is_available()
    rank, processes = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    store = distributed.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), processes, is_master=False)
    distributed.init_process_group(
        "gloo" if on_cpu else "nccl", store=distributed.PrefixStore(f"restart_{restarts}", store), rank=rank, world_size=processes
    )


def terminate_with_launcher() -> None:
    """Under `accelerate launch` with one process: receive SIGTERM when the launcher ends. The launcher does not forward the
    SIGTERM that it receives, so training would continue as an orphan process and occupy its GPU.
    """
    launcher = psutil.Process().parent()
    if sys.platform == "linux" and launcher is not None and _is_accelerate(launcher):
        parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)


def _is_accelerate(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return "accelerate.commands.launch" in words or ("launch" in words and any("accelerate" in word for word in words))
