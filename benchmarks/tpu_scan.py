"""Static estimates of the TPU kernels' times, against what the chip allows and against XLA's scans.

Nothing runs on a TPU: cycles come from the compiler's schedule, clocks and bandwidths from ``aot.GENERATIONS``.

    python benchmarks/tpu_scan.py [--out FILE]  # the scans of three models, and XLA's implementations
    python benchmarks/tpu_scan.py --all training [--generations v5e] [--work FILE] [--out FILE]  # of every model

The second, for images as in training or (``--all detector``) of a detector, takes half an hour of a core or more for
each generation. What it has compiled is kept in the work file, so it can be stopped and started again; after a change
of the kernels or of libtpu delete the file.
"""

import argparse
import dataclasses
import functools
import json
import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Cell, Report
from evmamba_jax.preflight import aot, hlo
from evmamba_jax.preflight.clock import ATTAINABLE, clock
from evmamba_jax.preflight.floor import (
    REGISTER,
    SCAN_EXPONENTIAL,
    SCAN_VECTOR,
    VECTOR_UNITS,
    ScanFloor,
    hbm_seconds,
)
from evmamba_jax.preflight.kernels import BATCH, Kernel, Scan, compile_scan
from evmamba_jax.preflight.scans import DETECTOR, model_scans
from pallas_kernels import ATROUS, CROSS, Order, selective_scan

GENERATIONS = ("v5e", "v6e")  # of the tables of three models
FIGURES = {
    "EfficientVMamba-T stage 1": [Scan(BATCH, 56, 56, 96, 3, 16, ATROUS)],
    "EfficientVMamba-T stage 2": [Scan(BATCH, 28, 28, 192, 6, 16, ATROUS)],
    "VMamba-T stage 1": [Scan(BATCH, 56, 56, 96, 6, 1, CROSS)],
    "VMamba-T stage 2": [Scan(BATCH, 28, 28, 192, 12, 1, CROSS)],
    "VMamba-T stage 3": [Scan(BATCH, 14, 14, 384, 24, 1, CROSS)],
    "VMamba-T stage 4": [Scan(BATCH, 7, 7, 768, 48, 1, CROSS)],
    "Vim-S, both ways": [Scan(BATCH, 1, 197, 768, 24, 16, (Order(reverse=back),)) for back in (False, True)],
}
# XLA's implementations against the kernels, as the mamba-ssm function: (images, tokens, channels, states).
PEER = (BATCH, 784, 384, 16)

FREE = Format(Layout.AUTO)  # the compiler chooses

EVERY_SCAN = {
    size: f"""\
Every distinct scan of every registered model, {images}, bfloat16, for one JAX device (a chip; of tpu7x, half a chip):
milliseconds forward / backward, the cycles of the compiler's schedule over the clock, without waiting for memory.
"XLA": the kernels leave the scan to XLA. A scan is written as images, height, width, channels E, rank R of the time
step, states N, orders.
"""
    for size, images in {
        "training": f"{BATCH} images of the model's own size",
        "detector": f"one image of {DETECTOR[0]}x{DETECTOR[1]} pixels",
    }.items()
}


def _counted(operations: dict[str, tuple[int, int]]) -> str:
    """Say how many operations a token and channel take."""
    return ", ".join(
        f"{direction} {each} a state and {besides} besides" for direction, (each, besides) in operations.items()
    )


THREE_MODELS = f"""\
Batch {BATCH} a JAX device (a chip; of tpu7x, half a chip), bfloat16, kernels alone: projections to B, C and the rank of
the time step, and sums of the results of several calls, are XLA's and are not in here.

- **ms by cycles**: the schedules of all calls, a row a cycle, over the clock; without waiting for memory.
- **HBM moved**, **ms by HBM**: what the windows of all calls bring in and out, at {ATTAINABLE:.0%} of the peak.
- **floor**: the largest of three times of a fused scan. HBM: x and y once, projections (float32) once; backward: x, dy
  and dx once, projections read and their gradients written (**fused ideal**). Exponential unit, for each token and
  channel: {_counted(SCAN_EXPONENTIAL)}; {REGISTER} elements a cycle of a core. Vector units: {_counted(SCAN_VECTOR)},
  by the kernel's own count; {VECTOR_UNITS * REGISTER} elements a cycle of a core. The count is in
  `evmamba_jax/preflight/floor.py`.
- **ratio**: the larger of the two times over the floor.
- **busiest unit**: of the loop that takes most, and the share of its slots in use. **spills**: registers that one turn
  of the innermost loops writes to memory, all calls together.
"""

XLA = f"""\
`selective_scan` with {PEER[0]} images of {PEER[1]} tokens, {PEER[2]} channels, {PEER[3]} states,
bfloat16 streams, whole programs, each with the layouts of arguments and results that the compiler likes best for it: a
program around it would choose them so. By the preflight's clock: each instruction takes as long as its schedule or its
traffic, whichever is longer, loops by their trips.
"""


def figures(report: Report, dump_folder: str) -> None:
    """Add the table of three models."""
    report.table(
        "scan",
        "TPU",
        "pass",
        ("calls", "{}"),
        ("ms by cycles", "{:.3f}"),
        ("HBM moved, MB", "{:.0f}"),
        ("ms by HBM", "{:.3f}"),
        ("floor, ms", "{:.3f}"),
        "set by",
        ("ratio", "{:.2f}"),
        ("fused ideal, MB", "{:.0f}"),
        ("busiest unit", "{} {:.0%}"),
        ("spills in inner loops", "{}"),
    )
    for name in GENERATIONS:
        generation = aot.GENERATIONS[name]
        for title, scans in FIGURES.items():
            kernels = [k for scan in scans for k in compile_scan(scan, name, dump_folder)]
            for direction in SCAN_VECTOR:
                report.row(title, name, direction, *_figure(generation, direction, scans, kernels))


def _figure(generation: aot.Generation, direction: str, scans: list[Scan], kernels: list[Kernel]) -> list[Cell]:
    problems = [kernel.problem for kernel in kernels if kernel.problem]
    if problems:
        return [problems[0]]
    calls = [kernel for kernel in kernels if kernel.direction == direction]
    compute = sum(call.cycles for call in calls) / generation.clock
    moved = sum(call.hbm_bytes for call in calls)
    waiting = hbm_seconds(moved, generation)
    floor = ScanFloor.of(scans, generation, direction)
    limit, least = floor.binding
    slowest = max(calls, key=lambda call: call.cycles)
    times = [1e3 * compute, moved / 1e6, 1e3 * waiting, 1e3 * least]
    ratio, spills = max(compute, waiting) / least, sum(call.spills for call in calls)
    return [len(calls), *times, limit, ratio, floor.bytes / 1e6, [slowest.unit, slowest.load], spills]


def peers(report: Report, dump_folder: str) -> None:
    """Add the table against XLA's implementations."""
    numbers = [("ms, estimate", "{:.2f}"), ("of it kernels", "{:.2f}"), ("temporaries, GiB", "{:.2f}")]
    report.table("TPU", "program", "implementation", *numbers, ("over ours", "{:.1f}"))
    batch, length, channels, state = PEER
    stream = jax.ShapeDtypeStruct((batch, length, channels), jnp.bfloat16)
    projected = jax.ShapeDtypeStruct((batch, length, 1, state), jnp.bfloat16)
    decay = jax.ShapeDtypeStruct((channels, state), jnp.float32)
    vector = jax.ShapeDtypeStruct((channels,), jnp.float32)
    arguments = (stream, stream, decay, projected, projected, vector, vector)

    def forward(implementation, u, delta, A, B, C, D, bias):
        options = {"delta_bias": bias, "delta_softplus": True, "implementation": implementation}
        return selective_scan(u, delta, A, B, C, D, **options)

    def both(implementation, dy, *arguments):
        y, pull = jax.vjp(functools.partial(forward, implementation), *arguments)
        return y, pull(dy)

    programs = {
        "forward": (forward, arguments, ("pallas", "sequential", "associative")),
        "forward + backward": (both, (stream, *arguments), ("pallas", "sequential")),
    }
    for name in GENERATIONS:
        for title, (program, shapes, implementations) in programs.items():
            ours = None
            for implementation in implementations:
                what = name, title, implementation
                try:
                    compiled = aot.compile_for(
                        name, functools.partial(program, implementation), *shapes, in_shardings=FREE, out_shardings=FREE
                    )
                except jax.errors.JaxRuntimeError as error:
                    report.row(*what, str(error).splitlines()[0])
                    continue
                total, of_kernels = program_seconds(compiled.as_text(), name, dump_folder)
                ours = ours or total
                temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**30
                report.row(*what, 1e3 * total, 1e3 * of_kernels, temporaries, total / ours)


def program_seconds(text: str, generation: str, dump_folder: str) -> tuple[float, float]:
    """Return the time of a compiled program, and of its kernels alone."""
    program = hlo.parse(text)
    _, unknown = hlo.runs(program)
    if unknown:
        raise ValueError(f"loops of unknown trips: {unknown}")
    items = clock(program, dump_folder, generation)
    return sum(i.seconds for i in items), sum(i.seconds for i in items if i.kind == "kernels")


def every_scan(report: Report, dump_folder: str, size: str, generations: list[str], work: Path) -> None:
    """Add a table of all scans of all registered models, a column a generation, and what was found in all of them."""
    scans = model_scans(detector=size == "detector")
    work.parent.mkdir(parents=True, exist_ok=True)
    known: dict[tuple[str, str], list[Kernel]] = {}
    for line in work.read_text().splitlines() if work.exists() else []:
        kernel = Kernel(**json.loads(line))
        known.setdefault((kernel.generation, kernel.scan), []).append(kernel)
    report.table("scan", *((generation, "{:.3f} / {:.3f}") for generation in generations))
    for scan in scans:
        cells = []
        for generation in generations:
            kernels = known.get((generation, str(scan)))
            if kernels is None:
                kernels = known[generation, str(scan)] = list(compile_scan(scan, generation, dump_folder))
                with work.open("a") as file:
                    file.write("".join(f"{json.dumps(dataclasses.asdict(kernel))}\n" for kernel in kernels))
            cells.append(_times(kernels))
        report.row(str(scan), *cells)
    report.heading("All kernels")
    counts = [(name, "{}") for name in ("scans", "left to XLA", "kernels", "refused")]
    spills = [(name, "{}") for name in ("spill in inner loops", "most spills")]
    report.table("TPU", *counts, ("most VMEM, MiB", "{:.1f}"), *spills)
    for generation in generations:
        own = [kernel for scan in scans for kernel in known[generation, str(scan)]]
        portable = [kernel for kernel in own if kernel.name == "portable"]
        kernels = [kernel for kernel in own if kernel.name != "portable"]
        report.row(
            generation,
            len({kernel.scan for kernel in own}),
            len(portable),
            len(kernels),
            sum(bool(kernel.problem) for kernel in kernels),
            max(kernel.vmem_bytes for kernel in kernels) / 2**20,
            sum(kernel.spills > 0 for kernel in kernels),
            max(kernel.spills for kernel in kernels),
        )


def _times(kernels: list[Kernel]) -> Cell:
    """Return milliseconds of a scan's kernels, forward and backward, or why there are none."""
    if kernels[0].name == "portable":
        return "XLA"
    problems = [kernel.problem for kernel in kernels if kernel.problem]
    if problems:
        return f"refused: {problems[0]}"
    rate = aot.GENERATIONS[kernels[0].generation].clock
    return [
        1e3 * sum(kernel.cycles for kernel in kernels if kernel.direction == direction) / rate
        for direction in SCAN_VECTOR
    ]


def fill(report: Report, dump_folder: str, options: argparse.Namespace) -> None:
    """Add everything."""
    if options.all:
        report.text(EVERY_SCAN[options.all])
        every_scan(report, dump_folder, options.all, options.generations, options.work)
        return
    report.text(THREE_MODELS)
    figures(report, dump_folder)
    report.heading("Against XLA's scans")
    report.text(XLA)
    peers(report, dump_folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", choices=list(EVERY_SCAN), help="every scan of every registered model, for such images")
    every = list(aot.GENERATIONS)
    parser.add_argument(
        "--generations", nargs="+", choices=every, default=every, metavar="TPU", help="the TPUs of --all"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/every_scan.jsonl"), help="what --all has done")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as dump_folder:
        aot.prepare(dump_folder)
        title = "Scans on TPUs: static estimates, nothing ran on a TPU"
        versions = machine.versions("jax", "jaxlib", "libtpu")
        fill(Report(title, options.out, versions=versions, date=machine.today()), dump_folder, options)


if __name__ == "__main__":
    main()
