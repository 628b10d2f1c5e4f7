"""What both kernels do with tokens: reading and writing them, their step sizes, and the recurrence.

A token is a row of channels, which lie next to each other in memory, so that every order of the pixels reads equally
well. The state (N, P), float32, stays in registers, where the step size is projected too.

A thread has all the states of one channel. No thread asks another for anything, and all of them read the same B and C.
Only the gradients of B and C, sums over channels, take the threads together.

Memory is slow, and there are few programs to fill the time. So a turn's reads begin a turn before ("ahead"), except
where they would drive states from the registers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.contract import LOG2E
from pallas_kernels.gpu import walks
from pallas_kernels.gpu.program import WIDTH, Program, power_of_two
from pallas_kernels.gpu.triton import Device, load, slice_of, store

# 2 artanh(z) / z by powers of z**2, highest first, for z up to 1 / 3: a fit, 4e-9 off.
ARTANH = (0.2817465725913468, 0.2796141883651232, 0.4002485372325789, 0.6666631593508594, 2.000000007877748)

Refs = dict[str, Any]
Mask = jax.Array | None  # None: everywhere


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

    def __init__(self, refs: Refs, program: Program, own: Mask):
        self.refs, self.device = refs, Device(program.interpret)
        self.shape = (program.state, program.width)
        channels = self.device.limited(jnp.arange(program.width), program.registers)
        if program.width == WIDTH:  # of more, a thread has the neighbours that it has of a row
            channels = self.device.column_a_thread(channels)
        self.index = tuple(
            jnp.broadcast_to(x, self.shape) for x in (jnp.arange(program.state)[:, None], channels[None])
        )
        self.mask = None if own is None else jnp.broadcast_to(own[None], self.shape)
        # The one of which ``Device.sums`` leaves the sum there.
        self.state_of_thread = lax.div(channels * program.state, jnp.int32(program.width))

    def read(self, name: str, *at: Any) -> jax.Array:
        """Return one array; zeros where it was not given."""
        if name not in self.refs:
            return jnp.zeros(self.shape)
        return load_or_zeros(self.refs[name].at[*at, *self.index], self.mask)

    def write(self, name: str, value: jax.Array, *at: Any) -> None:
        """Write one array."""
        store(self.refs[name].at[*at, *self.index], value, mask=self.mask)

    def decay(self, token: Token, A: jax.Array) -> jax.Array:
        """Return a = exp(dt A), as a power of 2: A comes multiplied by log2(e)."""
        return self.device.exp2(token.dt[None] * A)

    def sum(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Return the sums of x * y over states (P,)."""
        few = max(1, self.shape[0] // 4)
        total: Any = 0.0
        for one, other in zip(split(x, 0, few), split(y, 0, few), strict=True):
            total = self.device.fma(one, other, total)
        return total.sum(0)

    def step(self, state: jax.Array, token: Token, A: jax.Array) -> jax.Array:
        """Return the state after a token."""
        added = (token.dt * token.x)[None] * token.B[:, None]  # dt x B
        return self.device.fma(self.decay(token, A), state, added)  # h <- a h + dt x B


class Walker:
    """One walk of a program: its parameters, in registers, and how its tokens are read and written.

    ``own`` (P,) says which of the program's channels there are; None if all.
    """

    def __init__(self, refs: Refs, program: Program, own: Mask, number: Any):
        self.refs, self.program, self.own, self.number = refs, program, own, number
        self.device = Device(program.interpret)
        entries = (walks.LENGTH, walks.SET, walks.SLOT, walks.LAYER, walks.STARTS, walks.ENDS)
        self.length, self.set, self.slot, self.layer, self.starts, self.ends = (
            refs["table"][number, entry] for entry in entries
        )
        self.D = load_or_zeros(refs["D"].at[self.set], own)
        self.bias = load_or_zeros(refs["bias"].at[self.set], own)
        self.weights = [load_or_zeros(refs["weights"].at[self.set, jnp.int32(r)], own) for r in range(program.rank)]

    def turns(self, size: int, until: Any = None) -> jax.Array:
        """Return how many times ``size`` tokens there are, before token ``until``; the last ones are filled up."""
        end = self.length if until is None else jnp.minimum(self.length, until)
        return lax.div(end + (size - 1), jnp.int32(size))

    def request(self, turn: Any, *others: str, written: tuple[str, int] | None = None) -> Any:
        """Begin to read the tokens of a turn; ``tokens`` makes them from the result.

        ``others`` are more arrays like x. ``written`` is one that the program adds to, and the bit of its first visit.
        """
        refs, program = self.refs, self.program
        codes = [refs["tokens"][self.number, turn * program.tokens_a_turn + i] for i in range(program.tokens_a_turn)]
        names = ("x", *(() if program.rank else ("delta",)), *others)
        rows = {name: [self.row(refs[name].at[self.pixel(code)], code) for code in codes] for name in names}
        if written and program.merges:
            name, bit = written
            # A walk comes to a pixel once: the turn before does not write it.
            rows[name] = [
                self.row(refs[name].at[self.layer, self.pixel(code)], code, ((code & bit) == 0)) for code in codes
            ]
        few = {"packed": 2 * program.state + program.rank} if program.rank else dict.fromkeys(("B", "C"), program.state)
        return codes, rows, {name: self.request_rows(name, columns, turn) for name, columns in few.items()}

    def request_rows(self, name: str, columns: int, turn: Any) -> list[jax.Array]:
        """Begin to read the first columns of the rows of a turn's pixels.

        A thread loads one column, of several tokens at once if rows are short, although every thread needs all of them:
        so the loads under way take few registers. Triton spreads them through shared memory where they are used.
        """
        together, columns = self.program.tokens_a_turn, power_of_two(columns)
        several = min(together, max(1, self.program.width // columns))
        shape = several, columns
        column, there = self.device.column_a_thread(jnp.arange(columns)), self.refs[name].shape[2]
        mask = None if columns <= there else jnp.broadcast_to((column < there)[None], shape)
        at = jnp.full(shape, self.slot), jnp.broadcast_to(jnp.minimum(column, there - 1)[None], shape)
        parts = []
        for i in range(0, together, several):
            codes = self.refs["tokens"][self.number, slice_of(turn * together + i, several)]
            pixels = jnp.broadcast_to(self.pixel(codes)[:, None], shape)
            parts.append(load_or_zeros(self.refs[name].at[pixels, *at], mask))
        return parts

    def tokens(self, requested: Any) -> list[Token]:
        """Return the tokens of a turn."""
        codes, rows, few = requested
        program, (rank, state) = self.program, (self.program.rank, self.program.state)
        few = {name: [row for part in parts for row in split(part, 0, 1)] for name, parts in few.items()}
        result = []
        for i, code in enumerate(codes):
            wide = {name: values[i].astype(jnp.float32) for name, values in rows.items()}
            if rank:
                B, C, *low = split(few["packed"][i], 1, state)
                columns = [one.reshape(1) for part in low for one in split(part, 1, 1)][:rank]
                raw = self.bias
                for one, weights in zip(columns, self.weights, strict=True):
                    raw = self.device.fma(one, weights, raw)
                raw = raw if program.all_pixels else jnp.where(code >= 0, raw, self.bias)
            else:
                B, C = few["B"][i], few["C"][i]
                raw = wide.pop("delta") + self.bias
            dt = self.softplus(raw) if program.softplus else raw
            dt = dt if program.all_pixels else jnp.where(code == walks.FILLER, 0.0, dt)
            B, C = (one.reshape(state).astype(jnp.float32) for one in (B, C))
            result.append(Token(code, wide.pop("x"), raw, dt, B, C, wide))
        return result

    def pixel(self, code: Any) -> jax.Array:
        """Return the number of a token's pixel; 0 for what is none."""
        pixel = lax.shift_right_arithmetic(code, jnp.int32(walks.BITS))
        return pixel if self.program.all_pixels else jnp.maximum(pixel, 0)

    def inside(self, code: Any) -> Mask:
        """Return which channels (P,) of a token there are to be read and written."""
        return both(self.own, None if self.program.all_pixels else code >= 0)

    def row(self, ref: Any, code: Any, there: Any = None) -> jax.Array:
        """Return the channels of a token's pixel (P,); zeros where there is none, or nothing yet."""
        there = None if there is None else jnp.broadcast_to(there, self.program.width)
        return load_or_zeros(ref, both(self.inside(code), there))

    def write(self, name: str, token: Token, value: jax.Array) -> None:
        """Add the channels of a pixel (P,) to what the program has written there before."""
        value = token.others[name] + value if name in token.others else value
        ref = self.refs[name]
        store(ref.at[self.layer, self.pixel(token.code)], value.astype(ref.dtype), mask=self.inside(token.code))

    def softplus(self, raw: jax.Array) -> jax.Array:
        """Return the softplus of ``contract.py``: the larger of raw and 0, plus log(1 + e) = 2 artanh(e / (2 + e))."""
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


def ahead(first: Any, last: Any, ask: Callable, turn: Callable, carry: Any) -> Any:
    """Return ``carry = turn(i, ask(i), carry)`` from ``first`` to before ``last``, where each asks for the next."""

    def one(i, both):
        requested, carry = both
        following = ask(jnp.minimum(i + 1, last - 1))
        return following, turn(i, requested, carry)

    return lax.fori_loop(first, last, one, (ask(first), carry))[1]


def run(
    walk: Walker, states: States, A: jax.Array, state: jax.Array, first: Any, last: Any, each: Callable | None = None
) -> jax.Array:
    """Return the state after the turns from ``first`` to before ``last``; ``each(turn, state)`` sees those before."""

    def turn(i, requested, state):
        if each:
            each(i, state)
        for token in walk.tokens(requested):
            state = states.step(state, token, A)
        return state

    return ahead(first, last, walk.request, turn, state)


def split(x: jax.Array, axis: int, size: int) -> Sequence[jax.Array]:
    """Return the parts of ``size`` along an axis."""
    return lax.split(x, (size,) * (x.shape[axis] // size), axis)


def load_or_zeros(ref: Any, mask: Mask) -> jax.Array:
    """Return what is there, and zeros elsewhere."""
    return load(ref) if mask is None else load(ref, mask=mask, other=0.0)


def both(mask: Mask, other: Mask) -> Mask:
    """Return where both are."""
    if mask is None or other is None:
        return other if mask is None else mask
    return mask & other


def each_walk(program: Program, one: Callable, carry: Any) -> Any:
    """Take every walk in turn; a single one without a loop."""
    return one(0, carry) if program.walks == 1 else lax.fori_loop(0, program.walks, one, carry)
