"""What both kernels do with tokens: their time steps, and the recurrence.

Time steps are in units of ln 2 and B in units of 1 / ln 2. So exponentials and softplus are powers and logarithms of 2,
which is what the chip has, and dt B is the same in both units.

``refs`` is what a kernel reads and writes, by the names of ``arrays.py``. The rows of ``packed`` hold, for each
parameter set of a pixel, the time step before its projection (rank R), B and C; a row is read as one register, repeated
over the sublanes by the load itself.
"""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.contract import LOG2E
from pallas_kernels.tpu.blocks import Block
from pallas_kernels.tpu.geometry import Walk

ALL = (
    *("x", "delta", "packed", "weights", "weights_back", "A", "bias", "skip", "start", "dy", "d_final", "kept"),
    *("y", "final", "borders", "dx", "d_delta", "d_packed", "dA", "d_bias", "d_skip", "d_weights", "d_start"),
    *("sum", "dt", "d_raw", "state", "h", "a", "sum_B", "sum_C", "acc_A", "acc_bias", "acc_skip", "acc_weights"),
)
Refs = Any  # an attribute for each of these; None for those that a call does not have


def named(names, references) -> Refs:
    """Name the references of a call."""
    return types.SimpleNamespace(**(dict.fromkeys(ALL) | dict(zip(names, references, strict=True))))


def portions(items: list, size: int) -> list[list]:
    """Split a list into parts of ``size``, the last of which may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def softplus(z, *, exact: bool):
    """Return log2(1 + 2^z) of float32: softplus with its argument and its value in units of ln 2.

    Where it is far below 1, rounding 1 + 2^z costs relative precision: 6e-8 over the result. ``exact`` keeps it.
    """
    if exact:
        return jnp.maximum(z, 0.0) + LOG2E * jnp.log1p(jnp.exp2(-jnp.abs(z)))
    # Beyond 24 the two are equal; the limit keeps 2^z finite.
    return jnp.maximum(z, jnp.log2(1.0 + jnp.exp2(jnp.minimum(z, 100.0))))


def softplus_slope(dt, *, exact: bool):
    """Return the derivative of softplus from its value, 1 - 2^-dt; ``exact`` keeps its digits for short steps."""
    slope = 1.0 - jnp.exp2(-dt)
    short = dt * (1 / LOG2E)
    # Below 0.01 the difference cancels: 1 - e^-x = x - x^2 / 2 + x^3 / 6, 4e-10 off.
    return jnp.where(dt < 0.01, short * (1.0 - short * (0.5 - short * (1 / 6))), slope) if exact else slope


def fill_time_steps(refs: Refs, block: Block, walk: Walk) -> None:
    """Fill ``refs.dt``, which is laid out as the image is, with the time steps of a walk.

    They have no order, so they are made for the whole block before the recurrence: projected on the matrix unit,
    several tokens in one product with block-diagonal weights.
    """
    maths, channels = block.maths, block.channels
    bias = refs.bias[walk.slot]
    row = walk.slot * maths.set_rows

    def group(pixels):
        for some in portions(pixels, block.schedule.pixels_a_product if maths.rank else 1):
            if maths.rank:
                low = jnp.concatenate([refs.packed[*q, row : row + maths.slab, :] for q in some], 0)
                weights = refs.weights[walk.slot, : len(some) * channels, : len(some) * maths.slab]
                raw = jnp.dot(weights, low.astype(weights.dtype), **maths.product)
            else:
                raw = refs.delta[*some[0], walk.slot].astype(jnp.float32)
                raw = LOG2E * raw if maths.natural else raw
            steps = raw + jnp.concatenate([bias] * len(some), 0)
            steps = softplus(steps, exact=maths.exact) if maths.softplus else steps
            for i, q in enumerate(some):
                refs.dt[q] = steps[i * channels : (i + 1) * channels]

    block.for_pixels(block.schedule.turns.project, group)


def first_states(block: Block, group: slice, start) -> tuple:
    """Return the states before the first token of a walk, for a group of channels."""
    rest = jnp.zeros((block.schedule.channels_in_flight, block.lanes), jnp.float32)
    return tuple(rest if start is None else start[n, group, :] for n in range(block.maths.state))


@dataclasses.dataclass(frozen=True)
class Token:
    """What a token was computed with: its pixel, u, and for each n the decay and the state after it."""

    pixel: tuple
    u: jax.Array
    decays: list[jax.Array]
    states: list[jax.Array]


def advance(refs: Refs, block: Block, walk: Walk, group: slice, pixels, h) -> tuple[tuple, list[Token]]:
    """Run the recurrence over some tokens; return the last states, and every token."""
    b = block.row_of_B(walk)
    tokens: list[Token] = []
    # With few states in flight each must wait for the one before. Two tokens at once make two steps in the time of one.
    in_pairs = block.maths.state * block.schedule.tiles <= 2
    for some in portions(pixels, 2 if in_pairs else 1):
        new = [Token(q, refs.x[*q, group, :].astype(jnp.float32), [], []) for q in some]
        dt = [refs.dt[*q, group, :] for q in some]
        dtu = [x * token.u for x, token in zip(dt, new, strict=True)]
        for n in range(block.maths.state):
            A = refs.A[walk.slot, n, group, :]
            a = [jnp.exp2(x * A) for x in dt]  # a = exp(dt A)
            # dt u B
            written = [
                x * over_channels(refs.packed[*q, b + n : b + n + 1, :], x) for q, x in zip(some, dtu, strict=True)
            ]
            reached = [a[0] * h[n] + written[0]]  # h <- a h + dt u B
            if len(some) == 2:
                reached.append((a[1] * a[0]) * h[n] + (a[1] * written[0] + written[1]))
            for token, decay, state in zip(new, a, reached, strict=True):
                token.decays.append(decay)
                token.states.append(state)
        h = tuple(new[-1].states)
        tokens += new
    return h, tokens


def over_channels(row, like):
    """Repeat a row (1, lanes) of ``packed`` over the channels that ``like`` has."""
    return jnp.broadcast_to(row, like.shape)


def copy_or_clear(reference, value) -> None:
    """Copy a block, or clear where there is none."""
    reference[...] = jnp.zeros(reference.shape, reference.dtype) if value is None else value[...]


def round_result(block: Block, source, target) -> None:
    """Write a float32 sum as what the caller asked for; nothing to do where there is no such sum."""
    if source is not None:

        def one(q):
            target[q] = source[q].astype(target.dtype)

        block.for_pixels(16, lambda pixels: [one(q) for q in pixels])
