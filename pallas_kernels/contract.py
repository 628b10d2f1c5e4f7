"""The contract that every implementation of the scan keeps, and the terms of its recurrence.

For each token t, group k, channel p and state n::

    dt = delta + delta_bias, through softplus if asked
    state[n, p] <- exp(dt[p] A[n, p]) state[n, p] + dt[p] u[p] B[n]
    y[p] = sum_n C[n] state[n, p] + D[p] u[p]

An implementation is a function of (u, delta, A, B, C, D, delta_bias, initial_state, delta_softplus, reverse):

    u, delta         (B, L, K, P)   any floating dtype
    A                (K, N, P)      negative; its dtype, float32 or float64, is the dtype of the whole recurrence
    B, C             (B, L, K, N)   any floating dtype
    D, delta_bias    (K, P)         dtype of A; zeros when the user gave none
    initial_state    (B, K, N, P)   dtype of A; zeros when the user gave none

and returns y (B, L, K, P) and the state after the last token (B, K, N, P), both in the dtype of A. Channels are the
last axis of the state, so that a step works on contiguous vectors of channels.

The kernels have a softplus of their own, from the instructions that their chip has: ``tpu/tokens.py`` and
``gpu/tokens.py``. The one below is the definition; tests hold all of them to loops in float64.
"""

import jax
import jax.numpy as jnp

LOG2E = 1.4426950408889634  # log2(e): the kernels compute exp(x) as 2^(x log2(e)), the power that chips have


def softplus(x: jax.Array) -> jax.Array:
    """Return log(1 + exp(x)), as PyTorch has it: the identity beyond 20."""
    # The inner minimum keeps the unused branch, and its gradient, finite.
    return jnp.where(x > 20, x, jnp.log1p(jnp.exp(jnp.minimum(x, 20))))


def decay(dt: jax.Array, A: jax.Array) -> jax.Array:
    """Return exp(dt A) (..., K, N, P) from dt (..., K, P) and A (K, N, P)."""
    return jnp.exp(dt[..., None, :] * A)


def write_in(dtu: jax.Array, B: jax.Array) -> jax.Array:
    """Return what a token adds to the state, (..., K, N, P), from dt * u (..., K, P) and B (..., K, N)."""
    return dtu[..., None, :] * B[..., None]
