"""Ensembles: predictions of several nets, averaged with shares (He et al. 2015, Tables 4 and 5: six nets of different depth).

A member is a net, or a file of predictions that `PredictionWriter` wrote. What is averaged are softmax probabilities, as
`model.schemes` has it from Simonyan and Zisserman 2015, section 4.5.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from model.testing import Score, Tally
from pipeline.engines.multiview import MultiViewBatch
from pipeline.errors import UserError
from pipeline.store import files

_FORMAT = "cropfeed-predictions 1"
_BLOCK = 4096  # images at a time where no net has to see them


class EvalSet(NamedTuple):
    """What predictions are of. fingerprint: the data's, see `Manifest`. classes: names in label order. images: in the split."""

    fingerprint: str
    split: str
    classes: list[str]
    images: int


_GROUND_WORDS = ("data set", "split", "list of classes", "number of images")


class Member(Protocol):
    """What an ensemble is made of. name: for people."""

    name: str

    def probabilities(self, batch: MultiViewBatch) -> dict[str, torch.Tensor]:
        """By scheme float32 (N, classes) of the images in `batch`, on the device of its labels."""


class SavedPredictions:
    """A file of predictions as a member. schemes: whose probabilities it holds. ground: what they are of."""

    def __init__(self, path: str) -> None:
        """Raises UserError for a file that is not there or holds something else."""
        content = io.BytesIO(files.read(path))
        try:
            with np.load(content, allow_pickle=False) as file:
                if str(file["format"]) != _FORMAT:
                    raise ValueError(f"it says {file['format']}, not {_FORMAT}")
                self.schemes: list[str] = file["schemes"].tolist()
                self._found = {scheme: file[f"probabilities/{scheme}"] for scheme in self.schemes}
                self._labels, ids = file["labels"], file["ids"]
                self.ground = EvalSet(str(file["fingerprint"]), str(file["split"]), file["classes"].tolist(), len(ids))
                self._path, self.name = path, f"{path} ({file['net']})"
            if any(found.shape != (len(ids), len(self.ground.classes)) for found in self._found.values()):
                raise ValueError("its arrays differ in length")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path}: no predictions that evaluate.py --save wrote ({error}); save them again") from error
        if not np.array_equal(ids, np.arange(len(ids))):
            raise UserError(f"{path}: its ids are not a whole split's, 0 to {len(ids) - 1}; save the predictions again")

    def select(self, schemes: Sequence[str]) -> None:
        """Go on with these of its schemes alone."""
        self.schemes, self._found = list(schemes), {scheme: self._found[scheme] for scheme in schemes}

    def probabilities(self, batch: MultiViewBatch) -> dict[str, torch.Tensor]:
        device = batch.labels.device
        return {scheme: torch.from_numpy(found[batch.ids]).to(device) for scheme, found in self._found.items()}

    def batches(self) -> Iterator[MultiViewBatch]:
        """The split's images without pictures, for ensembles of saved predictions alone."""
        for first in range(0, len(self._labels), _BLOCK):
            labels = self._labels[first : first + _BLOCK]
            yield MultiViewBatch({}, torch.from_numpy(labels), np.arange(first, first + len(labels)))

    def check(self, ground: EvalSet, whose: str) -> None:
        """Raise UserError unless the predictions are of `ground`. whose: that is, for the message."""
        for what, ours, theirs in zip(_GROUND_WORDS, self.ground, ground, strict=True):
            if ours != theirs:
                values = "" if what == "list of classes" else f" ({ours}, not {theirs})"
                raise UserError(f"{self._path}: predictions of another {what} than {whose}{values}; give ones of the same images")


class PredictionWriter:
    """Predictions of a whole split in the making. On the host: images * classes * 4 bytes a scheme."""

    def __init__(self, ground: EvalSet, schemes: Sequence[str]) -> None:
        shape = ground.images, len(ground.classes)
        self._ground = ground
        self._found = {scheme: np.full(shape, np.nan, np.float32) for scheme in schemes}
        self._labels = np.full(ground.images, -1, np.int64)

    def add(self, batch: MultiViewBatch, probabilities: dict[str, torch.Tensor]) -> None:
        self._labels[batch.ids] = batch.labels.cpu().numpy()
        for scheme, found in self._found.items():
            found[batch.ids] = probabilities[scheme].cpu().numpy()

    def save(self, path: str, net: str) -> None:
        """Write a .npz, whole or not at all: for each scheme probabilities/SCHEME, float32 (images, classes); labels and ids,
        int64 (images,); classes, schemes, fingerprint and split of the data, net: the weights' name."""
        arrays = {f"probabilities/{scheme}": found for scheme, found in self._found.items()}
        texts = {"format": _FORMAT, "net": net, "fingerprint": self._ground.fingerprint, "split": self._ground.split}
        lists = {"schemes": list(self._found), "classes": self._ground.classes}
        ids = np.arange(self._ground.images)
        with files.atomic_write(path) as scratch, scratch.open("wb") as stream:
            np.savez(stream, labels=self._labels, ids=ids, **arrays, **texts, **lists)  # type: ignore[arg-type]


def evaluate(
    members: Sequence[Member],
    shares: Sequence[float],
    batches: Iterable[MultiViewBatch],
    schemes: Sequence[str],
    classes: int,
    collected: PredictionWriter | None = None,
) -> list[dict[str, Score]]:
    """Score each member by scheme and, last, their average if there are several; one pass over `batches`.

    shares: each member's weight in the average, above 0. schemes: those that are averaged; members may have figures of others,
    too. collected: gets the average's predictions, or the only member's.
    """
    tallies: list[dict[str, Tally]] = [{} for _ in range(len(members) + (len(members) > 1))]
    for batch in batches:
        found = [member.probabilities(batch) for member in members]
        if len(members) > 1:
            found.append(mixed(found, shares, schemes))
        for tally, ours in zip(tallies, found, strict=True):
            for scheme, scores in ours.items():
                tally.setdefault(scheme, Tally(classes, batch.labels.device)).add(scores, batch.labels)
        if collected:
            collected.add(batch, found[-1])
    return [{scheme: one.score() for scheme, one in tally.items()} for tally in tallies]


def mixed(found: Sequence[dict[str, torch.Tensor]], shares: Sequence[float], schemes: Sequence[str]) -> dict[str, torch.Tensor]:
    """Weighted averages of members' probabilities by scheme. The shares' sum need not be 1."""
    parts = [(share / sum(shares), one) for share, one in zip(shares, found, strict=True)]
    return {scheme: torch.stack([part * one[scheme] for part, one in parts]).sum(dim=0) for scheme in schemes}
