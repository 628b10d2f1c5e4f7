"""The report in words."""

import collections
from collections.abc import Iterator
from typing import Any

GIB = 2**30
_PARTS = ("parameters", "batch statistics", "moving average", "optimizer", "input batch", "other")


def report(facts: dict[str, Any], *, fast: bool) -> str:
    """Return the report of a step, refused or compiled, as lines of text."""
    lines = [*_what(facts, fast)]
    if "refusal" in facts:
        return "\n".join([*lines, "", *_refused(facts)])
    lines += ["", *_memory(facts), "", *_buffers(facts), "", *_exchanges(facts)]
    if "kernel_cycles" in facts:
        lines += ["", *_kernels(facts)]
    if facts["platform"] == "tpu":
        lines += ["", *_slowest(facts)]
    return "\n".join([*lines, "", *_time(facts, fast)])


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


def _what(facts: dict[str, Any], fast: bool) -> Iterator[str]:
    height, width, channels = facts["image"]
    mesh = ", ".join(f"{axis}={size}" for axis, size in facts["mesh"].items())
    rounds = f" in {facts['accumulation']} rounds" if facts["accumulation"] > 1 else ""
    hosts = f", {facts['hosts']} hosts" if facts["hosts"] > 1 else ""
    slices = f", {facts['slices']} slices" if facts["slices"] > 1 else ""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    chips = f"{facts['chips']} {'chips' if facts['platform'] == 'tpu' else 'GPUs'}"
    yield (
        f"{facts['model']}, {height}x{width}x{channels}, {facts['dtype']}, on {facts['devices']} devices of "
        f"{facts['generation']} ({chips}{hosts}{slices}; mesh {mesh})"
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
    yield "Pallas kernels, those that take longest first (static cycles: without waiting for memory)"
    for kernel in facts["kernel_cycles"]:
        unit, load = kernel["busiest"] or ("nothing", 0.0)
        at_least = "" if kernel["is_complete"] else "at least "
        cycles = kernel["cycles"]
        yield (
            f"  {kernel['count']:4} x {kernel['name']}: {at_least}{cycles:,.0f} cycles, "
            f"{cycles / facts['clock'] * 1e3:.3f} ms; {unit} {load:.0%}; VMEM {_size(kernel['vmem'])}; "
            f"spills {kernel['spills']}"
        )
    if facts["unread_kernels"]:
        yield f"  {facts['unread_kernels']} calls of kernels whose schedule was not found"


def _slowest(facts: dict[str, Any]) -> Iterator[str]:
    yield "Lines whose XLA instructions take longest, by XLA's own estimate"
    for place in facts["slowest"]:
        milliseconds = place["cycles"] / facts["clock"] * 1e3
        yield f"  {milliseconds:7.3f} ms  {place['count']:4} x  {place['source']}  {_end(place['op_name'])}"


def step_time(facts: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of XLA's instructions, of kernels and of exchanges over the links of a slice."""
    kernels = sum(kernel["count"] * kernel["cycles"] for kernel in facts.get("kernel_cycles", ()))
    moved = sum(e["times"] * e["moved"] for e in facts["collectives"] if not e["between_slices"])
    return {
        "XLA": facts["cycles"] / facts["clock"],
        "kernels": kernels / facts["clock"],
        "exchanges": moved / facts["link_bandwidth"],
    }


def step_bounds(parts: dict[str, float]) -> tuple[float, float]:
    """Return the seconds of a step with all exchanges hidden, and with none; ``parts`` are those of its time."""
    compute = parts["XLA"] + parts["kernels"]
    return max(compute, parts["exchanges"]), compute + parts["exchanges"]


def _time(facts: dict[str, Any], fast: bool) -> Iterator[str]:
    if facts["platform"] != "tpu":
        yield "Time of a step: not known. XLA's GPU compiler estimates none, and chose its kernels without trying them."
        return
    parts = step_time(facts)
    low, high = step_bounds(parts)
    images = facts["batch_size"]
    speed = f"{images / high:,.0f} to {images / low:,.0f} images/s"
    yield f"Time of a step (rough): {low * 1e3:.1f} to {high * 1e3:.1f} ms, {speed}"
    yield (
        f"  XLA {parts['XLA'] * 1e3:.1f} ms, Pallas kernels {parts['kernels'] * 1e3:.1f} ms, exchanges "
        f"{parts['exchanges'] * 1e3:.2f} ms at full bandwidth; from all of them hidden to none"
    )
    missing = ["most waiting for memory", "the latency of exchanges", "input"]
    if facts["unknown_loops"]:
        missing.append(f"all trips but one of {facts['unknown_loops']} loops whose length depends on data")
    if facts.get("unread_kernels"):
        missing.append("kernels whose schedule was not found")
    if any(exchange["between_slices"] for exchange in facts["collectives"]):
        missing.append("the network between slices")
    yield f"  Not in it: {', '.join(missing)}. Never compared with hardware: use it to compare programs, not to plan."
    if fast:
        yield "  --fast compiles a slower program than training runs: memory and exchanges hold, the time is too long."
