"""The scan and its gradient as one program computes them: for some channels of one image, along its walks.

A token is a row of channels, which lie next to each other in memory, so that every order of the pixels reads equally
well. The state (N, P), float32, stays in registers, where the step size is projected too. Exponentials are to the base
of two, and A comes multiplied by log2(e).

A thread has all the states of one channel: no thread asks another for anything, and B and C are read by all of them at
once. Only the gradients of B and C, sums over channels, take the threads together.

What a turn reads was asked for a turn before ("ahead"), for memory is slow and there are few programs to fill the time;
but not where it would drive states from the registers.

The backward pass needs the states from the last to the first. It walks forward once and keeps the state before each
chunk; then, chunk by chunk from the last, it keeps the state before every few tokens, computes those between them again
in registers, and sweeps back over them. The formulas are those of ``sequential.py``.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu import walks
from pallas_kernels.gpu.backend import Device, load, slice_of, store

LOG2E = 1.4426950408889634
# 2 artanh(z) / z by powers of z**2, highest first, for z up to 1 / 3: a fit, 4e-9 off.
ARTANH = (0.2817465725913468, 0.2796141883651232, 0.4002485372325789, 0.6666631593508594, 2.000000007877748)

Refs = dict[str, Any]
Mask = jax.Array | None  # None: everywhere


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
        certain: all tokens are pixels, with neither padding nor fillers.
        registers: that a thread may take, or None.
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
    certain: bool
    registers: int | None
    interpret: bool

    @property
    def columns(self) -> tuple[int, int]:
        """Where B and C begin in what a pixel was projected to; without projection they are arrays of their own."""
        return (0, self.state) if self.rank else (0, 0)

    @property
    def square(self) -> int:
        """The rank, as a side of a matrix that Triton multiplies."""
        return max(walks.TILE, power_of_two(self.rank))

    @property
    def keeps_chunks(self) -> bool:
        """Whether some chunk begins with a state that only a walk from the start can tell."""
        return self.chunks > 1 or self.chained


@dataclasses.dataclass(frozen=True)
class Token:
    """What is read at one token.

    That is, x (P,), the step size before and after softplus (P,), B and C (N,); and what else the pass reads there, by
    the names of the arrays (P,).
    """

    code: jax.Array
    x: jax.Array
    raw: jax.Array
    dt: jax.Array
    B: jax.Array
    C: jax.Array
    others: dict[str, jax.Array]


class States:
    """The states of a program (N, P), of which a thread has those of its channel, and arrays of them in memory."""

    def __init__(self, refs: Refs, block: Block, own: Mask):
        self.refs, self.device = refs, Device(block.interpret)
        self.shape = (block.state, block.width)
        channels = self.device.one_each(self.device.limited(jnp.arange(block.width), block.registers))
        self.index = tuple(jnp.broadcast_to(x, self.shape) for x in (jnp.arange(block.state)[:, None], channels[None]))
        self.mask = None if own is None else jnp.broadcast_to(own[None], self.shape)
        # The one of which ``Device.sums`` leaves the sum there.
        self.state_of_thread = lax.div(channels * block.state, jnp.int32(block.width))

    def read(self, name: str, *at: Any) -> jax.Array:
        """Return one array; zeros where it was not given."""
        if name not in self.refs:
            return jnp.zeros(self.shape)
        return _load(self.refs[name].at[*at, *self.index], self.mask)

    def write(self, name: str, value: jax.Array, *at: Any) -> None:
        """Write one array."""
        store(self.refs[name].at[*at, *self.index], value, mask=self.mask)

    def decay(self, token: Token, A: jax.Array) -> jax.Array:
        """Return exp(dt A)."""
        return self.device.exp2(token.dt[None] * A)

    def sum(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Return the sums of x * y over states (P,)."""
        few = max(1, self.shape[0] // 4)
        total: Any = 0.0
        for one, other in zip(_split(x, 0, few), _split(y, 0, few), strict=True):
            total = self.device.fma(one, other, total)
        return total.sum(0)

    def step(self, state: jax.Array, token: Token, A: jax.Array) -> jax.Array:
        """Return the state after a token."""
        added = (token.dt * token.x)[None] * token.B[:, None]
        return self.device.fma(self.decay(token, A), state, added)


class Walk:
    """One walk of a program: its parameters, in registers, and how its tokens are read and written.

    ``own`` (P,) says which of the program's channels there are; None if all.
    """

    def __init__(self, refs: Refs, block: Block, own: Mask, number: Any):
        self.refs, self.block, self.own, self.number = refs, block, own, number
        self.device = Device(block.interpret)
        entries = (walks.LENGTH, walks.SET, walks.SLOT, walks.LAYER, walks.STARTS, walks.ENDS)
        self.length, self.set, self.slot, self.layer, self.starts, self.ends = (
            refs["table"][number, entry] for entry in entries
        )
        self.D = _load(refs["D"].at[self.set], own)
        self.bias = _load(refs["bias"].at[self.set], own)
        self.weights = [_load(refs["weights"].at[self.set, jnp.int32(r)], own) for r in range(block.rank)]

    def turns(self, size: int, until: Any = None) -> jax.Array:
        """Return how many times ``size`` tokens there are, before token ``until``; the last ones are filled up."""
        end = self.length if until is None else jnp.minimum(self.length, until)
        return lax.div(end + (size - 1), jnp.int32(size))

    def ask(self, turn: Any, *others: str, written: tuple[str, int] | None = None) -> Any:
        """Begin to read the tokens of a turn; ``tokens`` makes them of the result.

        ``others`` are more arrays like x. ``written`` is one that the program adds to, and the bit of its first visit.
        """
        refs, block = self.refs, self.block
        codes = [refs["tokens"][self.number, turn * block.together + i] for i in range(block.together)]
        names = ("x", *(() if block.rank else ("delta",)), *others)
        rows = {name: [self.row(refs[name].at[self.pixel(code)], code) for code in codes] for name in names}
        if written and block.merges:
            name, bit = written
            # A walk comes to a pixel once: the turn before does not write it.
            rows[name] = [
                self.row(refs[name].at[self.layer, self.pixel(code)], code, ((code & bit) == 0)) for code in codes
            ]
        few = {"packed": 2 * block.state + block.rank} if block.rank else dict.fromkeys(("B", "C"), block.state)
        return codes, rows, {name: self.few(name, columns, turn) for name, columns in few.items()}

    def few(self, name: str, columns: int, turn: Any) -> list[jax.Array]:
        """Begin to read the first columns of the rows of a turn's pixels.

        Not as all threads need them, but a column to a thread, of several tokens if they are short: so they take few
        registers on their way. The compiler goes through shared memory where they are used.
        """
        together, columns = self.block.together, power_of_two(columns)
        several = min(together, max(1, self.block.width // columns))
        shape = several, columns
        column, there = self.device.one_each(jnp.arange(columns)), self.refs[name].shape[2]
        mask = None if columns <= there else jnp.broadcast_to((column < there)[None], shape)
        at = jnp.full(shape, self.slot), jnp.broadcast_to(jnp.minimum(column, there - 1)[None], shape)
        parts = []
        for i in range(0, together, several):
            codes = self.refs["tokens"][self.number, slice_of(turn * together + i, several)]
            pixels = jnp.broadcast_to(self.pixel(codes)[:, None], shape)
            parts.append(_load(self.refs[name].at[pixels, *at], mask))
        return parts

    def tokens(self, asked: Any) -> list[Token]:
        """Return the tokens of a turn."""
        codes, rows, few = asked
        block, (rank, state) = self.block, (self.block.rank, self.block.state)
        few = {name: [row for part in parts for row in _split(part, 0, 1)] for name, parts in few.items()}
        result = []
        for i, code in enumerate(codes):
            wide = {name: values[i].astype(jnp.float32) for name, values in rows.items()}
            if rank:
                B, C, *low = _split(few["packed"][i], 1, state)
                columns = [one.reshape(1) for part in low for one in _split(part, 1, 1)][:rank]
                raw = self.bias
                for one, weights in zip(columns, self.weights, strict=True):
                    raw = self.device.fma(one, weights, raw)
                raw = raw if block.certain else jnp.where(code >= 0, raw, self.bias)
            else:
                B, C = few["B"][i], few["C"][i]
                raw = wide.pop("delta") + self.bias
            dt = self.softplus(raw) if block.softplus else raw
            dt = dt if block.certain else jnp.where(code == walks.FILLER, 0.0, dt)
            B, C = (one.reshape(state).astype(jnp.float32) for one in (B, C))
            result.append(Token(code, wide.pop("x"), raw, dt, B, C, wide))
        return result

    def pixel(self, code: Any) -> jax.Array:
        """Return the number of a token's pixel; 0 for what is none."""
        pixel = lax.shift_right_arithmetic(code, jnp.int32(walks.BITS))
        return pixel if self.block.certain else jnp.maximum(pixel, 0)

    def inside(self, code: Any) -> Mask:
        """Return which channels (P,) of a token there are to be read and written."""
        return _both(self.own, None if self.block.certain else code >= 0)

    def row(self, ref: Any, code: Any, there: Any = None) -> jax.Array:
        """Return the channels of a token's pixel (P,); zeros where there is none, or nothing yet."""
        there = None if there is None else jnp.broadcast_to(there, self.block.width)
        return _load(ref, _both(self.inside(code), there))

    def write(self, name: str, token: Token, value: jax.Array) -> None:
        """Add the channels of a pixel (P,) to what the program has written there before."""
        value = token.others[name] + value if name in token.others else value
        ref = self.refs[name]
        store(ref.at[self.layer, self.pixel(token.code)], value.astype(ref.dtype), mask=self.inside(token.code))

    def softplus(self, raw: jax.Array) -> jax.Array:
        """Return the softplus of ``terms.py``: beside the larger of raw and 0, log(1 + e) = 2 artanh(e / (2 + e))."""
        e = self.device.exp2(jnp.abs(raw) * -LOG2E)
        z = e * self.device.reciprocal(2 + e)
        square = z * z
        series = jnp.full_like(z, ARTANH[0])
        for coefficient in ARTANH[1:]:
            series = self.device.fma(series, square, jnp.float32(coefficient))
        return self.device.fma(series, z, jnp.maximum(raw, 0))

    def slope(self, raw: jax.Array) -> jax.Array:
        """Return the derivative of the softplus."""
        e = self.device.exp2(jnp.abs(raw) * -LOG2E)
        return jnp.where(raw > 0, 1.0, e) * self.device.reciprocal(1 + e)


def _ahead(first: Any, last: Any, ask: Callable, turn: Callable, carry: Any) -> Any:
    """Return ``carry = turn(i, ask(i), carry)`` from ``first`` to before ``last``, where each asks for the next."""

    def one(i, both):
        asked, carry = both
        following = ask(jnp.minimum(i + 1, last - 1))
        return following, turn(i, asked, carry)

    return lax.fori_loop(first, last, one, (ask(first), carry))[1]


def _run(
    walk: Walk, states: States, A: jax.Array, state: jax.Array, first: Any, last: Any, each: Callable | None = None
) -> jax.Array:
    """Return the state after the turns from ``first`` to before ``last``; ``each(turn, state)`` sees those before."""

    def turn(i, asked, state):
        if each:
            each(i, state)
        for token in walk.tokens(asked):
            state = states.step(state, token, A)
        return state

    return _ahead(first, last, walk.ask, turn, state)


def forward(refs: Refs, block: Block, own: Mask) -> None:
    """Write y, and the last state where it is wanted."""
    states = States(refs, block, own)

    def one(number, state):
        walk, A = Walk(refs, block, own, number), states.read("A", refs["table"][number, walks.SET])
        state = jnp.where(walk.starts != 0, states.read("start"), state)

        def turn(i, asked, state):
            for token in walk.tokens(asked):
                state = states.step(state, token, A)
                y = (state * token.C[:, None]).sum(0)
                walk.write("y", token, walk.device.fma(walk.D, token.x, y))
            return state

        ask = functools.partial(walk.ask, written=("y", walks.FIRST))
        state = _ahead(jnp.int32(0), walk.turns(block.together), ask, turn, state)
        walk.device.barrier()
        return state

    state = _each(block, one, jnp.zeros(states.shape))
    if "final" in refs:
        states.write("final", state)


def backward(refs: Refs, block: Block, own: Mask) -> None:
    """Write the gradients of what the forward pass reads; those of parameters from this image alone."""
    states = States(refs, block, own)
    if block.keeps_chunks:
        _keep_chunks(refs, block, own)

    def one(i, carry):
        walk = Walk(refs, block, own, block.walks - 1 - i)
        adjoint, sums = carry
        adjoint = jnp.where(walk.ends != 0, states.read("d_final"), adjoint)
        sums = {name: jnp.where(walk.ends != 0, 0.0, value) for name, value in sums.items()}
        if block.rank:
            at = _turned(block.square, block.width)
            ends = jnp.broadcast_to(walk.ends != 0 if own is None else (own & (walk.ends != 0))[:, None], at[0].shape)
            store(refs["d_weights"].at[walk.set, *at], jnp.zeros(ends.shape), mask=ends)
        chunks, A = walk.turns(block.chunk), states.read("A", walk.set)
        adjoint, sums = lax.fori_loop(
            0, chunks, lambda c, carry: _sweep_chunk(walk, A, states, chunks - 1 - c, *carry), (adjoint, sums)
        )
        # The walks of a chain share these: what the first one writes, the last to come here, is their sum.
        states.write("d_A", sums["d_A"] * (1 / LOG2E), walk.set)
        for name in ("d_D", "d_bias"):
            store(refs[name].at[walk.set], sums[name], mask=own)
        walk.device.barrier()
        return adjoint, sums

    zero, channels = jnp.zeros(states.shape), jnp.zeros(block.width)
    adjoint, _ = _each(block, one, (zero, {"d_A": zero, "d_D": channels, "d_bias": channels}))
    if "d_start" in refs:
        states.write("d_start", adjoint)


def _keep_chunks(refs: Refs, block: Block, own: Mask) -> None:
    """Keep the state before each chunk of every walk."""
    states = States(refs, block, own)

    def one(number, state):
        walk, A = Walk(refs, block, own, number), states.read("A", refs["table"][number, walks.SET])
        state = jnp.where(walk.starts != 0, states.read("start"), state)
        last = jnp.maximum(walk.turns(block.chunk), 1) - 1
        turns = block.chunk // block.together

        def chunk(c, state):
            states.write("chunks", state, number, c)
            return _run(walk, states, A, state, c * turns, (c + 1) * turns)

        state = lax.fori_loop(0, last, chunk, state)
        states.write("chunks", state, number, last)
        # Only the next walk of a chain asks for the state after the last chunk.
        return _run(walk, states, A, state, last * turns, walk.turns(block.together)) if block.chained else state

    _each(block, one, jnp.zeros(states.shape))
    Device(block.interpret).barrier()


def _sweep_chunk(
    walk: Walk, A: jax.Array, states: States, number: Any, adjoint: jax.Array, sums: dict
) -> tuple[jax.Array, dict]:
    """Go back through a chunk: from the gradient of the state after it, "adjoint", to that of the state before it."""
    block = walk.block
    start = states.read("chunks", walk.number, number) if block.keeps_chunks else states.read("start")
    first = number * (block.chunk // block.together)
    last = walk.turns(block.together, (number + 1) * block.chunk) - 1

    def keep(turn, state):
        states.write("turns", state, turn - first)

    keep(last, _run(walk, states, A, start, first, last, keep))
    walk.device.barrier()

    per_tile = walks.TILE // block.together
    first_tile, last_tile = lax.div(first, per_tile), lax.div(last, per_tile)

    ahead = block.state <= 4 and block.rank <= 16

    def ask(turn):
        return walk.ask(turn, "dy", written=("dx", walks.LAST)), states.read("turns", turn - first)

    def tile(i, carry):
        t = last_tile - i
        begin, end = t * per_tile, jnp.minimum(last, (t + 1) * per_tile - 1)

        def turn(i, carry):
            asked, adjoint, sums = carry
            now = end - i
            (rows, state), following = (asked, ask(jnp.maximum(now - 1, first))) if ahead else (ask(now), None)
            return following, *_sweep_turn(walk, A, states, now, rows, state, adjoint, sums)

        carry = lax.fori_loop(0, end - begin + 1, turn, carry)
        if block.rank:
            walk.device.barrier()
            _sweep_projection(walk, t * walks.TILE)
            walk.device.barrier()
        return carry

    _, adjoint, sums = lax.fori_loop(0, last_tile - first_tile + 1, tile, (ask(last) if ahead else None, adjoint, sums))
    walk.device.barrier()
    return adjoint, sums


def _sweep_turn(
    walk: Walk,
    A: jax.Array,
    states: States,
    turn: Any,
    asked: Any,
    state: jax.Array,
    adjoint: jax.Array,
    sums: dict,
) -> tuple[jax.Array, dict]:
    """Go back through the tokens of a turn, before which the state is given."""
    block, refs, tokens = walk.block, walk.refs, walk.tokens(asked)
    passed = [state]
    for token in tokens:
        passed.append(states.step(passed[-1], token, A))

    fma = walk.device.fma
    dA, dD, d_bias = sums["d_A"], sums["d_D"], sums["d_bias"]
    for i in reversed(range(block.together)):
        token, dy = tokens[i], tokens[i].others["dy"]
        gradient = fma(dy[None], token.C[:, None], adjoint)
        adjoint = states.decay(token, A) * gradient
        through = adjoint * passed[i]
        dt_x = token.dt * token.x
        gB = (gradient * token.B[:, None]).sum(0)
        d_dt = fma(token.x, gB, states.sum(through, A) * (1 / LOG2E))
        d_raw = d_dt * walk.slope(token.raw) if block.softplus else d_dt
        d_raw = d_raw if block.certain else jnp.where(token.code == walks.FILLER, 0.0, d_raw)
        dA = fma(through, token.dt[None], dA)
        dD = fma(dy, token.x, dD)
        d_bias = d_bias + d_raw
        walk.write("dx", token, fma(token.dt, gB, walk.D * dy))
        if block.rank:
            refs["d_raw"][(turn * block.together + i) & (walks.TILE - 1)] = d_raw
        else:
            ref = refs["d_delta"]
            store(ref.at[walk.pixel(token.code)], d_raw.astype(ref.dtype), mask=walk.inside(token.code))
        of_pixel = {"d_B": gradient * dt_x[None], "d_C": passed[i + 1] * dy[None]}
        for column, (name, value) in zip(block.columns, of_pixel.items(), strict=True):
            value = walk.device.sums(value)
            ref = refs[name].at[walk.pixel(token.code), walk.slot, column + states.state_of_thread]
            inside = None if block.certain else jnp.broadcast_to(token.code >= 0, value.shape)
            if block.remerges:
                again = jnp.broadcast_to((token.code & walks.LAST_OF_SET) == 0, value.shape)
                value = value + _load(ref, _both(inside, again))
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
    pixel = jnp.where(there, walk.pixel(codes)[:, None], refs["packed"].shape[0])
    index = pixel, jnp.full(shape, walk.slot), 2 * block.state + jnp.minimum(column, block.rank - 1)
    low = _load(refs["packed"].at[index], there)
    d_raw = jnp.where((codes >= 0)[None], _load(refs["d_raw"].at[_turned(walks.TILE, block.width)], None), 0.0)
    at, own = (walk.set, *_turned(block.square, block.width)), walk.own
    own = None if own is None else jnp.broadcast_to(own[:, None], at[1].shape)
    d_low = walk.device.dot(d_raw, _load(refs["weights"].at[at], own), (0, 0))
    if block.remerges:
        again = jnp.broadcast_to(((codes & walks.LAST_OF_SET) == 0)[:, None], shape)
        d_low = d_low + _load(refs["d_packed"].at[index], there & again)
    store(refs["d_packed"].at[index], d_low, mask=there)
    # Summed in memory: as large as it may be, it would drive more important things from the registers.
    d_weights = _load(refs["d_weights"].at[at], own)
    store(refs["d_weights"].at[at], d_weights + walk.device.dot(d_raw, low, (1, 0)), mask=own)


def _turned(rows: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Return where to find rows of channels (P, rows).

    (rows, P) they might have the shape of states, and Triton arranges alike what has one shape.
    """
    channel, row = (lax.broadcasted_iota(jnp.int32, (width, rows), axis) for axis in (0, 1))
    return row, channel


def _split(x: jax.Array, axis: int, size: int) -> Sequence[jax.Array]:
    return lax.split(x, (size,) * (x.shape[axis] // size), axis)


def power_of_two(count: int) -> int:
    """Return the least power of two that is not below a count."""
    return 1 << (count - 1).bit_length()


def _load(ref: Any, mask: Mask) -> jax.Array:
    """Return what is there, and zeros elsewhere."""
    return load(ref) if mask is None else load(ref, mask=mask, other=0.0)


def _both(mask: Mask, other: Mask) -> Mask:
    """Return where both are."""
    if mask is None or other is None:
        return other if mask is None else mask
    return mask & other


def _each(block: Block, one: Callable, carry: Any) -> Any:
    """Take every walk in turn; a single one without a loop."""
    return one(0, carry) if block.walks == 1 else lax.fori_loop(0, block.walks, one, carry)
