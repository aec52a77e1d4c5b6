"""Evaluates the models of runs and finds the images that they get most wrong. All runs on the same data share one pass over the
split, which decodes each image once."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from model.loading import load_model
from model.schemes import MultiViewClassifier
from model.testing import Accuracy, AccuracyMeter
from pipeline import open_loader
from pipeline.cli import with_flags
from pipeline.engines.multiview import MultiViewBatch
from pipeline.errors import UserError
from pipeline.plan.geometry import choose_geometry
from pipeline.progress import progress_bar
from pipeline.spec import LoaderSpec, check_device
from pipeline.store.class_names import class_name
from pipeline.store.shards import Manifest, ShardSet
from tools.reporting.evaluation import MAX_CONFUSION, EvaluateOptions, open_batches
from tools.reporting.runs import Run

QUALITY = 85  # of the images in the page, as JPEG


class WorstImage(NamedTuple):
    """An image with a low probability for its label.

    id: its position in the split. key: its name in its tar. prediction: the class of the highest probability. pixels: uint8
    (H, W, 3), the crop that the model sees.
    """

    id: int
    key: str
    label: int
    prediction: int
    label_probability: float
    prediction_probability: float
    pixels: npt.NDArray[np.uint8]


def jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


class TrainingImage(NamedTuple):
    """An image of a run's first training batch. name: of its class. pixels: uint8 (H, W, 3), the crop before normalization."""

    id: int
    name: str
    pixels: npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class RunEvaluation:
    """How a run's model classifies a split.

    weights: the file, relative to the run's folder. scheme: in `model.schemes`. worst: the images with the lowest probabilities
    for their labels, ascending. classes: their names for people, in label order. batch: see `training_images`.
    """

    weights: str
    data: str
    scheme: str
    classes: list[str]
    accuracy: Accuracy
    worst: list[WorstImage]
    batch: Sequence[TrainingImage] = ()


@dataclass
class RunEvaluator:
    """Evaluates one model, batch by batch, and keeps the `limit` worst images."""

    classifier: MultiViewClassifier
    scheme: str
    meter: AccuracyMeter
    limit: int
    interpolation: str
    worst: list[WorstImage] = field(default_factory=list)

    def update(self, batch: MultiViewBatch) -> None:
        """Count a batch. Raises UserError if the model's outputs are not finite."""
        probabilities = self.classifier.probabilities(batch)[self.scheme]
        if not bool(torch.isfinite(probabilities).all()):
            raise UserError(f"{self.classifier.name}: its outputs are not finite", "its training diverged")
        self.meter.update(probabilities, batch.labels)
        of_labels = probabilities.gather(1, batch.labels[:, None])[:, 0]
        highest, predictions = probabilities.max(dim=1)
        (view,) = self.classifier.view_specs
        crops = batch.images[view][:: view.geometry.crops]  # the first of each image; with centre-flip the second is its mirror
        for place in of_labels.sort(stable=True).indices[: self.limit].tolist():
            probability = float(of_labels[place])
            if len(self.worst) == self.limit and probability >= self.worst[-1].label_probability:
                break
            label, prediction = int(batch.labels[place]), int(predictions[place])
            pixels = crops[place].cpu().numpy().copy()
            found = WorstImage(int(batch.ids[place]), "", label, prediction, probability, float(highest[place]), pixels)
            self.worst = sorted([*self.worst, found], key=lambda one: (one.label_probability, one.id))[: self.limit]


def evaluate_runs(runs: Sequence[Run], options: EvaluateOptions, worst: int) -> dict[str, RunEvaluation | str]:
    """For each run by name the evaluation of its model, or one line that says why there is none.

    options.data: None for each run's own. The testing scheme is that of the run's validation. worst: images to keep for each run.
    Raises UserError for a device that does not exist.
    """
    check_device(options.device)
    found: dict[str, RunEvaluation | str] = {}
    groups: dict[str, list[tuple[Run, Path]]] = {}
    for run in runs:
        data, weights = options.data or run.argument("data"), run.weights
        if weights is None:
            found[run.name] = "no weights yet: the first checkpoint is written after an epoch, or --checkpoint-every steps"
        elif data is None:
            found[run.name] = "its config.json does not name the data; give --data"
        else:
            groups.setdefault(str(data), []).append((run, weights))
    for data, members in groups.items():
        try:
            found |= _evaluate_group(members, data, options, worst)
        except UserError as error:
            found |= {run.name: with_flags(str(error)) for run, _ in members}
    return found


def _evaluate_group(
    members: Sequence[tuple[Run, Path]], data: str, options: EvaluateOptions, worst: int
) -> dict[str, RunEvaluation | str]:
    """The same for runs on one data set. Raises UserError if that cannot be read."""
    manifest = Manifest(data)
    found: dict[str, RunEvaluation | str] = {}
    evaluators: dict[str, RunEvaluator] = {}
    for run, weights in members:
        try:
            evaluators[run.name] = _evaluator(run, weights, manifest.classes, options, worst)
        except UserError as error:  # a run that is still training may just have replaced its checkpoint
            found[run.name] = with_flags(str(error))
    if not evaluators:
        return found
    for interpolation in sorted({one.interpolation for one in evaluators.values()}):
        some = {name: one for name, one in evaluators.items() if one.interpolation == interpolation}
        view_specs = list(dict.fromkeys(view for one in some.values() for view in one.classifier.view_specs))
        batches, count = open_batches(replace(options, data=data), view_specs, interpolation)
        label = f"evaluating {', '.join(some)}"
        found |= _update_all(some, progress_bar(batches, total=count, desc=label, unit=" batches"))
    shards = ShardSet(data, options.split, options.cache, options.cache_gb, tars=False)
    for run, weights in members:
        if run.name not in found:
            one = evaluators[run.name]
            images = [image._replace(key=_key(shards, image.id)) for image in one.worst]
            file = str(weights.relative_to(run.folder))
            classes = [class_name(each, manifest.class_names) for each in manifest.classes]
            batch = training_images(run, data, classes, options, worst)
            found[run.name] = RunEvaluation(file, data, one.scheme, classes, one.meter.compute(), images, batch)
    return found


def training_images(run: Run, data: str, names: Sequence[str], options: EvaluateOptions, count: int) -> list[TrainingImage]:
    """The first `count` images of the first epoch, cropped as in training. Empty if the run or `data` does not tell."""
    fields = {name: run.argument(name) for name in ("batch_size", "order", "block_shards", "seed", "geometry", "image_size")}
    if not count or None in fields.values() or "train" not in Manifest(data).splits:
        return []
    final = fields.pop("image_size")
    size = run.argument("start_size") or final
    geometry = choose_geometry(fields.pop("geometry"), run.argument("scale"), final, run.argument("area")).scaled(size, final)
    spec = LoaderSpec(data, image_size=size, geometry=geometry, dtype=torch.uint8, engine="cpu", **fields)
    spec = replace(spec, batch_size=min(count, spec.batch_size), cache=options.cache, cache_gb=options.cache_gb)
    with open_loader(spec) as loader:
        images, labels, ids = next(iter(loader))
    pixels = images.permute(0, 2, 3, 1).numpy()
    return [TrainingImage(i, names[label], one) for i, label, one in zip(ids.tolist(), labels.tolist(), pixels, strict=True)]


def _evaluator(run: Run, weights: Path, classes: list[str], options: EvaluateOptions, worst: int) -> RunEvaluator:
    model, config = load_model(weights, None, classes)
    scheme = "centre-flip" if run.argument("flip_test") else "centre"
    how = [scheme], (), options.device, options.dtype, options.batch_size
    classifier = MultiViewClassifier(run.name, model, config, *how)
    meter = AccuracyMeter(len(classes), torch.device(options.device), len(classes) <= MAX_CONFUSION)
    return RunEvaluator(classifier, scheme, meter, worst, config.interpolation)


def _update_all(evaluators: dict[str, RunEvaluator], batches: Iterable[MultiViewBatch]) -> dict[str, str]:
    """Pass every batch to every evaluator. Returns those that fail, with the reason."""
    failed: dict[str, str] = {}
    for batch in batches:
        for name in [name for name in evaluators if name not in failed]:
            try:
                evaluators[name].update(batch)
            except UserError as error:
                failed[name] = with_flags(str(error))
    return failed


def _key(shards: ShardSet, index: int) -> str:
    """A sample's name in its tar, or its number if there are only FFCV files."""
    try:
        return shards.key(index)
    except (UserError, IndexError):
        return f"sample {index}"
