"""Compiles a few small kernels whose loops are known and prints their schedules as JSON: a process of its own."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from evmamba_jax.preflight import aot, schedules

WIDE = 128


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def summed(x, first, last, start):
    """A loop of one load, one product and one sum a trip, over rows of eight."""
    return lax.fori_loop(first, last, lambda i, c: c * 1.5 + x[pl.ds(pl.multiple_of(i * 8, 8), 8), :], start)


def offset(x):  # 70 trips, counted from 20
    def kernel(x, out):
        out[...] = summed(x, 20, 90, jnp.zeros((8, WIDE)))

    return pl.pallas_call(kernel, out_shape=shape(8, WIDE), name="offset")(x)


def nested(x):  # 7 trips of 50
    def kernel(x, out):
        def outer(i, c):
            return summed(x.at[pl.ds(pl.multiple_of(i * 400, 8), 400)], 0, 50, c + 1.0)

        out[...] = lax.fori_loop(0, 7, outer, jnp.zeros((8, WIDE)))

    return pl.pallas_call(kernel, out_shape=shape(8, WIDE), name="nested")(x)


def dynamic(count, x):  # as many trips as the argument says
    def kernel(count, x, out):
        out[...] = summed(x, 0, count[0], jnp.zeros((8, WIDE)))

    specs = [pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.VMEM)]
    return pl.pallas_call(kernel, out_shape=shape(8, WIDE), in_specs=specs, name="dynamic")(count, x)


def product(x, y):  # 1024^3 multiply-adds in 4 x 4 x 2 steps
    def kernel(x, y, out, total):
        @pl.when(pl.program_id(2) == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        total[...] += jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == 1)
        def _():
            out[...] = total[...].astype(out.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=shape(1024, 1024, dtype=jnp.bfloat16),
        grid=(4, 4, 2),
        in_specs=[pl.BlockSpec((256, 512), lambda i, j, k: (i, k)), pl.BlockSpec((512, 256), lambda i, j, k: (k, j))],
        out_specs=pl.BlockSpec((256, 256), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((256, 256), jnp.float32)],
        name="product",
    )(x, y)


def crowded(x):  # 80 registers carried through 640 trips, more than there are
    def kernel(x, out):
        def body(i, sums):
            row = x[pl.ds(pl.multiple_of(i * 8, 8), 8), :]
            return tuple(c * 1.5 + row * n for n, c in enumerate(sums))

        sums = lax.fori_loop(0, 640, body, tuple(jnp.full((8, WIDE), float(n)) for n in range(80)))
        for n, c in enumerate(sums):
            out[pl.ds(8 * n, 8), :] = c

    return pl.pallas_call(kernel, out_shape=shape(640, WIDE), name="crowded")(x)


square = shape(1024, 1024, dtype=jnp.bfloat16)
KERNELS = {
    offset: [shape(800, WIDE)],
    nested: [shape(2800, WIDE)],
    dynamic: [shape(1, dtype=jnp.int32), shape(800, WIDE)],
    product: [square, square],
    crowded: [shape(5120, WIDE)],
}

if __name__ == "__main__":
    folder = sys.argv[1]
    aot.prepare(folder)
    found = {}
    for generation in ("v5e", "v4"):
        for function, arguments in KERNELS.items():
            aot.compile_for(generation, function, *arguments)
            schedule = schedules.read(folder, function.__name__, generation)
            found[f"{function.__name__} {generation}"] = dataclasses.asdict(schedule) | {"text": str(schedule)}
    given = schedules.read(folder, "dynamic", "v4", trips={0: 100})
    found["dynamic v4, told"] = dataclasses.asdict(given)
    print(json.dumps(found))
