"""The process that compiles: it builds the trainer's step from shapes, has it compiled, and writes down what it finds.

It runs apart from the command because libtpu reads its options when it is loaded, and because a compiler that runs out
of memory takes its process with it. Its answers are lines of JSON on standard output: ``{"stage": ...}`` as it goes on,
and at last ``{"facts": ...}`` or ``{"error": ...}``.
"""

import dataclasses
import json
import os
import re
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from evmamba_jax.errors import UserError
from evmamba_jax.preflight import aot, gpu, hlo
from evmamba_jax.preflight.clock import clock
from evmamba_jax.preflight.floor import floors
from evmamba_jax.preflight.work import step_work
from evmamba_jax.tasks import task_of
from evmamba_jax.training import parse_command
from evmamba_jax.training.mesh import make_mesh
from evmamba_jax.training.setup import Setup

LARGEST = 8  # arrays that a report lists


@dataclasses.dataclass
class Request:
    """What to compile.

    Attributes:
        arguments: the command line of ``train_tpu.py`` without its name: ``--config FILE --config.NAME=VALUE ...``.
        topology: a TPU topology's or a GPU's name.
        batch_per_device: replaces config.batch_size where it is not 0.
        export: a file for the lowered step, or "".
        timed: whether to time the step's instructions, by the schedules that the compiler then writes.
    """

    arguments: list[str]
    topology: str
    batch_per_device: int = 0
    export: str = ""
    timed: bool = True


def main() -> None:
    """Serve the request in the last argument but one; the last is a folder for the compiler's schedules."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is no answer
    tell = lambda **words: print(json.dumps(words), file=answers)  # noqa: E731
    *_, text, dump_folder = sys.argv
    request = Request(**json.loads(text))
    try:
        tell(facts=step_facts(request, tell, dump_folder))
    except (UserError, ImportError) as error:
        tell(error=str(error))
    except Exception as error:  # a fault of the program that is checked, or of this one: where, and what
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:500]
        tell(error=f"the step cannot be built: {type(error).__name__}: {text} ({place.filename}:{place.lineno})")
        raise


def step_facts(request: Request, tell, dump_folder: str) -> dict[str, Any]:
    """Build, lower, compile and read the step; a TPU's compiler writes its schedules into the folder."""
    config, _ = parse_command(["train_tpu.py", *request.arguments])
    tell(stage=f"describing {request.topology}")
    timed = request.timed and not gpu.is_gpu(request.topology)
    if timed:
        aot.prepare(dump_folder)
    target = gpu.target(request.topology) if gpu.is_gpu(request.topology) else _tpu(request.topology)
    if request.batch_per_device:
        config.batch_size = request.batch_per_device * len(target["devices"])
    kind = task_of(config)
    class_names, examples, known_from = kind.describe(config)
    started = time.perf_counter()
    tell(stage="tracing the train step")
    mesh = make_mesh(config, target.pop("devices"))
    task = kind(config, class_names)
    setup = Setup(task, mesh, examples)
    lowered = setup.lower()
    facts: dict[str, Any] = {
        "model": config.model.name,
        "data": f"{config.data.name}: {len(class_names)} classes, {examples:,} training images ({known_from})",
        "mesh": dict(mesh.shape),
        "devices": mesh.size,
        "batch_size": config.batch_size,
        "accumulation": config.accumulation,
        "dtype": config.model.dtype,
        "image": list(task.reader().blank(training=True)["image"].shape),
        "versions": {"jax": jax.__version__, target["compiler"][0]: target["compiler"][1]},
        "trace_seconds": time.perf_counter() - started,
        **target,
    }
    if request.export:
        tell(stage=f"exporting to {request.export}")
        Path(request.export).write_bytes(exported(setup, target["platform"]))
    tell(stage=f"compiling for {mesh.size} devices")
    started = time.perf_counter()
    with ThreadPoolExecutor() as beside:
        # The compiler leaves Python to others.
        work = beside.submit(step_work, config, devices=mesh.size) if timed else None
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return facts | {"refusal": refusal(str(error)), "compile_seconds": time.perf_counter() - started}
    facts["compile_seconds"] = time.perf_counter() - started
    tell(stage="reading what the compiler made")
    program = hlo.parse(compiled.as_text() or "")
    if work is not None:
        least = floors(work.result(), aot.GENERATIONS[facts["generation"]])
        facts["floor"] = {part: dataclasses.asdict(floor) for part, floor in least.items()}
        items = clock(program, dump_folder, facts["generation"])
        facts["times"] = [dataclasses.asdict(item) for item in items]
    return facts | compiled_facts(compiled, program, facts)


def _tpu(name: str) -> dict[str, Any]:
    topology = aot.topology(name)
    generation, devices = topology.generation, topology.devices
    import libtpu

    return {
        "platform": "tpu",
        "compiler": ("libtpu", libtpu.__version__),
        "devices": devices,
        "generation": generation.name,
        "chips": topology.chips,
        "hosts": topology.hosts,
        "slices": topology.slices,
        "available": generation.available,
        "clock": generation.clock,
        # Of one device, half a tpu7x or a whole one of the others, in one direction.
        "link_bandwidth": generation.ici_bandwidth / generation.devices_per_chip / 2,
    }


def exported(setup: Setup, platform: str) -> bytes:
    """Return the step, lowered for a platform, as ``jax.export`` writes it.

    It takes and gives flat lists, so that nothing needs to be known to read it back: all leaves of (state, batch) in
    the order of ``jax.tree.leaves``, and those of the new state.
    """
    step, arguments = setup.step()
    leaves, structure = jax.tree.flatten(arguments)

    def flat(leaves):
        return jax.tree.leaves(step(*jax.tree.unflatten(structure, leaves)))

    jitted = jax.jit(flat, out_shardings=jax.tree.leaves(setup.shardings))
    with jax.set_mesh(setup.mesh):
        return bytes(jax.export.export(jitted, platforms=(platform,))(leaves).serialize())


def refusal(message: str) -> dict[str, Any]:
    """Put the compiler's refusal in one line, with the bytes it wanted where it says them."""
    unit = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"\(([\d.]+)([BKMGT])\) exceeds available HBM", message) or re.search(
        r"Used ([\d.]+)([BKMGT]) of [\d.]+[BKMGT] hbm", message
    )
    needed = int(float(found[1]) * unit[found[2]]) if found else None
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return {"line": " ".join(lines[:1])[:600], "needed": needed}


def compiled_facts(compiled: jax.stages.Compiled, program: hlo.Program, facts: dict[str, Any]) -> dict[str, Any]:
    """Read memory and exchanges of a compiled step."""
    runs, unknown = hlo.runs(program)
    memory: Any = compiled.memory_analysis()
    parts: dict[str, list[int]] = {}
    for name, array in hlo.arguments(program).items():
        part = parts.setdefault(_part(name), [0, 0])
        part[0] += array.padded
        part[1] += array.size
    exchanges = list(hlo.collectives(program, runs, devices=facts["devices"], slices=facts["slices"]))
    return {
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "parts": parts,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
            "kept_outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        },
        "buffers": [
            [b.array.text, b.array.padded, b.array.size, b.count, b.op_name, b.source]
            for b in hlo.buffers(program, runs)[:LARGEST]
        ],
        "collectives": [dataclasses.asdict(e) | {"moved": e.moved} for e in exchanges],
        "unknown_loops": len(unknown),
    }


def _part(name: str) -> str:
    """Return which part of the memory an argument belongs to."""
    for start, part in (
        ("state.model.params", "parameters"),
        ("state.model.batch_stats", "batch statistics"),
        ("state.ema", "moving average"),
        ("state.extra", "other"),
        ("state.", "optimizer"),  # and a few counters
        ("batch", "input batch"),
    ):
        if name.startswith(start):
            return part
    return "other"


if __name__ == "__main__":
    main()
