"""One call of a kernel: its programs, and what each of them sees."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu import walks
from pallas_kernels.gpu.arrays import Arrays, arrays_of
from pallas_kernels.gpu.backward import backward
from pallas_kernels.gpu.forward import forward
from pallas_kernels.gpu.program import Program
from pallas_kernels.gpu.triton import BlockSpec, call, program_id
from pallas_kernels.gpu.walks import WalkTable


def run(table: WalkTable, program: Program, arrays: Arrays, dtype: Any = jnp.float32) -> Arrays:
    """Run a kernel, the forward or the backward one.

    Args:
        table: the walks. Where the step size is projected, all sets of walks are over the same channels; where it is
            given, set k is over group k.
        program: what each program does.
        arrays: x and dy (B, L, G, P). A (K, N, P) times log2(e), D and bias (K, P). Either packed
            (B, L, slots, 2N + R), with columns for B, C and the step size and perhaps some more, and weights (K, R, P)
            with R filled up to ``Program.square``; or delta (B, L, G, P), B and C (B, L, G, N), start and d_final
            (B, G, N, P). All but x, dy, delta, B and C are float32.
        dtype: of y.

    Returns:
        Forward: y (layers, B, L, G, P), and with start also final (B, G, N, P).
        Backward: dx (layers, B, L, G, P); d_A, d_D, d_bias with B in front; either d_packed with the blocks of channels
        in front, and d_weights with B in front; or d_B, d_C with the blocks of channels in front, d_delta and d_start.
        All but d_delta, which is as delta, are float32.
    """
    images, _, groups, channels = arrays["x"].shape
    rank, state = program.rank, program.state
    per_block, _, tokens = table.tokens.shape
    arrays = arrays | {"tokens": jnp.asarray(table.tokens), "table": jnp.asarray(table.rows)}
    every = arrays_of(table, program, arrays, dtype)
    if program.gradient:
        results = ["dx", "d_A", "d_D", "d_bias"]
        results += ["d_packed", "d_weights", "d_raw"] if rank else ["d_delta", "d_B", "d_C", "d_start"]
        results += ["turns", *(["chunks"] if program.keeps_chunks else [])]
    else:
        results = ["y"] if rank else ["y", "final"]
    # Of these, not all may be written.
    partial = {"y": not table.complete, "dx": not table.complete, "d_packed": not table.exact}
    zeros = [name for name in results if partial.get(name)]

    def spec(name):
        place = every[name]

        def index(i):
            # Program i works on image b; of its programs, on block j of the channels along set k of the walks.
            of_image, blocks = jnp.int32(per_block * program.blocks), jnp.int32(program.blocks)
            b, rest = lax.div(i, of_image), lax.rem(i, of_image)
            return place.index(i, b, lax.div(rest, blocks), lax.rem(rest, blocks))

        return BlockSpec(place.block, index)

    def kernel(*refs):
        inputs = dict(zip(arrays, refs[: len(arrays)], strict=True))
        outputs = dict(zip(results, refs[len(arrays) + len(zeros) :], strict=True))
        seen = inputs | outputs
        if rank:
            seen |= {"B": seen["packed"], "C": seen["packed"]}
            seen |= {"d_B": seen["d_packed"], "d_C": seen["d_packed"]} if program.gradient else {}
        first = lax.rem(program_id(0), jnp.int32(program.blocks)) * program.width
        own = first + jnp.arange(program.width) < channels if channels % program.width else None
        (backward if program.gradient else forward)(seen, program, own)

    elements = images * channels * (groups if not rank else 1) * int(table.rows[..., walks.LENGTH].sum())
    shapes = {name: jax.ShapeDtypeStruct(every[name].shape, every[name].dtype) for name in results}
    values = call(
        kernel,
        images * per_block * program.blocks,
        [(array, spec(name)) for name, array in arrays.items()]
        + [(jnp.zeros(shapes[name].shape, shapes[name].dtype), spec(name)) for name in zeros],
        [(shapes[name], spec(name)) for name in results],
        name=f"scan_{'backward' if program.gradient else 'forward'}_l{tokens}_e{channels}_r{rank}_n{state}",
        flops=elements * (2 * rank + state * (20 if program.gradient else 6)),
        exponentials=elements * (state * (3 if program.gradient else 1) + 2),
        aliases={len(arrays) + i: results.index(name) for i, name in enumerate(zeros)},
        interpret=program.interpret,
    )
    return dict(zip(results, values, strict=True))
