"""What runs' nets get wrong: a pass over a split for all runs of the same data, each image decoded once."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tqdm import tqdm

from model.loading import load_model
from model.schemes import Classifier
from model.testing import Score, Tally
from pipeline.engines.multiview import MultiViewBatch
from pipeline.errors import UserError
from pipeline.spec import PRECISIONS, check_device
from pipeline.store.shards import Manifest, ShardSet
from tools.evaluate import open_pictures
from tools.reporting.runs import Run

QUALITY = 85  # of the pictures, as JPEG


class Mistake(NamedTuple):
    """An image and what the net makes of it. id: its place in the split; key: its name in its tar. probability: of its label;
    predicted: of the prediction, the highest. pixels: uint8 (H, W, 3), the crop that the net sees."""

    id: int
    key: str
    label: int
    prediction: int
    probability: float
    predicted: float
    pixels: npt.NDArray[np.uint8]

    def jpeg(self) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(self.pixels).save(stream, "JPEG", quality=QUALITY)
        return stream.getvalue()


@dataclass
class Findings:
    """weights: the file, within the run's folder. scheme: of `model.schemes`. worst: images of the lowest probabilities for their
    labels, ascending."""

    weights: str
    data: str
    scheme: str
    classes: list[str]
    score: Score
    worst: list[Mistake]


@dataclass
class Evaluation:
    """One net's pass in the making, with the `most` worst images so far."""

    net: Classifier
    scheme: str
    tally: Tally
    most: int
    worst: list[Mistake] = field(default_factory=list)

    def add(self, batch: MultiViewBatch) -> None:
        probabilities = self.net.probabilities(batch)[self.scheme]
        if not bool(torch.isfinite(probabilities).all()):
            raise UserError(f"{self.net.name}: gives outputs that are no numbers; its training diverged")
        self.tally.add(probabilities, batch.labels)
        ours = probabilities.gather(1, batch.labels[:, None])[:, 0]
        predicted, predictions = probabilities.max(dim=1)
        (look,) = self.net.view_specs
        pictures = batch.pictures[look][:: look.geometry.crops]  # the first of an image's, which --flip-test mirrors
        for place in ours.sort(stable=True).indices[: self.most].tolist():
            probability = float(ours[place])
            if len(self.worst) == self.most and probability >= self.worst[-1].probability:
                break
            label, prediction, highest = int(batch.labels[place]), int(predictions[place]), float(predicted[place])
            pixels = pictures[place].cpu().numpy().copy()
            self.worst.append(Mistake(int(batch.ids[place]), "", label, prediction, probability, highest, pixels))
            self.worst = sorted(self.worst, key=lambda one: (one.probability, one.id))[: self.most]


def evaluate_runs(runs: Sequence[Run], args: Any) -> dict[str, Findings | str]:
    """For each run by name what its net makes of the split, or one line that says why that is not known.

    args: of report.py: data (None: each run's own), split, worst and what `evaluate.open_pictures` needs. Raises UserError for a
    device that is not there.
    """
    check_device(args.device)
    found: dict[str, Findings | str] = {}
    groups: dict[str, list[tuple[Run, Path]]] = {}
    for run in runs:
        data, weights = args.data or run.argument("data"), run.weights
        if weights is None:
            found[run.name] = "no weights yet: the first checkpoint comes after an epoch, or --checkpoint-every steps"
        elif data is None:
            found[run.name] = "its config.json does not name the data; give --data"
        else:
            groups.setdefault(str(data), []).append((run, weights))
    for data, members in groups.items():
        try:
            found |= evaluate_group(members, argparse.Namespace(**vars(args) | {"data": data}))
        except UserError as error:
            found |= {run.name: str(error) for run, _ in members}
    return found


def evaluate_group(members: Sequence[tuple[Run, Path]], args: Any) -> dict[str, Findings | str]:
    """The same for runs of one data set, args.data. Raises UserError where that cannot be read."""
    manifest = Manifest(args.data)
    found: dict[str, Findings | str] = {}
    going: dict[str, Evaluation] = {}
    files = {run.name: str(weights.relative_to(run.folder)) for run, weights in members}
    for run, weights in members:
        try:
            net, recipe = load_model(weights, None, manifest.classes)
        except UserError as error:  # a run still going may just have replaced its checkpoint
            found[run.name] = str(error)
            continue
        scheme = "centre-flip" if run.argument("flip_test") else "centre"  # as it was validated while training
        how = [scheme], None, args.device, PRECISIONS[args.precision], args.batch_size
        tally = Tally(len(manifest.classes), torch.device(args.device))
        going[run.name] = Evaluation(Classifier(run.name, net, recipe, *how), scheme, tally, args.worst)
    if not going:
        return found
    view_specs = list(dict.fromkeys(look for one in going.values() for look in one.net.view_specs))
    batches, count = open_pictures(args, view_specs)
    found |= feed(going, tqdm(batches, total=count, unit=" batches", disable=None))
    shards = ShardSet(args.data, args.split, args.cache, args.cache_gb, tars=False)
    for name, one in going.items():
        if name in found:
            continue
        worst = [mistake._replace(key=key_of(shards, mistake.id)) for mistake in one.worst]
        found[name] = Findings(files[name], args.data, one.scheme, manifest.classes, one.tally.score(), worst)
    return found


def feed(going: dict[str, Evaluation], batches: Iterable[MultiViewBatch]) -> dict[str, str]:
    """Show every batch to every net; returns those that fail, with the reason."""
    failed: dict[str, str] = {}
    for batch in batches:
        for name in [name for name in going if name not in failed]:
            try:
                going[name].add(batch)
            except UserError as error:
                failed[name] = str(error)
    return failed


def key_of(shards: ShardSet, index: int) -> str:
    """A sample's name in its tar; its number where there are FFCV files only."""
    try:
        return shards.key(index)
    except (UserError, IndexError):
        return f"sample {index}"
