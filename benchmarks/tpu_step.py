"""Whole train steps on TPUs: their memory, or their time beside its floor. All are estimates.

Nothing runs on a TPU: the exact step of ``train_tpu.py``, 128 images a chip, is compiled by the real TPU compiler: with
the Pallas kernels, with the portable ``sequential`` scans, and with the kernels and blocks in loops that recompute what
the policy ``dots_and_scans`` does not keep. With parameters divided over four chips, the exchanges of that form are
counted, inside its loops and outside.

    python benchmarks/tpu_step.py [--models evmamba_t vmamba_t vim_s] [--fast] [--out FILE]  # memory, on v5e
    python benchmarks/tpu_step.py --parts [--models evmamba_t vmamba_t] [--generations v5e v6e] [--out FILE]  # time

``--fast`` compiles at JAX's optimisation level O1: the same peak, three to five times sooner. ``--parts`` compiles the
step with the kernels for each generation, times its instructions by the preflight's clock, and counts the least time
that each part of it allows. What a step takes to compile depends on the model: 3 to 15 minutes of a core.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report

ROOT = Path(__file__).parents[1]
BATCH = 128  # images a chip
FORMS = {  # scans, rematerialisation and chips
    "kernels": ("pallas", "none", 1),
    "portable": ("sequential", "none", 1),
    "loops": ("pallas", "dots_and_scans", 1),
    "divided": ("pallas", "dots_and_scans", 4),
}
MODELS = ("evmamba_t", "vmamba_t", "vim_s")  # of the table of memory
EVERY_FAMILY = (*MODELS, "msvmamba_t", "mambavision_t")
GENERATIONS = ("v5e", "v6e")
MEBIBYTE = 2**20
# What a fusion may hold that only moves numbers about, or rounds them on the way.
MOVES = {
    *("parameter", "copy", "transpose", "bitcast", "reshape", "convert", "broadcast", "constant", "pad", "slice"),
    *("concatenate", "dynamic-slice", "dynamic-update-slice", "tuple", "get-tuple-element"),
}


def compile_step(model: str, form: str, generation: str) -> None:
    """Compile one step in this process, and print its facts as a line of JSON."""
    from evmamba_jax.preflight import aot, hlo
    from evmamba_jax.preflight.clock import clock
    from evmamba_jax.preflight.floor import floors
    from evmamba_jax.preflight.work import step_work
    from evmamba_jax.tasks import task_of
    from evmamba_jax.training import parse_command
    from evmamba_jax.training.mesh import make_mesh
    from evmamba_jax.training.setup import Setup
    from pallas_kernels.scan2d import KERNELS

    is_timed = form == "parts"
    implementation, remat, chips = FORMS["kernels" if is_timed else form]
    if implementation == "sequential":
        KERNELS.clear()  # the portable scans, as on a platform without kernels
    config, _ = parse_command(["train_tpu.py", "--config", f"configs/{model}.py"])
    config.batch_size, config.model.remat, config.mesh.fsdp = BATCH * chips, remat, chips
    with tempfile.TemporaryDirectory() as dump_folder:
        aot.prepare(dump_folder if is_timed else None)
        devices = aot.topology(f"{generation}-{chips}").devices
        kind = task_of(config)
        class_names, examples, _ = kind.describe(config)
        lowered = Setup(kind(config, class_names), make_mesh(config, devices), examples).lower()
        began = time.process_time()
        compiled = lowered.compile()
        seconds = time.process_time() - began
        program = hlo.parse(compiled.as_text())
        timed = [dataclasses.asdict(one) for one in clock(program, dump_folder, generation)] if is_timed else []
    memory = compiled.memory_analysis()
    found, _ = hlo.runs(program)
    facts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "kept": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "kernels": len(hlo.pallas_calls(found)),
        "copies": list(copies(program, found)),
        "compile_cpu_seconds": seconds,
        "bytes_accessed": (compiled.cost_analysis() or {}).get("bytes accessed"),
        "gathers": [
            (one.size, one.times)
            for one in hlo.collectives(program, found, devices=chips)
            if one.kind == "all-gather" and one.size >= MEBIBYTE / 4
        ],
    }
    if is_timed:
        least = floors(step_work(config, devices=chips), aot.GENERATIONS[generation])
        facts |= {"times": timed, "floor": {part: dataclasses.asdict(floor) for part, floor in least.items()}}
    print(json.dumps(facts))


def copies(program, found) -> Iterator[tuple[str, int, str]]:
    """Yield side of the kernel, bytes and type of whatever only moves what a kernel reads or wrote, from 1 MiB up."""
    by_name = {run.instruction.name: run.instruction for run in found}

    def operands(instruction) -> list:
        return [by_name[name] for name in instruction.operands if name in by_name]

    def sources(instruction) -> Iterator:
        for operand in operands(instruction):
            yield from sources(operand) if operand.opcode in ("bitcast", "get-tuple-element") else [operand]

    def is_move(instruction) -> bool:
        if instruction.opcode == "fusion":
            inner = program.computations.get(instruction.calls, [])
            return all(one.opcode in MOVES for one in inner)
        return instruction.opcode in ("copy", "transpose", "copy-done")

    seen = set()
    for instruction in by_name.values():
        is_kernel = 'custom_call_target="tpu_custom_call"' in instruction.line
        for source in sources(instruction):
            of_kernel = 'custom_call_target="tpu_custom_call"' in source.line
            mover = source if is_kernel else instruction if of_kernel else None
            if mover is None or not is_move(mover) or mover.name in seen:
                continue
            seen.add(mover.name)
            size = sum(array.padded for array in mover.result if array.in_hbm)
            if size >= MEBIBYTE:
                yield "before" if is_kernel else "after", size, mover.result[0].text


def fill(report: Report, models: list[str], forms: list[str], *, fast: bool) -> None:
    """Add one step after another."""
    report.text(
        f"`configs/MODEL.py`, {BATCH} images a chip, bfloat16. Temporaries are all activations, gradients and scratch "
        "at their peak; `over`, the share of the model's first row. GB accessed is by the compiler, left out where "
        "it would take a loop's body once. A copy is an instruction beside a kernel that only moves numbers, 1 MiB or "
        "more. CPU s: of the compilation alone. Written by `benchmarks/tpu_step.py"
        + (" --fast` (optimisation level O1)." if fast else "`.")
    )
    sizes = [
        ("arguments, GiB", "{:.2f}"),
        ("temporaries, GiB", "{:.2f}"),
        ("over", "{:.0%}"),
        ("GB accessed", "{:.1f}"),
    ]
    counts = [("kernels", "{}"), ("copies", "{}"), ("their MiB", "{:,.0f}"), ("CPU s", "{:.0f}")]
    report.table("model", "scans", "remat", *sizes, *counts)
    details = []
    for model in models:
        first = None
        for form, (implementation, remat, chips) in FORMS.items():
            if chips > 1 or form not in forms:
                continue
            f = run(model, form, GENERATIONS[0], fast=fast)
            if "refusal" in f:
                report.row(model, implementation, remat, f["refusal"])
                continue
            peak = f["temporaries"]
            first = first or peak
            copied = sum(size for _, size, _ in f["copies"]) / MEBIBYTE
            accessed = f["bytes_accessed"] / 1e9 if f["bytes_accessed"] and remat == "none" else None
            memory = [f["arguments"] / 2**30, peak / 2**30, peak / first, accessed]
            report.row(
                *(model, implementation, remat, *memory),
                *(f["kernels"], len(f["copies"]), copied, f["compile_cpu_seconds"]),
            )
            if f["copies"]:
                details.append("\n".join([f"{model}, {remat}, copies beside its kernels:", "", *grouped(f["copies"])]))
    for text in details:
        report.text(text)
    divided = {model: run(model, "divided", GENERATIONS[0], fast=fast) for model in models if "divided" in forms}
    report.text("\n".join(f"- {model}, parameters over 4 chips: {gathers(f)}" for model, f in divided.items()))


def gathers(facts: dict) -> str:
    """Say what is gathered within loops over blocks and outside of them."""
    if "refusal" in facts:
        return facts["refusal"]
    inside = [(size, times) for size, times in facts["gathers"] if times > 1]
    outside = [size for size, times in facts["gathers"] if times == 1]
    largest = max((size for size, _ in inside), default=0)
    return (
        f"{len(inside)} gathers of 0.25 MiB or more within loops, {sum(times for _, times in inside)} times a step, "
        f"the largest {largest / MEBIBYTE:.1f} MiB; {len(outside)} outside, the largest "
        f"{max(outside, default=0) / MEBIBYTE:.1f} MiB; temporaries {facts['temporaries'] / 2**30:.2f} GiB a chip"
    )


def grouped(copies: list) -> Iterator[str]:
    """Yield a line for each kind of copy."""
    counts: dict[tuple, int] = {}
    for copy in copies:
        counts[tuple(copy)] = counts.get(tuple(copy), 0) + 1
    for (side, size, text), count in sorted(counts.items(), key=lambda item: -item[0][1] * item[1]):
        yield f"- {count} x {text} {side} a kernel, {size / MEBIBYTE:.0f} MiB each"


def fill_parts(report: Report, models: list[str], generations: list[str]) -> None:
    """Add the time and the floor of one step after another, and of its parts."""
    from evmamba_jax.preflight.floor import LIMITS, Floor, compare

    report.text(
        f"`configs/MODEL.py`, {BATCH} images a chip, with the kernels and without rematerialisation. Time: by the "
        "preflight's clock. Floor: what the chip allows at least, counted from the step's traced program "
        "(docs/preflight.md); of a part the time of its scans and the longest of four limits of its rest, of the step "
        "the sum of its parts. The last columns are the milliseconds of the kernels and of each limit. A fusion counts "
        "whole to the part of its result, so read neighbouring parts together. Written by "
        "`benchmarks/tpu_step.py --parts`."
    )
    numbers = [("ms", "{:.3f}"), ("floor, ms", "{:.3f}"), ("ratio", "{:.2f}")]
    limits = [(name, "{:.3f}") for name in ("kernels", *LIMITS)]
    steps: list[list] = []
    for model in models:
        for generation in generations:
            report.heading(f"{model}, {generation}")
            f = run(model, "parts", generation, fast=False)
            if "refusal" in f:
                report.text(f["refusal"])
                continue
            least = {part: Floor(**floor) for part, floor in f["floor"].items()}
            report.table("part", *numbers, "floor set by", *limits)
            for row in compare(f["times"], least):
                floors = list(least.values()) if row.part == "all" else [least[row.part]] if row.part in least else []
                each = (
                    sum(one.kernels for one in floors),
                    *(sum(one.limits[name] for one in floors) for name in LIMITS),
                )
                cells = [1e3 * row.seconds, 1e3 * row.floor, row.ratio, row.set_by, *(1e3 * number for number in each)]
                report.row(row.part, *cells)
            steps.append([model, generation, *cells, f["compile_cpu_seconds"]])  # the last row is of all parts
    report.heading("All steps")
    report.table("model", "TPU", *numbers, "floor set by", *limits, ("CPU s", "{:.0f}"))
    for step in steps:
        report.row(*step)


def run(model: str, form: str, generation: str, *, fast: bool) -> dict:
    """Compile a step in a process of its own; what the compiler refuses is a result too."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"JAX_OPTIMIZATION_LEVEL": "O1"} if fast else {})
    command = [sys.executable, __file__, "--one", model, form, generation]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        from evmamba_jax.preflight.program import refusal

        lines = [line for line in done.stderr.splitlines() if "RESOURCE_EXHAUSTED" in line or "Used" in line]
        return {"refusal": refusal("\n".join(lines or done.stderr.splitlines()[-1:]))["line"][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", help="default: of three families; with --parts of all")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS, help="of the table of memory")
    parser.add_argument("--fast", action="store_true", help="compile with less optimisation; for memory alone")
    parser.add_argument("--parts", action="store_true", help="time and floor instead of memory")
    parser.add_argument("--generations", nargs="+", default=list(GENERATIONS), metavar="TPU", help="of --parts")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        compile_step(*options.one)
        return
    if options.parts and options.fast:
        parser.error("--fast makes a slower step, so --parts would time another program: give one of the two")
    versions = machine.versions("jax", "jaxlib", "libtpu")
    what = " beside their floors: estimates" if options.parts else " on v5e: the compiler's figures"
    title = f"Whole train steps{what}, nothing ran on a TPU"
    report = Report(title, options.out, versions=versions, date=machine.today())
    if options.parts:
        fill_parts(report, options.models or list(EVERY_FAMILY), options.generations)
    else:
        fill(report, options.models or list(MODELS), options.forms, fast=options.fast)


if __name__ == "__main__":
    main()
