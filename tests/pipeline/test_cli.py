"""What every command-line program does with errors of the system: one line, and an exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.cli import Parser, run_cli
from pipeline.errors import storage_error
from tests.helpers import ROOT, assert_refused
from tools.evaluate import parser as evaluate_parser
from training.command_line import parser as train_parser


def program(code: str, *, is_log: bool = False) -> list[str]:
    """A program whose `main` is one line of code."""
    lines = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom pipeline.cli import run_cli\n"
    return [sys.executable, "-c", f"{lines}def main():\n    {code}\nrun_cli(main, is_log={is_log})"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "/dev/null"), "/dev/null: cannot be written: not enough space on the disk at /"),
        (OSError(27, "File too large"), "a file: cannot be written: the file is too large for the file system at /"),
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b: Permission denied"),
        (FileNotFoundError(2, "No such file or directory", "/a/b"), "/a/b: No such file or directory"),
        (OSError(107, "Transport endpoint is not connected"), "Transport endpoint is not connected"),
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe"),
        (MemoryError("Unable to allocate 728. TiB for an array"), "memory ran out (Unable to allocate 728. TiB)"),
        (RuntimeError("[x] DefaultCPUAllocator: you tried to allocate 4000 bytes. Error"), "(tried to allocate 4000 bytes)"),
    ],
)
def test_an_error_of_the_system_is_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    printed = capsys.readouterr().err
    assert_refused(subprocess.CompletedProcess("", int(str(ended.value)), "", printed), line)


ON_A_GPU = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.1 GiB of which 1.2 GiB is free."


@pytest.mark.parametrize(
    ("parser", "error", "line"),
    [
        (train_parser, torch.OutOfMemoryError(ON_A_GPU), "memory of the GPU ran out (Tried to allocate 2.50 GiB); lower "
         "--batch-size or --image-size, or raise --accumulate"),
        (train_parser, RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
         "memory of the GPU ran out; lower --batch-size or --image-size, or raise --accumulate"),
        (evaluate_parser, torch.OutOfMemoryError(ON_A_GPU), "2.50 GiB); lower --batch-size or --scales"),
        (evaluate_parser, None, "memory ran out (tried to allocate 1152921504606846976 bytes); lower --batch-size or --scales"),
    ],
)  # fmt: skip
def test_memory_that_runs_out_is_one_line_with_advice(
    parser: Callable[[], Parser], error: Exception | None, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """error: None for a real one, of torch."""

    def main() -> None:
        parser().parse_args(["--data", "/data", "run"][: 3 if parser is evaluate_parser else 2])
        if error:
            raise error
        torch.empty(1 << 60, dtype=torch.uint8)

    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    assert_refused(subprocess.CompletedProcess("", int(str(ended.value)), "", capsys.readouterr().err), line)


@pytest.mark.parametrize("bug", [RuntimeError("a bug"), OSError("without a number"), ValueError("a bug")])
def test_a_bug_has_a_traceback(bug: Exception) -> None:
    def main() -> None:
        raise bug

    with pytest.raises(type(bug)):
        run_cli(main)


def test_output_to_a_full_disk_is_lost_but_ends_no_work(tmp_path: Path) -> None:
    """A program whose output is its result says so and fails; one whose output is only a log says so."""
    code = "print('x' * 100_000, flush=True); open(sys.argv[1], 'w').write('done')"
    for is_log in (False, True):
        file = tmp_path / str(is_log)
        with Path("/dev/full").open("w") as full:
            result = subprocess.run(
                [*program(code, is_log=is_log), str(file)], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert result.returncode == (0 if is_log else 2)
        assert result.stderr == "error: a part of the output is lost (No space left on device)\n"
        assert file.read_text() == "done"


def test_output_that_nobody_reads(tmp_path: Path) -> None:
    """`... | head` ends quietly; a training goes on."""
    for is_log in (False, True):
        command = program("[print(number) for number in range(100_000)]", is_log=is_log)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait() == (0 if is_log else 1)


def test_closed_output_ends_no_work(tmp_path: Path) -> None:
    """`>&- 2>&-`, as some job systems start programs. Files that are opened later must not get its number."""
    code = "f = open(sys.argv[1], 'w'); print('lost', flush=True); print('lost', file=sys.stderr, flush=True); f.write('done')"
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *program(code), str(tmp_path / "file")]
    assert subprocess.run(command, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == "done"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", "not enough space"),
        ("I/O error: Read-only file system (os error 30)", "is read-only"),
        ("I/O error: Disk quota exceeded (os error 122)", "your quota on the disk at /proc is used up"),
    ],
)
def test_an_error_of_safetensors_is_understood(text: str, cause: str) -> None:
    assert cause in str(storage_error(Exception(text), "/proc/model"))


@pytest.mark.parametrize("text", ["1000 requested and 20 written", "Not enough free space to write 24 bytes after offset 128"])
def test_an_error_of_numpy_is_understood(text: str) -> None:
    assert "not enough space" in str(storage_error(OSError(text), "/mean.npy"))


def test_an_error_behind_the_one_of_torch_is_understood(tmp_path: Path) -> None:
    error = RuntimeError("unexpected pos 64 vs 0")
    error.__context__ = OSError(5, "Input/output error")
    assert "reports an input/output error" in str(storage_error(error, tmp_path / "optimizer.pt"))
    error.__context__ = None
    assert storage_error(error, tmp_path) is None


IN_NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc"]


def test_sigterm_ends_the_first_process_of_a_container() -> None:
    if subprocess.run([*IN_NAMESPACE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a new PID namespace needs root")
    command = [*IN_NAMESPACE, *program("import os, time; print(os.getpid(), flush=True); time.sleep(60)")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        (first,) = psutil.Process(process.pid).children()
        first.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM


@pytest.mark.parametrize(("script", "in_namespace"), [("train.py", False), ("tools/evaluate.py", False), ("train.py", True)])
def test_a_signal_during_the_imports_ends_a_script_at_once(script: str, in_namespace: bool, tmp_path: Path) -> None:
    """SIGTERM for the first process of a container, else Ctrl-C."""
    prefix = IN_NAMESPACE if in_namespace else []
    if prefix and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a new PID namespace needs root")
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)")
    with subprocess.Popen(
        [*prefix, sys.executable, str(ROOT / script)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells let background jobs ignore it
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        first = psutil.Process(process.pid).children()[0] if prefix else process
        first.send_signal(signal.SIGTERM if prefix else signal.SIGINT)
        assert process.communicate(timeout=10)[1] == ("" if prefix else "interrupted\n")
        assert process.returncode == (143 if prefix else 130)
