"""The backward kernel: the states again, chunk by chunk from the last, and back through their tokens.

It walks forward once and keeps the state before each chunk. Then, chunk by chunk from the last, it keeps the state
before every turn, computes the states inside a turn again in registers, and sweeps back over them. With ``s``, the
gradient of the state that a token hands on to the token before ("adjoint"), every token computes::

    g = s + C dy            s <- a g            w = s h_before            (a = exp(dt A))
    dC = sum_p h_after dy            dB = sum_p g dt x            dA = sum_t w dt
    d_dt = sum_n w A + x sum_n g B            dx = dt sum_n g B + D dy

The step size was projected from a pixel's row; its gradient goes back there for 16 tokens at once, on tensor cores.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.contract import LOG2E
from pallas_kernels.gpu import walks
from pallas_kernels.gpu.program import Program
from pallas_kernels.gpu.tokens import (
    Mask,
    Refs,
    States,
    Walker,
    both,
    each_walk,
    load_or_zeros,
    run,
)
from pallas_kernels.gpu.triton import Device, slice_of, store


def backward(refs: Refs, program: Program, own: Mask) -> None:
    """Write the gradients of what the forward pass reads; those of parameters from this image alone."""
    states = States(refs, program, own)
    if program.keeps_chunks:
        _keep_chunks(refs, program, own)

    def one(i, carry):
        walk = Walker(refs, program, own, program.walks - 1 - i)
        adjoint, sums = carry
        adjoint = jnp.where(walk.ends != 0, states.read("d_final"), adjoint)
        sums = {name: jnp.where(walk.ends != 0, 0.0, value) for name, value in sums.items()}
        if program.rank:
            at = _turned(program.square, program.width)
            ends = jnp.broadcast_to(walk.ends != 0 if own is None else (own & (walk.ends != 0))[:, None], at[0].shape)
            store(refs["d_weights"].at[walk.set, *at], jnp.zeros(ends.shape), mask=ends)
        chunks, A = walk.turns(program.chunk), states.read("A", walk.set)
        adjoint, sums = lax.fori_loop(
            0, chunks, lambda c, carry: _sweep_chunk(walk, A, states, chunks - 1 - c, *carry), (adjoint, sums)
        )
        # The walks of a chain share these: what the first one writes, the last to come here, is their sum.
        states.write("d_A", sums["d_A"] * (1 / LOG2E), walk.set)
        for name in ("d_D", "d_bias"):
            store(refs[name].at[walk.set], sums[name], mask=own)
        walk.device.barrier()
        return adjoint, sums

    zero, channels = jnp.zeros(states.shape), jnp.zeros(program.width)
    adjoint, _ = each_walk(program, one, (zero, {"d_A": zero, "d_D": channels, "d_bias": channels}))
    if "d_start" in refs:
        states.write("d_start", adjoint)


def _keep_chunks(refs: Refs, program: Program, own: Mask) -> None:
    """Keep the state before each chunk of every walk."""
    states = States(refs, program, own)

    def one(number, state):
        walk, A = Walker(refs, program, own, number), states.read("A", refs["table"][number, walks.SET])
        state = jnp.where(walk.starts != 0, states.read("start"), state)
        last = jnp.maximum(walk.turns(program.chunk), 1) - 1
        turns = program.chunk // program.tokens_a_turn

        def chunk(c, state):
            states.write("chunks", state, number, c)
            return run(walk, states, A, state, c * turns, (c + 1) * turns)

        state = lax.fori_loop(0, last, chunk, state)
        states.write("chunks", state, number, last)
        # Only the next walk of a chain asks for the state after the last chunk.
        return (
            run(walk, states, A, state, last * turns, walk.turns(program.tokens_a_turn)) if program.chained else state
        )

    each_walk(program, one, jnp.zeros(states.shape))
    Device(program.interpret).barrier()


def _sweep_chunk(
    walk: Walker, A: jax.Array, states: States, number: Any, adjoint: jax.Array, sums: dict
) -> tuple[jax.Array, dict]:
    """Go back through a chunk: from the gradient of the state after it, "adjoint", to that of the state before it."""
    program = walk.program
    start = states.read("chunks", walk.number, number) if program.keeps_chunks else states.read("start")
    first = number * (program.chunk // program.tokens_a_turn)
    last = walk.turns(program.tokens_a_turn, (number + 1) * program.chunk) - 1

    def keep(turn, state):
        states.write("turns", state, turn - first)

    keep(last, run(walk, states, A, start, first, last, keep))
    walk.device.barrier()

    per_tile = walks.MATRIX_SIDE // program.tokens_a_turn
    first_tile, last_tile = lax.div(first, per_tile), lax.div(last, per_tile)

    ahead = program.state <= 4 and program.rank <= 16

    def ask(turn):
        return walk.request(turn, "dy", written=("dx", walks.LAST)), states.read("turns", turn - first)

    def tile(i, carry):
        t = last_tile - i
        begin, end = t * per_tile, jnp.minimum(last, (t + 1) * per_tile - 1)

        def turn(i, carry):
            requested, adjoint, sums = carry
            now = end - i
            (rows, state), following = (requested, ask(jnp.maximum(now - 1, first))) if ahead else (ask(now), None)
            return following, *_sweep_turn(walk, A, states, now, rows, state, adjoint, sums)

        carry = lax.fori_loop(0, end - begin + 1, turn, carry)
        if program.rank:
            walk.device.barrier()
            _sweep_projection(walk, t * walks.MATRIX_SIDE)
            walk.device.barrier()
        return carry

    _, adjoint, sums = lax.fori_loop(0, last_tile - first_tile + 1, tile, (ask(last) if ahead else None, adjoint, sums))
    walk.device.barrier()
    return adjoint, sums


def _sweep_turn(
    walk: Walker,
    A: jax.Array,
    states: States,
    turn: Any,
    requested: Any,
    state: jax.Array,
    adjoint: jax.Array,
    sums: dict,
) -> tuple[jax.Array, dict]:
    """Go back through the tokens of a turn, before which the state is given."""
    program, refs, tokens = walk.program, walk.refs, walk.tokens(requested)
    passed = [state]
    for token in tokens:
        passed.append(states.step(passed[-1], token, A))

    fma = walk.device.fma
    dA, dD, d_bias = sums["d_A"], sums["d_D"], sums["d_bias"]
    for i in reversed(range(program.tokens_a_turn)):
        token, dy = tokens[i], tokens[i].others["dy"]
        g = fma(dy[None], token.C[:, None], adjoint)  # g = s + C dy
        adjoint = states.decay(token, A) * g  # s <- a g
        w = adjoint * passed[i]  # w = s h_before
        dt_x = token.dt * token.x
        g_B = (g * token.B[:, None]).sum(0)  # sum_n g B
        # d_dt = sum_n w A + x sum_n g B; A is multiplied by log2(e) here
        d_dt = fma(token.x, g_B, states.sum(w, A) * (1 / LOG2E))
        d_raw = d_dt * walk.slope(token.raw) if program.softplus else d_dt
        d_raw = d_raw if program.all_pixels else jnp.where(token.code == walks.FILLER, 0.0, d_raw)
        dA = fma(w, token.dt[None], dA)  # dA = sum_t w dt
        dD = fma(dy, token.x, dD)  # dD = sum_t dy x
        d_bias = d_bias + d_raw
        walk.write("dx", token, fma(token.dt, g_B, walk.D * dy))  # dx = dt sum_n g B + D dy
        if program.rank:
            refs["d_raw"][(turn * program.tokens_a_turn + i) & (walks.MATRIX_SIDE - 1)] = d_raw
        else:
            ref = refs["d_delta"]
            store(ref.at[walk.pixel(token.code)], d_raw.astype(ref.dtype), mask=walk.inside(token.code))
        of_pixel = {"d_B": g * dt_x[None], "d_C": passed[i + 1] * dy[None]}  # before sums over the channels
        for column, (name, value) in zip(program.columns, of_pixel.items(), strict=True):
            value = walk.device.sums(value)
            ref = refs[name].at[walk.pixel(token.code), walk.slot, column + states.state_of_thread]
            inside = None if program.all_pixels else jnp.broadcast_to(token.code >= 0, value.shape)
            if program.remerges:
                again = jnp.broadcast_to((token.code & walks.LAST_OF_SET) == 0, value.shape)
                value = value + load_or_zeros(ref, both(inside, again))
            store(ref, value, mask=inside)
    return adjoint, sums | {"d_A": dA, "d_D": dD, "d_bias": d_bias}


def _sweep_projection(walk: Walker, first: Any) -> None:
    """Take the gradient of 16 step sizes back to what they were projected from, and to the weights."""
    refs, program = walk.refs, walk.program
    codes = refs["tokens"][walk.number, slice_of(first, walks.MATRIX_SIDE)]
    shape = (walks.MATRIX_SIDE, program.square)
    column = jnp.broadcast_to(jnp.arange(program.square)[None], shape)
    there = (codes >= 0)[:, None] & (column < program.rank)
    # What is not there lies out of bounds: a GPU goes by the mask, but the interpreter would write it, unchanged.
    pixel = jnp.where(there, walk.pixel(codes)[:, None], refs["packed"].shape[0])
    index = pixel, jnp.full(shape, walk.slot), 2 * program.state + jnp.minimum(column, program.rank - 1)
    low = load_or_zeros(refs["packed"].at[index], there)
    d_raw = jnp.where(
        (codes >= 0)[None], load_or_zeros(refs["d_raw"].at[_turned(walks.MATRIX_SIDE, program.width)], None), 0.0
    )
    at, own = (walk.set, *_turned(program.square, program.width)), walk.own
    own = None if own is None else jnp.broadcast_to(own[:, None], at[1].shape)
    d_low = walk.device.dot(d_raw, load_or_zeros(refs["weights"].at[at], own), (0, 0))
    if program.remerges:
        again = jnp.broadcast_to(((codes & walks.LAST_OF_SET) == 0)[:, None], shape)
        d_low = d_low + load_or_zeros(refs["d_packed"].at[index], there & again)
    store(refs["d_packed"].at[index], d_low, mask=there)
    # Summed in memory: as large as it may be, it would drive more important things from the registers.
    d_weights = load_or_zeros(refs["d_weights"].at[at], own)
    store(refs["d_weights"].at[at], d_weights + walk.device.dot(d_raw, low, (1, 0)), mask=own)


def _turned(rows: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Return where to find rows of channels (P, rows).

    (rows, P) they might have the shape of states, and Triton arranges alike what has one shape.
    """
    channel, row = (lax.broadcasted_iota(jnp.int32, (width, rows), axis) for axis in (0, 1))
    return row, channel
