"""The scan as one ``jax.lax.associative_scan``: short, differentiable by JAX, and hungry for memory.

It builds arrays of (batch, length, channels, state), which is the bill every other implementation exists to avoid. Keep
it as the reference whose every line can be checked against the paper.
"""

import jax
from jax import lax

from pallas_kernels.contract import decay, softplus, write_in


def scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    delta_bias: jax.Array,
    initial_state: jax.Array,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    """Scan K groups of P channels (shapes and contract: ``contract.py``)."""
    wide = A.dtype
    raw = delta.astype(wide) + delta_bias
    dt = softplus(raw) if delta_softplus else raw
    a = decay(dt, A)
    b = write_in(dt * u.astype(wide), B.astype(wide))
    first = -1 if reverse else 0
    b = b.at[:, first].add(a[:, first] * initial_state)

    # (a1, b1) then (a2, b2) is the map h -> a2 (a1 h + b1) + b2.
    def compose(one, two):
        return two[0] * one[0], two[0] * one[1] + two[1]

    _, state = lax.associative_scan(compose, (a, b), axis=1, reverse=reverse)
    y = (state * C.astype(wide)[..., None]).sum(-2) + D * u.astype(wide)
    return y, state[:, 0 if reverse else -1]
