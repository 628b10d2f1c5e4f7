"""One call of a kernel through Pallas."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import shape_like, vary_alike
from pallas_kernels.tpu.arrays import IMAGES, arrays, scratch
from pallas_kernels.tpu.backward import backward
from pallas_kernels.tpu.blocks import FLOAT32, Call
from pallas_kernels.tpu.chip import Chip
from pallas_kernels.tpu.forward import forward


def run(
    call: Call,
    values: dict[str, jax.Array],
    results: tuple[str, ...],
    onto: dict[str, jax.Array],
    chip: Chip,
    *,
    gradient: bool,
) -> dict[str, jax.Array]:
    """Call a kernel.

    Args:
        call: from ``plan``.
        values: its inputs by name.
        results: the names of its outputs.
        onto: outputs of earlier calls that this one writes other parts of.
        chip: what to compile for.
        gradient: which of the two kernels.

    Returns:
        The outputs by name.
    """
    block, shape = call.block, call.shape
    every = arrays(call, gradient=gradient)
    kept = scratch(call, gradient=gradient, names=results)
    kernel: Callable = backward if gradient else forward
    inputs, aliased = list(values), [name for name in results if name in onto]

    def body(*references):
        # What is written onto comes in once more as an input; the kernel does not look at it.
        seen = references[: len(inputs)] + references[len(inputs) + len(aliased) :]
        kernel(*seen, names=(*inputs, *results, *kept), block=block)

    def as_blocked(name, value):
        return value.reshape(every[name].shape)  # images with or without their pixels on one axis

    tiles, lattices, chunks, blocks = call.grid
    if "borders" in results:  # no border follows the last chunk
        chunks -= 1
    grid = (tiles, lattices, chunks, blocks)
    elements = math.prod(grid) * block.tokens * block.channels * block.lanes * len(block.walks)
    states = block.maths.state
    outputs = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[every[name].spec for name in inputs] + [pl.BlockSpec(memory_space=pl.ANY) for _ in aliased],
        out_specs=[every[name].spec for name in results],
        out_shape=[shape_like(every[name].shape, every[name].dtype, values["x"]) for name in results],
        scratch_shapes=[pltpu.VMEM(size, FLOAT32) for size in kept.values()],
        input_output_aliases={len(inputs) + i: results.index(name) for i, name in enumerate(aliased)},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=chip.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=elements * states * (20 if gradient else 6),
            transcendentals=elements * (states * (2 if gradient else 1) + 2),
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in values.values())
            + sum(math.prod(every[name].shape) * jnp.dtype(every[name].dtype).itemsize for name in results),
        ),
        interpret=chip.interpret or False,
        name=call.name(gradient=gradient),
    )(*vary_alike(*(as_blocked(*item) for item in values.items()), *(as_blocked(name, onto[name]) for name in aliased)))
    whole = (shape.rows, shape.step[0], shape.columns, shape.step[1])
    return {
        name: output.reshape(*whole, *output.shape[2:]) if block.flat and name in IMAGES else output
        for name, output in zip(results, outputs, strict=True)
    }
