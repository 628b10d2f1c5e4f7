"""Compiles a few programs whose work is known, and prints their instructions' times as JSON: a process of its own."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from evmamba_jax.preflight import aot, hlo, schedules
from evmamba_jax.preflight.clock import clock

GRID, TRIPS = (2, 4), 60


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def product(x, y):
    return x @ y


def scanned(x, weights):  # five products, one after another, each of a slice of the weights
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def twice(x, y):  # two equal instructions, of which the compiler writes one schedule
    return jnp.sort(x, axis=1), jnp.sort(y, axis=1)


def guarded(x):  # a loop in each step of the grid, and one of TRIPS in the first step of the last axis alone
    def kernel(x, out):
        @pl.when(pl.program_id(1) == 0)
        def _():
            def body(i, c):
                return c * 1.5 + x[pl.ds(pl.multiple_of(i * 8, 8), 8), :]

            out[...] = lax.fori_loop(0, TRIPS, body, jnp.zeros((8, 128)))

        out[...] += x[:8, :]

    return pl.pallas_call(
        kernel,
        grid=GRID,
        in_specs=[pl.BlockSpec((8 * TRIPS, 128), lambda i, j: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i, j: (i, 0)),
        out_shape=shape(16, 128, dtype=jnp.float32),
        name="guarded",
    )(x)


PROGRAMS = {
    product: [shape(4096, 1024), shape(1024, 1024)],
    scanned: [shape(1024, 512), shape(5, 512, 512)],
    twice: [shape(64, 256, dtype=jnp.float32)] * 2,
    guarded: [shape(2 * 8 * TRIPS, 128, dtype=jnp.float32)],
}

if __name__ == "__main__":
    folder = sys.argv[1]
    aot.prepare(folder)
    found = {}
    for function, arguments in PROGRAMS.items():
        program = hlo.parse(aot.compile_for("v5e", function, *arguments).as_text())
        found[function.__name__] = [dataclasses.asdict(item) for item in clock(program, folder, "v5e")]
    written = schedules.files(folder)
    found["written"] = sorted(written)
    found["loops"] = [dataclasses.asdict(loop) for loop in schedules.read(folder, "guarded", "v5e").loops]
    found["rows"] = schedules.read(folder, "guarded", "v5e").rows
    print(json.dumps(found))
