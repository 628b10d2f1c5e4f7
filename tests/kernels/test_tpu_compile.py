"""The TPU kernels through the real TPU compiler: they compile, they fit, and they are not slower than they were.

Nothing runs: what is compared are the compiler's own schedules, whose limits are in ``cycle_budgets.json``. After a
change that is meant to move them, write that file again (for the libtpu that is installed):

    python tests/kernels/test_tpu_compile.py

A selection of scans is compiled. All of them, for every TPU, take hours of processor time:

    pytest --every-scan tests/kernels/test_tpu_compile.py
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUDGETS = Path(__file__).with_name("cycle_budgets.json")
TOLERANCE = 1.15  # cycles over those of the budget
JOBS = ("training", "detector", "generations")
SIZES = ("training", "detector")  # of images


def scans_of(job):
    """Return what a job compiles: pairs of a generation and a scan; those of one generation are all its scans."""
    from evmamba_jax.preflight import scans

    generation, _, size = job.partition(" ")
    if size:
        return [(generation, scan) for scan in scans.model_scans(detector=size == "detector")]
    if job == "generations":
        others = [generation for generation in scans.aot.GENERATIONS if generation != "v5e"]
        return [(generation, scan) for generation in others for scan in scans.HANDFUL]
    detector = job == "detector"
    scans = sorted(scans.model_scans(detector=detector), key=lambda scan: (scan.visits, scan.channels))
    assert detector or set(scans.HANDFUL) <= set(scans)  # no model has lost them
    # More channels are more blocks of nearly one program, so that the fewest stand for all. Of all images with the same
    # orders and states, here are the largest, where memory is short, and of a detector's the smallest, which are large
    # enough.
    alike = {}
    for scan in scans:
        alike.setdefault((scan.orders, scan.state), []).append(scan)
    chosen = [
        group[0] if detector else next(scan for scan in group if scan.visits == group[-1].visits)
        for group in alike.values()
    ]
    return [("v5e", scan) for scan in chosen]


def compile_job(job, result):
    """Write what became of every kernel of a job to a file; in a process of its own, for libtpu reads options once."""
    from evmamba_jax.preflight import aot

    with tempfile.TemporaryDirectory() as dump:
        aot.prepare(dump)
        from evmamba_jax.preflight import scans

        kernels = [k for generation, scan in scans_of(job) for k in scans.compile_scan(scan, generation, dump)]
    Path(result).write_text(json.dumps([dataclasses.asdict(kernel) for kernel in kernels]))


def run_job(job, folder):
    """Compile a job in another process and return its kernels."""
    from evmamba_jax.preflight import scans

    result = Path(folder) / f"{job}.json"
    # What the cache of compiled programs returns has not been compiled, and has no schedule.
    variables = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    variables |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, job, str(result)], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"the process that compiles failed:\n{done.stderr[-5000:]}"
    return [scans.Kernel(**kernel) for kernel in json.loads(result.read_text())]


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
    write = "if that is meant: python tests/kernels/test_tpu_compile.py"
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


def pytest_generate_tests(metafunc):
    from evmamba_jax.preflight import aot

    if "job" in metafunc.fixturenames:
        every = metafunc.config.getoption("every_scan")
        jobs = [f"{generation} {size}" for size in SIZES for generation in aot.GENERATIONS] if every else JOBS
        limit = pytest.mark.timeout(7200 if every else 1800)
        metafunc.parametrize("job", [pytest.param(job, marks=limit) for job in jobs])


def test_kernels_compile_and_keep_their_budgets(job, tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('the TPU compiler is not installed (Linux on x86-64 only): pip install "jax[tpu]"')
    from evmamba_jax.preflight import scans

    kernels = run_job(job, tmp_path)
    print("\n".join([*scans.table_head(), *map(scans.table_row, kernels)]))
    assert {kernel.direction for kernel in kernels} >= {"forward", "backward"}
    budgets, version = json.loads(BUDGETS.read_text()), libtpu_version()
    wrong = list(complaints(kernels, budgets, version, selected=job in JOBS))
    assert not wrong, "\n".join(wrong)
    if version not in budgets:
        pytest.skip(
            f"all but cycles was checked: there are no budgets for libtpu {version}, only for {', '.join(budgets)}"
        )


def test_every_limit_is_one():
    from evmamba_jax.preflight.scans import Kernel

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


def write_budgets():
    with tempfile.TemporaryDirectory() as folder:
        kernels = [kernel for job in JOBS for kernel in run_job(job, folder)]
    failed = [f"{kernel.key}: {kernel.problem}" for kernel in kernels if kernel.problem and kernel.name != "portable"]
    if failed:
        sys.exit("\n".join(["nothing written; these do not compile:", *failed]))
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    budgets[libtpu_version()] = {kernel.key: [round(kernel.cycles), kernel.spills] for kernel in kernels}
    versions = []
    for version, limits in sorted(budgets.items()):
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(limit)}" for key, limit in sorted(limits.items()))
        versions.append(f"{json.dumps(version)}: {{\n{lines}\n }}")
    BUDGETS.write_text("{\n " + ",\n ".join(versions) + "\n}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    compile_job(*sys.argv[1:]) if sys.argv[1:] else write_budgets()
