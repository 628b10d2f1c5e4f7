"""Calls of the kernels: how the work is cut into programs, and which part of each array a program sees."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu import kernels, walks
from pallas_kernels.gpu.backend import BlockSpec, call, program_id
from pallas_kernels.gpu.kernels import Block
from pallas_kernels.gpu.walks import Plan

WIDTH = 32  # channels of a program, one for each thread of its warp

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class _Place:
    """An array and the part of it that program i sees, whose team k walks on block j of the channels of image b."""

    shape: tuple[int, ...]
    block: tuple[int | None, ...]
    index: Callable  # (i, b, k, j) -> index of the block
    dtype: Any = jnp.float32


def programs(images: int, channels: int) -> int:
    """Return how many programs there are if one does all the walks of its channels."""
    return images * -(-channels // WIDTH)


def run(plan: Plan, arrays: Arrays, *, rank: int, softplus: bool, dtype: Any, interpret: Any) -> Arrays:
    """Run a kernel: the forward one, or the backward one where there is dy.

    Args:
        plan: the walks. Where the step size is projected, all teams work on the same channels; where it is given,
            team k works on group k.
        arrays: x and dy (B, L, G, P). A (K, N, P) times log2(e), D and bias (K, P). Either packed
            (B, L, slots, 2N + R), with columns for B, C and the step size and perhaps some more, and weights (K, R, P)
            with R filled up to ``Block.square``; or delta (B, L, G, P), B and C (B, L, G, N), start and d_final
            (B, G, N, P). All but x, dy, delta, B and C are float32.
        rank: R; 0 where there is delta.
        softplus: whether the step size goes through it.
        dtype: of y.
        interpret: run anywhere, slowly.

    Returns:
        Forward: y (layers, B, L, G, P), and with start also final (B, G, N, P).
        Backward: dx (layers, B, L, G, P); d_A, d_D, d_bias with B in front; either d_packed with the blocks of channels
        in front, and d_weights with B in front; or d_B, d_C with the blocks of channels in front, d_delta and d_start.
        All but d_delta, which is as delta, are float32.
    """
    images, _, groups, channels = arrays["x"].shape
    state = arrays["A"].shape[1]
    teams, count, tokens = plan.tokens.shape
    # More would fill the registers with states, or with columns of the projection.
    together = 8 if state <= 2 and rank <= 16 else 4
    backward = "dy" in arrays
    if backward and state > 4:
        together = 2
    lengths = plan.table[..., walks.LENGTH]
    if together == 8 and (lengths % 8).any() and not (lengths % 4).any():
        together = 4  # no fillers
    if interpret:
        together = 2  # nothing to wait for, and a fourth of the program to compile
    # A program keeps a state for each turn of one chunk, and one for each chunk. This bounds the former.
    chunk = min(tokens, max(walks.TILE, 512 * together // state))
    block = Block(
        width=WIDTH,
        channels=channels,
        blocks=-(-channels // WIDTH),
        state=state,
        rank=rank,
        softplus=softplus,
        walks=count,
        together=together,
        chunk=chunk,
        chunks=-(-tokens // chunk),
        merges=plan.merges,
        remerges=plan.remerges,
        chained=plan.chained,
        certain=plan.only_pixels and bool((lengths > 0).all()) and not (lengths % together).any(),
        # So three warps fit on each of a multiprocessor's four schedulers, which has 16384 registers. Weights for
        # more columns of the step size would not leave enough of them.
        registers=168 if backward and rank <= 32 else None,
        interpret=bool(interpret),
    )
    arrays = arrays | {"tokens": jnp.asarray(plan.tokens), "table": jnp.asarray(plan.table)}
    places = _places(plan, block, arrays, dtype)
    if backward:
        results = ["dx", "d_A", "d_D", "d_bias"]
        results += ["d_packed", "d_weights", "d_raw"] if rank else ["d_delta", "d_B", "d_C", "d_start"]
        results += ["turns", *(["chunks"] if block.keeps_chunks else [])]
    else:
        results = ["y"] if rank else ["y", "final"]
    # Of these, not all may be written.
    partial = {"y": not plan.complete, "dx": not plan.complete, "d_packed": not plan.exact}
    zeros = [name for name in results if partial.get(name)]

    def spec(name):
        place = places[name]

        def index(i):
            b, rest = lax.div(i, jnp.int32(teams * block.blocks)), lax.rem(i, jnp.int32(teams * block.blocks))
            return place.index(i, b, lax.div(rest, jnp.int32(block.blocks)), lax.rem(rest, jnp.int32(block.blocks)))

        return BlockSpec(place.block, index)

    def kernel(*refs):
        inputs = dict(zip(arrays, refs[: len(arrays)], strict=True))
        outputs = dict(zip(results, refs[len(arrays) + len(zeros) :], strict=True))
        seen = inputs | outputs
        if rank:
            seen |= {"B": seen["packed"], "C": seen["packed"]}
            seen |= {"d_B": seen["d_packed"], "d_C": seen["d_packed"]} if backward else {}
        first = lax.rem(program_id(0), jnp.int32(block.blocks)) * WIDTH
        own = first + jnp.arange(WIDTH) < channels if channels % WIDTH else None
        (kernels.backward if backward else kernels.forward)(seen, block, own)

    elements = images * channels * (groups if not rank else 1) * int(plan.table[..., walks.LENGTH].sum())
    shapes = {name: jax.ShapeDtypeStruct(places[name].shape, places[name].dtype) for name in results}
    values = call(
        kernel,
        images * teams * block.blocks,
        [(array, spec(name)) for name, array in arrays.items()]
        + [(jnp.zeros(shapes[name].shape, shapes[name].dtype), spec(name)) for name in zeros],
        [(shapes[name], spec(name)) for name in results],
        name=f"scan_{'backward' if backward else 'forward'}_l{tokens}_e{channels}_r{rank}_n{state}",
        flops=elements * (2 * rank + state * (20 if backward else 6)),
        exponentials=elements * (state * (3 if backward else 1) + 2),
        aliases={len(arrays) + i: results.index(name) for i, name in enumerate(zeros)},
        interpret=interpret,
    )
    return dict(zip(results, values, strict=True))


def _places(plan: Plan, block: Block, arrays: Arrays, dtype: Any) -> dict[str, _Place]:
    """Return every array that a kernel can read or write, by its name there."""
    images, length, groups, channels = arrays["x"].shape
    teams, count, tokens = plan.tokens.shape
    blocks, width, state = block.blocks, block.width, block.state
    sets = arrays["A"].shape[0]
    grouped = not block.rank
    slots = groups if grouped else plan.slots
    programs = images * teams * blocks

    def image(dtype):
        full = (images, length, groups, channels)
        return _Place(full, (None, length, None, width), lambda i, b, k, j: (b, 0, k if grouped else 0, j), dtype)

    def layers(dtype):
        full = (plan.layers, images, length, groups, channels)
        part = (plan.layers, None, length, None, width)
        return _Place(full, part, lambda i, b, k, j: (0, b, 0, k if grouped else 0, j), dtype)

    def pixels(rows):
        return _Place((images, length, slots, rows), (None, length, slots, rows), lambda i, b, k, j: (b, 0, 0, 0))

    def pixels_of_block(rows):
        full = (blocks, images, length, slots, rows)
        return _Place(full, (None, None, length, slots, rows), lambda i, b, k, j: (j, b, 0, 0, 0))

    def parameter(rest, part, at):
        return _Place((sets, *rest), (sets, *part), lambda i, b, k, j: (0, *at(j)))

    def gradient(rest, part, at):
        return _Place((images, sets, *rest), (None, sets, *part), lambda i, b, k, j: (b, 0, *at(j)))

    def scratch(*shape):
        return _Place((programs, *shape), (None, *shape), lambda i, b, k, j: (i, *(0 for _ in shape)))

    def walk(*shape):
        return _Place((teams, *shape), (None, *shape), lambda i, b, k, j: (k, *(0 for _ in shape)))

    A = (state, channels), (state, width), lambda j: (0, j)
    D = (channels,), (width,), lambda j: (j,)
    of_state = _Place((images, groups, state, channels), (None, None, state, width), lambda i, b, k, j: (b, k, 0, j))
    places = {
        "tokens": walk(count, tokens),
        "table": walk(count, plan.table.shape[2]),
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
        "turns": scratch(block.chunk // block.together, state, width),
        "chunks": scratch(count, block.chunks, state, width),
    }
    if grouped:
        of_group = pixels(state), pixels_of_block(state)
        delta = image(arrays["delta"].dtype)
        places |= {"delta": delta, "d_delta": delta} | dict.fromkeys(("B", "C"), of_group[0])
        places |= dict.fromkeys(("d_B", "d_C"), of_group[1])
        places |= dict.fromkeys(("start", "final", "d_final", "d_start"), of_state)
    else:
        weights = (block.square, channels), (block.square, width), lambda j: (0, j)
        places |= {"packed": pixels(arrays["packed"].shape[3]), "d_packed": pixels_of_block(2 * state + block.rank)}
        places |= {"weights": parameter(*weights), "d_weights": gradient(*weights)}
        places |= {"d_raw": scratch(walks.TILE, width)}
    return places
