"""Capacity planning (--gpus, --hosts): what each host of a cluster needs to keep its GPUs busy, and the first bottleneck if the
hosts are like this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tools.profiler.figures import amount, count, speed

GRADIENT_BYTES = 4  # per parameter, float32


@dataclass(frozen=True)
class Host:
    """What was measured on this machine. per_core: images per second that one core processes in all stages of the CPU engine.

    stored_bytes: bytes read from the storage per image. data_bytes: size of all shards. memory: bytes free for the page cache.
    storage: maximum read speed, bytes per second. copy: bytes per second to a GPU, None if not measured.
    pixel_bytes: bytes copied to a GPU per image.
    """

    cores: int
    per_core: float
    stored_bytes: float
    data_bytes: int
    memory: int
    storage: float
    copy: float | None
    pixel_bytes: int


def plan_ahead(host: Host, gpus: int, hosts: int, demand: float, parameters: int | None, batch_size: int) -> dict[str, Any]:
    """The plan, in the format of schema.json. gpus: per host. demand: images per second per GPU. parameters: of the model, if
    known, for the network traffic of gradients. batch_size: global.

    The plan assumes that each host reads its share of the images itself, in random order.
    """
    each = gpus * demand  # images per second per host
    fits = host.data_bytes < host.memory
    when = "in the first epoch; later epochs read from memory" if fits else "in every epoch, because the shards exceed the memory"
    reading = each * host.stored_bytes
    decoding = f"{speed(host.per_core)} images/s per core, decoding on the CPU"
    needs = [
        need("cores", "cores", each / host.per_core, host.cores, decoding),
        need("storage", "bytes/s", reading, host.storage, when),
        need("network, data", "Gbit/s", reading * 8 / 1e9, None, f"if the shards are on another machine; {when}"),
        need("memory", "bytes", host.data_bytes, host.memory, "to keep all shards in the page cache, so that they are read once"),
        need("copies to GPUs", "bytes/s", each * host.pixel_bytes, host.copy and host.copy * gpus, "of pixels; less with DALI"),
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
        f"{count(hosts, 'host')} with {count(gpus, 'GPU')} each, at {speed(demand)} images/s per GPU, need "
        f"{speed(hosts * gpus * demand)} images/s, {speed(gpus * demand)} per host. "
        f"Each host needs {cores} for decoding and reads {storage} from the storage ({network} over a network). "
    )
    if first is None:
        return text + "A host like this machine meets all needs that could be compared."
    broken = by_name[first]
    here, needed = amount(broken["here"], broken["unit"]), amount(broken["needed"], broken["unit"])
    return text + f"With hosts like this machine, the first bottleneck is {first}: {here} here, {needed} needed."
