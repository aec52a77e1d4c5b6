"""The figures of `measure.profile` in plain lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import readable_bytes

WAITING = 0.05  # a training that waits for data for less than this share of its time has no use for a faster loader
SIMILAR = 1.1  # a gain below this is not worth a change
BUSY = 0.75  # a loader that uses less than this share of the cores, or of what Cropfeed uses, is held up by something else


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The lines to print."""
    own, ours, demand = found["loader"], found["cropfeed"], found["options"]["demand"]
    cores = found["cores"]
    yield from _figures("your loader", own, cores)
    if ours:
        yield from _figures("Cropfeed", ours, cores)
        yield _gain(found["gain"])
    if demand:
        yield _waiting(own, ours, found["training_gain"], demand)
    yield from _notes(found)


def _figures(name: str, one: dict[str, Any], cores: int) -> Iterator[str]:
    speed, batch = one["images_per_s"], one["batch"]
    yield (
        f"{name}: {_digits(speed['median'])} images/s ({_digits(speed['low'])} to {_digits(speed['high'])}), "
        f"{_digits(1e3 * one['cpu_s_per_image'])} ms of CPU time per image, {_digits(one['cores_used'])} of {cores} cores busy"
    )
    yield (
        f"  first batch after {_digits(one['first_batch_s'])} s; memory {readable_bytes(one['memory_bytes'])} "
        f"(sum of its processes' peaks: {readable_bytes(one['peak_rss_bytes'])}); "
        f"batches of {batch['count']} images, {batch['dtype']} {tuple(batch['shape'])} on {batch['device']}"
    )


def _gain(gain: dict[str, float]) -> str:
    times = f"{gain['median']:.2f} times as fast ({gain['low']:.2f} to {gain['high']:.2f})"
    if gain["high"] < 1:
        return f"Cropfeed would be slower here: {times}."
    return f"Cropfeed would be {times}." + ("" if gain["median"] >= SIMILAR else " That is not worth a change.")


def _waiting(own: dict[str, Any], ours: dict[str, Any] | None, gain: dict[str, float] | None, demand: float) -> str:
    now = own["wait_share"]
    text = (
        f"A training that could process {_digits(demand)} images/s waits for your loader {_percent(now['median'])} of the time "
        f"({_percent(now['low'])} to {_percent(now['high'])})"
    )
    if ours is None or gain is None:
        return f"{text}."
    then = ours["wait_share"]
    text += f"; for Cropfeed it would be {_percent(then['median'])} ({_percent(then['low'])} to {_percent(then['high'])})."
    if now["median"] < WAITING:
        return f"{text} Your loader is fast enough for it: faster input gains nothing but CPU time."
    return f"{text} The training would run {gain['median']:.2f} times as fast."


def _notes(found: dict[str, Any]) -> Iterator[str]:
    own, ours, options, cores = found["loader"], found["cropfeed"], found["options"], found["cores"]
    if own["batch"]["count"] == 1:
        yield "Note: your loader yields single images. If training takes batches, measure the loader that makes them."
    if own["epochs"]:
        yield f"Note: {own['epochs']} epochs of your loader ended while it was measured; the starts of the next ones count."
    if own["cores_used"] < BUSY * (ours["cores_used"] if ours else cores):
        yield (
            f"Note: your loader used only {_digits(own['cores_used'])} of {cores} cores. It may wait for its storage, have too "
            "few workers, or share the machine." + (" Cropfeed was measured with its images in memory." if ours else "")
        )
    if ours:
        geometry = {"rrc": "random resized crops", "jitter": "scale jitter", "pad": "crops of padded images"}[options["geometry"]]
        yield f"Note: Cropfeed makes {geometry} and flips here (--geometry). A loader with other augmentation costs another time."
    else:
        yield "Give --images, a folder of these images or of shards, to see what Cropfeed would deliver on this machine."


def _digits(value: float) -> str:
    """Three significant digits; from 100 on a whole number with separators."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.1f} %"
