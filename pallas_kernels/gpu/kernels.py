"""The scan and its gradient as one program computes them: for some channels of one image, along its walks.

A token is a row of channels, which lie next to each other in memory, so that every order of the pixels reads equally
well. The state, float32, stays in registers, where the step size is projected too. Exponentials are to the base of two,
and A comes multiplied by log2(e).

The backward pass needs the states from the last to the first. It walks forward once and keeps the state before each
chunk; then, chunk by chunk from the last, it keeps the state before every few tokens, computes those between them again
in registers, and sweeps back over them. The formulas are those of ``sequential.py``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu import walks
from pallas_kernels.gpu.backend import Device, load, slice_of, store

LOG2E = 1.4426950408889634

Refs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Block:
    """What a program does.

    Attributes:
        width: channels of a program, a power of two.
        channels: of the image (or group); the last program may have less than ``width``.
        blocks: programs that share the channels.
        state: N, a power of two.
        rank: R of the step size; 0 where it comes as an array of its own, ``delta``.
        softplus: whether the step size goes through it.
        walks: of a program.
        together: tokens whose loads are under way at once, and whose states the backward pass holds; divides 16.
        chunk: tokens between two states that the backward pass keeps to the end; a multiple of 16.
        chunks: of the longest walk.
        merges, remerges, chained: as in ``walks.Plan``.
        interpret: whether the program is interpreted.
    """

    width: int
    channels: int
    blocks: int
    state: int
    rank: int
    softplus: bool
    walks: int
    together: int
    chunk: int
    chunks: int
    merges: bool
    remerges: bool
    chained: bool
    interpret: bool

    @property
    def columns(self) -> tuple[int, int]:
        """Where B and C begin in what a pixel was projected to; without projection they are arrays of their own."""
        return (self.rank, self.rank + self.state) if self.rank else (0, 0)

    @property
    def square(self) -> int:
        """The rank, as a side of a matrix that Triton multiplies."""
        return max(walks.TILE, 1 << (self.rank - 1).bit_length())

    @property
    def keeps_chunks(self) -> bool:
        """Whether some chunk begins with a state that only a walk from the start can tell."""
        return self.chunks > 1 or self.chained


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Token:
    """What is read at one token: x (P,), the step size before and after softplus (P,), B and C (N,)."""

    code: jax.Array
    x: jax.Array
    raw: jax.Array
    dt: jax.Array
    B: jax.Array
    C: jax.Array

    @property
    def inside(self) -> jax.Array:
        """Whether it is a pixel."""
        return self.code >= 0

    @property
    def pixel(self) -> jax.Array:
        """The number of the pixel; 0 for what is none."""
        return _pixel(self.code)

    def has(self, bit: int) -> jax.Array:
        """Whether a bit of ``walks.py`` is set."""
        return (self.code & bit) != 0


class Walk:
    """One walk of a program: its parameters, in registers, and how its tokens are read and written.

    ``own`` (P,) says which of the program's channels there are.
    """

    def __init__(self, refs: Refs, block: Block, own: jax.Array, number: Any):
        self.refs, self.block, self.own, self.number = refs, block, own, number
        self.device = Device(block.interpret)
        columns = (walks.LENGTH, walks.SET, walks.SLOT, walks.LAYER, walks.STARTS, walks.ENDS)
        self.length, self.set, self.slot, self.layer, self.starts, self.ends = (
            refs["table"][number, column] for column in columns
        )
        self.A = load(refs["A"].at[self.set], mask=_per_state(self.own, block), other=0.0)
        self.D = load(refs["D"].at[self.set], mask=self.own, other=0.0)
        self.bias = load(refs["bias"].at[self.set], mask=self.own, other=0.0)
        self.weights = [
            load(refs["weights"].at[self.set, jnp.int32(r)], mask=self.own, other=0.0) for r in range(block.rank)
        ]

    def turns(self, size: int, until: Any = None) -> jax.Array:
        """Return how many times ``size`` tokens there are, before token ``until``; the last ones are filled up."""
        end = self.length if until is None else jnp.minimum(self.length, until)
        return lax.div(end + (size - 1), jnp.int32(size))

    def read(self, t: Any) -> Token:
        """Return token t."""
        refs = self.refs
        code = refs["tokens"][self.number, t]
        pixel = _pixel(code)
        if self.block.rank:
            step = jnp.zeros(self.block.width)
            for r, weights in enumerate(self.weights):
                step = self.device.fma(refs["packed"][pixel, self.slot, r], weights, step)
            step = jnp.where(code >= 0, step, 0.0)
        else:
            step = self.row("delta", code)
        raw = step + self.bias
        dt = self.softplus(raw)[0] if self.block.softplus else raw
        B, C = (
            refs[name][pixel, self.slot, slice_of(column, self.block.state)].astype(jnp.float32)
            for name, column in zip(("B", "C"), self.block.columns, strict=True)
        )
        return Token(code, self.row("x", code), raw, jnp.where(code == walks.FILLER, 0.0, dt), B, C)

    def read_some(self, turn: Any) -> list[Token]:
        """Return the tokens of one turn, whose loads do not wait for each other."""
        return [self.read(turn * self.block.together + i) for i in range(self.block.together)]

    def row(self, name: str, code: Any) -> jax.Array:
        """Return the channels of a pixel (P,); zeros where there is none."""
        ref = self.refs[name].at[_pixel(code)]
        return load(ref, mask=self.own & (code >= 0), other=0.0).astype(jnp.float32)

    def before(self, name: str, token: Token, first: int) -> jax.Array | None:
        """Return what the program has written to a token's pixel (P,); None where it never comes there twice."""
        if not self.block.merges:
            return None
        there = self.own & token.inside & ~token.has(first)
        return load(self.refs[name].at[self.layer, token.pixel], mask=there, other=0.0)

    def write(self, name: str, token: Token, value: jax.Array, before: jax.Array | None) -> None:
        """Add the channels of a pixel (P,) to what was there before."""
        value = value if before is None else before + value
        ref = self.refs[name]
        store(ref.at[self.layer, token.pixel], value.astype(ref.dtype), mask=self.own & token.inside)

    def softplus(self, raw: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the softplus of ``terms.py``, and its derivative."""
        e = self.device.exp2(raw * LOG2E)
        return jnp.where(raw > 20, raw, jnp.log1p(e)), jnp.where(raw > 20, 1.0, e / (1 + e))

    def decay(self, token: Token) -> jax.Array:
        """Return exp(dt A) (P, N)."""
        return self.device.exp2(token.dt[:, None] * self.A)

    def step(self, state: jax.Array, token: Token) -> jax.Array:
        """Return the state (P, N) after a token."""
        return self.device.fma(self.decay(token), state, (token.dt * token.x)[:, None] * token.B)

    def run(self, state: jax.Array, first: Any, last: Any) -> jax.Array:
        """Return the state after the turns from ``first`` to before ``last``."""

        def turn(i, state):
            for token in self.read_some(i):
                state = self.step(state, token)
            return state

        return lax.fori_loop(first, last, turn, state)


def forward(refs: Refs, block: Block, own: jax.Array) -> None:
    """Write y, and the last state where it is wanted."""

    def one(number, state):
        walk = Walk(refs, block, own, number)
        state = jnp.where(walk.starts != 0, _given(refs, "start", block, own), state)

        def turn(i, state):
            tokens = walk.read_some(i)
            before = [walk.before("y", token, walks.FIRST) for token in tokens]
            for token, old in zip(tokens, before, strict=True):
                state = walk.step(state, token)
                y = (state * token.C).sum(1)
                walk.write("y", token, walk.device.fma(walk.D, token.x, y), old)
            return state

        state = lax.fori_loop(0, walk.turns(block.together), turn, state)
        walk.device.barrier()
        return state

    state = _each(block, one, jnp.zeros((block.width, block.state)))
    if "final" in refs:
        store(refs["final"].at[:], state, mask=_per_state(own, block))


def backward(refs: Refs, block: Block, own: jax.Array) -> None:
    """Write the gradients of what the forward pass reads; those of parameters from this image alone."""
    if block.keeps_chunks:
        _keep_chunks(refs, block, own)

    def one(i, carry):
        walk = Walk(refs, block, own, block.walks - 1 - i)
        adjoint, sums = carry
        adjoint = jnp.where(walk.ends != 0, _given(refs, "d_final", block, own), adjoint)
        sums = {name: jnp.where(walk.ends != 0, 0.0, value) for name, value in sums.items()}
        if block.rank:
            of_weights = jnp.broadcast_to(own, (block.square, block.width))
            store(refs["d_weights"].at[walk.set], jnp.zeros(of_weights.shape), mask=of_weights & (walk.ends != 0))
        chunks = walk.turns(block.chunk)
        adjoint, sums = lax.fori_loop(
            0, chunks, lambda c, carry: _sweep_chunk(walk, chunks - 1 - c, *carry), (adjoint, sums)
        )
        # The walks of a chain share these: what the first one writes, the last to come here, is their sum.
        store(refs["d_A"].at[walk.set], sums["d_A"] * (1 / LOG2E), mask=_per_state(own, block))
        for name in ("d_D", "d_bias"):
            store(refs[name].at[walk.set], sums[name], mask=own)
        walk.device.barrier()
        return adjoint, sums

    states, channels = jnp.zeros((block.width, block.state)), jnp.zeros(block.width)
    adjoint, _ = _each(block, one, (states, {"d_A": states, "d_D": channels, "d_bias": channels}))
    if "d_start" in refs:
        store(refs["d_start"].at[:], adjoint, mask=_per_state(own, block))


def _keep_chunks(refs: Refs, block: Block, own: jax.Array) -> None:
    """Keep the state before each chunk of every walk."""

    def one(number, state):
        walk = Walk(refs, block, own, number)
        state = jnp.where(walk.starts != 0, _given(refs, "start", block, own), state)
        last = jnp.maximum(walk.turns(block.chunk), 1) - 1
        turns = block.chunk // block.together

        def chunk(c, state):
            refs["chunks"][number, c] = state
            return walk.run(state, c * turns, (c + 1) * turns)

        state = lax.fori_loop(0, last, chunk, state)
        refs["chunks"][number, last] = state
        # Only the next walk of a chain asks for the state after the last chunk.
        return walk.run(state, last * turns, walk.turns(block.together)) if block.chained else state

    _each(block, one, jnp.zeros((block.width, block.state)))
    Device(block.interpret).barrier()


def _sweep_chunk(walk: Walk, number: Any, adjoint: jax.Array, sums: dict) -> tuple[jax.Array, dict]:
    """Go back through a chunk: from the gradient of the state after it, "adjoint", to that of the state before it."""
    refs, block = walk.refs, walk.block
    start = refs["chunks"][walk.number, number] if block.keeps_chunks else _given(refs, "start", block, walk.own)
    first = number * (block.chunk // block.together)
    last = walk.turns(block.together, (number + 1) * block.chunk) - 1

    def keep(turn, state):
        refs["turns"][turn - first] = state
        return walk.run(state, turn, turn + 1)

    refs["turns"][last - first] = lax.fori_loop(first, last, keep, start)
    walk.device.barrier()

    per_tile = walks.TILE // block.together
    first_tile, last_tile = lax.div(first, per_tile), lax.div(last, per_tile)

    def tile(i, carry):
        t = last_tile - i
        begin, end = t * per_tile, jnp.minimum(last, (t + 1) * per_tile - 1)

        def turn(i, carry):
            return _sweep_turn(walk, end - i, refs["turns"][end - i - first], *carry)

        adjoint, sums = lax.fori_loop(0, end - begin + 1, turn, carry)
        if block.rank:
            walk.device.barrier()
            _sweep_projection(walk, t * walks.TILE)
            walk.device.barrier()
        return adjoint, sums

    adjoint, sums = lax.fori_loop(0, last_tile - first_tile + 1, tile, (adjoint, sums))
    walk.device.barrier()
    return adjoint, sums


def _sweep_turn(walk: Walk, turn: Any, state: jax.Array, adjoint: jax.Array, sums: dict) -> tuple[jax.Array, dict]:
    """Go back through the tokens of a turn, before which the state is given."""
    block, refs = walk.block, walk.refs
    tokens = walk.read_some(turn)
    dys = [walk.row("dy", token.code) for token in tokens]
    olds = [walk.before("dx", token, walks.LAST) for token in tokens]
    states = [state]
    for token in tokens:
        states.append(walk.step(states[-1], token))

    fma = walk.device.fma
    dA, dD, d_bias = sums["d_A"], sums["d_D"], sums["d_bias"]
    for i in reversed(range(block.together)):
        token, dy, old = tokens[i], dys[i], olds[i]
        gradient = fma(dy[:, None], token.C, adjoint)
        adjoint = walk.decay(token) * gradient
        through = adjoint * states[i]
        dt_x = token.dt * token.x
        gB = (gradient * token.B).sum(1)
        d_dt = fma(token.x, gB, (through * walk.A).sum(1) * (1 / LOG2E))
        d_raw = d_dt * walk.softplus(token.raw)[1] if block.softplus else d_dt
        d_raw = jnp.where(token.code == walks.FILLER, 0.0, d_raw)
        dA = fma(through, token.dt[:, None], dA)
        dD = fma(dy, token.x, dD)
        d_bias = d_bias + d_raw
        walk.write("dx", token, fma(token.dt, gB, walk.D * dy), old)
        if block.rank:
            refs["d_raw"][(turn * block.together + i) & (walks.TILE - 1)] = d_raw
        else:
            ref = refs["d_delta"]
            store(ref.at[token.pixel], d_raw.astype(ref.dtype), mask=walk.own & token.inside)
        of_pixel = {"d_B": (gradient * dt_x[:, None]).sum(0), "d_C": (states[i + 1] * dy[:, None]).sum(0)}
        for column, (name, value) in zip(block.columns, of_pixel.items(), strict=True):
            ref = refs[name].at[token.pixel, walk.slot, slice_of(column, block.state)]
            inside = jnp.broadcast_to(token.inside, value.shape)
            if block.remerges:
                value = value + load(ref, mask=inside & ~token.has(walks.LAST_OF_SET), other=0.0)
            store(ref, value, mask=inside)
    return adjoint, sums | {"d_A": dA, "d_D": dD, "d_bias": d_bias}


def _sweep_projection(walk: Walk, first: Any) -> None:
    """Take the gradient of 16 step sizes back to what they were projected from, and to the weights."""
    refs, block = walk.refs, walk.block
    codes = refs["tokens"][walk.number, slice_of(first, walks.TILE)]
    shape = (walks.TILE, block.square)
    column = jnp.broadcast_to(jnp.arange(block.square)[None], shape)
    there = (codes >= 0)[:, None] & (column < block.rank)
    # What is not there lies out of bounds: a GPU goes by the mask, but the interpreter would write it, unchanged.
    pixel = jnp.where(there, _pixel(codes)[:, None], refs["packed"].shape[0])
    index = pixel, jnp.full(shape, walk.slot), jnp.minimum(column, block.rank)
    low = load(refs["packed"].at[index], mask=there, other=0.0)
    d_raw = jnp.where((codes >= 0)[:, None], refs["d_raw"][:], 0.0)
    own = jnp.broadcast_to(walk.own, (block.square, block.width))
    weights = load(refs["weights"].at[walk.set], mask=own, other=0.0)
    d_low = walk.device.dot(d_raw, weights, (1, 1))
    if block.remerges:
        again = jnp.broadcast_to(((codes & walks.LAST_OF_SET) == 0)[:, None], shape)
        d_low = d_low + load(refs["d_packed"].at[index], mask=there & again, other=0.0)
    store(refs["d_packed"].at[index], d_low, mask=there)
    # Summed in memory: as large as it may be, it would drive more important things from the registers.
    d_weights = load(refs["d_weights"].at[walk.set], mask=own, other=0.0)
    store(refs["d_weights"].at[walk.set], d_weights + walk.device.dot(low, d_raw, (0, 0)), mask=own)


def _per_state(own: jax.Array, block: Block) -> jax.Array:
    return jnp.broadcast_to(own[:, None], (block.width, block.state))


def _pixel(code: jax.Array) -> jax.Array:
    return jnp.where(code >= 0, lax.shift_right_arithmetic(code, jnp.int32(walks.BITS)), 0)


def _given(refs: Refs, name: str, block: Block, own: jax.Array) -> jax.Array:
    """Return a state (P, N) that came from outside; zeros where there is none."""
    if name not in refs:
        return jnp.zeros((block.width, block.state))
    return load(refs[name].at[:], mask=_per_state(own, block), other=0.0)


def _each(block: Block, one: Callable, carry: Any) -> Any:
    """Take every walk in turn; a single one without a loop."""
    return one(0, carry) if block.walks == 1 else lax.fori_loop(0, block.walks, one, carry)
