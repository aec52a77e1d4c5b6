"""The converter on a local Ray cluster of two nodes. One node dies halfway."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers import ROOT, assert_refused, clean_environment, run_script, without_progress
from tests.tools.test_make_shards import digests

CLUSTER = """
import sys, time
from pathlib import Path
from ray.cluster_utils import Cluster

out = Path(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000})
second = cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
deadline = time.monotonic() + 120
while len(list(out.glob("conversion/*.npz"))) < 2 and time.monotonic() < deadline:
    time.sleep(0.02)
cluster.remove_node(second, allow_graceful=False)
print("killed with", len(list(out.glob("conversion/*.npz"))), "shards finished", flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_dying_node_changes_no_bytes(image_folder: Path, tmp_path: Path) -> None:
    expected, out = tmp_path / "expected", tmp_path / "out"
    options = ("--shard-size", 3, "--workers", 1)
    assert run_script("tools/make_shards.py", image_folder, "--out", expected, *options).returncode == 0
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(out)],
        cwd=ROOT, env=clean_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        result = run_script(
            "tools/make_shards.py", image_folder, "--out", out, *options, "--engine", "ray", "--ray-address", address
        )
        assert result.returncode == 0, result.stderr
        assert "27 shards, 81 images" in result.stdout
        killed = cluster.stdout.readline().split()
        assert 2 <= int(killed[2]) < 27, killed  # killed during the conversion
        assert digests(out) == digests(expected)
        for name in ("n1", "n2"):
            (tmp_path / "src" / name).mkdir(parents=True)
            (tmp_path / "src" / name / "notes.JPEG").write_text("no image")
        result = run_script(
            "tools/make_shards.py",
            tmp_path / "src",
            "--out",
            tmp_path / "no",
            "--strict",
            "--engine",
            "ray",
            "--ray-address",
            address,
        )
        assert_refused(without_progress(result), "notes.JPEG: no usable image (not an image)")
    finally:
        try:
            cluster.communicate("\n", timeout=30)
        except subprocess.TimeoutExpired:
            for process in psutil.Process(cluster.pid).children(recursive=True):
                process.kill()
            cluster.kill()


def test_without_a_cluster_the_error_says_how_to_start_one(image_folder: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    result = run_script("tools/make_shards.py", image_folder, "--out", tmp_path / "out", "--engine", "ray")
    assert_refused(without_progress(result), "no Ray cluster", "ray start --head")
    assert time.monotonic() - began < 60
