"""The forward kernel: along its walks, a program computes y from the state after each token.

::

    h <- exp(dt A) h + dt x B        y = sum_n C h + D x
"""

import functools

import jax.numpy as jnp

from pallas_kernels.gpu import walks
from pallas_kernels.gpu.program import Program
from pallas_kernels.gpu.tokens import Mask, Refs, States, Walker, ahead, each_walk


def forward(refs: Refs, program: Program, own: Mask) -> None:
    """Write y, and the last state where it is wanted."""
    states = States(refs, program, own)

    def one(number, state):
        walk, A = Walker(refs, program, own, number), states.read("A", refs["table"][number, walks.SET])
        state = jnp.where(walk.starts != 0, states.read("start"), state)

        def turn(i, requested, state):
            for token in walk.tokens(requested):
                state = states.step(state, token, A)
                y = (state * token.C[:, None]).sum(0)
                walk.write("y", token, walk.device.fma(walk.D, token.x, y))  # y = sum_n C h + D x
            return state

        ask = functools.partial(walk.request, written=("y", walks.FIRST))
        state = ahead(jnp.int32(0), walk.turns(program.tokens_a_turn), ask, turn, state)
        walk.device.barrier()
        return state

    state = each_walk(program, one, jnp.zeros(states.shape))
    if "final" in refs:
        states.write("final", state)
