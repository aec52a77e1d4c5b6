"""Planning ahead, on paper: what a cluster of hosts like this machine needs to feed its GPUs, and where it breaks first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tools.profiler.figures import amount, count, speed

GRADIENT_BYTES = 4  # of a parameter's gradient, float32


@dataclass(frozen=True)
class Host:
    """What was measured here. per_core: images a second that one core makes of stored images, all stages of the CPU engine.

    image_bytes: read from the storage for an image. data_bytes: of all shards. memory: bytes that the page cache may take.
    storage: bytes a second, the read ceiling. copy: bytes a second to a GPU, None if not measured. picture_bytes: of an image on
    its way to a GPU.
    """

    cores: int
    per_core: float
    image_bytes: float
    data_bytes: int
    memory: int
    storage: float
    copy: float | None
    picture_bytes: int


def plan_ahead(host: Host, gpus: int, hosts: int, demand: float, parameters: int | None, batch_size: int) -> dict[str, Any]:
    """In the schema's form. gpus: of a host. demand: images a second and GPU. parameters: of the net, for the gradients' traffic,
    if known. batch_size: global.

    Every host reads shards for itself, in random order: each needs its share of the images from wherever the shards lie.
    """
    each = gpus * demand
    fits = host.data_bytes < host.memory
    when = "in the first epoch; then they lie in memory" if fits else "always: they exceed the memory"
    reading = each * host.image_bytes
    needs = [
        need(
            "cores", "cores", each / host.per_core, host.cores, f"at {speed(host.per_core)} images/s a core, decoding on the CPU"
        ),
        need("storage", "bytes/s", reading, host.storage, when),
        need("network, data", "Gbit/s", reading * 8 / 1e9, None, f"if the shards lie on another machine; {when}"),
        need(
            "memory", "bytes", host.data_bytes, host.memory, "for the page cache to hold all shards, so that they are read once"
        ),
        need("copies to GPUs", "bytes/s", each * host.picture_bytes, host.copy and host.copy * gpus, "as pixels; less from DALI"),
    ]
    if parameters and hosts > 1:
        steps = hosts * each / batch_size
        traffic = 2 * (hosts - 1) / hosts * parameters * GRADIENT_BYTES * steps
        needs.append(need("network, gradients", "Gbit/s", traffic * 8 / 1e9, None, f"ring all-reduce, {speed(steps)} steps/s"))
    missed = {
        found["name"]: found["needed"] / found["here"]
        for found in needs
        if found["here"] is not None and found["name"] != "memory" and found["needed"] > found["here"]
    }
    first = max(missed, key=lambda name: missed[name], default=None)
    return {
        "gpus": gpus,
        "hosts": hosts,
        "demand": demand,
        "images_per_s": hosts * each,
        "needs": needs,
        "breaks_first": first,
        "text": in_words(gpus, hosts, demand, needs, first),
    }


def need(name: str, unit: str, needed: float, here: float | None, why: str) -> dict[str, Any]:
    return {"name": name, "unit": unit, "needed": needed, "here": here, "why": why}


def in_words(gpus: int, hosts: int, demand: float, needs: list[dict[str, Any]], first: str | None) -> str:
    by_name = {found["name"]: found for found in needs}
    cores, storage, network = (
        amount(by_name[name]["needed"], by_name[name]["unit"]) for name in ("cores", "storage", "network, data")
    )
    text = (
        f"{count(hosts, 'host')} with {count(gpus, 'GPU')} each, at {speed(demand)} images/s a GPU, eat "
        f"{speed(hosts * gpus * demand)} images/s, {speed(gpus * demand)} a host. "
        f"Each host needs {cores} for decoding and {storage} of storage (as network: {network}). "
    )
    if first is None:
        return text + "A host like this machine meets all that was measured here."
    broken = by_name[first]
    here, needed = amount(broken["here"], broken["unit"]), amount(broken["needed"], broken["unit"])
    return text + f"With hosts like this machine it breaks first at {first}: {here} here, {needed} needed."
