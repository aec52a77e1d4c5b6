"""report.json: the findings of a conversion, which show exactly what images a data set consists of.

profile
splits           name -> listed, stored, left_out (numbers of images), read_bytes, stored_bytes (of the stored images)
facts            finding -> images: how many have it, names: the first thousand of them. One of them is `DECODED_IN_FULL`.
left_out         [{split, image, reason}]: images that are not in the shards
duplicates       [{sha256, images: [{split, image, class}], across_splits, conflicting_labels}]: images with identical bytes
duplicate_images, conflicting_duplicates: images in such groups, and in groups with differing labels
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt

from .images import DECODED_IN_FULL
from .sources import Listing
from .task import Record

_MAX_NAMES = 1000  # names per fact
# On one x86 core, ImageNet images as PNG take 6.9 ms, as WebP (quality 90) 7.5 ms, as tiled JPEGs 0.7 ms, with resampling.
_COST_IN_FULL = ", each with about 10 times the CPU time of a JPEG (`reencode` stores them as JPEGs of quality 95)"


def make_report(listing: Listing, profile: str, records: dict[str, list[Record]]) -> dict[str, Any]:
    """The report of a complete conversion, as values for JSON."""
    facts: dict[str, list[str]] = defaultdict(list)
    left_out, splits = [], {}
    for split, finished in records.items():
        for record in finished:
            for fact, names in record.facts.items():
                facts[fact] += names
            left_out += [{"split": split, "image": name, "reason": reason} for name, reason in record.left_out.items()]
        splits[split] = {
            "listed": len(listing.splits[split]),
            "stored": sum(len(record.samples) for record in finished),
            "left_out": sum(len(record.left_out) for record in finished),
            "read_bytes": sum(record.read_bytes for record in finished),
            "stored_bytes": sum(record.stored_bytes for record in finished),
        }
    duplicates = _duplicates(listing.classes, records)
    return {
        "profile": profile,
        "splits": splits,
        "facts": {fact: {"images": len(facts[fact]), "names": sorted(facts[fact])[:_MAX_NAMES]} for fact in sorted(facts)},
        "left_out": sorted(left_out, key=lambda item: item["image"]),
        "duplicate_images": sum(len(group["images"]) for group in duplicates),
        "conflicting_duplicates": sum(len(group["images"]) for group in duplicates if group["conflicting_labels"]),
        "duplicates": duplicates,
    }


def _duplicates(classes: list[str], records: dict[str, list[Record]]) -> list[dict[str, Any]]:
    """Groups of stored images with byte-identical sources."""
    where = [
        (split, record, place)
        for split, finished in records.items()
        for record in finished
        for place in range(len(record.samples))
    ]
    digests = np.concatenate([record.digests for finished in records.values() for record in finished])
    groups = []
    for places in _equal_rows(digests):
        images = []
        for split, record, place in sorted((where[i] for i in places), key=lambda found: found[1].names[found[2]]):
            name = classes[int(record.samples["label"][place])]
            images.append({"split": split, "image": record.names[place], "class": name})
        groups.append(
            {
                "sha256": digests[places[0]].tobytes().hex(),
                "images": images,
                "across_splits": len({image["split"] for image in images}) > 1,
                "conflicting_labels": len({image["class"] for image in images}) > 1,
            }
        )
    return sorted(groups, key=lambda group: group["images"][0]["image"])


def _equal_rows(digests: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.int64]]:
    """Indices of equal rows of uint8 (N, 32), in groups of at least two."""
    keys = np.ascontiguousarray(digests).view("S32").ravel() if len(digests) else np.empty(0, "S32")
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], keys[order][1:] != keys[order][:-1]])) if len(keys) else np.empty(0, np.int64)
    return [group for group in np.split(order, starts[1:]) if len(group) > 1]


def summary(report: dict[str, Any]) -> list[str]:
    """The report in a few lines, to print."""
    lines = []
    for split, found in report["splits"].items():
        share = found["stored_bytes"] / max(found["read_bytes"], 1)
        lines.append(f"{split}: {found['stored']} of {found['listed']} images, {share:.3f} of their bytes")
    for fact, found in report["facts"].items():
        cost = _COST_IN_FULL if fact == DECODED_IN_FULL else ""
        lines.append(f"  {fact}: {found['images']}{cost}")
    if report["left_out"]:
        first = report["left_out"][0]
        lines.append(f"  left out: {len(report['left_out'])}, such as {first['image']} ({first['reason']})")
    if report["duplicates"]:
        lines.append(
            f"  exact duplicates: {report['duplicate_images']} images in {len(report['duplicates'])} groups, "
            f"{report['conflicting_duplicates']} of them under different labels"
        )
    return lines
