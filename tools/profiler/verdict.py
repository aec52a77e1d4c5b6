"""The verdict: what limits, by how much, and what to change; in one paragraph and in fields."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tools.profiler.figures import bytes_rate, gain, milliseconds, share, size, speed
from tools.profiler.remedies import Remedy, Situation, compute_remedies, nearest, remedies
from tools.profiler.storage import Ceiling

WAITING = 0.05  # share of training's time spent waiting from which the input is the limit; train.py speaks up at the same
AMPLE = 1.2  # times the demand that the loader gives from which the input has room to spare

NAMES = {
    "read cold": "reading from the storage",
    "read warm": "reading",
    "cut": "cutting",
    "decode": "decoding",
    "resample": "resampling",
    "tail": "the colour tail",
    "assembly": "assembling batches",
    "copy": "copying to the GPU",
}


@dataclass(frozen=True)
class Verdict:
    """As the schema has it. chosen: the nearest remedy, None if there is none."""

    text: str
    limit: str
    stage: str
    chosen: Remedy | None
    others: list[Remedy]

    def json(self) -> dict[str, Any]:
        remedy = self.chosen or Remedy("none", "nothing", 1.0)
        return {
            "text": self.text,
            "limit": self.limit,
            "stage": self.stage,
            **remedy.json(),
            "others": [other.json() for other in self.others],
        }


def ceilings(situation: Situation, storage: Ceiling) -> list[dict[str, Any]]:
    """What this machine could feed at most, in the schema's form."""
    stages = situation.stages.measured
    own = [name for name in ("decode", "resample", "tail", "assembly") if name in stages]
    total_ms = sum(stages[name].ms_per_image(1) for name in own)
    found = [
        {
            "name": "decoding",
            "images_per_s": 1e3 / total_ms * situation.cores,
            "why": f"{milliseconds(total_ms)} an image on one core, {situation.cores} cores",
        },
        {
            "name": "storage",
            "images_per_s": storage.bytes_per_s.mean / situation.mean_bytes,
            "why": f"{bytes_rate(storage.bytes_per_s.mean)}, {size(situation.mean_bytes)} an image, each read once",
        },
    ]
    if "copy" in stages:
        found.append({"name": "copy", "images_per_s": stages["copy"].at(1).mean, "why": "pinned memory to the GPU"})
    return found


def judge(situation: Situation, limits: list[dict[str, Any]]) -> Verdict:
    """limits: of `ceilings`."""
    limit = limit_of(situation)
    if limit == "compute":
        found, stage = compute_remedies(situation), "model"
        chosen = found[0] if found else None
    else:
        found = remedies(situation)
        stage = situation.limiting
        chosen = nearest(found) if limit == "input" else None
    others = [remedy for remedy in found if remedy is not chosen]
    sentences = [*diagnosis(situation, limit, stage), *advice(situation, chosen, others), machine_text(limits)]
    return Verdict(" ".join(sentences), limit, stage, chosen, others)


def limit_of(situation: Situation) -> str:
    """input, compute or balanced. Without a demand, whatever takes the batches would wait for them."""
    training = situation.training
    if training is None or training.wait_share >= WAITING:
        return "input"
    return "compute" if situation.now.estimate.mean >= AMPLE * training.demand.mean else "balanced"


def diagnosis(situation: Situation, limit: str, stage: str) -> Iterator[str]:
    """What limits, and by how much."""
    training, feed = situation.training, speed(situation.now.estimate.mean)
    if training is None:
        yield f"Input-bound, as nothing trains here (no --arch, no --demand): the loader alone gives {feed} images/s."
        yield cause(situation, stage)
        return
    demand, reached, waiting = speed(training.demand.mean), speed(training.speed.mean), share(training.wait_share)
    what = training.consumer.what
    if limit == "input":
        yield f"Input-bound: training waits for data {waiting} of its time. What trains, {what}, could eat {demand} images/s and"
        yield f"gets {reached}; the loader alone gives {feed}."
        yield cause(situation, stage)
    elif limit == "compute":
        times = gain(situation.now.estimate.mean / training.demand.mean)
        yield f"Compute-bound: the model limits. {what[0].upper()}{what[1:]} eats {demand} images/s; the loader alone gives"
        yield f"{feed}, {times} as many. Training runs at {reached} images/s and waits for data {waiting} of its time: no change"
        yield f"to the input could gain more than {gain(1 / (1 - training.wait_share))}."
        if situation.shares_cores:
            taken = situation.cpu_seconds(situation.now) * training.speed.mean / situation.cores
            yield f"On this machine both share the cores; the loader takes {share(taken)} of them."
    else:
        yield f"Balanced: {what} eats {demand} images/s, the loader alone gives {feed}; training runs at {reached} images/s and"
        yield f"waits for data {waiting} of its time. A faster net would wait for"
        yield f"{NAMES.get(stage, 'the engine')}."


def cause(situation: Situation, stage: str) -> str:
    """The sentence on the stage that limits."""
    now = situation.now
    threads = now.spec.threads
    with_threads = f"in {threads} {'thread' if threads == 1 else 'threads'} of {situation.cores} usable cores"
    if stage == "engine":
        ours = milliseconds(situation.total_ms)
        each = milliseconds(1e3 * threads / now.estimate.mean)
        return (
            f"Engine {now.spec.engine} itself limits: of {each} that an image takes of a thread, reading and cutting are {ours}."
        )
    name, alone = NAMES[stage], milliseconds(situation.ms(stage))
    part = share(situation.ms(stage) / situation.total_ms)
    return f"{name[0].upper()}{name[1:]} limits: {alone} an image, {part} of what an image takes, {with_threads}."


def advice(situation: Situation, chosen: Remedy | None, others: list[Remedy]) -> Iterator[str]:
    if chosen is None:
        yield "Nothing needs to be changed."
    else:
        now = situation.training.speed.mean if situation.training else situation.now.estimate.mean
        most = situation.training.demand.mean if situation.training and chosen.kind not in ("precision", "device") else math.inf
        after = speed(min(now * chosen.gain, most))
        yield f"Nearest remedy: {chosen.change}; predicted gain {gain(chosen.gain)}, to {after} images/s."
    if others:
        yield "Also: " + "; ".join(f"{other.change} ({gain(other.gain)})" for other in others) + "."


def machine_text(limits: list[dict[str, Any]]) -> str:
    found = "; ".join(f"{limit['name']} {speed(limit['images_per_s'])} images/s ({limit['why']})" for limit in limits)
    return f"This machine's ceilings: {found}."
