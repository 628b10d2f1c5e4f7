"""The forward kernel: for every walk of a block, the time steps of all tokens, then the recurrence.

The recurrence takes one group of channels after the other, with the states in registers::

    h <- 2^(dt A) h + dt u B        y = sum_n C h + D u
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tpu.blocks import Block
from pallas_kernels.tpu.geometry import for_tokens
from pallas_kernels.tpu.tokens import (
    advance,
    copy_or_clear,
    fill_time_steps,
    first_states,
    named,
    over_channels,
)


def forward(*references, names: tuple[str, ...], block: Block) -> None:
    """Scan a block along its walks; the parts that ``names`` leaves out are not computed."""
    refs, state = named(names, references), block.maths.state
    chunk, number = pl.program_id(2), pl.program_id(3)
    # With chunks, every block of channels has states that run on from chunk to chunk.
    chunked = block.chunks > 1
    mine = number if chunked else 0
    y = refs.y if refs.sum is None else refs.sum  # all walks but the last add up here
    visits = [(walk, before) for walk in block.walks for _, before in block.segments(walk)]

    if chunked:

        @pl.when(chunk == 0)
        def _():
            copy_or_clear(refs.state.at[mine], refs.start)

    for walk in block.walks:
        fill_time_steps(refs, block, walk)
        c = block.row_of_C(walk)
        for group in block.channel_groups():
            h = first_states(block, group, refs.state.at[mine] if chunked else refs.start)
            for segment, before in block.segments(walk):
                first = (walk, before) == visits[0]  # to write to its pixels; all others add
                target = refs.y if (walk, before) == visits[-1] else y

                def turn(t, pixel, count, h, walk=walk, group=group, first=first, target=target, c=c):
                    h, tokens = advance(refs, block, walk, group, [pixel(i) for i in range(count)], h)
                    if y is None:
                        return h
                    for token in tokens:
                        place = (*token.pixel, group)
                        C = [
                            over_channels(refs.packed[*token.pixel, c + n : c + n + 1, :], token.u)
                            for n in range(state)
                        ]
                        # y = sum_n C h + D u
                        sum_n = functools.reduce(jnp.add, [h * row for h, row in zip(token.states, C, strict=True)])
                        total = sum_n + (token.u * refs.skip[group, :] if first else y[place])
                        target[place] = total.astype(target.dtype)
                    return h

                h = for_tokens(segment, block.schedule.turns.forward, turn, h)
            for n, last in enumerate(h):
                if chunked:
                    refs.state[mine, n, group, :] = last
                for result in (refs.final, refs.borders):
                    if result is not None:
                        result[n, group, :] = last
