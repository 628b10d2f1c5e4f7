"""Static cycles of Pallas kernels, of a recorded schedule and of libtpu's own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evmamba_jax.preflight import schedules

HERE = Path(__file__).parent
RECORDED = HERE / "recorded"
ROWS = "1-when.1-00-post-bundle-packing-post-ra.txt"


def test_a_recorded_schedule():
    """Ten grid steps, in each a loop of 100 trips, and two pl.when; libtpu 0.0.52 for v5e, figures read off by hand."""
    schedule = schedules.read(RECORDED, "when", "v5e")
    assert schedule.grid == (10,)
    assert schedule.rows == 86
    # A window of (800, 128) float32 and one of (8, 128), both twice, and a scratch of (8, 128).
    assert schedule.vmem_bytes >= (2 * 800 + 8 + 8) * 128 * 4
    grid, loop = schedule.loops
    assert (grid.depth, grid.trips, grid.is_grid) == (0, 10, True)
    # 79 rows lie in the grid's loop (4 to 82), of which the inner one has 8 (56 to 63).
    assert (grid.rows, loop.rows) == (71, 8)
    assert (loop.depth, loop.trips, loop.is_grid) == (1, 100, False)
    assert loop.cycles == 10 * 100 * 8
    assert schedule.cycles == 10 * 71 + 10 * 100 * 8 + (86 - 79)
    assert grid.predicated > 0
    assert loop.predicated == 0
    assert loop.loads["VLOAD"] == 1 / (3 * 8)  # one load a trip; three a cycle are possible
    assert schedule.is_complete
    assert "estimate" in str(schedule)


def test_trips_can_be_given():
    schedule = schedules.read(RECORDED, "when", "v5e", trips={1: 2.5})
    assert schedule.cycles == 10 * 71 + 10 * 2.5 * 8 + 7
    with pytest.raises(ValueError, match="trips are given for loop 2, but when has 2 loops"):
        schedules.read(RECORDED, "when", "v5e", trips={2: 1})


def test_what_cannot_be_read_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no schedule of 'other' in .* \(there are: when.1\)"):
        schedules.read(RECORDED, "other", "v5e")
    with pytest.raises(ValueError, match="unknown generation 'v9'; allowed: v4, v5e"):
        schedules.read(RECORDED, "when", "v9")
    for file in RECORDED.glob("1-when*"):
        shutil.copy(file, tmp_path)
    text = (RECORDED / ROWS).read_text()
    (tmp_path / ROWS).write_text(text.replace("region range", "rows"))
    with pytest.raises(ValueError, match="is not written as by libtpu 0.0.42 to 0.0.52.*lists no regions"):
        schedules.read(tmp_path, "when", "v5e")
    (tmp_path / ROWS).write_text(text.replace("loop_header_branch", "loop_end"))
    with pytest.raises(ValueError, match="is not written as by libtpu.*no branch back"):
        schedules.read(tmp_path, "when", "v5e")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install -e '.[tpu]'")
    command = [sys.executable, str(HERE / "scheduled_kernels.py"), str(tmp_path_factory.mktemp("dump"))]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("generation", ["v5e", "v4"])
def test_loops_of_the_real_compiler(compiled, generation):
    (loop,) = compiled[f"offset {generation}"]["loops"]
    assert loop["trips"] == 70
    assert 2 <= loop["rows"] < 20
    outer, inner = compiled[f"nested {generation}"]["loops"]
    assert (outer["trips"], outer["depth"], inner["trips"], inner["depth"]) == (7, 0, 50, 1)
    assert inner["cycles"] == 7 * 50 * inner["rows"]
    (loop,) = compiled[f"dynamic {generation}"]["loops"]
    assert loop["trips"] is None
    assert "at least" in compiled[f"dynamic {generation}"]["text"]


def test_told_trips_complete_a_loop(compiled):
    (loop,) = compiled["dynamic v4, told"]["loops"]
    assert loop["cycles"] == 100 * loop["rows"]


@pytest.mark.parametrize(("generation", "unit"), [("v5e", ("MATMUL", "MXU")), ("v4", ("MATMUL", "MXU"))])
def test_the_matrix_units_do_the_work_there_is(compiled, generation, unit):
    """1024^3 multiply-adds are 16,384 passes of 8 rows through four units of 128x128, whatever the compiler does."""
    schedule = compiled[f"product {generation}"]
    grid = schedule["loops"][0]
    assert (grid["trips"], grid["is_grid"], schedule["grid"]) == (32, True, [4, 4, 2])
    load = next(grid["loads"][name] for name in unit if name in grid["loads"])  # its name changed with libtpu
    assert load * grid["cycles"] == pytest.approx(1024**3 / (4 * 128 * 128), rel=0.02)
    assert schedule["cycles"] >= 1024**3 / (4 * 128 * 128)


@pytest.mark.parametrize("generation", ["v5e", "v4"])
def test_spills_are_seen(compiled, generation):
    (loop,) = compiled[f"crowded {generation}"]["loops"]
    assert loop["spills"] > 0
    assert loop["fills"] > 0
    assert compiled[f"offset {generation}"]["loops"][0]["spills"] == 0


def test_prepare_comes_first():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install -e '.[tpu]'")
    code = (
        "from evmamba_jax.preflight import aot\naot.prepare()\naot.prepare()\n"
        "try: aot.prepare('later')\nexcept RuntimeError as error: print(error)"
    )
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "aot.prepare('later') comes too late" in done.stdout
