"""The TPU kernels through the real TPU compiler: they compile, they fit, and they are not slower than they were.

Nothing runs: what is compared are the compiler's own schedules, whose limits are in ``cycle_budgets.json``.

To compile all of them takes a quarter of an hour, and gives the same as long as the kernels' sources, JAX and libtpu
are the same. So ``compiled_kernels.json`` records what the compiler made of them, with the SHA-256 of the sources and
the versions. What the record does not hold is compiled; five of what it holds are compiled again, chosen by the commit.
Only this script writes the record, from what it has compiled itself:

    python tests/kernels/test_tpu_compile.py               # records what is not recorded yet
    python tests/kernels/test_tpu_compile.py generations   # that of one job: training, detector or generations
    python tests/kernels/test_tpu_compile.py --budgets     # after a change that is meant to move the budgets

A selection of scans is compiled. All of them, for every TPU, take hours of processor time:

    pytest --every-scan tests/kernels/test_tpu_compile.py
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUDGETS = Path(__file__).with_name("cycle_budgets.json")
RECORD = Path(__file__).with_name("compiled_kernels.json")
TOLERANCE = 1.15  # cycles over those of the budget
JOBS = ("training", "detector", "generations")
SIZES = ("training", "detector")  # of images
AGAIN = 5  # recorded kernels that every run compiles again

# What decides a kernel's schedule, and what the models scan. Whatever else changes, these results stay.
KERNELS = (
    *(
        "pallas_kernels/contract.py",
        "pallas_kernels/dispatch.py",
        "pallas_kernels/orders.py",
        "pallas_kernels/tpu/*.py",
    ),
    *("evmamba_jax/preflight/aot.py", "evmamba_jax/preflight/kernels.py", "evmamba_jax/preflight/schedules.py"),
)
MODELS = ("evmamba_jax/models/*.py", "evmamba_jax/layers/*.py", "evmamba_jax/ops.py", "evmamba_jax/preflight/scans.py")


def digest(patterns):
    """Return the SHA-256 of the files that some patterns name."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        found.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return found.hexdigest()


# --------------------------------------------------------------------------------------------------------- the record


def read_record():
    """Return {"scans": {"sources", job: [scans]}, "kernels": {libtpu: {"sources", "jax", kernel: [its results]}}}."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {"scans": {}, "kernels": {}}


def write_record(record):
    kernels = []
    for version, own in sorted(record["kernels"].items()):
        lines = ",\n".join(f"   {json.dumps(key)}: {json.dumps(own[key])}" for key in sorted(own))
        kernels.append(f"  {json.dumps(version)}: {{\n{lines}\n  }}")
    scans = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record["scans"].items())
    text = ",\n".join(kernels)
    RECORD.write_text(f'{{\n "scans": {{\n{scans}\n }},\n "kernels": {{\n{text}\n }}\n}}\n')


def versions():
    return {"sources": digest(KERNELS), "jax": importlib.metadata.version("jax")}


def known_kernels(record):
    """Return the recorded kernels, if nothing has changed that decides them: {(generation, scan): [kernels]}."""
    from evmamba_jax.preflight.kernels import Kernel

    own = record["kernels"].get(libtpu_version(), {})
    found = {}
    if all(own.get(name) == value for name, value in versions().items()):
        for key, results in own.items():
            if key not in versions():
                kernel = Kernel(**dict(zip(("generation", "scan", "direction", "name"), key.split("|"), strict=True)))
                found.setdefault((kernel.generation, kernel.scan), []).append(dataclasses.replace(kernel, **results))
    return found


def to_record(kernel):
    """Return the key of a kernel in the record, and its results."""
    results = {name: getattr(kernel, name) for name in ("cycles", "spills", "vmem_bytes", "problem")}
    return "|".join((kernel.generation, kernel.scan, kernel.direction, kernel.name)), results


@functools.cache
def commit():
    """Return the commit's hash, or a constant where there is no git."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit"


# ------------------------------------------------------------------------------------------- which scans, by their text


def scans_of_job(job, record):
    """Return what a job compiles, pairs of a generation and a scan's text; changed models are traced for it."""
    from evmamba_jax.preflight import aot, kernels

    generation, _, size = job.partition(" ")
    if size:  # all scans of a generation
        return [(generation, scan) for scan in map(str, all_scans(size))]
    if job == "generations":
        others = [generation for generation in aot.GENERATIONS if generation != "v5e"]
        return [(generation, str(scan)) for generation in others for scan in kernels.HANDFUL]
    recorded = record["scans"]
    texts = recorded[job] if recorded.get("sources") == digest(MODELS) else selected(job)
    return [("v5e", text) for text in texts]


@functools.cache
def all_scans(size):
    from evmamba_jax.preflight.scans import model_scans

    return list(model_scans(detector=size == "detector"))


def selected(size):
    """Return the scans that stand for all: more channels are more blocks of nearly one program, so that few will do.

    Of all images with the same orders and states, these are the largest, where memory is short, and of a detector's the
    smallest, which are large enough.
    """
    from evmamba_jax.preflight.kernels import HANDFUL

    detector = size == "detector"
    scans = sorted(all_scans(size), key=lambda scan: (scan.visits, scan.channels))
    assert detector or set(HANDFUL) <= set(scans)  # no model has lost them
    alike = {}
    for scan in scans:
        alike.setdefault((scan.orders, scan.state), []).append(scan)
    return [
        str(group[0] if detector else next(scan for scan in group if scan.visits == group[-1].visits))
        for group in alike.values()
    ]


# ----------------------------------------------------------------------------------------------------------- compiling


def compile_here(wanted, result):
    """Compile kernels in this process, and write what became of them to a file.

    ``wanted`` holds pairs of a generation and a scan, or those with a direction and a kernel's name.
    """
    from evmamba_jax.preflight import aot, kernels

    with tempfile.TemporaryDirectory() as dump:
        aot.prepare(dump)
        found = []
        for generation, scan, *only in wanted:
            for kernel, call in kernels.trace(kernels.Scan.parse(scan), generation):
                if not only or only == [kernel.direction, kernel.name]:
                    found.append(kernel if call is None else kernels.compile_kernel(kernel, call, dump))
    Path(result).write_text(json.dumps([dataclasses.asdict(kernel) for kernel in found]))


def compile_elsewhere(wanted, folder):
    """Compile kernels in another process, for libtpu reads its options once, and return them."""
    from evmamba_jax.preflight.kernels import Kernel

    result = Path(folder) / "kernels.json"
    # What the cache of compiled programs returns has not been compiled, and has no schedule.
    variables = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    variables |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--compile", str(result)]
    done = subprocess.run(command, env=variables, input=json.dumps(wanted), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the process that compiles failed:\n{done.stderr[-5000:]}"
    return [Kernel(**kernel) for kernel in json.loads(result.read_text())]


def kernels_of(job, record, folder):
    """Return the kernels of a job: those of the record, and the others compiled."""
    known, scans = known_kernels(record), scans_of_job(job, record)
    missing = [scan for scan in scans if scan not in known]
    compiled = compile_elsewhere(missing, folder) if missing else []
    print(f"{job}: {len(scans) - len(missing)} scans are recorded, {len(missing)} were compiled")
    return [kernel for scan in scans for kernel in known.get(scan, [])] + compiled


def libtpu_version():
    return importlib.metadata.version("libtpu")


def complaints(kernels, budgets, version, *, selected=True):
    """Return a line for everything that is wrong with the kernels, by budgets {version: {kernel: [cycles, spills]}}.

    Those that were selected must have a budget; where all are compiled, the others only have to fit.
    """
    from evmamba_jax.preflight import aot

    own = budgets.get(version)
    known = {}  # of a version without budgets, the most spills of any other
    for limits in budgets.values() if own is None else [own]:
        for key, (_, spills) in limits.items():
            known[key] = max(spills, known.get(key, 0))
    write = "if that is meant: python tests/kernels/test_tpu_compile.py --budgets"
    for kernel in kernels:
        if kernel.problem and kernel.name != "portable":
            yield f"{kernel.key}: does not compile: {kernel.problem}"
            continue
        memory = aot.GENERATIONS[kernel.generation].vmem_bytes
        if kernel.vmem_bytes > memory:
            yield f"{kernel.key}: {kernel.vmem_bytes} bytes of VMEM, the chip has {memory}"
        if not selected and kernel.key not in known:
            continue
        if own is not None and kernel.key not in own:
            yield f"{kernel.key}: a kernel without a budget; {write}"
        elif kernel.spills > known.get(kernel.key, 0):
            limit = known.get(kernel.key, 0)
            yield f"{kernel.key}: {kernel.spills} spills in inner loops, the limit is {limit}; {write}"
        elif own is not None and kernel.cycles > TOLERANCE * own[kernel.key][0]:
            yield f"{kernel.key}: {kernel.cycles:.0f} cycles, the budget is {own[kernel.key][0]} + 15 %; {write}"


# ------------------------------------------------------------------------------------------------------------ the tests


def pytest_generate_tests(metafunc):
    from evmamba_jax.preflight import aot

    if "job" in metafunc.fixturenames:
        every = metafunc.config.getoption("every_scan")
        jobs = [f"{generation} {size}" for size in SIZES for generation in aot.GENERATIONS] if every else JOBS
        limit = pytest.mark.timeout(7200 if every else 1800)
        metafunc.parametrize("job", [pytest.param(job, marks=limit) for job in jobs])


@pytest.fixture
def libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('the TPU compiler is not installed (Linux on x86-64 only): pip install "jax[tpu]"')


@pytest.mark.usefixtures("libtpu")
def test_kernels_compile_and_keep_their_budgets(job, tmp_path):
    kernels = kernels_of(job, read_record(), tmp_path)
    for kernel in kernels:
        print(f"{kernel.key}: {kernel.problem or f'{kernel.cycles:,.0f} cycles, {kernel.spills} spills'}")
    assert {kernel.direction for kernel in kernels} >= {"forward", "backward"}
    budgets, version = json.loads(BUDGETS.read_text()), libtpu_version()
    wrong = list(complaints(kernels, budgets, version, selected=job in JOBS))
    assert not wrong, "\n".join(wrong)
    if version not in budgets:
        pytest.skip(
            f"all but cycles was checked: there are no budgets for libtpu {version}, only for {', '.join(budgets)}"
        )


@pytest.mark.usefixtures("libtpu")
def test_recorded_kernels_compile_to_what_is_recorded(tmp_path):
    """Five of them, others for every commit."""
    recorded = [kernel for own in known_kernels(read_record()).values() for kernel in own if kernel.name != "portable"]
    if not recorded:
        pytest.skip("nothing is recorded for these sources, JAX and libtpu: all kernels were compiled")
    chosen = random.Random(commit()).sample(recorded, AGAIN)
    wanted = [(kernel.generation, kernel.scan, kernel.direction, kernel.name) for kernel in chosen]
    compiled = dict(map(to_record, compile_elsewhere(wanted, tmp_path)))
    assert compiled == dict(map(to_record, chosen))


def test_a_change_of_a_source_or_a_version_is_not_in_the_record(monkeypatch):
    this = sys.modules[__name__]
    monkeypatch.setattr(this, "libtpu_version", lambda: "1")
    results = {"cycles": 7.0, "spills": 0, "vmem_bytes": 8, "problem": ""}
    own = {**versions(), "v4|scan|forward|name": results}
    record = {"scans": {}, "kernels": {"1": own}}
    ((key, [kernel]),) = known_kernels(record).items()
    assert key == ("v4", "scan")
    assert to_record(kernel) == ("v4|scan|forward|name", results)
    for change in versions():
        assert not known_kernels({"scans": {}, "kernels": {"1": own | {change: "another"}}})
    assert not known_kernels({"scans": {}, "kernels": {"2": own}})
    for pattern in (*KERNELS, *MODELS):
        assert list(ROOT.glob(pattern)), f"{pattern} names no file"


def test_scans_are_written_as_they_are_read():
    from evmamba_jax.preflight.kernels import HANDFUL, Scan
    from pallas_kernels import Chain, Order

    chain = Chain((Order((1, 0), (2, 3), reverse=True), Order((1, 0), (2, 3), column_major=True)))
    for scan in (*HANDFUL, Scan(1, 50, 80, 96, 3, 2, (chain, Order(column_major=True, reverse=True)))):
        assert Scan.parse(str(scan)) == scan


def test_every_limit_is_one():
    from evmamba_jax.preflight.kernels import Kernel

    good = Kernel("scan", "v4", "forward", "kernel", cycles=114.0, vmem_bytes=16 * 2**20, spills=3)
    portable = Kernel("scan", "v4", "both", "portable", problem="too large")
    limits = {"1": {good.key: [100, 3], portable.key: [0, 0]}}
    assert not list(complaints([good, portable], limits, "1"))
    assert not list(complaints([dataclasses.replace(good, cycles=1e9), portable], limits, "2"))
    for version, worse in (
        ("1", {"cycles": 116.0}),
        ("1", {"name": "new"}),
        ("1", {"name": "portable"}),
        ("1", {"spills": 4}),
        ("2", {"spills": 4}),
        ("2", {"vmem_bytes": 16 * 2**20 + 1}),
        ("2", {"problem": "refused"}),
    ):
        (line,) = complaints([dataclasses.replace(good, **worse)], limits, version)
        assert line.startswith("v4 scan forward")
    unknown = dataclasses.replace(good, name="new")
    assert not list(complaints([unknown], limits, "1", selected=False))
    assert list(complaints([dataclasses.replace(unknown, problem="refused")], limits, "1", selected=False))


# ----------------------------------------------------------------------------------------------------------- the script


def write(jobs, *, budgets):
    """Compile what is not recorded of some jobs and record it; with ``budgets``, let these be the limits."""
    record = read_record()
    if record["scans"].get("sources") != digest(MODELS):
        record["scans"] = {"sources": digest(MODELS), **{size: selected(size) for size in SIZES}}
    kernels = []
    for job in jobs:
        before = versions()
        with tempfile.TemporaryDirectory() as folder:
            kernels += kernels_of(job, record, folder)
        failed = [f"{k.key}: {k.problem}" for k in kernels if k.problem and k.name != "portable"]
        if failed:
            sys.exit("\n".join(["these are not recorded, for they do not compile:", *failed]))
        if versions() != before:
            sys.exit("not recorded: a source changed while its kernels were compiled")
        # After each job, and on top of what another process may have recorded by now.
        known = [kernel for own in known_kernels(read_record()).values() for kernel in own]
        record["kernels"] = read_record()["kernels"]
        record["kernels"][libtpu_version()] = versions() | dict(map(to_record, [*known, *kernels]))
        write_record(record)
    if budgets:
        write_budgets(kernels)
    wrong = list(complaints(kernels, json.loads(BUDGETS.read_text()), libtpu_version()))
    sys.exit("\n".join(wrong) if wrong else 0)


def write_budgets(kernels):
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    own = budgets.setdefault(libtpu_version(), {})
    own |= {kernel.key: [round(kernel.cycles), kernel.spills] for kernel in kernels}
    texts = []
    for version, limits in sorted(budgets.items()):
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(limit)}" for key, limit in sorted(limits.items()))
        texts.append(f"{json.dumps(version)}: {{\n{lines}\n }}")
    BUDGETS.write_text("{\n " + ",\n ".join(texts) + "\n}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--compile"]:
        compile_here(json.load(sys.stdin), sys.argv[2])
    else:
        write([job for job in JOBS if job in sys.argv[1:]] or JOBS, budgets="--budgets" in sys.argv[1:])
