"""The verdict: the bottleneck, how much it costs, and what to change, as fields and as one paragraph."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tools.profiler.figures import bytes_rate, count, gain, milliseconds, share, size, speed
from tools.profiler.remedies import Remedy, Situation, compute_remedies, easiest, remedies
from tools.profiler.storage import Ceiling

WAITING = 0.05  # the input is the bottleneck if training waits for data for this share of the time; train.py has the same limit
AMPLE = 1.2  # the model is the bottleneck if the loader alone is this many times as fast as the demand

NAMES = {
    "read cold": "reading from the storage",
    "read warm": "reading",
    "cut": "cutting out the tiles under the crop",
    "decode": "decoding",
    "resample": "resampling",
    "normalize": "normalization",
    "assembly": "assembling batches",
    "copy": "copying to the GPU",
}


@dataclass(frozen=True)
class Verdict:
    """Fields as in schema.json. chosen: the remedy to try first, if there is one."""

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
    """Upper limits of this machine, in the format of schema.json."""
    stages = situation.stages.measured
    own = [name for name in ("decode", "resample", "normalize", "assembly") if name in stages]
    total_ms = sum(stages[name].ms_per_image(1) for name in own)
    found = [
        {
            "name": "decoding",
            "images_per_s": 1e3 / total_ms * situation.cores,
            "why": f"{milliseconds(total_ms)} per image on one core, {situation.cores} cores",
        },
        {
            "name": "storage",
            "images_per_s": storage.bytes_per_s.mean / situation.mean_bytes,
            "why": f"{bytes_rate(storage.bytes_per_s.mean)}, {size(situation.mean_bytes)} per image, each read once",
        },
    ]
    if "copy" in stages:
        found.append({"name": "copy", "images_per_s": stages["copy"].at(1).mean, "why": "pinned memory to the GPU"})
    return found


def judge(situation: Situation, limits: list[dict[str, Any]]) -> Verdict:
    """limits: from `ceilings`."""
    limit = limit_of(situation)
    if limit == "compute":
        found, stage = compute_remedies(situation), "model"
        chosen = found[0] if found else None
    else:
        found = remedies(situation)
        stage = situation.limiting
        chosen = easiest(found) if limit == "input" else None
    others = [remedy for remedy in found if remedy is not chosen]
    sentences = [*diagnosis(situation, limit, stage), *advice(situation, chosen, others), machine_text(limits)]
    return Verdict(" ".join(sentences), limit, stage, chosen, others)


def limit_of(situation: Situation) -> str:
    """The bottleneck: input, compute or balanced. Without a demand it is the input."""
    training = situation.training
    if training is None or training.wait_share >= WAITING:
        return "input"
    return "compute" if situation.now.estimate.mean >= AMPLE * training.demand.mean else "balanced"


def diagnosis(situation: Situation, limit: str, stage: str) -> Iterator[str]:
    """The sentences about the bottleneck."""
    training, alone = situation.training, speed(situation.now.estimate.mean)
    if training is None:
        yield f"The loader alone delivers {alone} images/s. Give --arch or --demand to compare it with the speed of training."
        yield cause(situation, stage)
        return
    demand, reached, waiting = speed(training.demand.mean), speed(training.speed.mean), share(training.wait_share)
    what = training.consumer.what
    waits = f"waits for data {waiting} of the time"
    if limit == "input":
        yield f"Input-bound: training {waits}. The train step ({what}) could process {demand} images/s, but training runs at"
        yield f"{reached}. The loader alone delivers {alone}."
        yield cause(situation, stage)
    elif limit == "compute":
        times = gain(situation.now.estimate.mean / training.demand.mean)
        yield f"Compute-bound: the model is the bottleneck. The train step ({what}) could process {demand} images/s, and the"
        yield f"loader alone delivers {alone}, {times} as many. Training runs at {reached} images/s and {waits}. Therefore no"
        yield f"change to the input can gain more than {gain(1 / (1 - training.wait_share))}."
        if situation.shares_cores:
            taken = situation.cpu_seconds(situation.now) * training.speed.mean / situation.cores
            yield f"The model and the loader share the cores; the loader uses {share(taken)} of the CPU time."
    else:
        yield f"Balanced: the train step ({what}) could process {demand} images/s, and the loader alone delivers {alone}."
        yield f"Training runs at {reached} images/s and {waits}. With a faster model, the bottleneck would be"
        yield f"{NAMES.get(stage, 'the engine')}."


def cause(situation: Situation, stage: str) -> str:
    """The sentence about the slowest stage."""
    now = situation.now
    threads = now.spec.threads
    with_threads = f"with {count(threads, 'thread')} on {count(situation.cores, 'core')}"
    if stage == "engine":
        whole = milliseconds(1e3 * threads / now.estimate.mean)
        return (
            f"The engine {now.spec.engine} itself is the bottleneck: it takes {whole} per image and thread, but the measured "
            f"stages account for only {milliseconds(situation.total_ms)} of that."
        )
    part = share(situation.ms(stage) / situation.total_ms)
    time = f"{milliseconds(situation.ms(stage))} per image, {part} of the time of all stages"
    return f"The slowest stage is {NAMES[stage]}: {time}, {with_threads}."


def advice(situation: Situation, chosen: Remedy | None, others: list[Remedy]) -> Iterator[str]:
    if chosen is None:
        yield "Nothing needs to be changed."
    else:
        now = situation.training.speed.mean if situation.training else situation.now.estimate.mean
        most = situation.training.demand.mean if situation.training and chosen.kind not in ("precision", "device") else math.inf
        after = speed(min(now * chosen.gain, most))
        yield f"Try first: {chosen.change}. Predicted gain: {gain(chosen.gain)}, to {after} images/s."
    if others:
        yield "Other options: " + "; ".join(f"{other.change} ({gain(other.gain)})" for other in others) + "."


def machine_text(limits: list[dict[str, Any]]) -> str:
    found = "; ".join(f"{limit['name']} {speed(limit['images_per_s'])} images/s ({limit['why']})" for limit in limits)
    return f"Upper limits of this machine: {found}."
