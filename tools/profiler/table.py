"""A profile as tables: `sections` makes the tables, which the HTML report also shows; `table` is their text for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from tools.profiler.figures import (
    DASH,
    Row,
    Section,
    amount,
    bytes_rate,
    count,
    gain,
    gain_interval,
    interval,
    milliseconds,
    seconds,
    share,
    size,
    speed,
)  # fmt: skip

WIDTH = 100
Profile = dict[str, Any]


def table(profile: Profile) -> str:
    """The text for a terminal: the verdict's paragraph, then all tables. No newline at the end."""
    blocks = ["\n".join(wrapped(profile["verdict"]["text"]))]
    blocks += [text(section) for section in sections(profile)]
    return "\n\n".join(blocks)


def sections(profile: Profile) -> list[Section]:
    """All tables of a profile, in reading order, without those of missing parts."""
    made = [
        remedies(profile),
        stages(profile),
        loaders(profile),
        training(profile),
        ceilings(profile),
        *(part(profile) for name, part in (("tuned", tuned), ("ahead", ahead)) if profile.get(name)),
        environment(profile),
    ]
    return [section.without_empty_columns() for section in made]


def remedies(profile: Profile) -> Section:
    verdict, tried = profile["verdict"], profile["applied"]
    lines = []
    for remedy in (verdict, *verdict["others"]):
        mine = tried and (tried["remedy"], tried["change"]) == (remedy["remedy"], remedy["change"])
        lines.append(remedy_row(remedy, tried if mine else None))
        tried = None if mine else tried
    if tried:
        lines.append(remedy_row(tried, tried))
    what = "training" if profile["demand"] else "the loader"
    note = f"Predicted and measured gain: speed of {what} with the remedy, divided by its current speed."
    return Section("What to change", ("remedy", "predicted", "measured", "95 % interval"), lines, notes=[note])


def remedy_row(remedy: Profile, tried: Profile | None) -> Row:
    """tried: the profile's `applied` if it tried this remedy, else None."""
    cells = (remedy["remedy"], gain((tried or remedy)["predicted_gain"]))
    if not tried:
        return Row((*cells, DASH, DASH), remedy["change"])
    error = tried.get("error")
    note = f"{remedy['change']} (not tried: {error})" if error else remedy["change"]
    return Row((*cells, gain(tried["measured_gain"]), gain_interval(tried["low"], tried["high"])), note)


def stages(profile: Profile) -> Section:
    limits, threads = profile["verdict"]["stage"], profile["spec"]["threads"]
    lines = []
    for stage in profile["stages"]:
        for place, at in enumerate(stage["at"]):
            limit = stage["name"] == limits and at["threads"] == threads
            note = "slowest stage" if limit else "not used" if not stage["used"] and place == 0 else ""
            figures = speed(at["images_per_s"]), interval(at["low"], at["high"]), milliseconds(at["ms_per_image"])
            lines.append(Row((stage["name"] if place == 0 else "", f"{at['threads']:,}", *figures), note))
    columns = ("stage", "threads", "images/s", "95 % interval", "per image")
    repeats = repeated([at.get("repeats") for stage in profile["stages"] for at in stage["at"]])
    return Section("Stages, each measured alone", columns, lines, notes=[f"Per image: time of one thread for an image.{repeats}"])


def loaders(profile: Profile) -> Section:
    spec, ceiling = profile["spec"], profile["storage"]["bytes_per_s"]
    now = (profile["engine"], spec["threads"], spec["prefetch"])
    lines = []
    for loader in profile["loaders"]:
        way = (loader["engine"], loader["threads"], loader["prefetch"])
        cells: tuple[str, ...] = (way[0], f"{way[1]:,}", f"{way[2]:,}")
        if loader["error"] is not None:
            lines.append(Row(cells, f"not measured: {loader['error']}"))
            continue
        rate = loader["bytes_per_s"]
        cells += (
            speed(loader["images_per_s"]),
            interval(loader["low"], loader["high"]),
            *(share(loader[name]) for name in ("cpu_share", "gpu_share", "jpeg_share")),
            bytes_rate(rate),
            share(rate / ceiling if rate is not None and ceiling > 0 else None),
        )
        lines.append(Row(cells, "as configured" if way == now else ""))
    columns = ("engine", "threads", "prefetch", "images/s", "95 % interval", "CPU", "GPU", "JPEG", "encoded", "of storage")
    notes = ["Encoded: bytes of encoded images per second; of storage: as a share of the maximum read speed of the storage, "
             f"{bytes_rate(ceiling)}. CPU, GPU, JPEG: utilization."
             + repeated([loader.get("repeats") for loader in profile["loaders"]])] if lines else ["None measured."]  # fmt: skip
    return Section("Loaders, without training", columns, lines, notes=notes)


def training(profile: Profile) -> Section:
    """The speeds as configured: of the loader, the train step, and both together."""
    spec, demand = profile["spec"], profile["demand"]
    way = f"{profile['engine']}, {count(spec['threads'], 'thread')}, prefetch {spec['prefetch']:,}"
    lines = [Row(("loader alone", speed(profile["images_per_s"]), interval(profile["low"], profile["high"])), way)]
    notes = []
    if demand:
        both = demand["training"]
        shares = (share(demand[name]) for name in ("wait_share", "ready", "cpu_share", "gpu_share", "jpeg_share"))
        emulated = ", emulated by waiting" if demand["emulated"] and "emulated" not in demand["what"] else ""
        alone = ("train step alone", speed(demand["images_per_s"]), interval(demand["low"], demand["high"]))
        together = ("training from the loader", speed(both["images_per_s"]), interval(both["low"], both["high"]))
        lines += [Row(alone, f"{demand['what']}{emulated}"), Row((*together, *shares))]
        if demand["ready"] is not None:
            notes = ["Queue: mean share of the prefetch queue that was filled when training requested a batch."]
        if "steps_alone" in demand:
            steps = f"{count(demand['steps_alone'], 'step')} alone, {both['steps']:,} from the loader"
            notes.append(f"Measured: {steps}.{repeated([both['repeats']])}")
    else:
        notes = ["No demand was measured: give --arch or --demand."]
    columns = ("", "images/s", "95 % interval", "data wait", "queue", "CPU", "GPU", "JPEG")
    return Section("Demand and training, as configured", columns, lines, notes=notes)


def repeated(counts: list[int | None]) -> str:
    """A sentence that says how many repeats stand behind each figure; "" if unknown, as in profiles of earlier versions."""
    known = sorted({number for number in counts if number})
    if not known:
        return ""
    return f" Each figure is the mean of {known[0]:,}{f' to {known[-1]:,}' if len(known) > 1 else ''} repeats."


def ceilings(profile: Profile) -> Section:
    lines = [Row((ceiling["name"], speed(ceiling["images_per_s"])), ceiling["why"]) for ceiling in profile["ceilings"]]
    storage = profile["storage"]
    read = bytes_rate(storage["bytes_per_s"])
    note = f"The maximum read speed of the storage is {read} ({bytes_rate(storage['low'])} to {bytes_rate(storage['high'])}) "
    note += f"at {count(storage['streams'], 'stream')}"
    if storage["cold_bytes_per_image"] is not None:
        note += f"; with a cold page cache, reading one image transfers {size(storage['cold_bytes_per_image'])}"
    return Section("Upper limits of this machine", ("", "images/s"), lines, notes=[f"{note}."])


def tuned(profile: Profile) -> Section:
    found = profile["tuned"]
    cells = (f"{found['threads']:,}", f"{found['prefetch']:,}", speed(found["images_per_s"]), seconds(found["seconds"]))
    columns = ("threads", "prefetch", "images/s", "search time")
    return Section("Tuned settings", columns, [Row(cells)], texts=0, notes=[f"Written to {found['file']}."])


def ahead(profile: Profile) -> Section:
    plan = profile["ahead"]
    lines = []
    for need in plan["needs"]:
        first = need["name"] == plan["breaks_first"]
        over = need["needed"] / need["here"] if need["here"] else None
        cells = (need["name"], amount(need["needed"], need["unit"]), amount(need["here"], need["unit"]), gain(over))
        note = f"first bottleneck: {need['why']}" if first else need["why"]
        lines.append(Row(cells, note))
    cluster = f"{count(plan['hosts'], 'host')} of {count(plan['gpus'], 'GPU')}"
    title = f"Plan: {cluster}, {speed(plan['demand'])} images/s each, {speed(plan['images_per_s'])} in total"
    return Section(title, ("per host", "needed", "this machine", "ratio"), lines, notes=[plan["text"]])


def environment(profile: Profile) -> Section:
    made, data, spec = profile["made"], profile["data"], profile["spec"]
    mean = f"{size(data['bytes'])} of shards, {size(data['mean_bytes'])} per image"
    facts = {
        "data": f"{data['path']}, {data['split']}",
        "images": f"{count(data['images'], 'image')}, {mean}, profile {data['profile']}",
        "page cache": f"{data['cache']}: {data['cache_why']}",
        "batches": f"{spec['batch_size']:,} of {spec['image_size']} px, {spec['geometry']}, {spec['dtype']} on {spec['device']}",
        "cores": f"{spec['cores']:,}",
        "injected fault": made["planted"],
        "hardware": made["hardware"],
        "versions": made["versions"],
        "commit": made["commit"],
        "command": made["command"],
        "date": made["date"],
    }
    return Section("Measured on", ("", ""), [Row((name,), fact) for name, fact in facts.items() if fact])


def text(section: Section) -> str:
    """A section for the terminal."""
    widths = [max(map(len, column)) for column in columns(section)]

    def line(cells: tuple[str, ...]) -> str:
        padded = [
            cell.ljust(width) if place < section.texts else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=False))
        ]
        return "  " + "  ".join(padded)

    lines = [section.title]
    if section.rows and any(section.columns):
        lines.append(line(section.columns).rstrip())
    for row in section.rows:
        lines += with_note(line(row.cells), row.note)
    for note in section.notes:
        lines += wrapped(note, "  ")
    return "\n".join(lines)


def columns(section: Section) -> Iterator[list[str]]:
    """The cells of each column, its heading first."""
    for place, heading in enumerate(section.columns):
        yield [heading, *(row.cells[place] for row in section.rows if place < len(row.cells))]


def with_note(line: str, note: str) -> list[str]:
    """A line followed by its note, wrapped to its own column, or on new lines if too little space is left."""
    start = len(line) + 2
    if len(note) <= max(WIDTH - start, 16):
        return [f"{line}  {note}".rstrip()]
    if start > WIDTH * 2 // 3:
        return [line.rstrip(), *wrapped(note, " " * 6)]
    first, *others = wrapped(note, " " * start)
    return [f"{line}  {first.lstrip()}", *others]


def wrapped(paragraph: str, indent: str = "") -> list[str]:
    """The lines of a paragraph. Paths and options are not broken."""
    wrapper = textwrap.TextWrapper(WIDTH, indent, indent, break_on_hyphens=False, break_long_words=False)
    return wrapper.wrap(paragraph)
