"""The two kernels: forward, and backward with the states computed again. Both run on one block at a time.

A block is a sub-lattice (or a chunk of it) of ``channels`` channels and up to 128 images: images lie on lanes, channels
on sublanes, and a token is a whole number of registers on an untiled axis, which makes every order an address. The
rows of ``packed`` hold, for each parameter set of a pixel, the time step before its projection (rank R), B and C; a row
is read as one register, repeated over the sublanes by the load itself.

Forward, for every walk of the block: the time steps of all its tokens (projected on the matrix unit, several tokens in
one product with block-diagonal weights), then the recurrence, a tile of eight channels after the other with the states
in registers. Backward: the same time steps; the states once more, kept on chip; then from the last token to the first
with ``s[n]``, the gradient of the state that a token hands on to the one before::

    g = s + C dy        s <- a g        w = s h_before        (a = 2^(dt A))
    dC = sum_e h_after dy    dB = sum_e g dt u    d_dt = sum_n w A + u sum_n g B    du = dt sum_n g B    dA = sum_t w dt

Time steps are in units of ln 2 and B in units of 1 / ln 2, so that exponentials and softplus are powers and logarithms
of 2, which is what the chip has; the derivatives of a have a factor ln 2, which is left out above.
"""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.geometry import Segment, Walk, for_tokens

LOG2E = 1.4426950408889634
TILE = 8  # channels of a register


@dataclasses.dataclass(frozen=True)
class Block:
    """What a kernel is compiled for, besides the shapes of its blocks.

    Attributes:
        walks: what is done on the block.
        rows, columns: pixels of the block.
        flat: whether they lie on its first axis, row by row, or on the first two.
        channels: channels of the block, a multiple of 8.
        lanes: images, at most 128.
        state: N.
        rank: rows that hold the time step before its projection; 0 where the time steps come from outside.
        natural: whether those from outside are still to be brought into units of ln 2.
        slab: the rows that the product with the projection's weights reads, a multiple of 8, at least rank.
        set_rows: rows of one parameter set.
        softplus: whether time steps go through softplus.
        together: pixels whose time steps are projected in one product.
        at_a_time: pixels of one turn of the loops that have no order.
        unroll: tokens of one turn of the forward loop.
        unroll_again, unroll_back: the same for the two loops of the backward pass.
        tiles: tiles of 8 channels in flight.
        chunks, blocks: sizes of the grid's axes over chunks and over channels.
        at_once: sum dB and dC over the channels of a block token by token, not for all channels at the end.
        keep_decays: keep the decays of the recomputation for the way back.
        exact: float32 in all products and in softplus; otherwise products take bfloat16.
    """

    walks: tuple[Walk, ...]
    rows: int
    columns: int
    flat: bool
    channels: int
    lanes: int
    state: int
    rank: int
    natural: bool
    slab: int
    set_rows: int
    softplus: bool
    together: int
    at_a_time: int
    unroll: int
    unroll_again: int
    unroll_back: int
    tiles: int
    chunks: int
    blocks: int
    at_once: bool
    keep_decays: bool
    exact: bool

    @property
    def product(self) -> dict[str, Any]:
        """Options of products with the projection's weights."""
        return {"precision": lax.Precision.HIGHEST if self.exact else None, "preferred_element_type": jnp.float32}

    @property
    def pixels(self) -> int:
        """Pixels of the block."""
        return self.rows * self.columns

    @property
    def axes(self) -> tuple[int, int]:
        """The two axes that pixels have in a block."""
        return (self.pixels, 1) if self.flat else (self.rows, self.columns)

    @property
    def tokens(self) -> int:
        """Tokens of its longest walk."""
        return max(len(walk.orders) for walk in self.walks) * self.pixels

    def segments(self, walk: Walk) -> list[tuple[Segment, int]]:
        """Return the segments of a walk, each with the number of tokens before it."""
        ways = [Segment.of(*order, self.rows, self.columns, flat=self.flat) for order in walk.orders]
        return [(segment, i * self.pixels) for i, segment in enumerate(ways)]

    def for_pixels(self, size: int, body) -> None:
        """Run ``body(pixels)`` over all pixels of the block, about ``size`` of them, a list, at once."""
        if self.flat or self.columns >= size:
            segment = Segment.of(False, False, self.rows, self.columns, flat=self.flat)

            def group(t, pixel, count, carry):
                body([pixel(i) for i in range(count)])
                return carry

            for_tokens(segment, size, group)
        else:  # several whole rows
            rows = Segment(1, self.rows, (0, 0), (0, 0), (1, 0))

            def lines(t, pixel, count, carry):
                body([(pixel(i)[0], column) for i in range(count) for column in range(self.columns)])
                return carry

            for_tokens(rows, size // self.columns, lines)

    @property
    def flying(self) -> int:
        """Channels that are in flight together."""
        return self.tiles * TILE

    def channel_groups(self) -> list[slice]:
        """Return the channels that are in flight together, for every such group."""
        return [slice(i, i + self.flying) for i in range(0, self.channels, self.flying)]

    def full(self, row):
        """Repeat a row (1, lanes) for all channels in flight."""
        return jnp.broadcast_to(row, (self.flying, self.lanes))

    def row_of_b(self, walk: Walk) -> int:
        """Return the row of the first B of a walk's parameters; the first C is ``state`` rows further."""
        return walk.slot * self.set_rows + self.rank


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
    return jnp.where(dt < 0.01, short * (1.0 - short * (0.5 - short * (1 / 6))), slope) if exact else slope


def _references(names, references):
    """Name the references; those that this call has not are None."""
    return types.SimpleNamespace(**(dict.fromkeys(ALL) | dict(zip(names, references, strict=True))))


ALL = (
    *("x", "delta", "packed", "weights", "weights_back", "A", "bias", "skip", "start", "dy", "d_final", "kept"),
    *("y", "final", "borders", "dx", "d_delta", "d_packed", "dA", "d_bias", "d_skip", "d_weights", "d_start"),
    *("sum", "dt", "d_raw", "state", "h", "a", "sum_B", "sum_C", "acc_A", "acc_bias", "acc_skip", "acc_weights"),
)


def _time_steps(r, s: Block, walk: Walk):
    """Fill ``r.dt``, which is laid out as the image is, with the time steps of a walk."""
    bias = r.bias[walk.slot]
    row = walk.slot * s.set_rows

    def group(pixels):
        for some in _portions(pixels, s.together if s.rank else 1):
            if s.rank:
                low = jnp.concatenate([r.packed[*q, row : row + s.slab, :] for q in some], 0)
                weights = r.weights[walk.slot, : len(some) * s.channels, : len(some) * s.slab]
                raw = jnp.dot(weights, low.astype(weights.dtype), **s.product)
            else:
                raw = r.delta[*some[0], walk.slot].astype(jnp.float32)
                raw = LOG2E * raw if s.natural else raw
            steps = raw + jnp.concatenate([bias] * len(some), 0)
            steps = softplus(steps, exact=s.exact) if s.softplus else steps
            for i, q in enumerate(some):
                r.dt[q] = steps[i * s.channels : (i + 1) * s.channels]

    s.for_pixels(s.at_a_time, group)


def _portions(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def forward(*references, names, block: Block):
    """Scan a block along its walks; the parts that ``names`` leaves out are not computed."""
    s = block
    r = _references(names, references)
    chunk, number = pl.program_id(2), pl.program_id(3)
    mine = number if s.chunks > 1 else 0
    target = r.y if r.sum is None else r.sum

    if s.chunks > 1:

        @pl.when(chunk == 0)
        def _():
            _set(r.state.at[mine], r.start)

    for walk in s.walks:
        _time_steps(r, s, walk)
        for group in s.channel_groups():
            h = _first_states(s, group, r.state.at[mine] if s.chunks > 1 else r.start)
            for segment, before in s.segments(walk):
                first = walk.slot == 0 and before == 0  # to write to its pixels; all others add

                def turn(t, pixel, count, h, walk=walk, group=group, first=first):
                    h, tokens = _advance(r, s, walk, group, [pixel(i) for i in range(count)], h)
                    if target is None:
                        return h
                    for token in tokens:
                        place, c = (*token.pixel, group), s.row_of_b(walk) + s.state
                        C = [s.full(r.packed[*token.pixel, c + n : c + n + 1, :]) for n in range(s.state)]
                        y = functools.reduce(jnp.add, [h * row for h, row in zip(token.states, C, strict=True)])
                        target[place] = y + (token.u * r.skip[group, :] if first else target[place])
                    return h

                h = for_tokens(segment, s.unroll, turn, h)
            for n, state in enumerate(h):
                if s.chunks > 1:
                    r.state[mine, n, group, :] = state
                for result in (r.final, r.borders):
                    if result is not None:
                        result[n, group, :] = state
    _convert(s, r.sum, r.y)


def _first_states(s: Block, group: slice, start):
    """Return the states before the first token."""
    rest = jnp.zeros((s.flying, s.lanes), jnp.float32)
    return tuple(rest if start is None else start[n, group, :] for n in range(s.state))


@dataclasses.dataclass(frozen=True)
class _Token:
    """What a token was computed with: its pixel, u, and for each n the decay and the state after it."""

    pixel: tuple
    u: jax.Array
    decays: list[jax.Array]
    states: list[jax.Array]


def _advance(r, s: Block, walk: Walk, group: slice, pixels, h) -> tuple[tuple, list[_Token]]:
    """Run the recurrence over some tokens; return the last states, and every token."""
    b = s.row_of_b(walk)
    tokens: list[_Token] = []
    # With few states in flight each must wait for the one before. Two tokens at once make two steps in the time of one.
    for some in _portions(pixels, 2 if s.state * s.tiles <= 2 else 1):
        new = [_Token(q, r.x[*q, group, :].astype(jnp.float32), [], []) for q in some]
        dt = [r.dt[*q, group, :] for q in some]
        dtu = [x * token.u for x, token in zip(dt, new, strict=True)]
        for n in range(s.state):
            A = r.A[walk.slot, n, group, :]
            a = [jnp.exp2(x * A) for x in dt]
            written = [x * s.full(r.packed[*q, b + n : b + n + 1, :]) for x, q in zip(dtu, some, strict=True)]
            reached = [a[0] * h[n] + written[0]]
            if len(some) == 2:
                reached.append((a[1] * a[0]) * h[n] + (a[1] * written[0] + written[1]))
            for token, decay, state in zip(new, a, reached, strict=True):
                token.decays.append(decay)
                token.states.append(state)
        h = tuple(new[-1].states)
        tokens += new
    return h, tokens


def _convert(s: Block, source, target):
    """Write a float32 sum as what the caller asked for."""
    if source is not None:

        def one(q):
            target[q] = source[q].astype(target.dtype)

        s.for_pixels(16, lambda pixels: [one(q) for q in pixels])


def backward(*references, names, block: Block):
    """Compute the gradients of a block's inputs from the gradient of its result."""
    s = block
    r = _references(names, references)
    chunk, number = pl.program_id(2), pl.program_id(3)  # chunks come from the last to the first
    mine = number if s.chunks > 1 else 0
    target = r.dx if r.sum is None else r.sum

    totals = {"dA": r.dA, "d_bias": r.d_bias, "d_skip": r.d_skip, "d_weights": r.d_weights}
    totals = {name: total for name, total in totals.items() if total is not None}
    if s.chunks > 1:
        sums = {"dA": r.acc_A, "d_bias": r.acc_bias, "d_skip": r.acc_skip, "d_weights": r.acc_weights}
        results, totals = totals, {name: sums[name].at[mine] for name in totals}

    @pl.when(chunk == 0)
    def _():
        for total in totals.values():
            total[...] = jnp.zeros(total.shape, total.dtype)
        if s.chunks > 1:
            _set(r.state.at[mine], r.d_final)

    @pl.when(number == 0)
    def _():
        s.for_pixels(8, lambda pixels: [_clear(r.d_packed, q) for q in pixels])
        if not s.at_once:
            for total in (r.sum_B, r.sum_C):
                lax.fori_loop(0, s.tokens, lambda t, carry, total=total: _clear(total, (t,)) or carry, 0)

    for walk in s.walks:
        if s.chunks == 1:
            _set(r.state.at[mine], r.d_final)
        _time_steps(r, s, walk)
        for group in s.channel_groups():
            h = _first_states(s, group, r.start)
            if r.kept is not None:
                h = tuple(jnp.where(chunk == s.chunks - 1, x, r.kept[n, group, :]) for n, x in enumerate(h))
            _again(r, s, walk, group, h)
            _back(r, s, walk, group, r.state.at[mine], target, totals)
        _project_back(r, s, walk, totals)
    if r.d_start is not None:
        r.d_start[...] = r.state[mine]
    if not s.at_once:

        @pl.when(number == s.blocks - 1)
        def _():
            _sum_channels(r, s)

    if s.chunks > 1:

        @pl.when(chunk == s.chunks - 1)
        def _():
            for name, result in results.items():
                result[...] = totals[name][...]

    _convert(s, r.sum, r.dx)


def _set(reference, value):
    """Copy a block, or clear where there is none."""
    reference[...] = jnp.zeros(reference.shape, reference.dtype) if value is None else value[...]


def _clear(reference, at):
    reference[at] = jnp.zeros(reference.shape[len(at) :], reference.dtype)


def _again(r, s: Block, walk: Walk, group: slice, h):
    """Compute the states of a walk again and keep the state before each token in ``r.h``, with the last one behind."""
    for n, state in enumerate(h):
        r.h[0, n] = state
    for segment, before in s.segments(walk):

        def turn(t, pixel, count, h, before=before):
            h, tokens = _advance(r, s, walk, group, [pixel(i) for i in range(count)], h)
            for i, token in enumerate(tokens):
                for n in range(s.state):
                    r.h[before + t + i + 1, n] = token.states[n]
                    if s.keep_decays:
                        r.a[before + t + i, n] = token.decays[n]
            return h

        h = for_tokens(segment, s.unroll_again, turn, h)


def _back(r, s: Block, walk: Walk, group: slice, passed, target, totals):
    """Go through a walk from its last token to its first.

    ``passed`` is the gradient of the state that a token hands on to the one before. Between turns it stays in memory:
    together with what the tokens of a turn need it is more than there are registers.
    """
    tiles = [slice(i, i + TILE) for i in range(group.start, group.stop, TILE)]
    slot, b, c = walk.slot, s.row_of_b(walk), s.row_of_b(walk) + s.state
    of_tile = functools.partial(jnp.broadcast_to, shape=(TILE, s.lanes))
    # A chain comes to every pixel again and needs its time step then.
    d_raw = r.dt if r.d_raw is None else r.d_raw
    last = s.segments(walk)[-1][1]
    for segment, before in reversed(s.segments(walk)):
        first = slot == 0 and before == last  # to write to its pixels; all others add

        def turn(t, pixel, count, carry, before=before, first=first):
            q = [pixel(i) for i in range(count)]
            time = [before + t + i for i in range(count)]
            # The compiler keeps near to the order of the program. With few states what a turn needs fits the registers
            # if one tile and token comes after the other; with many, what all its tokens need for one state.
            few = s.state <= 2
            parts = _portions(list(reversed(range(count))), 1 if few else count)
            carried: dict[Any, Any] = {}
            for part in parts:
                every = [(i, j) for i in part for j in range(len(tiles))]
                u = {(i, j): r.x[*q[i], tiles[j], :].astype(jnp.float32) for i, j in every}
                dy = {(i, j): r.dy[*q[i], tiles[j], :].astype(jnp.float32) for i, j in every}
                dt = {(i, j): r.dt[*q[i], tiles[j], :] for i, j in every}
                dtu = {ij: dt[ij] * u[ij] for ij in every}
                if first:
                    for j, tile in enumerate(tiles):
                        d_skip = carried["skip", j] if part is not parts[0] else totals["d_skip"][tile, :]
                        d_skip = carried["skip", j] = d_skip + sum(u[i, j] * dy[i, j] for i in part)
                        if part is parts[-1]:
                            totals["d_skip"][tile, :] = d_skip
                g_B, w_A, sums = {}, {}, {}
                for n in range(s.state):
                    for j, tile in enumerate(tiles):
                        own = slice(j * TILE, (j + 1) * TILE)  # of the group
                        A = r.A[slot, n, tile, :]
                        if part is parts[0]:
                            g, dA = passed[n, tile, :], totals["dA"][slot, n, tile, :]
                        else:
                            g, dA = carried[n, j]
                        for i in part:
                            gradient = g + of_tile(r.packed[*q[i], c + n : c + n + 1, :]) * dy[i, j]
                            a = r.a[time[i], n, own] if s.keep_decays else jnp.exp2(dt[i, j] * A)
                            g = a * gradient
                            w = g * r.h[time[i], n, own]
                            x = gradient * of_tile(r.packed[*q[i], b + n : b + n + 1, :])
                            g_B[i, j] = x if n == 0 else g_B[i, j] + x
                            x = w * (A * (1 / LOG2E) if few else A)  # the former once a turn
                            w_A[i, j] = x if n == 0 else w_A[i, j] + x
                            dA = dA + w * dt[i, j]
                            of_B, of_C = gradient * dtu[i, j], r.h[time[i] + 1, n, own] * dy[i, j]
                            if j > 0:
                                of_B, of_C = sums[i, "B", n] + of_B, sums[i, "C", n] + of_C
                            elif not s.at_once:
                                of_B, of_C = r.sum_B[time[i], n] + of_B, r.sum_C[time[i], n] + of_C
                            sums[i, "B", n], sums[i, "C", n] = of_B, of_C
                        carried[n, j] = g, dA
                        if part is parts[-1]:
                            passed[n, tile, :], totals["dA"][slot, n, tile, :] = g, dA
                    if not s.at_once:
                        for i in part:
                            r.sum_B[time[i], n], r.sum_C[time[i], n] = sums[i, "B", n], sums[i, "C", n]
                for i in part if s.at_once else ():
                    both = [sums[i, name, n] for name in "BC" for n in range(s.state)]
                    r.d_packed[*q[i], b : b + 2 * s.state, :] += _sums_of_rows(both)
                for i, j in every:
                    place = (*q[i], tiles[j])
                    du = g_B[i, j] * dt[i, j]
                    target[place] = du + (r.skip[tiles[j], :] * dy[i, j] if first else target[place])
                    # d 2^(dt A) / d dt = ln 2 A 2^(dt A)
                    d_dt = (w_A[i, j] if few else w_A[i, j] * (1 / LOG2E)) + g_B[i, j] * u[i, j]
                    raw = d_dt * softplus_slope(dt[i, j], exact=s.exact) if s.softplus else d_dt
                    d_raw[place] = raw + d_raw[place] if len(walk.orders) > 1 and before != last else raw
            return carry

        for_tokens(segment, s.unroll_back, turn, backwards=True)


def _sums_of_rows(values: list) -> jax.Array:
    """Return the sums over the rows of arrays (8, lanes), one below the other: (arrays, lanes).

    Two arrays become one, in which each has every other row, or every other two, or four, and adds the rest to these:
    so 8 of them take 7 additions where 8 sums would take 24.
    """
    parts, lanes = [], values[0].shape[1]
    row = lax.broadcasted_iota(jnp.int32, (TILE, lanes), 0)
    for some in _portions(values, TILE):
        count, shift = len(some), 1
        while shift < TILE:
            second = (row & shift) != 0
            joined = []
            for x, y in ((pair[0], pair[-1]) for pair in _portions(some, 2)):
                own, other = jnp.where(second, y, x), jnp.where(second, x, y)
                joined.append(own + pltpu.roll(other, shift, 0))
            some, shift = joined, 2 * shift
        parts.append(some[0][:count])
    return jnp.concatenate(parts, 0)


def _project_back(r, s: Block, walk: Walk, totals):
    """Hand on the gradient of the raw time steps to what they were made from."""
    slot, row = walk.slot, walk.slot * s.set_rows
    rows = slice(row, row + s.slab)
    d_raw = r.dt if r.d_raw is None else r.d_raw

    def group(pixels):
        raw = [d_raw[q] for q in pixels]
        totals["d_bias"][slot] += sum(raw)
        if not s.rank:
            for q, gradient in zip(pixels, raw, strict=True):
                gradient = LOG2E * gradient if s.natural else gradient
                r.d_delta[*q, slot] = gradient.astype(r.d_delta.dtype)
            return
        results = []
        for some, gradients in zip(_portions(pixels, s.together), _portions(raw, s.together), strict=True):
            dtype = r.weights_back.dtype
            low = jnp.concatenate([r.packed[*q, rows, :] for q in some], 0).astype(dtype)
            gradient = jnp.concatenate(gradients, 0).astype(dtype)
            high, wide = slice(0, len(some) * s.slab), slice(0, len(some) * s.channels)
            d_low = jnp.dot(r.weights_back[slot, high, wide], gradient, **s.product)
            totals["d_weights"][slot, high, wide] += lax.dot_general(
                low, gradient, (((1,), (1,)), ((), ())), **s.product
            )
            results += [(q, d_low[i * s.slab : (i + 1) * s.slab]) for i, q in enumerate(some)]
        results = [(q, r.d_packed[*q, rows, :] + gradient) for q, gradient in results]
        for q, gradient in results:
            r.d_packed[*q, rows, :] = gradient

    s.for_pixels(s.at_a_time, group)


def _sum_channels(r, s: Block):
    """Sum the gradients of B and C over the sublanes, once all channels are in."""
    (walk,) = s.walks
    b = s.row_of_b(walk)
    for segment, before in s.segments(walk):

        def turn(t, pixel, count, carry, before=before):
            for i in range(count):
                kept = [x[before + t + i, n] for x in (r.sum_B, r.sum_C) for n in range(s.state)]
                r.d_packed[*pixel(i), b : b + 2 * s.state, :] += _sums_of_rows(kept)
            return carry

        for_tokens(segment, 4, turn)
