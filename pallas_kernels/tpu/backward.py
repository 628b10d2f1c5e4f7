"""The backward kernel: the states once more, kept on chip, then from the last token of a walk to its first.

With ``s[n]``, the gradient of the state that a token hands on to the token before, every token computes::

    g = s + C dy        s <- a g        w = s h_before        (a = 2^(dt A))
    dC = sum_e h_after dy    dB = sum_e g dt u    d_dt = sum_n w A + u sum_n g B    du = dt sum_n g B    dA = sum_t w dt

``through_state`` has the formulas of one state, ``finish`` those of the whole token. Two schedules call them: token by
token where there are few states, state by state where there are many. Both exist because the compiler keeps near to the
order of the program: whatever comes together in it must fit the registers.

In units of ln 2, a derivative of a has the factor ln 2. ``through_state`` and ``finish`` say where it goes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.contract import LOG2E
from pallas_kernels.tpu.blocks import Block
from pallas_kernels.tpu.chip import SUBLANES
from pallas_kernels.tpu.geometry import Segment, Walk, for_tokens
from pallas_kernels.tpu.tokens import (
    Refs,
    advance,
    copy_or_clear,
    fill_time_steps,
    first_states,
    named,
    over_channels,
    portions,
    round_result,
    softplus_slope,
)
from pallas_kernels.tpu.tuning import FEW_STATES


def backward(*references, names: tuple[str, ...], block: Block) -> None:
    """Compute the gradients of a block's inputs from the gradient of its result."""
    refs = named(names, references)
    chunk, number = pl.program_id(2), pl.program_id(3)  # chunks come from the last to the first
    chunked = block.chunks > 1
    mine = number if chunked else 0
    dx = refs.dx if refs.sum is None else refs.sum

    # Gradients of parameters are summed where they are to go or, with chunks, on the chip until all chunks are done.
    totals = {"dA": refs.dA, "d_bias": refs.d_bias, "d_skip": refs.d_skip, "d_weights": refs.d_weights}
    totals = {name: total for name, total in totals.items() if total is not None}
    if chunked:
        sums = {"dA": refs.acc_A, "d_bias": refs.acc_bias, "d_skip": refs.acc_skip, "d_weights": refs.acc_weights}
        results, totals = totals, {name: sums[name].at[mine] for name in totals}

    @pl.when(chunk == 0)
    def _():
        for total in totals.values():
            total[...] = jnp.zeros(total.shape, total.dtype)
        if chunked:
            copy_or_clear(refs.state.at[mine], refs.d_final)

    @pl.when(number == 0)
    def _():
        _clear_shared(refs, block)

    for walk in block.walks:
        if not chunked:
            copy_or_clear(refs.state.at[mine], refs.d_final)
        fill_time_steps(refs, block, walk)
        for group in block.channel_groups():
            h = first_states(block, group, refs.start)
            if refs.kept is not None:
                h = tuple(jnp.where(chunk == block.chunks - 1, x, refs.kept[n, group, :]) for n, x in enumerate(h))
            _again(refs, block, walk, group, h)
            _Sweep(refs, block, walk, group, refs.state.at[mine], dx, totals).run()
        _project_back(refs, block, walk, totals)
    if refs.d_start is not None:
        refs.d_start[...] = refs.state[mine]
    if not block.schedule.sum_each_token:

        @pl.when(number == block.blocks - 1)
        def _():
            _sum_channels(refs, block)

    if chunked:

        @pl.when(chunk == block.chunks - 1)
        def _():
            for name, result in results.items():
                result[...] = totals[name][...]

    round_result(block, refs.sum, refs.dx)


def _clear_shared(refs: Refs, block: Block) -> None:
    """Clear what all blocks of channels add to, before the first of them."""

    def clear(reference, at):
        reference[at] = jnp.zeros(reference.shape[len(at) :], reference.dtype)

    block.for_pixels(8, lambda pixels: [clear(refs.d_packed, q) for q in pixels])
    if not block.schedule.sum_each_token:
        for total in (refs.sum_B, refs.sum_C):
            lax.fori_loop(0, block.tokens, lambda t, carry, total=total: clear(total, (t,)) or carry, 0)


def _again(refs: Refs, block: Block, walk: Walk, group: slice, h) -> None:
    """Compute the states of a walk again; keep the state before each token in ``refs.h``, and the last one behind."""
    for n, state in enumerate(h):
        refs.h[0, n] = state
    for segment, before in block.segments(walk):

        def turn(t, pixel, count, h, before=before):
            h, tokens = advance(refs, block, walk, group, [pixel(i) for i in range(count)], h)
            for i, token in enumerate(tokens):
                for n in range(block.maths.state):
                    refs.h[before + t + i + 1, n] = token.states[n]
                    if block.schedule.keep_decays:
                        refs.a[before + t + i, n] = token.decays[n]
            return h

        h = for_tokens(segment, block.schedule.turns.again, turn, h)


@dataclasses.dataclass
class _Tile:
    """A tile of a token on the way back: where it is, what is known of it, and sums over its states so far."""

    pixel: tuple
    time: Any  # the number of the token in its walk
    channels: slice  # of the block
    own: slice  # the same channels, counted in the group in flight
    u: jax.Array
    dy: jax.Array
    dt: jax.Array
    dtu: jax.Array
    g_B: Any = None  # sum_n g B
    w_A: Any = None  # sum_n w A


def _plus(total, value):
    return value if total is None else total + value


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """The way back through a walk, for a group of channels.

    Attributes:
        passed: s, the gradient of the state that a token hands on to the token before. Between turns it stays in
            memory: beside what the tokens of a turn need there are no registers for it.
        dx: where the gradient of the image goes.
        totals: the gradients of the parameters, by name.
    """

    refs: Refs
    block: Block
    walk: Walk
    group: slice
    passed: Any
    dx: Any
    totals: dict[str, Any]

    @property
    def few(self) -> bool:
        """Which schedule it is."""
        return self.block.maths.state <= FEW_STATES

    @property
    def channels(self) -> list[slice]:
        """The channels of each tile in flight."""
        return [slice(i, i + SUBLANES) for i in range(self.group.start, self.group.stop, SUBLANES)]

    @property
    def last(self) -> int:
        """Tokens before the last segment, which is the first on the way back."""
        return self.block.segments(self.walk)[-1][1]

    def run(self) -> None:
        """Go through the walk from its last token to its first."""
        turn_of = self._few_states if self.few else self._many_states
        for segment, before in reversed(self.block.segments(self.walk)):
            self._through(segment, before, turn_of)

    def _through(self, segment: Segment, before: int, turn_of) -> None:
        # The first to come to a pixel writes its dx and counts the skip; all others add.
        first = self.walk.slot == 0 and before == self.last

        def turn(t, pixel, count, carry):
            pixels, times = [pixel(i) for i in range(count)], [before + t + i for i in range(count)]
            turn_of(list(zip(pixels, times, strict=True))[::-1], before, first=first)
            return carry

        for_tokens(segment, self.block.schedule.turns.back, turn, backwards=True)

    def _few_states(self, tokens: list, before: int, *, first: bool) -> None:
        """One token after the other: all that a token needs for all its states fits the registers."""
        states, tiles = range(self.block.maths.state), range(len(self.channels))
        d_skip: dict[int, Any] = {}  # by tile
        s: dict[tuple[int, int], Any] = {}  # by state and tile, as is
        dA: dict[tuple[int, int], Any] = {}
        for number, token in enumerate(tokens):
            begins, ends = number == 0, number == len(tokens) - 1
            row = self._load([token])
            if first:
                for j in tiles:
                    before_it = self.totals["d_skip"][self.channels[j], :] if begins else d_skip[j]
                    d_skip[j] = before_it + sum([row[j].u * row[j].dy])  # dD = sum_t u dy
                    if ends:
                        self.totals["d_skip"][self.channels[j], :] = d_skip[j]
            summed = []
            for n in states:
                dB_dC = None
                for j in tiles:
                    A = self.refs.A[self.walk.slot, n, self.channels[j], :]
                    if begins:
                        s[n, j], dA[n, j] = self._read(n, j)
                    s[n, j], dA[n, j], dB, dC = self._through_state(row[j], n, A, s[n, j], dA[n, j])
                    dB_dC = self._add_tile(dB_dC, row[j].time, n, dB, dC)
                    if ends:
                        self._write(n, j, s[n, j], dA[n, j])
                summed.append(dB_dC)
                if not self.block.schedule.sum_each_token:
                    self._keep(row[0].time, n, dB_dC)
            if self.block.schedule.sum_each_token:
                dB, dC = zip(*summed, strict=True)
                _add_sums(self.refs, self.block, self.walk, token[0], [*dB, *dC])
            self._finish(row, before, first=first)

    def _many_states(self, tokens: list, before: int, *, first: bool) -> None:
        """One state after the other: what all tokens of the turn need for one state fits the registers."""
        tiles = range(len(self.channels))
        every = self._load(tokens)
        row = [every[i : i + len(tiles)] for i in range(0, len(every), len(tiles))]  # by token, then by tile
        if first:
            for j in tiles:
                d_skip = self.totals["d_skip"][self.channels[j], :]
                self.totals["d_skip"][self.channels[j], :] = d_skip + sum(r[j].u * r[j].dy for r in row)
        for n in range(self.block.maths.state):
            dB_dC: list[Any] = [None] * len(tokens)
            for j in tiles:
                A = self.refs.A[self.walk.slot, n, self.channels[j], :]
                s, dA = self._read(n, j)
                for i, tile in enumerate(r[j] for r in row):
                    s, dA, dB, dC = self._through_state(tile, n, A, s, dA)
                    dB_dC[i] = self._add_tile(dB_dC[i], tile.time, n, dB, dC)
                self._write(n, j, s, dA)
            for (_, time), sums in zip(tokens, dB_dC, strict=True):
                self._keep(time, n, sums)
        self._finish(every, before, first=first)

    # ------------------------------------------------------------------------------------------------- the formulas

    def _through_state(self, tile: _Tile, n: int, A, s, dA):
        """Take the gradient s of state n through a token.

        Returns:
            s for the token before, dA so far, and what the channels of the tile add to dB and dC.
        """
        refs, b, c = self.refs, self.block.row_of_B(self.walk), self.block.row_of_C(self.walk)
        # g = s + C dy
        g = s + over_channels(refs.packed[*tile.pixel, c + n : c + n + 1, :], tile.dy) * tile.dy
        # s <- a g, with a = 2^(dt A)
        a = refs.a[tile.time, n, tile.own] if self.block.schedule.keep_decays else jnp.exp2(tile.dt * A)
        s = a * g
        # w = s h_before
        w = s * refs.h[tile.time, n, tile.own]
        # sum_n g B
        g_B = g * over_channels(refs.packed[*tile.pixel, b + n : b + n + 1, :], g)
        tile.g_B = _plus(tile.g_B, g_B)
        # sum_n w A; the factor ln 2 of the derivative of 2^(dt A) is in A here, once a turn, or else in d_dt
        tile.w_A = _plus(tile.w_A, w * (A * (1 / LOG2E) if self.few else A))
        # dA = sum_t w dt; its factor ln 2 comes outside, for all tokens at once
        dA = dA + w * tile.dt
        # dB = sum_e g dt u, dC = sum_e h_after dy
        return s, dA, g * tile.dtu, refs.h[tile.time + 1, n, tile.own] * tile.dy

    def _finish(self, tiles: list[_Tile], before: int, *, first: bool) -> None:
        """Write the gradients of u and of the raw time step, once all states are through."""
        refs, maths = self.refs, self.block.maths
        # A chain comes to every pixel again and needs its time step then.
        d_raw = refs.dt if refs.d_raw is None else refs.d_raw
        again = len(self.walk.orders) > 1 and before != self.last
        for tile in tiles:
            place = (*tile.pixel, tile.channels)
            # du = dt sum_n g B + D dy
            du = tile.g_B * tile.dt
            self.dx[place] = du + (refs.skip[tile.channels, :] * tile.dy if first else self.dx[place])
            # d_dt = ln 2 sum_n w A + u sum_n g B
            d_dt = (tile.w_A if self.few else tile.w_A * (1 / LOG2E)) + tile.g_B * tile.u
            raw = d_dt * softplus_slope(tile.dt, exact=maths.exact) if maths.softplus else d_dt
            d_raw[place] = raw + d_raw[place] if again else raw

    # ------------------------------------------------------------------------------------------ registers and memory

    def _load(self, tokens: list) -> list[_Tile]:
        """Return the tiles of some tokens: all tiles of the first token, and so on."""
        refs, channels = self.refs, self.channels
        every = [(q, time, c) for q, time in tokens for c in channels]
        u = [refs.x[*q, c, :].astype(jnp.float32) for q, _, c in every]
        dy = [refs.dy[*q, c, :].astype(jnp.float32) for q, _, c in every]
        dt = [refs.dt[*q, c, :] for q, _, c in every]
        dtu = [x * y for x, y in zip(dt, u, strict=True)]
        start = self.group.start
        return [
            _Tile(q, time, c, slice(c.start - start, c.stop - start), *values)
            for (q, time, c), *values in zip(every, u, dy, dt, dtu, strict=True)
        ]

    def _read(self, n: int, j: int):
        """Return s and dA of a state and a tile, as the turn before left them."""
        channels = self.channels[j]
        return self.passed[n, channels, :], self.totals["dA"][self.walk.slot, n, channels, :]

    def _write(self, n: int, j: int, s, dA) -> None:
        channels = self.channels[j]
        self.passed[n, channels, :], self.totals["dA"][self.walk.slot, n, channels, :] = s, dA

    def _add_tile(self, sums, time, n: int, dB, dC):
        """Return the sums of dB and dC over the tiles so far, 8 sublanes each; the first adds to earlier groups'."""
        if sums is not None:
            return sums[0] + dB, sums[1] + dC
        if self.block.schedule.sum_each_token:
            return dB, dC
        return self.refs.sum_B[time, n] + dB, self.refs.sum_C[time, n] + dC

    def _keep(self, time, n: int, sums) -> None:
        self.refs.sum_B[time, n], self.refs.sum_C[time, n] = sums


# ----------------------------------------------------------------------------------------------- sums over channels


def _add_sums(refs: Refs, block: Block, walk: Walk, pixel, values: list) -> None:
    """Add to the gradients of a pixel's B and C, N of each, what their 8 sublanes come to."""
    b = block.row_of_B(walk)
    refs.d_packed[*pixel, b : b + 2 * block.maths.state, :] += _sums_of_rows(values)


def _sums_of_rows(values: list) -> jax.Array:
    """Return the sums over the rows of arrays (8, lanes), one below the other: (arrays, lanes).

    Two arrays become one, in which each has every other row, or every other two, or four, and adds the rest to these:
    so 8 of them take 7 additions where 8 sums would take 24.
    """
    parts, lanes = [], values[0].shape[1]
    row = lax.broadcasted_iota(jnp.int32, (SUBLANES, lanes), 0)
    for some in portions(values, SUBLANES):
        count, shift = len(some), 1
        while shift < SUBLANES:
            second = (row & shift) != 0
            joined = []
            for x, y in ((pair[0], pair[-1]) for pair in portions(some, 2)):
                own, other = jnp.where(second, y, x), jnp.where(second, x, y)
                joined.append(own + pltpu.roll(other, shift, 0))
            some, shift = joined, 2 * shift
        parts.append(some[0][:count])
    return jnp.concatenate(parts, 0)


def _sum_channels(refs: Refs, block: Block) -> None:
    """Sum the gradients of B and C over the sublanes, once all channels are in."""
    (walk,) = block.walks
    for segment, before in block.segments(walk):

        def turn(t, pixel, count, carry, before=before):
            for i in range(count):
                kept = [x[before + t + i, n] for x in (refs.sum_B, refs.sum_C) for n in range(block.maths.state)]
                _add_sums(refs, block, walk, pixel(i), kept)
            return carry

        for_tokens(segment, 4, turn)


# ------------------------------------------------------------------------------------------------------- time steps


def _project_back(refs: Refs, block: Block, walk: Walk, totals) -> None:
    """Hand on the gradient of the raw time steps to what they were made from."""
    maths, together = block.maths, block.schedule.pixels_a_product
    slot, row = walk.slot, walk.slot * maths.set_rows
    rows = slice(row, row + maths.slab)
    d_raw = refs.dt if refs.d_raw is None else refs.d_raw

    def group(pixels):
        raw = [d_raw[q] for q in pixels]
        totals["d_bias"][slot] += sum(raw)
        if not maths.rank:
            for q, gradient in zip(pixels, raw, strict=True):
                gradient = LOG2E * gradient if maths.natural else gradient
                refs.d_delta[*q, slot] = gradient.astype(refs.d_delta.dtype)
            return
        results = []
        for some, gradients in zip(portions(pixels, together), portions(raw, together), strict=True):
            dtype = refs.weights_back.dtype
            low = jnp.concatenate([refs.packed[*q, rows, :] for q in some], 0).astype(dtype)
            gradient = jnp.concatenate(gradients, 0).astype(dtype)
            high, wide = slice(0, len(some) * maths.slab), slice(0, len(some) * block.channels)
            d_low = jnp.dot(refs.weights_back[slot, high, wide], gradient, **maths.product)
            totals["d_weights"][slot, high, wide] += lax.dot_general(
                low, gradient, (((1,), (1,)), ((), ())), **maths.product
            )
            results += [(q, d_low[i * maths.slab : (i + 1) * maths.slab]) for i, q in enumerate(some)]
        # All loads before all stores: else each load waits for the store before it.
        results = [(q, refs.d_packed[*q, rows, :] + gradient) for q, gradient in results]
        for q, gradient in results:
            refs.d_packed[*q, rows, :] = gradient

    block.for_pixels(block.schedule.turns.project, group)
