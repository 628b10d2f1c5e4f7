"""Everything that is open on a GPU, in one run of nine minutes: correctness, train steps, scans, inference.

    python benchmarks/gpu_all.py [--cache FOLDER] [--peer-python PYTHON] [--clones FOLDER] [--budget 540] [--out FILE]
    JAX_PLATFORMS=cpu python benchmarks/gpu_all.py --dry     # on any machine: every row, but nothing is measured

CONTRIBUTING.md, "Measure on a GPU", makes the environment of the peers. Each row is a process with a limit of seconds,
and is written when it is done: what crashes or hangs loses its own row. The first row compares the kernels' results and
gradients with loops in float64; if they are wrong, no time of theirs is measured. Rows that no longer fit the budget
are not measured, and say so.

``--cache`` keeps what XLA has compiled, and can be carried to another machine of the same GPU and the same versions:
the keys of its entries name no path.

A train step is one update as ``python -m evmamba_jax.analysis throughput`` makes it, of both sides: forward, backward,
clipping, AdamW and moving average, in bfloat16 from float32 parameters. Ours starts from uint8 images on the GPU, which
it normalises, erases and mixes; the official code, under autocast, is given images and soft targets that are ready, no
loss is read back, and its moving average is one call where its own trainers loop: all in its favour.

``--dry`` lowers the scans for an H200, interprets one kernel, and traces the models. It runs peers of PyTorch that are
given on the CPU, and leaves out jax-linear-attention.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib import gpu_scans

from evmamba_jax.errors import UserError
from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report
from evmamba_jax.measuring.rounds import spread, steps_for, warmed_up

ROOT = Path(__file__).parents[1]
TORCH_SCANS, COMPARISON = ROOT / "benchmarks/lib/torch_scans.py", ROOT / "tests/kernels/compare_gpu.py"
BATCH, SECONDS = gpu_scans.BATCH, 4.0
LEAST = 15.0  # seconds that no row begins with less of
# By our model the authors' code: a folder of --clones, and its name for the model there.
OFFICIAL = {
    "evmamba_t": ("EfficientVMamba", "vssm_efficient_tiny"),
    "vmamba_t": ("VMamba", "vmambav2v_tiny_224"),
    "vim_s": ("Vim", "vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"),
    "msvmamba_t": ("MSVMamba", "vssm_tiny_224_ms"),
    "mambavision_t": ("MambaVision", "mamba_vision_T"),
}
WIDE = [shape for shape, sizes in gpu_scans.SHAPES.items() if sizes[-1] == 16]
NARROW = [shape for shape, sizes in gpu_scans.SHAPES.items() if sizes[-1] == 1]
CHAINS = [*reversed(NARROW)]  # the stages at which the chain was nearest come first
OURS, MAMBA_SSM, LINEAR_ATTENTION = "ours", "mamba-ssm", "jax-linear-attention"
OTHERS = " of the other official codes"


class Row(NamedTuple):
    """Something to measure.

    Attributes:
        section: of the report.
        what: model or shape.
        side: ours, or whose code.
        call: the function of this file that measures, and its arguments.
        limit: seconds.
        goal: what the figures should reach.
    """

    section: str
    what: str
    side: str
    call: tuple[str, ...]
    limit: float
    goal: str = ""


class Settings(NamedTuple):
    """Where the peers are, and whether anything is measured.

    Attributes:
        python: of the environment with PyTorch.
        clones: folder of the official repositories.
        dry: nothing is measured.
    """

    python: str
    clones: str
    dry: bool


MODELS = (
    "model",
    "whose",
    ("ms a step", "{:.2f}"),
    ("images/s", "{:,.0f}"),
    ("quartiles", "{:,.0f} to {:,.0f}"),
    ("peak memory, GiB", "{:.2f}"),
    ("compile, s", "{:.0f}"),
    ("ours over it", "{:.2f}"),
    "goal",
)
SCANS = (
    "shape",
    "whose",
    ("forward, ms", "{:.3f}"),
    ("ours over it", "{:.2f}"),
    ("backward, ms", "{:.3f}"),
    ("ours over it", "{:.2f}"),
    "goal",
)
SHARES = (
    "shape",
    "whose",
    ("forward, ms", "{:.3f}"),
    ("share of a copy", "{:.0%}"),
    ("backward, ms", "{:.3f}"),
    ("share of a copy", "{:.0%}"),
    "goal",
)
# By heading the columns, and what is said below.
SECTIONS: dict[str, tuple[Sequence[Any], str]] = {
    "Correctness": (
        ("scan", "against", ("largest error over its limit", "{:.2f}"), "of", "goal"),
        "Results and gradients of both kernels at small sizes, `tests/kernels/compare_gpu.py`.",
    ),
    "Train steps": (MODELS, f"{BATCH} images of 224 px, bfloat16. Of the official code, ours over it is images/s."),
    "Scans alone, N = 16": (SCANS, "Step sizes, B and C are ready. A peer's ratio is its time over ours."),
    "Scans alone, N = 1": (
        SHARES,
        "Share of a copy: the bytes that a scan must move over its time (forward u, step size and y; backward u, step "
        "size, dy and the gradients of u and step size; y, dy and the gradient of u are float32), over the bandwidth "
        "of a copy of 1 GiB.",
    ),
    "VMamba's chain": (SCANS, "Ours is `scan2d`: cross-scan, projections, scan and cross-merge in one."),
    "Inference": (MODELS, f"{BATCH} images of 224 px, bfloat16."),
    f"Train steps{OTHERS}": (MODELS, "Ours are the train steps above."),
}


def rows() -> Iterator[Row]:
    """Yield all rows, what matters most first."""
    yield Row("Correctness", "scan2d, selective_scan", "loops in float64", ("correctness",), 150, "below 1")
    models = [*OFFICIAL]
    twice = {"evmamba_t": "at least 2"}
    for model in models:
        # Where nothing is cached yet, most of it is compilation; what is cut off would be compiled again.
        yield Row("Train steps", model, OURS, ("model", model, "training"), 150)
    for model in models[:2]:
        call = ("official", model, "training")
        yield Row("Train steps", model, OFFICIAL[model][0], call, 60, twice.get(model, ""))
    scans = "Scans alone, N = 16"
    for shape in WIDE:
        yield Row(scans, shape, OURS, ("scan", "alone", shape), 60)
        yield Row(scans, shape, MAMBA_SSM, ("torch_scan", "alone", shape), 40, "at least 1.9")
        yield Row(scans, shape, LINEAR_ATTENTION, ("scan", "linear_attention", shape), 120, "at least 1.0")
    for shape in NARROW:
        yield Row("Scans alone, N = 1", shape, OURS, ("scan", "share_of_copy", shape), 60, "at least 85 %")
    for shape in CHAINS:
        yield Row("VMamba's chain", shape, OURS, ("scan", "whole", shape), 60)
        yield Row("VMamba's chain", shape, MAMBA_SSM, ("torch_scan", "chain", shape), 40, "at least 3")
    for model in models:
        yield Row("Inference", model, OURS, ("model", model, "inference"), 60)
        yield Row("Inference", model, OFFICIAL[model][0], ("official", model, "inference"), 40)
    for model in models[2:]:
        yield Row(f"Train steps{OTHERS}", model, OFFICIAL[model][0], ("official", model, "training"), 60)


# ---------------------------------------------------------------------------------------------------------------------
# What measures a row, in a process of its own. Each returns facts: numbers, or ``missing``, what is not there.


def correctness(settings: Settings) -> dict[str, Any]:
    """Compare the kernels with float64; in a dry run the forward pass of one, interpreted."""
    return answer([sys.executable, str(COMPARISON), *(("--interpret", "--only", "both") if settings.dry else ())])


def answer(command: Sequence[str]) -> dict[str, Any]:
    """Return what a program prints last, JSON."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    with contextlib.suppress(ValueError, IndexError):
        return json.loads(done.stdout.splitlines()[-1])
    raise UserError(f"{Path(command[1]).name} ended without an answer, with code {done.returncode}")


def model(settings: Settings, name: str, mode: str) -> dict[str, Any]:
    """Measure steps of a model of ours."""
    from evmamba_jax.analysis import speed

    batch = 2 if settings.dry else BATCH
    prepare = traced if settings.dry else speed.prepare
    program = prepare(name, batch=batch, dtype="bfloat16", mode=mode)
    return rates(program.measure, batch, settings) | {
        "memory": program.result([1.0], 1, None).memory / 2**30,
        "compile": program.compile_seconds,
    }


def rates(measure: Callable[[int], float], batch: int, settings: Settings) -> dict[str, Any]:
    """Return images a second of steps; ``measure`` returns the mean seconds of so many."""
    count, steps = steps_for(0.01 if settings.dry else SECONDS, warmed_up(measure), 10)
    median, low, high = spread([measure(steps) for _ in range(count)])
    return {"batch": batch, "rate": batch / median, "quartiles": (batch / high, batch / low)}


def traced(name: str, *, batch: int, dtype: str, mode: str) -> Any:
    """Trace a model in evaluation, whatever the mode, and return a step that does nothing."""
    from evmamba_jax.analysis.speed import Program

    forward_shape(name, batch, dtype)
    return Program(lambda: time.sleep(1e-4), batch=batch, needed=0, compile_seconds=0.0, multiply_adds=0)


@functools.cache
def forward_shape(name: str, batch: int, dtype: str) -> tuple[int, ...]:
    """Return the shape of what a model makes of images."""
    import jax

    from evmamba_jax.analysis.speed import DTYPES
    from evmamba_jax.arrays import merge, split
    from evmamba_jax.models.registry import abstract_model, input_size

    graphdef, *parameters = split(abstract_model(name, dtype=DTYPES[dtype]))

    def forward(parameters: Any, images: jax.Array) -> jax.Array:
        module = merge(graphdef, *parameters)
        module.eval()
        return module(images)

    side = input_size(name)[0]
    return jax.eval_shape(forward, parameters, jax.ShapeDtypeStruct((batch, side, side, 3), DTYPES["float32"])).shape


def official(settings: Settings, name: str, mode: str) -> dict[str, Any]:
    """Measure steps of the authors' code, in the environment with PyTorch."""
    from evmamba_jax.analysis.peers import Peers

    folder, theirs = OFFICIAL[name]
    if not settings.clones:
        return {"missing": "--clones is not given"}
    clone = Path(settings.clones, folder).resolve()
    if not clone.is_dir():
        return {"missing": f"there is no {clone}"}
    peer = f"official:{clone}:{theirs}"
    device, batch = ("cpu", 1) if settings.dry else ("cuda", BATCH)
    peers = Peers(settings.python, [peer], threads=machine.threads(), device=device)
    with contextlib.closing(peers):
        memory = peers.load(peer, batch=batch, size=224, dtype="bfloat16", mode=mode)
        return rates(functools.partial(peers.measure, peer), batch, settings) | {"memory": (memory or 0) / 2**30}


def scan(settings: Settings, function: str, shape: str) -> dict[str, Any]:
    """Time a scan on our side: what a function of ``lib/gpu_scans.py`` makes of a shape."""
    device = gpu_scans.Described() if settings.dry else gpu_scans.AtHand()
    return getattr(gpu_scans, function)(shape, device)


def torch_scan(settings: Settings, what: str, shape: str) -> dict[str, Any]:
    """Time a scan of PyTorch, in its environment."""
    orders, height, width, channels, rank, state = gpu_scans.SHAPES[shape]
    request = {
        "what": what,
        "runs": 1 if settings.dry else gpu_scans.RUNS,
        "device": "cpu" if settings.dry else "cuda",
        "batch": 1 if settings.dry else BATCH,
        "height": height,
        "width": width,
        "sets": len(orders),
        "channels": channels,
        "rank": rank,
        "state": state,
        "length": orders[0].length(height, width),
    }
    return answer([settings.python, str(TORCH_SCANS), json.dumps(request)])


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function for function in (correctness, model, official, scan, torch_scan)
}


def facts_of(call: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Return the facts of a row, measured in this process."""
    name, *arguments = call
    try:
        return MEASURES[name](settings, *arguments)
    except UserError as error:
        return {"failure": str(error)}


# ---------------------------------------------------------------------------------------------------------------------
# The run


def in_process(command: Sequence[str], limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """Return what a process prints last, JSON, or why there is nothing; what it started ends with it.

    Args:
        command: program and arguments.
        limit: seconds after which it is killed.
        environment: its variables.
    """
    with tempfile.TemporaryFile("w+") as errors:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, env=environment, stdout=pipe, stderr=errors, text=True, start_new_session=True
        )
        try:
            printed, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return {"failure": f"not done after {limit:.0f} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    print(*said[-20:], sep="\n", file=sys.stderr)
    if process.returncode:
        return {"failure": f"failed with code {process.returncode}: {said[-1][:150] if said else 'it said nothing'}"}
    with contextlib.suppress(ValueError, IndexError):
        return json.loads(printed.splitlines()[-1])
    return {"failure": "ended without an answer"}


def environment(cache: Path | None) -> dict[str, str]:
    """Return the variables of a row's process.

    Args:
        cache: folder of what XLA has compiled.
    """
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    variables |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # PyTorch is on the same GPU
    if cache is None:
        return variables
    return variables | {
        "JAX_COMPILATION_CACHE_DIR": str(cache.resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # XLA's own caches are named by their path in the key of an entry, and the places of a kernel's source lines
        # are in its code: without them the key is the same on another machine.
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
        "JAX_HLO_SOURCE_FILE_CANONICALIZATION_REGEX": ".*/",
    }


def cells(row: Row, facts: dict[str, Any], ours: dict[str, Any]) -> list[Any]:
    """Return the cells of a row.

    Args:
        row: it.
        facts: what was measured.
        ours: what was measured of ours beside it; empty where that is the row, or was not measured.
    """
    columns, _ = SECTIONS[row.section]
    why = facts.get("missing") or facts.get("failure") or facts.get("wrong")
    if why:
        said = f"wrong: {why}" if "wrong" in facts else f"not measured: {why}"
        return [row.what, row.side, said, *[None] * (len(columns) - 4), row.goal]
    if row.section == "Correctness":
        figures = [facts["worst"], facts["of"]]
    elif columns is MODELS:
        over = ours["rate"] / facts["rate"] if ours else None
        step = 1e3 * facts["batch"] / facts["rate"]
        figures = [step, facts["rate"], facts["quartiles"], facts["memory"], facts.get("compile"), over]
    else:
        figures = []
        for way in gpu_scans.MOVED:
            share = facts[f"share {way}"] if columns is SHARES else None
            figures += [facts[way], facts[way] / ours[way] if ours else share]
    return [row.what, row.side, *figures, row.goal]


def measure_all(
    report: Report, measure: Callable[[Row, float], dict[str, Any]], budget: float, *, dry: bool, refusal: str = ""
) -> None:
    """Measure all rows that fit the budget, and write down all.

    Args:
        report: grows by a row after the other.
        measure: returns the facts of a row within so many seconds.
        budget: seconds of all rows.
        dry: whether figures are made up, and so not written.
        refusal: why nothing can be measured, if so.
    """
    end, section = time.monotonic() + budget, None
    ours: dict[tuple[str, str], dict[str, Any]] = {}
    unproven = ""  # why ours are not measured
    for row in rows():
        if row.section != section:
            section = row.section
            columns, text = SECTIONS[section]
            report.heading(section)
            report.text(text)
            report.table(*columns)
        left = end - time.monotonic()
        why = refusal or ("no time left" if left < LEAST else unproven if row.side == OURS else "")
        facts = {"failure": why} if why else measure(row, min(row.limit, left))
        known = not {"failure", "missing", "wrong"} & facts.keys()
        if row.section == "Correctness" and not known:
            unproven = "the kernels are not known to be right"
        key = row.section.removesuffix(OTHERS), row.what
        if row.side == OURS and known:
            ours[key] = facts
        written = cells(row, facts, ours.get(key, {}) if row.side != OURS else {})
        report.row(*("tried" if dry and cell is not None and not isinstance(cell, str) else cell for cell in written))


def gpu_name(variables: dict[str, str]) -> str:
    """Return the name of the GPU that JAX sees; "" if there is none."""
    code = "import json, jax; d = jax.devices()[0]; print(json.dumps(d.device_kind if d.platform == 'gpu' else ''))"
    found = in_process([sys.executable, "-c", code], 60, variables)
    return found if isinstance(found, str) else ""


def peers_versions(python: str) -> dict[str, str]:
    """Return the versions of what the peers need, in their environment."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = in_process([python, "-c", code], 60, dict(os.environ))
    named = {name.lower().replace("_", "-"): version for name, version in found.items()}
    return {package: named[package] for package in ("torch", "timm", "mamba-ssm") if package in named}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep what XLA has compiled here")
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PYTHON", help="interpreter with torch, timm and mamba-ssm"
    )
    parser.add_argument("--clones", default="", metavar="FOLDER", help="folder of the official repositories")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="of all rows (default 540)")
    parser.add_argument("--dry", action="store_true", help="try every row on this machine; nothing is measured")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if shutil.which(options.peer_python) is None:
        parser.error(f"--peer-python {options.peer_python} is no program: name the interpreter with torch")
    if options.one:
        call, settings = json.loads(options.one)
        print(json.dumps(facts_of(call, Settings(*settings))))
        return
    began = time.monotonic()
    settings = Settings(options.peer_python, options.clones, options.dry)
    variables = environment(options.cache)

    def measure(row: Row, limit: float) -> dict[str, Any]:
        if settings.dry:
            return facts_of(row.call, settings)
        command = [sys.executable, __file__, "--one", json.dumps([row.call, settings])]
        return in_process(command, limit, variables)

    name = "" if settings.dry else gpu_name(variables)
    report = Report(
        "A dry run: nothing was measured" if settings.dry else "Everything on a GPU",
        options.out,
        machine=name or "no GPU",
        versions=machine.versions("Python", "jax", "jaxlib", "flax", "jax-linear-attention")
        | peers_versions(settings.python),
        date=machine.today(),
    )
    report.text(
        "Times are medians; how many times as fast ours is, and its goal, stand beside a peer's. Written by "
        "`benchmarks/gpu_all.py`, which says what a train step is; `gpu_scan.md` has figures of November 2026."
    )
    refusal = "" if name or settings.dry else "there is no GPU here"
    left = options.budget - (time.monotonic() - began)
    measure_all(report, measure, left, dry=settings.dry, refusal=refusal)


if __name__ == "__main__":
    main()
