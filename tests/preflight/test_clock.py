"""Times of compiled programs: those of the real compiler, and texts whose figures are worked out by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evmamba_jax.preflight import hlo, schedules
from evmamba_jax.preflight.aot import GENERATIONS
from evmamba_jax.preflight.clock import Timed, _Schedules, bandwidth, clock

HERE = Path(__file__).parent
RATE = 0.8 * 819e9  # bytes/s of a v5e that count as attainable
V5E_PEAK = 197e12


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install -e '.[tpu]'")
    command = [sys.executable, str(HERE / "clocked_programs.py"), str(tmp_path_factory.mktemp("dump"))]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_matrix_product(compiled):
    items = compiled["product"]
    (product,) = (item for item in items if item["kind"] == "matrix products")
    assert product["schedule"] == pytest.approx(2 * 4096 * 1024 * 1024 / V5E_PEAK, rel=0.25)
    assert product["unit"] == "MXU"
    assert sum(item["bytes"] for item in items) == 2 * (4096 * 1024 + 1024 * 1024 + 4096 * 1024)


def test_a_loop_counts_with_its_trips_and_its_slices(compiled):
    (product,) = (item for item in compiled["scanned"] if item["kind"] == "matrix products")
    assert product["runs"] == 5
    assert product["schedule"] == pytest.approx(5 * 2 * 1024 * 512 * 512 / V5E_PEAK, rel=0.25)
    # Each trip reads a slice of the weights, all of them once; what is carried stays on the chip.
    assert product["bytes"] == 5 * 512 * 512 * 2


def test_equal_instructions_take_the_same_time(compiled):
    first, second = (item for item in compiled["twice"] if item["kind"] == "others")
    assert len({first["name"], second["name"]} & set(compiled["written"])) == 1  # the compiler wrote only one of them
    assert first["schedule"] == second["schedule"] > 0


def test_a_guarded_loop_runs_as_often_as_the_guard_lets_it(compiled):
    (kernel,) = (item for item in compiled["guarded"] if item["kind"] == "kernels")
    grid, loop = compiled["loops"]
    assert (grid["trips"], loop["trips"], loop["predicated"]) == (8, 60, loop["rows"])
    outside = compiled["rows"] - grid["rows"] - loop["rows"]
    cycles = outside + 8 * grid["rows"] + 2 * 60 * loop["rows"]  # twice in a grid of 2 x 4
    assert kernel["schedule"] * GENERATIONS["v5e"].clock == pytest.approx(cycles)


SLICE = 1024 * 128 * 4  # bytes
TEXT = """HloModule jit_f, is_scheduled=true

%sliced (p: f32[10,1024,128], i: s32[]) -> f32[1024,128] {
  %p = f32[10,1024,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %z = s32[]{:T(128)S(6)} constant(0)
  %d = f32[1,1024,128]{2,1,0:T(8,128)} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,1024,128}
  ROOT %b = f32[1024,128]{1,0:T(8,128)S(1)} bitcast(%d)
}

%replaced (q: f32[10,1024,128], v: f32[1024,128], j: s32[]) -> f32[10,1024,128] {
  %q = f32[10,1024,128]{2,1,0:T(8,128)} parameter(0)
  %v = f32[1024,128]{1,0:T(8,128)S(1)} parameter(1)
  %j = s32[]{:T(128)S(6)} parameter(2)
  %w = f32[1,1024,128]{2,1,0:T(8,128)} bitcast(%v)
  ROOT %u = f32[10,1024,128]{2,1,0:T(8,128)} dynamic-update-slice(%q, %w, %j, %j, %j)
}

%summed (s: f32[10,1024,128]) -> f32[1024,128] {
  %s = f32[10,1024,128]{2,1,0:T(8,128)} parameter(0)
  %zero = f32[]{:T(128)} constant(0)
  ROOT %r = f32[1024,128]{1,0:T(8,128)S(1)} reduce(%s, %zero), dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[4096,128], y: f32[10,1024,128], k: s32[]) -> f32[10,1024,128] {
  %x = f32[4096,128]{1,0:T(8,128)} parameter(0)
  %y = f32[10,1024,128]{2,1,0:T(8,128)} parameter(1)
  %k = s32[]{:T(128)S(6)} parameter(2)
  %copy-start = (f32[4096,128]{1,0:T(8,128)S(1)}, f32[4096,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %cut = f32[1024,128]{1,0:T(8,128)S(1)} fusion(%y, %k), kind=kLoop, calls=%sliced
  %put = f32[10,1024,128]{2,1,0:T(8,128)} fusion(%y, %cut, %k), kind=kLoop, calls=%replaced
  %copy-done = f32[4096,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %total = f32[1024,128]{1,0:T(8,128)S(1)} fusion(%put), calls=%summed, metadata={op_name="jit(f)/transpose(jvp())/sum"}
  %slice-start = ((f32[10,1024,128]{2,1,0:T(8,128)}), f32[2,1024,128]{2,1,0:T(8,128)S(1)}, s32[]) slice-start(%put)
  %slice-done = f32[2,1024,128]{2,1,0:T(8,128)S(1)} slice-done(%slice-start)
  ROOT %out = f32[10,1024,128]{2,1,0:T(8,128)} copy(%put)
}
"""


def clocked(folder: Path, text: str = TEXT) -> dict[str, Timed]:
    return {item.name: item for item in clock(hlo.parse(text), folder, "v5e")}


def test_bytes_are_those_that_are_read_and_written(tmp_path):
    items = clocked(tmp_path)
    moved = {name: item.bytes // SLICE for name, item in items.items()}
    # Of a slice the slice, of a whole the whole; of what is replaced the part that is.
    assert moved == {"copy-start": 4, "cut": 1, "put": 1, "total": 10, "slice-start": 2, "out": 20}
    assert {name: item.kind for name, item in items.items()} == {
        **{"copy-start": "transfers", "slice-start": "transfers", "cut": "copies", "put": "copies", "out": "copies"},
        "total": "reductions",
    }
    assert items["total"].direction == "backward"
    for name, item in items.items():  # nothing computes, so nothing hides a transfer
        assert item.seconds == pytest.approx(moved[name] * SLICE / RATE), name


@pytest.mark.parametrize(("idle", "left"), [(0.0, 4.0), (3.0, 1.0), (9.0, 0.0)])
def test_a_transfer_goes_on_while_memory_is_idle(tmp_path, monkeypatch, idle, left):
    """Four slices are on their way while an instruction computes for as long as so many slices take, beyond its own."""
    generation = GENERATIONS["v5e"]
    cycles = (1 + idle) * SLICE / RATE * generation.clock
    computing = schedules.Schedule("cut", generation, (1,), 0, cycles, 0, ())
    monkeypatch.setattr(_Schedules, "of", lambda _, one: computing if one.name == "cut" else None)
    items = clocked(tmp_path)
    assert items["cut"].seconds == pytest.approx((1 + idle) * SLICE / RATE)
    assert items["copy-start"].seconds == pytest.approx(left * SLICE / RATE, abs=1e-12)
    assert items["copy-start"].memory == pytest.approx(4 * SLICE / RATE)


def test_a_transfer_without_a_start_is_waited_for(tmp_path):
    """A loop can carry a started transfer into its next trip, where its end names what is carried."""
    kind = "(f32[4096,128]{1,0:T(8,128)S(1)}, f32[4096,128]{1,0:T(8,128)}, u32[]{:S(2)})"
    carried = f"%carried = {kind} optimization-barrier(%copy-start)\n  "
    end = TEXT.index("%copy-done = ")
    text = TEXT[:end] + carried + TEXT[end:].replace("copy-done(%copy-start)", "copy-done(%carried)")
    items = clocked(tmp_path, text)
    assert "copy-start" not in items  # counts once
    assert items["copy-done"].kind == "transfers"
    assert items["copy-done"].bytes == 4 * SLICE
    assert items["copy-done"].seconds == items["copy-done"].memory == pytest.approx(4 * SLICE / RATE)


def test_the_bandwidth_is_a_device_s():
    assert bandwidth(GENERATIONS["v5e"]) == RATE
    assert bandwidth(GENERATIONS["tpu7x"]) == 0.8 * 7380e9 / 2  # two devices a chip
    assert bandwidth(GENERATIONS["v4"]) == 0.8 * 1200e9  # two cores joined
