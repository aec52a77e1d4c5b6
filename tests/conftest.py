from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
import torch

from pipeline import cli
from pipeline.store import files
from tests.helpers import run_forked, run_script, s3_client, s3_server, write_image_folder
from tests.runs import arguments


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine", help="run the contract suite for this engine alone")


@pytest.fixture(autouse=True)
def no_flags_in_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages name no flags of a command line that another test has parsed."""
    monkeypatch.setattr(cli, "_parser", None)


@pytest.fixture(scope="module")
def one_core() -> Iterator[None]:
    """Under pytest-xdist, run this worker and its children on one core. Each worker has a different core.

    For modules that train models: if two processes with two threads each share two cores, their threads mostly wait for
    each other, and a step takes up to twenty times as long.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    if worker:
        os.sched_setaffinity(0, {sorted(cores)[int(worker.removeprefix("gw")) % len(cores)]})
        torch.set_num_threads(1)
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes with 20 training and 7 validation images each, of every subsampling, with sides of 40 to 90 pixels."""
    root = tmp_path_factory.mktemp("images")
    write_image_folder(root, classes=3, train=20, val=7)
    return root


@pytest.fixture(scope="session")
def small_shards(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of `image_folder`, made by the script: 16 unchanged files each."""
    out = tmp_path_factory.mktemp("shards") / "data"
    result = run_script("tools/make_shards.py", image_folder, "--out", out, "--profile", "original", "--shard-size", 16)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def finished(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process in float32, with its trace beside it."""
    folder = tmp_path_factory.mktemp("finished")
    result = run_forked("tests/traced_train.py", *arguments(small_shards, folder / "run"), TRACE=str(folder / "trace"))
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a local S3 server (moto), which runs in its own process."""
    with s3_server(tmp_path_factory.mktemp("moto") / "log") as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a new, empty bucket, "s3://NAME", for this process and its children."""
    file_systems = fsspec.get_filesystem_class("s3")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # without credentials, fail at once
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    bucket = f"bucket-{uuid4().hex}"
    s3_client().create_bucket(Bucket=bucket)
    file_systems.clear_instance_cache()  # file systems keep their first endpoint and credentials
    yield f"s3://{bucket}"
    file_systems.clear_instance_cache()


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs downloaded by this process, in order."""
    urls = []
    original = files.read_chunks

    def counted(url: str, count: int) -> Iterator[bytes]:
        urls.append(url)
        return original(url, count)

    monkeypatch.setattr(files, "read_chunks", counted)
    return urls
