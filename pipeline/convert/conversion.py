"""Plan a conversion, begin or resume it in an output folder, and complete it.

During a conversion, OUT has finished shards and the folder `conversion` (plan.json, one record per shard). It has no
manifest.json, so it is not a data set yet. Once all records exist, `complete` writes samples.npy, mean_image.npy, report.json
and finally manifest.json, each atomically, and removes the records. The result depends only on the source images and the
settings.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from ..plan import sampling
from ..progress import announce_if_slow, progress_bar
from ..store import files
from ..store.manifest import FORMAT, VERSION, manifest_problem
from ..store.tar import label_digits
from . import statistics
from .report import make_report
from .sources import Listing
from .task import RECORDS, Record, ShardTask, is_intact, read_record


@dataclass(frozen=True)
class Settings:
    """The settings that decide the shards' bytes, for a given source. (`strict` only decides whether the conversion succeeds.)"""

    profile: str
    shard_size: int
    seed: int
    reencode: bool = False


def plan_tasks(listing: Listing, out: str, settings: Settings, strict: bool) -> dict[str, list[ShardTask]]:
    """Divide the samples into shards: training samples in the order of `sampling.order`, others as listed."""
    tasks: dict[str, list[ShardTask]] = {}
    digits = label_digits(len(listing.classes))
    for split, sources in listing.splits.items():
        counted = statistics.IMAGES if split == next(iter(listing.splits)) else 0
        if split == "train":
            order = sampling.order(settings.seed, 0, np.arange(len(sources)), len(sources))
            sources = [sources[i] for i in order]
        tasks[split] = [
            ShardTask(
                out, split, shard, sources[start : start + settings.shard_size], settings.profile, digits, strict,
                min(max(counted - start, 0), settings.shard_size), settings.reencode,
            )
            for shard, start in enumerate(range(0, len(sources), settings.shard_size))
        ]  # fmt: skip
    return tasks


def fingerprint(listing: Listing, settings: Settings) -> dict[str, Any]:
    """The content of plan.json, and of `conversion` in the manifest. A conversion can be resumed if the fingerprint is equal."""
    values = {"version": VERSION, "source": listing.fingerprint(), **asdict(settings)}
    if not settings.reencode:
        del values["reencode"]  # conversions by version 0.1 do not have it
    return values


def is_complete(out: str) -> bool:
    return files.exists(files.join(out, "manifest.json"))


def begin(out: str, expected: dict[str, Any]) -> None:
    """Claim the output folder, or validate it. Raises UserError if it has other content."""
    path = files.join(out, RECORDS, "plan.json")
    if is_complete(out):
        found = _read(files.join(out, "manifest.json"))
        if manifest_problem(found):
            raise UserError(f"{out}: its manifest.json is damaged ({manifest_problem(found)})", "give another `out`")
        found = found.get("conversion")
    elif files.exists(path):
        found = _read(path)
    elif any(entry.name != RECORDS for entry in files.list_folder(out)):  # another job may be writing plan.json just now
        raise UserError(f"{out}: exists already and is not a conversion", "give another `out`")
    else:
        files.write(path, json.dumps(expected, indent=1).encode())
        return
    if found != expected:
        known = found if isinstance(found, dict) else {}
        differs = [name for name in expected | known if name not in known or known[name] != expected.get(name)]
        raise UserError(f"{out}: holds a conversion with another {', '.join(differs)}", "give another `out`")


def _read(path: str) -> Any:
    try:
        return json.loads(files.read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error})", "give another `out`") from error


def complete(out: str, listing: Listing, settings: Settings, tasks: dict[str, list[ShardTask]], alone: bool) -> int:
    """Turn the shards into a data set if all of them exist. Returns how many are missing. alone: see `remove_records`."""
    records: dict[str, list[Record]] = {}
    missing = 0
    for split, split_tasks in tasks.items():
        found = [read_record(task) for task in progress_bar(split_tasks, unit=" shards", desc=f"records of {split}")]
        records[split] = [record for record in found if record is not None]
        missing += len(found) - len(records[split])
    if is_complete(out):
        return 0  # completed by another run, which has removed the records
    if missing:
        return missing
    manifest = _manifest(out, listing, settings, records)
    with announce_if_slow("looking for duplicate images, about 10 seconds for all of ImageNet"):
        report = json.dumps(make_report(listing, settings.profile, records), indent=1).encode()
    files.write(files.join(out, "report.json"), report)
    files.write(files.join(out, "manifest.json"), json.dumps(manifest, indent=1).encode())
    remove_records(out, alone)
    return 0


def damaged(out: str, tasks: dict[str, list[ShardTask]]) -> list[ShardTask]:
    """The tasks of those shards of a complete data set that do not match the manifest. Reads every shard."""
    splits = json.loads(files.read(files.join(out, "manifest.json")))["splits"]
    entries = {shard["file"]: shard for split in splits.values() for shard in split["shards"]}
    every = [task for split in tasks.values() for task in split]
    return [
        task
        for task in progress_bar(every, unit=" shards", desc="checking")
        if task.file in entries and not is_intact(task, entries[task.file])
    ]


def remove_records(out: str, alone: bool) -> None:
    """Remove the records, and the partial files of killed runs.

    alone: no other job works on `out`. Otherwise, partial files that were written to within the last hour are kept, as another
    job may be writing them.
    """
    files.remove_folder(files.join(out, RECORDS))
    files.remove_partials(out, 0 if alone else 3600)


def _manifest(out: str, listing: Listing, settings: Settings, records: dict[str, list[Record]]) -> dict[str, Any]:
    manifest: dict[str, Any] = {
        "format": FORMAT, "version": VERSION, "profile": settings.profile,
        "classes": listing.classes, "label_digits": label_digits(len(listing.classes)),
        "conversion": fingerprint(listing, settings), "splits": {}, "statistics": {},
    }  # fmt: skip
    if listing.names:
        manifest["class_names"] = listing.names
    for split, finished in records.items():
        samples = np.concatenate([record.samples for record in finished])
        if not len(samples):
            reasons = (f"{name}: {reason}" for record in finished for name, reason in record.left_out.items())
            raise UserError(f"{out}: no image of {split} can be used ({next(reasons)})")
        file = f"{split}/samples.npy"
        manifest["splits"][split] = {
            "images": len(samples), "samples": file, "samples_sha256": _save(out, file, samples),
            "shards": [record.entry for record in finished],
        }  # fmt: skip
        if fields := sorted({name for record in finished for name in record.fields}):
            manifest["splits"][split]["fields"] = fields
        if not manifest["statistics"]:  # of the first split: training, if there is one
            total = statistics.Statistics.empty()
            for record in finished:
                total.add(record.statistics)
            digest = _save(out, "mean_image.npy", total.mean_image())
            manifest["statistics"] = total.summary() | {"mean_image": "mean_image.npy", "mean_image_sha256": digest}
    return manifest


def _save(out: str, file: str, array: Any) -> str:
    """Write an array as .npy; return the file's SHA-256."""
    stream = io.BytesIO()
    np.save(stream, array)
    files.write(files.join(out, file), stream.getvalue())
    return files.sha256(files.join(out, file))
