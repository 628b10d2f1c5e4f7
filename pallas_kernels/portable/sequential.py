"""The scan token by token, in chunks, with a backward pass that computes the states again.

Forward: a loop over chunks around a loop over tokens; nothing larger than one state lives between tokens, and nothing
but the inputs is kept for the gradient.

Backward: the state at the start of each chunk is computed again. Then, chunk by chunk from the last, the states of one
chunk are computed once more, and the adjoint runs through it from its last token. With g the gradient of the state
after token t, and h the state::

    g[t] = C[t] dy[t] + exp(dt[t+1] A) g[t+1]

    s = exp(dt A) g[t]          is passed on to token t - 1, and w = s h[t-1] gives both
    d_dt = sum_n w A + u sum_n g B        and        dA = sum_t w dt
    du   = dt sum_n g B + D dy
    dB   = sum_p g dt u                              dC = sum_p h dy

Memory beside inputs and outputs, in states of (batch, channels, state): one for each border, and two for each token of
one chunk (its state and its decay). Both numbers are near the square root of the length.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.contract import decay, softplus, write_in
from pallas_kernels.dispatch import vary_alike


def scan(u, delta, A, B, C, D, delta_bias, initial_state, delta_softplus, reverse):
    """Scan K groups of P channels (shapes and contract: ``contract.py``)."""
    raw = delta.astype(A.dtype) + delta_bias
    dt = _softplus(raw) if delta_softplus else raw
    return _scan(*vary_alike(u, dt, A, B, C, D, initial_state), reverse)


@jax.custom_vjp
def _softplus(raw):
    """The softplus of ``contract.py``, which keeps nothing but its own result for the backward pass."""
    return _softplus32(raw) if raw.dtype == jnp.float32 else softplus(raw)


# With y = log(1 + exp(x)), the derivative exp(x) / (1 + exp(x)) is 1 - exp(-y).
_softplus.defvjp(lambda raw: (_softplus(raw),) * 2, lambda dt, d_dt: (d_dt * -jnp.expm1(-dt),))


def _softplus32(raw):
    """Return log(1 + exp(raw)) to 4e-7 of itself, in a third of the time that a CPU takes with ``log1p``.

    max(x, 0) + log(1 + z) with z = exp(-abs(x)), at most 1. With s = z / (2 + z), at most 1/3, the logarithm is
    2 artanh(s) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...); what the terms from s^18 on add is below the rounding.
    """
    z = jnp.exp(-jnp.abs(raw))
    s = z / (2 + z)
    series = functools.reduce(lambda sum, n: sum * (s * s) + 1 / n, range(15, 0, -2), 1 / 17)
    return jnp.maximum(raw, 0) + 2 * s * series


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _scan(u, dt, A, B, C, D, initial_state, reverse):
    return _per_platform(_forward, u, dt, A, B, C, D, initial_state, reverse=reverse)


def _scan_fwd(*inputs_and_reverse):
    return _scan(*inputs_and_reverse), inputs_and_reverse[:-1]


def _scan_bwd(reverse, inputs, cotangents):
    return _per_platform(_backward, *inputs, *cotangents, reverse=reverse)


_scan.defvjp(_scan_fwd, _scan_bwd)

# Tokens that one turn of the inner loop handles. On a CPU a turn costs next to nothing, and unrolled bodies fuse badly;
# on an accelerator a turn costs more than its arithmetic.
UNROLL = {"cpu": 1, "default": 8}


def _per_platform(loop, *arrays, **options):
    """Run ``loop`` with the unrolling that suits the platform of the lowered program, not of the tracing machine."""
    choices = {platform: functools.partial(loop, unroll=n, **options) for platform, n in UNROLL.items()}
    return lax.platform_dependent(*arrays, **choices)


def _forward(u, dt, A, B, C, D, initial_state, *, reverse, unroll):
    """Return y and the last state."""
    chunks = _Chunks(u.shape[1], A.dtype, reverse)
    u, dt, B, C = map(chunks.pad, (u, dt, B, C))

    def chunk(i, carry):
        # Tokens are read where they are: copying a chunk together first costs a CPU a sixth of the whole scan.
        def token(i, carry):
            state, y = carry
            t = chunks.token(c, i)
            dt_t, u_t = chunks.at(dt, t), chunks.at(u, t)
            state = decay(dt_t, A) * state + write_in(dt_t * u_t, chunks.at(B, t))
            y_t = _sum_states(state, chunks.at(C, t)[..., None]) + D * u_t
            return state, lax.dynamic_update_index_in_dim(y, y_t, t, 1)

        c = chunks.chunk(i)
        return lax.fori_loop(0, chunks.size, token, carry, unroll=unroll)

    state, y = lax.fori_loop(0, chunks.count, chunk, (initial_state, jnp.zeros_like(u, dtype=A.dtype)))
    return chunks.unpad(y), state


def _borders(chunks, u, dt, A, B, initial_state, unroll):
    """Return the state before each chunk, (chunks, B, K, N, P)."""

    def chunk(i, carry):
        state, borders = carry
        c = chunks.chunk(i)
        borders = lax.dynamic_update_index_in_dim(borders, state, c, 0)

        def token(i, state):
            t = chunks.token(c, i)
            dt_t = chunks.at(dt, t)
            return decay(dt_t, A) * state + write_in(dt_t * chunks.at(u, t), chunks.at(B, t))

        return lax.fori_loop(0, chunks.size, token, state, unroll=unroll), borders

    # Every border is written; broadcasting, unlike new zeros, keeps the sharding of the state.
    borders = jnp.broadcast_to(initial_state, (chunks.count, *initial_state.shape))
    return lax.fori_loop(0, chunks.count, chunk, (initial_state, borders))[1]


def _backward(u, dt, A, B, C, D, initial_state, dy, d_state, *, reverse, unroll):
    """Return the gradients of the first seven from those of y and of the last state."""
    chunks = _Chunks(u.shape[1], A.dtype, reverse)
    u, dt, B, C, dy = map(chunks.pad, (u, dt, B, C, dy))
    borders = _borders(chunks, u, dt, A, B, initial_state, unroll)

    def chunk(i, carry):
        s, dA, dD, du, d_dt, dB, dC = carry
        c = chunks.chunk(chunks.count - 1 - i)
        u_c, dt_c, B_c, C_c, dy_c = (chunks.read(x, c) for x in (u, dt, B, C, dy))
        dtu = dt_c * u_c
        decays = decay(dt_c, A)  # both loops need them, and an exponential costs more than a load

        def again(state, x):
            decays, dtu, B, dy = x
            after = decays * state + write_in(dtu, B)
            return after, (state, _sum_channels(after, dy))

        border = lax.dynamic_index_in_dim(borders, c, 0, keepdims=False)
        _, (before, dC_c) = lax.scan(again, border, (decays, dtu, B_c, dy_c), reverse=reverse, unroll=unroll)

        def token(carry, x):
            s, dA = carry
            decays, dt, dtu, B, C, dy, before = x
            g = s + write_in(dy, C)
            s = decays * g
            w = s * before
            sums = _sum_states(g, B[..., None]), _sum_states(w, A), _sum_channels(g, dtu)
            return (s, dA + w * dt[..., None, :]), sums

        xs = (decays, dt_c, dtu, B_c, C_c, dy_c, before)
        (s, dA), (gB, wA, dB_c) = lax.scan(token, (s, dA), xs, reverse=not reverse, unroll=unroll)
        return (
            s,
            dA,
            dD + (dy_c * u_c).sum(0),
            chunks.write(du, dt_c * gB + D * dy_c, c),
            chunks.write(d_dt, wA + u_c * gB, c),
            chunks.write(dB, dB_c, c),
            chunks.write(dC, dC_c, c),
        )

    # Gradients shared by the batch keep its axis until the end: one sum over devices instead of one a chunk.
    wide = jnp.zeros_like(d_state)
    carry = (d_state, wide, wide[:, :, 0], *(jnp.zeros_like(x) for x in (u, dt, B, C)))
    s, dA, dD, *streams = lax.fori_loop(0, chunks.count, chunk, carry)
    du, d_dt, dB, dC = map(chunks.unpad, streams)
    return du, d_dt, dA.sum(0), dB, dC, dD.sum(0), s


class _Chunks:
    """How a sequence is cut into chunks: reading, writing, and the padding that makes the last one whole.

    A token of the padding has dt = 0, which leaves the state alone and lets no gradient through.
    """

    def __init__(self, length: int, dtype, reverse: bool):
        self.length, self.dtype, self.reverse = length, dtype, reverse
        # Short sequences are one chunk. Else the size that pads least, and of those the one that needs least memory:
        # in the backward pass two states for each token of a chunk, and one for each chunk.
        sizes = range(8, 65) if length > 64 else [length]
        self.size = min(sizes, key=lambda size: (-length % size, 2 * size + length // size))
        self.count = -(-length // self.size)

    def chunk(self, i):
        """Return which chunk comes i-th in scan order."""
        return self.count - 1 - i if self.reverse else i

    def token(self, c, i):
        """Return which token of chunk c comes i-th in scan order."""
        return c * self.size + (self.size - 1 - i if self.reverse else i)

    def at(self, x, t):
        """Return token t of x (B, L, ...)."""
        return lax.dynamic_index_in_dim(x, t, 1, keepdims=False).astype(self.dtype)

    def pad(self, x):
        extra = self.count * self.size - self.length
        return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2)) if extra else x

    def unpad(self, x):
        return x[:, : self.length]

    def read(self, x, c):
        """Return chunk c of x (B, L, ...) as (tokens, B, ...): a token is then one contiguous piece."""
        return jnp.moveaxis(lax.dynamic_slice_in_dim(x, c * self.size, self.size, 1), 1, 0).astype(self.dtype)

    def write(self, x, values, c):
        return lax.dynamic_update_slice_in_dim(x, jnp.moveaxis(values, 0, 1).astype(x.dtype), c * self.size, 1)


def _sum_states(x, y):
    """Return the sum over the states of x * y, (B, K, P) from (B, K, N, P).

    Written as N shifted products because XLA fuses them, and what x is made of, into one pass; a reduction it computes
    from a product that it first writes to memory.
    """
    return sum(x[..., n, :] * y[..., n, :] for n in range(x.shape[-2]))


def _sum_channels(x, y):
    """Return the sum over the channels of x (B, K, N, P) times y (B, K, P), (B, K, N), in full precision everywhere."""
    return jnp.einsum("bknp,bkp->bkn", x, y, precision=lax.Precision.HIGHEST)
