"""Ensembles: weighted averages of several models' predictions (He et al. 2015, Tables 4 and 5: six models of different depth).

A member is a model, or a file of predictions that `PredictionWriter` wrote. Softmax probabilities are averaged, as in Simonyan
and Zisserman 2015, section 4.5; see `model.schemes`.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from model.testing import Accuracy, AccuracyMeter
from pipeline.engines.multiview import MultiViewBatch
from pipeline.errors import UserError
from pipeline.store import files

_FORMAT = "cropfeed-predictions 1"
_BLOCK = 4096  # batch size for saved predictions


class EvalSet(NamedTuple):
    """The images that were predicted. fingerprint: of the data set, see `Manifest`. classes: names in label order. images: their
    number."""

    fingerprint: str
    split: str
    classes: list[str]
    images: int


_EVAL_SET_FIELDS = ("data set", "split", "list of classes", "number of images")  # in messages


class EnsembleMember(Protocol):
    """A source of predictions. name: shown in tables."""

    name: str

    def probabilities(self, batch: MultiViewBatch) -> dict[str, torch.Tensor]:
        """For each scheme, the probabilities of the N images in `batch`: float32 (N, classes), on the device of its labels."""


class SavedPredictions:
    """A file of predictions as an ensemble member. schemes: its testing schemes. eval_set: the images that were predicted."""

    def __init__(self, path: str) -> None:
        """Raises UserError for a file that does not exist or does not hold predictions."""
        content = io.BytesIO(files.read(path))
        try:
            with np.load(content, allow_pickle=False) as file:
                if str(file["format"]) != _FORMAT:
                    raise ValueError(f"it says {file['format']}, not {_FORMAT}")
                self.schemes: list[str] = file["schemes"].tolist()
                self._probabilities = {scheme: file[f"probabilities/{scheme}"] for scheme in self.schemes}
                self._labels, ids = file["labels"], file["ids"]
                self.eval_set = EvalSet(str(file["fingerprint"]), str(file["split"]), file["classes"].tolist(), len(ids))
                self._path, self.name = path, f"{path} ({file['net']})"
            shape = (len(ids), len(self.eval_set.classes))
            if any(probabilities.shape != shape for probabilities in self._probabilities.values()):
                raise ValueError("its arrays differ in length")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path}: was not written by evaluate.py --save ({error})", "save the predictions again") from error
        if not np.array_equal(ids, np.arange(len(ids))):
            raise UserError(f"{path}: its ids are not 0 to {len(ids) - 1}, a whole split", "save the predictions again")

    def select(self, schemes: Sequence[str]) -> None:
        """Keep only these schemes."""
        self.schemes, self._probabilities = list(schemes), {scheme: self._probabilities[scheme] for scheme in schemes}

    def probabilities(self, batch: MultiViewBatch) -> dict[str, torch.Tensor]:
        device = batch.labels.device
        return {scheme: torch.from_numpy(array[batch.ids]).to(device) for scheme, array in self._probabilities.items()}

    def batches(self) -> Iterator[MultiViewBatch]:
        """Batches of labels and ids, without pixels, for ensembles of saved predictions only."""
        for first in range(0, len(self._labels), _BLOCK):
            labels = self._labels[first : first + _BLOCK]
            yield MultiViewBatch({}, torch.from_numpy(labels), np.arange(first, first + len(labels)))

    def check(self, expected: EvalSet, source: str) -> None:
        """Raise UserError unless the images of `expected` were predicted. source: the name of `expected` in the message."""
        for what, own, other in zip(_EVAL_SET_FIELDS, self.eval_set, expected, strict=True):
            if own != other:
                values = "" if what == "list of classes" else f" ({own}, not {other})"
                raise UserError(
                    f"{self._path}: was saved for another {what} than {source}{values}", "give predictions for the same images"
                )


class PredictionWriter:
    """Collects the predictions of a whole split, in host memory: images * classes * 4 bytes for each scheme."""

    def __init__(self, eval_set: EvalSet, schemes: Sequence[str]) -> None:
        shape = eval_set.images, len(eval_set.classes)
        self._eval_set = eval_set
        self._probabilities = {scheme: np.full(shape, np.nan, np.float32) for scheme in schemes}
        self._labels = np.full(eval_set.images, -1, np.int64)

    def add(self, batch: MultiViewBatch, probabilities: dict[str, torch.Tensor]) -> None:
        self._labels[batch.ids] = batch.labels.cpu().numpy()
        for scheme, array in self._probabilities.items():
            array[batch.ids] = probabilities[scheme].cpu().numpy()

    def save(self, path: str, name: str) -> None:
        """Write a .npz file atomically. name: the name of the model or ensemble.

        It holds for each scheme probabilities/SCHEME, float32 (images, classes); labels and ids, int64 (images,); classes,
        schemes, fingerprint and split of the data; net: `name`.
        """
        arrays = {f"probabilities/{scheme}": array for scheme, array in self._probabilities.items()}
        texts = {"format": _FORMAT, "net": name, "fingerprint": self._eval_set.fingerprint, "split": self._eval_set.split}
        lists = {"schemes": list(self._probabilities), "classes": self._eval_set.classes}
        ids = np.arange(self._eval_set.images)
        with files.atomic_write(path) as scratch, scratch.open("wb") as stream:
            np.savez(stream, labels=self._labels, ids=ids, **arrays, **texts, **lists)  # type: ignore[arg-type]


def evaluate_ensemble(
    members: Sequence[EnsembleMember],
    shares: Sequence[float],
    batches: Iterable[MultiViewBatch],
    schemes: Sequence[str],
    classes: int,
    writer: PredictionWriter | None = None,
    confusion: bool = False,
) -> list[dict[str, Accuracy]]:
    """The accuracy of each member by scheme and, last, of their average if there are several. One pass over `batches`.

    shares: each member's weight in the average, above 0. schemes: the schemes to average; members may return further ones.
    writer: receives the predictions of the average, or of the only member. confusion: count confusion matrices, too.
    """
    meters: list[dict[str, AccuracyMeter]] = [{} for _ in range(len(members) + (len(members) > 1))]
    for batch in batches:
        predictions = [member.probabilities(batch) for member in members]
        if len(members) > 1:
            predictions.append(weighted_average(predictions, shares, schemes))
        for by_scheme, found in zip(meters, predictions, strict=True):
            for scheme, probabilities in found.items():
                meter = by_scheme.setdefault(scheme, AccuracyMeter(classes, batch.labels.device, confusion))
                meter.update(probabilities, batch.labels)
        if writer:
            writer.add(batch, predictions[-1])
    return [{scheme: meter.compute() for scheme, meter in by_scheme.items()} for by_scheme in meters]


def weighted_average(
    predictions: Sequence[dict[str, torch.Tensor]], shares: Sequence[float], schemes: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The weighted average of the members' probabilities, by scheme. The shares need not sum to 1."""
    weighted = [(share / sum(shares), member) for share, member in zip(shares, predictions, strict=True)]
    return {scheme: torch.stack([weight * member[scheme] for weight, member in weighted]).sum(dim=0) for scheme in schemes}
