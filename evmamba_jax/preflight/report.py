"""The report in words."""

import collections
from collections.abc import Iterator
from typing import Any

from evmamba_jax.preflight.clock import KINDS, UNCERTAINTY
from evmamba_jax.preflight.floor import Floor, compare

GIB = 2**30
LINES = 12  # of the code, that take longest
_PARTS = ("parameters", "batch statistics", "moving average", "optimizer", "input batch", "other")


def report(facts: dict[str, Any], *, fast: bool) -> str:
    """Return the report of a step, refused or compiled, as lines of text."""
    lines = [*_what(facts, fast)]
    if "refusal" in facts:
        return "\n".join([*lines, "", *_refused(facts)])
    lines += ["", *_memory(facts), "", *_buffers(facts), "", *_exchanges(facts)]
    if "times" in facts:
        lines += ["", *_kernels(facts), "", *_longest(facts)]
    lines += ["", *_time(facts, fast)]
    return "\n".join([*lines, "", *_floor(facts)] if "floor" in facts else lines)


def needed(facts: dict[str, Any]) -> float:
    """Return the bytes of a device that the step takes; ``inf`` where it was refused without a figure."""
    if "refusal" in facts:
        return facts["refusal"]["needed"] or float("inf")
    memory = facts["memory"]
    return memory["arguments"] + memory["temporaries"] + memory["code"] + memory["kept_outputs"]


def _size(count: float) -> str:
    """Return a number of bytes in a unit that suits it."""
    power = next((power for power in (3, 2, 1) if count >= 1024**power), 0)
    return f"{count / 1024**power:.{2 if power == 3 else 1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _several(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _what(facts: dict[str, Any], fast: bool) -> Iterator[str]:
    height, width, channels = facts["image"]
    mesh = ", ".join(f"{axis}={size}" for axis, size in facts["mesh"].items())
    rounds = f" in {facts['accumulation']} rounds" if facts["accumulation"] > 1 else ""
    hosts = f", {facts['hosts']} hosts" if facts["hosts"] > 1 else ""
    slices = f", {facts['slices']} slices" if facts["slices"] > 1 else ""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    chips = _several(facts["chips"], "chip" if facts["platform"] == "tpu" else "GPU")
    yield (
        f"{facts['model']}, {height}x{width}x{channels}, {facts['dtype']}, on {_several(facts['devices'], 'device')} "
        f"of {facts['generation']} ({chips}{hosts}{slices}; mesh {mesh})"
    )
    yield f"batch {facts['batch_size']}, {facts['batch_size'] // facts['devices']} a device{rounds}; {facts['data']}"
    quick = ", --fast" if fast else ""
    yield (
        f"{versions}{quick}: traced in {facts['trace_seconds']:.0f} s, compiled in {facts['compile_seconds']:.0f} s; "
        f"{facts['peak_rss'] / 1e9:.1f} GB of this machine's memory"
    )
    yield "Nothing ran: every figure below is the compiler's, or computed from its output, and an estimate."


def _refused(facts: dict[str, Any]) -> Iterator[str]:
    refusal = facts["refusal"]
    if refusal["needed"]:
        needed, available = refusal["needed"] / GIB, facts["available"] / GIB
        yield f"DOES NOT FIT: {needed:.2f} GiB needed on a device, {available:.2f} GiB there"
        yield "  A smaller config.batch_size, more config.accumulation or more chips help; see --find-batch."
    else:
        yield "DOES NOT COMPILE:"
    yield f"  {refusal['line']}"


def _memory(facts: dict[str, Any]) -> Iterator[str]:
    memory, available = facts["memory"], facts["available"]
    total = needed(facts)
    verdict = "COMPILES AND FITS" if total <= available else "COMPILES, BUT DOES NOT FIT"
    yield f"{verdict}: {total / GIB:.2f} of {available / GIB:.2f} GiB of a device ({total / available:.0%})"
    for part in (part for part in _PARTS if part in memory["parts"]):
        padded, size = memory["parts"][part]
        waste = f", {_size(padded - size)} of it padding" if padded > 1.05 * size else ""
        yield f"  {part:24}{_size(padded):>10}{waste}"
    yield f"  {'activations, gradients':24}{_size(memory['temporaries']):>10} (all temporaries at their peak)"
    yield f"  {'program':24}{_size(memory['code']):>10}"


def _buffers(facts: dict[str, Any]) -> Iterator[str]:
    if not facts["buffers"]:
        yield "No array of 64 KiB or more is made in main memory"
        return
    yield "Largest arrays that the step makes in main memory (not all live at once)"
    for text, padded, size, count, op_name, source in facts["buffers"]:
        waste = f", {padded / max(1, size):.1f}x by padding" if padded > 1.05 * size else ""
        yield f"  {_size(padded):>10}  {count} x {text}{waste}  {source}  {_end(op_name)}"


def _end(op_name: str) -> str:
    return op_name if len(op_name) < 60 else "..." + op_name[-57:]


def _exchanges(facts: dict[str, Any]) -> Iterator[str]:
    groups: dict[tuple, list[dict]] = collections.defaultdict(list)
    for exchange in facts["collectives"]:
        groups[exchange["kind"], exchange["group"], exchange["between_slices"]].append(exchange)
    yield "Exchanges between devices, a step" if groups else "No exchanges between devices"
    for (kind, size, between), each in groups.items():
        count, total = sum(e["times"] for e in each), sum(e["times"] * e["size"] for e in each)
        largest = max(each, key=lambda e: e["size"])
        where = " between slices" if between else ""
        partners = "pairs" if kind == "collective-permute" else f"groups of {size}"
        yield (
            f"  {kind:20}{count:6} x, {_size(total)} in all, {partners}{where}; "
            f"the largest {_size(largest['size'])}, {largest['source'] or largest['op_name'] or 'of unknown source'}"
        )


def _kernels(facts: dict[str, Any]) -> Iterator[str]:
    # Calls of one kernel are numbered, and the compiler adds to its name: "scan.3", "scan.1.references_6_".
    calls: dict[tuple, list[dict]] = collections.defaultdict(list)
    for item in facts["times"]:
        if item["kind"] == "kernels":
            seconds = None if item["schedule"] is None else item["schedule"] / item["runs"]
            calls[item["name"].partition(".")[0], seconds].append(item)
    yield "Pallas kernels, those that take longest first" if calls else "No Pallas kernels"
    for (name, seconds), each in sorted(calls.items(), key=lambda call: -_total(call[1], "seconds")):
        one, count = each[0], sum(item["runs"] for item in each)
        if seconds is None:
            yield f"  {count:4} x {name}: the compiler wrote no schedule"
            continue
        at_least = "" if one["is_complete"] else "at least "
        yield (
            f"  {count:4} x {name}: {at_least}{seconds * facts['clock']:,.0f} cycles, {seconds * 1e3:.3f} ms; "
            f"{one['unit']} {one['load']:.0%}; VMEM {_size(one['vmem'])}; spills {one['spills']}"
        )


def _longest(facts: dict[str, Any]) -> Iterator[str]:
    places: dict[tuple[str, str], list[dict]] = collections.defaultdict(list)
    for item in facts["times"]:
        places[item["source"], item["direction"]].append(item)
    yield "Lines whose instructions take longest: ms, of them by schedule and by memory alone, instructions"
    for (source, direction), each in sorted(places.items(), key=lambda place: -_total(place[1], "seconds"))[:LINES]:
        op_name = _end(max(each, key=lambda item: item["seconds"])["op_name"])
        yield f"  {_three(each)}  {len(each):5} x  {source or 'of unknown source'} {direction}  {op_name}"


def _three(items: list[dict[str, Any]]) -> str:
    """Return the milliseconds of instructions: in all, by their schedules alone, and by their memory alone."""
    return " ".join(f"{_total(items, name) * 1e3:8.3f}" for name in ("seconds", "schedule", "memory"))


def _total(items: list[dict[str, Any]], name: str) -> float:
    return sum(item[name] or 0.0 for item in items)


def _floor(facts: dict[str, Any]) -> Iterator[str]:
    yield "Parts of the step: ms, the least that the chip allows, times that, and what sets it (docs/preflight.md)"
    least = {part: Floor(**floor) for part, floor in facts["floor"].items()}
    for row in compare(facts["times"], least):
        ratio = f"{row.ratio:6.2f}" if row.ratio else f"{'-':>6}"
        yield f"  {row.part:16} {row.seconds * 1e3:8.3f} {row.floor * 1e3:8.3f} {ratio}  {row.set_by}".rstrip()


def step_time(facts: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of XLA's instructions, of kernels, of hidden transfers, and of exchanges within a slice.

    Hidden are the transfers between main memory and the chip's own for which nothing has to wait.
    """
    kernels = [item for item in facts["times"] if item["kind"] == "kernels"]
    others = [item for item in facts["times"] if item["kind"] != "kernels"]
    moved = sum(e["times"] * e["moved"] for e in facts["collectives"] if not e["between_slices"])
    return {
        "XLA": _total(others, "seconds"),
        "kernels": _total(kernels, "seconds"),
        "transfers": sum(max(0.0, item["memory"] - item["seconds"]) for item in others if item["kind"] == "transfers"),
        "exchanges": moved / facts["link_bandwidth"],
    }


def step_bounds(parts: dict[str, float]) -> tuple[float, float]:
    """Return the seconds of a step with transfers and exchanges hidden, and with none; ``parts``: of its time."""
    compute = parts["XLA"] + parts["kernels"]
    return max(compute, parts["exchanges"]), compute + parts["transfers"] + parts["exchanges"]


def _time(facts: dict[str, Any], fast: bool) -> Iterator[str]:
    if facts["platform"] != "tpu":
        yield "Time of a step: not known. XLA's GPU compiler estimates none, and chose its kernels without trying them."
        return
    parts, items = step_time(facts), facts["times"]
    low, high = step_bounds(parts)
    images = facts["batch_size"]
    speed = f"{images / high:,.0f} to {images / low:,.0f} images/s"
    yield f"Time of a step (estimate): {low * 1e3:.1f} to {high * 1e3:.1f} ms, {speed}"
    yield "  kind: ms, of them by schedule and by memory alone, instructions"
    for kind in KINDS:
        each = [item for item in items if item["kind"] == kind]
        yield f"  {kind:16} {_three(each)}  {len(each):5}"
    yield (
        f"  exchanges {parts['exchanges'] * 1e3:.2f} ms at full bandwidth, transfers for which nothing waits "
        f"{parts['transfers'] * 1e3:.2f} ms: from all of both hidden to none"
    )
    bare = [item for item in items if item["schedule"] is None and item["kind"] != "transfers"]
    if bare:
        share = _total(bare, "seconds") / (parts["XLA"] + parts["kernels"])
        yield f"  {len(bare)} instructions without a schedule, by their bytes alone: {share:.1%} of the time"
    yield f"  {UNCERTAINTY}"
    missing = ["the latency of memory and exchanges", "input"]
    if facts["unknown_loops"]:
        missing.append(f"all trips but one of {facts['unknown_loops']} loops whose length depends on data")
    if any(exchange["between_slices"] for exchange in facts["collectives"]):
        missing.append("the network between slices")
    yield f"  Not in it: {', '.join(missing)}."
    if fast:
        yield (
            "  --fast compiles a slower program, which keeps no array on the chip from one instruction to the next: "
            "memory and exchanges hold, the time is too long."
        )
