from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import ROOT, assert_refused, run_forked, run_script
from tests.runs import torchrun
from training.launch import gradient_exchange

# A launcher with the given command line. It starts a process and exits once the process is ready. The process records a SIGTERM.
LAUNCHER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from training.launch import terminate_with_launcher
if os.fork() == 0:
    signal.signal(signal.SIGTERM, lambda *_: (open({signalled!r}, "w").close(), os._exit(0)))
    terminate_with_launcher()
    open({ready!r}, "w").close()
    time.sleep(60)
while not os.path.exists({ready!r}):
    time.sleep(0.01)
os._exit(0)
"""


@pytest.mark.parametrize(("words", "ends"), [(("accelerate", "launch", "train.py"), True), (("bash",), False)])
def test_a_process_terminates_with_accelerates_launcher_but_outlives_a_shell(
    words: tuple[str, ...], ends: bool, tmp_path: Path
) -> None:
    """`nohup python train.py &` must keep running. Under the launcher nothing else would terminate the process."""
    signalled, ready = tmp_path / "signalled", tmp_path / "ready"
    code = LAUNCHER.format(root=str(ROOT), signalled=str(signalled), ready=str(ready))
    subprocess.run([sys.executable, "-c", code, *words], check=True, timeout=60)
    deadline = time.monotonic() + (20 if ends else 0.3)
    while not signalled.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert signalled.exists() == ends


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
    ],
)
def test_settings_of_a_launcher_that_do_not_fit(settings: dict[str, Any], words: str, small_shards: Path, tmp_path: Path) -> None:
    result = run_forked(
        "train.py", "--data", small_shards, "--output", tmp_path / "run", "--batch-size", 4, ACCELERATE_USE_CPU="true", **settings
    )
    assert_refused(result, "the launcher's settings do not fit", words)


# Trains in two processes in each of several ways. The first process saves the weights, and what DistributedDataParallel does.
LEARNERS = """
import sys
sys.path.insert(0, {root!r})
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import distributed
from training.command_line import parse_arguments
from training.launch import gradient_exchange
from training.learner import Learner
from training.loaders import open_loaders

torch.set_num_threads(1)
compile_ = torch.compile
torch.compile = lambda module, mode: compile_(module, backend="aot_eager")
found = {{}}
ways = {{
    "torch's": (1, [], ()), "ours": (1, [gradient_exchange(1, None)], ()),
    "compiled": (1, [gradient_exchange(1, None)], ("--compile",)), "fp16": (1, [gradient_exchange(1, "fp16")], ()),
    "torch's, parts": (2, [], ()), "ours, parts": (2, [gradient_exchange(2, None)], ()),
}}
for name, (parts, handlers, words) in ways.items():
    AcceleratorState._reset_state()
    GradientState._reset_state()
    options = parse_arguments(None, ["--data", {data!r}, "--arch", "resnet20", "--image-size", "32", "--batch-size", "16",
                                     "--threads", "1", "--accumulate", str(parts), "--alpha-std", "0", *words])
    accelerator = Accelerator(gradient_accumulation_steps=parts, kwargs_handlers=handlers)
    loader = open_loaders(options, accelerator)[0]
    learner = Learner(options, accelerator, loader)
    learner.prepare(loader, None)
    for step, batch in enumerate(loader):
        learner.step(batch, 0, 16 * step, 0.01)
    loader.close()
    weights = torch.cat([value.detach().flatten() for value in learner.model.parameters()])
    of_all = [torch.empty_like(weights) for _ in range(2)]
    distributed.all_gather(of_all, weights)
    ddp = learner.prepared
    found[name] = (weights, torch.equal(*of_all), type(ddp).__name__, ddp.gradient_as_bucket_view, ddp.static_graph)
if accelerator.is_main_process:
    torch.save(found, {out!r})
"""


@pytest.mark.slow
def test_two_processes_exchange_gradients(small_shards: Path, tmp_path: Path) -> None:
    """Views of buckets and a static graph change no bit, also of a compiled model. In fp16, weights differ a little."""
    script, out = tmp_path / "learners.py", tmp_path / "found.pt"
    script.write_text(LEARNERS.format(root=str(ROOT), data=str(small_shards), out=str(out)))
    result = run_script(script, launcher=torchrun(29613), ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    found = torch.load(out, weights_only=True)
    assert {name: tuple(rest) for name, (_, *rest) in found.items()} == {
        "torch's": (True, "DistributedDataParallel", False, False),
        "ours": (True, "DistributedDataParallel", True, True),
        "compiled": (True, "DistributedDataParallel", True, True),
        "fp16": (True, "DistributedDataParallel", True, True),
        "torch's, parts": (True, "DistributedDataParallel", False, False),
        "ours, parts": (True, "DistributedDataParallel", True, False),
    }
    weights = {name: values[0] for name, values in found.items()}
    assert torch.equal(weights["ours"], weights["torch's"])
    assert torch.equal(weights["ours, parts"], weights["torch's, parts"])
    torch.testing.assert_close(weights["compiled"], weights["ours"], rtol=1e-3, atol=1e-4)
    assert not torch.equal(weights["fp16"], weights["ours"])
    assert (weights["fp16"] - weights["ours"]).norm() < 0.01 * weights["ours"].norm()


@pytest.mark.parametrize(("compress", "hook"), [(None, "NO"), ("bf16", "BF16"), ("fp16", "FP16")])
def test_the_precision_of_exchanged_gradients(compress: str | None, hook: str) -> None:
    for accumulate in (1, 2):
        found = gradient_exchange(accumulate, compress)
        assert found.comm_hook.name == hook
        assert found.to_kwargs() == {"gradient_as_bucket_view": True} | ({"static_graph": True} if accumulate == 1 else {})
