"""Every array of the kernels: its shape, and which part of it a program sees."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import walks
from pallas_kernels.gpu.program import Program
from pallas_kernels.gpu.walks import WalkTable

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in the accelerator's memory, and the block of it that a program sees.

    ``block`` has None for an axis of which the program sees one entry; ``index`` goes from program i, which does set k
    of the walks on block j of the channels of image b, to the number of the block.
    """

    shape: tuple[int, ...]
    block: tuple[int | None, ...]
    index: Callable[[Any, Any, Any, Any], tuple]  # of (i, b, k, j)
    dtype: Any = jnp.float32


def arrays_of(table: WalkTable, program: Program, arrays: Arrays, dtype: Any) -> dict[str, Array]:
    """Return every array that a kernel can read or write, by its name there."""
    images, length, groups, channels = arrays["x"].shape
    per_block, count, tokens = table.tokens.shape
    blocks, width, state = program.blocks, program.width, program.state
    sets = arrays["A"].shape[0]
    grouped = not program.rank
    slots = groups if grouped else table.slots
    programs = images * per_block * blocks

    def image(dtype):
        full = (images, length, groups, channels)
        return Array(full, (None, length, None, width), lambda i, b, k, j: (b, 0, k if grouped else 0, j), dtype)

    def layers(dtype):
        full = (table.layers, images, length, groups, channels)
        part = (table.layers, None, length, None, width)
        return Array(full, part, lambda i, b, k, j: (0, b, 0, k if grouped else 0, j), dtype)

    def pixels(rows):
        return Array((images, length, slots, rows), (None, length, slots, rows), lambda i, b, k, j: (b, 0, 0, 0))

    def pixels_of_block(rows):
        full = (blocks, images, length, slots, rows)
        return Array(full, (None, None, length, slots, rows), lambda i, b, k, j: (j, b, 0, 0, 0))

    def parameter(rest, part, at):
        return Array((sets, *rest), (sets, *part), lambda i, b, k, j: (0, *at(j)))

    def gradient(rest, part, at):
        return Array((images, sets, *rest), (None, sets, *part), lambda i, b, k, j: (b, 0, *at(j)))

    def scratch(*shape):
        return Array((programs, *shape), (None, *shape), lambda i, b, k, j: (i, *(0 for _ in shape)))

    def walk(*shape):
        return Array((per_block, *shape), (None, *shape), lambda i, b, k, j: (k, *(0 for _ in shape)))

    A = (state, channels), (state, width), lambda j: (0, j)
    D = (channels,), (width,), lambda j: (j,)
    of_state = Array((images, groups, state, channels), (None, None, state, width), lambda i, b, k, j: (b, k, 0, j))
    found = {
        "tokens": walk(count, tokens),
        "table": walk(count, table.rows.shape[2]),
        "x": image(arrays["x"].dtype),
        "dy": image(arrays["x"].dtype),
        "y": layers(dtype),
        "dx": layers(jnp.float32),
        "A": parameter(*A),
        "d_A": gradient(*A),
        "D": parameter(*D),
        "d_D": gradient(*D),
        "bias": parameter(*D),
        "d_bias": gradient(*D),
        "turns": scratch(program.chunk // program.tokens_a_turn, state, width),
        "chunks": scratch(count, program.chunks, state, width),
    }
    if grouped:
        of_group = pixels(state), pixels_of_block(state)
        delta = image(arrays["delta"].dtype)
        found |= {"delta": delta, "d_delta": delta} | dict.fromkeys(("B", "C"), of_group[0])
        found |= dict.fromkeys(("d_B", "d_C"), of_group[1])
        found |= dict.fromkeys(("start", "final", "d_final", "d_start"), of_state)
    else:
        weights = (program.square, channels), (program.square, width), lambda j: (0, j)
        found |= {"packed": pixels(arrays["packed"].shape[3]), "d_packed": pixels_of_block(2 * state + program.rank)}
        found |= {"weights": parameter(*weights), "d_weights": gradient(*weights)}
        found |= {"d_raw": scratch(walks.MATRIX_SIDE, width)}
    return found
