"""The process that compiles: it builds the trainer's step from shapes, has it compiled, and writes down what it finds.

It runs apart from the command because libtpu reads its options when it is loaded, and because a compiler that runs out
of memory takes its process with it. Its answers are lines of JSON on standard output: ``{"stage": ...}`` as it goes on,
and at last ``{"facts": ...}`` or ``{"error": ...}``.
"""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from evmamba_jax.errors import UserError
from evmamba_jax.preflight import aot, gpu, hlo, schedules
from evmamba_jax.tasks import task_of
from evmamba_jax.training import parse_command
from evmamba_jax.training.mesh import make_mesh
from evmamba_jax.training.setup import Setup

LARGEST = 8  # arrays and places in the code that a report lists


@dataclasses.dataclass
class Request:
    """What to compile.

    Attributes:
        arguments: the command line of ``train_tpu.py`` without its name: ``--config FILE --config.NAME=VALUE ...``.
        topology: a TPU topology's or a GPU's name.
        batch_per_device: replaces config.batch_size where it is not 0.
        export: a file for the lowered step, or "".
        schedules: whether to read the schedules of the step's Pallas kernels.
        kernels: a file that holds such kernels, from the process that compiles their step: read their schedules, and
            compile nothing else.
    """

    arguments: list[str]
    topology: str
    batch_per_device: int = 0
    export: str = ""
    schedules: bool = True
    kernels: str = ""


def main() -> None:
    """Serve the request in the last argument."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is no answer
    tell = lambda **words: print(json.dumps(words), file=answers)  # noqa: E731
    request = Request(**json.loads(sys.argv[-1]))
    try:
        tell(facts=kernel_facts(request) if request.kernels else step_facts(request, tell))
    except (UserError, ImportError) as error:
        tell(error=str(error))
    except Exception as error:  # a fault of the program that is checked, or of this one: where, and what
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:500]
        tell(error=f"the step cannot be built: {type(error).__name__}: {text} ({place.filename}:{place.lineno})")
        raise


def step_facts(request: Request, tell) -> dict[str, Any]:
    """Build, lower, compile and read the step."""
    config, _ = parse_command(["train_tpu.py", *request.arguments])
    tell(stage=f"describing {request.topology}")
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
    kernels = list(hlo.stablehlo_kernels(lowered)) if request.schedules else []
    with _reading(request, kernels) as schedules:
        tell(stage=f"compiling for {mesh.size} devices")
        started = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return facts | {"refusal": refusal(str(error)), "compile_seconds": time.perf_counter() - started}
        facts["compile_seconds"] = time.perf_counter() - started
        tell(stage="reading what the compiler made")
        return facts | compiled_facts(compiled, facts) | schedules()


@contextlib.contextmanager
def _reading(request: Request, kernels: list[Any]) -> Iterator[Callable[[], dict[str, Any]]]:
    """Have the schedules of kernels read by another process, beside this one; yield what waits for its facts."""
    if not kernels:
        yield dict
        return
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(kernels, file)
        file.flush()
        request = dataclasses.replace(request, kernels=file.name)
        # --fast is for XLA's part of the step.
        environment = {name: value for name, value in os.environ.items() if name != "JAX_OPTIMIZATION_LEVEL"}
        command = [sys.executable, "-m", "evmamba_jax.preflight.program", json.dumps(dataclasses.asdict(request))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

        def facts() -> dict[str, Any]:
            answers, _ = process.communicate()
            answer = json.loads((answers.splitlines() or ["{}"])[-1])
            if "facts" not in answer:
                death = f"the reader of kernels ended with code {process.returncode}; is there memory for it?"
                raise UserError(answer.get("error", death))
            return answer["facts"]

        try:
            yield facts
        finally:
            process.kill()
            process.wait()


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
        # Of one device: half a tpu7x, a whole one of the others.
        "hbm_bandwidth": generation.hbm_bandwidth / generation.devices_per_chip,
        "link_bandwidth": generation.ici_bandwidth / generation.devices_per_chip / 2,  # one direction
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


def compiled_facts(compiled: jax.stages.Compiled, facts: dict[str, Any]) -> dict[str, Any]:
    """Read memory, exchanges, cycles and kernels of a compiled step."""
    program = hlo.parse(compiled.as_text() or "")
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
        "cycles": sum(hlo.cycles(run) * run.times for run in runs),
        "slowest": [dataclasses.asdict(slow) for slow in hlo.slowest(program, runs)[:LARGEST]],
        "unknown_loops": len(unknown),
        "kernels": hlo.pallas_calls(runs),
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


# Types as StableHLO, HLO and NumPy write them.
_TYPES = {
    **{"f32": ("f32", "float32"), "bf16": ("bf16", "bfloat16"), "f16": ("f16", "float16"), "i1": ("pred", "bool")},
    **{f"i{bits}": (f"s{bits}", f"int{bits}") for bits in (8, 16, 32)},
    **{f"ui{bits}": (f"u{bits}", f"uint{bits}") for bits in (8, 16, 32)},
}


def kernel_facts(request: Request) -> dict[str, Any]:
    """Compile each Pallas kernel of a step by itself, which is how its schedule can be had, and read its cycles."""
    with open(request.kernels) as file:
        kernels = json.load(file)
    import resource  # which is there where libtpu is

    generation = aot.topology(request.topology).generation
    found = []
    with tempfile.TemporaryDirectory() as folder:
        aot.prepare(folder)
        for name, arguments, results, config in kernels:
            shapes = [[jax.ShapeDtypeStruct(shape, _TYPES[kind][1]) for shape, kind in v] for v in (arguments, results)]
            call = jax.ffi.ffi_call(
                "tpu_custom_call",
                shapes[1],
                custom_call_api_version=1,
                legacy_backend_config=config,
                has_side_effect=True,  # nobody reads what it makes
            )
            aot.compile_for(generation.name, call, *shapes[0])
            schedule = schedules.read(folder, "ffi_call", generation.name)  # the newest: the one just compiled
            spills = sum(loop.spills for loop in schedule.loops)
            types = [f"{_TYPES[kind][0]}[{','.join(map(str, shape))}]" for shape, kind in results]
            found.append(
                {
                    "name": name,
                    "types": types,
                    "cycles": schedule.cycles,
                    "is_complete": schedule.is_complete,
                    "vmem": schedule.vmem_bytes,
                    "spills": spills,
                    "busiest": max(schedule.loops, key=lambda loop: loop.cycles).busiest if schedule.loops else None,
                }
            )
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"schedules": found, "reader_rss": peak}


if __name__ == "__main__":
    main()
