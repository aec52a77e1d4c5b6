"""Libraries with files of their own for encoded images: LitData, MosaicML's Streaming, and Hugging Face's datasets.

Each contender first writes the unchanged JPEGs in its own format. Workers of PyTorch's DataLoader decode them with OpenCV, the
fastest decoder of torch_loaders.py. Settings follow the projects' documentation:
- LitData: `optimize` with chunks of 64 MB; StreamingDataset(shuffle=True) in StreamingDataLoader;
- Streaming: MDSWriter with its default shards of 64 MB; StreamingDataset(shuffle=True, batch_size=...);
- datasets: Arrow files, as map-style dataset with_transform, which need not know the order beforehand.

Small data sets would measure the start of epochs. So LitData repeats its data set without an end (ParallelStreamingDataset), and
an epoch of Streaming has 100 times as many samples (epoch_size).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from tools.bench.peers.job import Job
from tools.bench.peers.torch_loaders import Endless, Sample, fast_collate, normalized, opencv, workers

EPOCHS = 100  # in one of Streaming's


def litdata(job: Job) -> Iterator[tuple[Any, Any]]:
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"
    from litdata import ParallelStreamingDataset, StreamingDataLoader, StreamingDataset, optimize

    folder = str(Path(job.data) / "litdata")
    optimize(stored, job.files(), folder, chunk_bytes="64MB", num_workers=job.threads, verbose=False)
    dataset = StreamingDataset(folder, shuffle=True)
    endless = ParallelStreamingDataset([dataset], length=float("inf"), transform=partial(first_crop, job))
    return normalized(StreamingDataLoader(endless, **settings(job)), job)


def first_crop(job: Job, samples: tuple[dict[str, Any], ...]) -> Sample:
    return crop(job, samples[0])


def stored(file: tuple[str, int]) -> dict[str, Any]:
    path, label = file
    return {"image": Path(path).read_bytes(), "label": label}


def crop(job: Job, sample: dict[str, Any]) -> Sample:
    return opencv(job, sample["image"]), int(sample["label"])


def mosaic(job: Job) -> Iterator[tuple[Any, Any]]:
    from streaming import MDSWriter, StreamingDataset

    folder = str(Path(job.data) / "mds")
    with MDSWriter(columns={"image": "bytes", "label": "int"}, out=folder) as writer:
        for file in job.files():
            writer.write(stored(file))

    class Crops(StreamingDataset):
        def __getitem__(self, index: int) -> Sample:
            return crop(job, super().__getitem__(index))

    size = {"epoch_size": EPOCHS * job.images, "batch_size": job.batch_size}
    return normalized(DataLoader(Crops(local=folder, shuffle=True, **size), **settings(job)), job)


def hugging_face(job: Job) -> Iterator[tuple[Any, Any]]:
    from datasets import Dataset, Features, Image, Value, load_from_disk

    folder = str(Path(job.data) / "datasets")
    features = Features({"image": Image(decode=False), "label": Value("int64")})
    samples = (sample | {"image": {"bytes": sample["image"]}} for sample in map(stored, job.files()))
    Dataset.from_list(list(samples), features=features).save_to_disk(folder)
    dataset = load_from_disk(folder).with_transform(partial(crops, job))
    return normalized(DataLoader(dataset, sampler=Endless(len(dataset)), **settings(job) | {"collate_fn": collate_rows}), job)


def crops(job: Job, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return batch | {"image": [opencv(job, image["bytes"]) for image in batch["image"]]}


def collate_rows(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    return fast_collate([(row["image"], row["label"]) for row in rows])


def settings(job: Job) -> dict[str, Any]:
    """Of the DataLoader, as in torch_loaders.py."""
    return {**workers(job), "batch_size": job.batch_size, "collate_fn": fast_collate, "drop_last": True}
