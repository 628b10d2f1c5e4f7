"""S5: one linear state-space model of several inputs and outputs for all channels, which does not depend on them."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from evmamba_jax.errors import UserError, one_of
from evmamba_jax.layers import initializers as init
from evmamba_jax.layers.discretization import DISCRETIZATIONS, Pair, conjugate, product

Discretization = Literal["zoh", "bilinear"]


class S5(nnx.Module):
    """A linear system with P states for all channels of a sequence: ``y = 2 Re(C x) + D u``, before any activation.

    States come in conjugate pairs, of which one half is kept. Parameters are named and shaped as the official ones,
    complex ones as pairs: ``Lambda_re`` and ``Lambda_im`` (P/2,), ``B`` (P/2, E, 2), ``C`` (E, P/2, 2), ``D`` (E,),
    ``log_step`` (P/2, 1). All is float32 or wider.

    Args:
        channels: E.
        d_state: state size P.
        blocks: HiPPO matrices along the diagonal of the initial system, each of P / blocks states, an even number.
        bidirectional: also scan from the last token to the first, the token itself included; ``C`` (E, P, 2) then has
            weights for the states of both scans, one after the other.
        discretization: "zoh" or "bilinear".
        rngs: source of the initial values.

    Raises:
        UserError: a state size that is no multiple of 2 * blocks, an unknown discretisation.

    Source: Smith et al., Simplified State Space Layers for Sequence Modeling (arXiv:2208.04933); lindermanlab/S5
    ``s5/ssm.py``, with its default ``C_init`` and ``conj_sym``.
    """

    def __init__(
        self,
        channels: int,
        *,
        d_state: int,
        blocks: int = 1,
        bidirectional: bool = False,
        discretization: Discretization = "zoh",
        rngs: nnx.Rngs,
    ):
        one_of("discretization", discretization, DISCRETIZATIONS)
        if min(d_state, blocks) < 1 or d_state % (2 * blocks):
            raise UserError(f"d_state={d_state} is not allowed with S5: it must be a multiple of {2 * max(blocks, 1)}")
        kept, size = d_state // 2, d_state // blocks
        imaginary, vectors = init.hippo_legs(size)
        basis = np.kron(np.eye(blocks), vectors[:, : size // 2]).astype(np.complex64)  # (P, P/2)
        scans = 2 if bidirectional else 1
        self.Lambda_re = nnx.Param(init.full(kept, -0.5))
        self.Lambda_im = nnx.Param(jax.device_put(np.tile(imaginary[: size // 2], blocks).astype(np.float32)))
        self.B = nnx.Param(_initial_b(rngs.params(), basis, channels))
        self.C = nnx.Param(jnp.concatenate([_initial_c(rngs.params(), basis, channels) for _ in range(scans)], 1))
        self.D = nnx.Param(init.normal(1.0)(rngs.params(), (channels,), jnp.float32))
        self.log_step = nnx.Param(init.log_dt(rngs.params(), (kept, 1)))
        self.bidirectional = bidirectional
        self.discretization: Discretization = discretization

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map sequences (B, L, E) to (B, L, E), of the same type."""
        dtype = jnp.promote_types(x.dtype, self.D.dtype)
        real, imaginary, b, c, d, log_step = (
            parameter[...].astype(dtype)
            for parameter in (self.Lambda_re, self.Lambda_im, self.B, self.C, self.D, self.log_step)
        )
        decay, factor = DISCRETIZATIONS[self.discretization]((real, imaginary), jnp.exp(log_step[:, 0]))
        b = jnp.concatenate(product((factor[0][:, None], factor[1][:, None]), (b[..., 0], b[..., 1])))
        u = x.astype(dtype)
        inputs = tuple(jnp.split(u @ b.T, 2, -1))
        states = [recur(decay, inputs, reverse) for reverse in (False, True)[: 1 + self.bidirectional]]
        # The real part of C x, of all scans, as one product.
        x_real, x_imaginary = (jnp.concatenate(parts, -1) for parts in zip(*states, strict=True))
        y = jnp.concatenate([x_real, x_imaginary], -1) @ jnp.concatenate([c[..., 0], -c[..., 1]], -1).T
        return checkpoint_name((2 * y + d * u).astype(x.dtype), "scan")


def _on_host(array: jax.Array) -> Any:
    """Return a NumPy array, of which products need no compiler; in a traced function the array itself."""
    return array if isinstance(array, jax.core.Tracer) else np.asarray(array)


def _initial_b(key: jax.Array, basis: np.ndarray, channels: int) -> jax.Array:
    """Return LeCun's normal matrix (P, E), real, in another basis: (P/2, E, 2)."""
    b = _on_host(init.lecun_normal(len(basis))(key, (len(basis), channels), jnp.float32))
    return jnp.stack([basis.real.T @ b, -basis.imag.T @ b], -1)


def _initial_c(key: jax.Array, basis: np.ndarray, channels: int) -> jax.Array:
    """Return LeCun's normal matrix (E, P), complex, in another basis: (E, P/2, 2)."""
    c = _on_host(init.lecun_normal(len(basis))(key, (channels, len(basis), 2), jnp.float32))
    real, imaginary = c[..., 0], c[..., 1]
    return jnp.stack([real @ basis.real - imaginary @ basis.imag, real @ basis.imag + imaginary @ basis.real], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def recur(decay: Pair, inputs: Pair, reverse: bool) -> Pair:
    """Return the states ``x[l] = decay * x[l - 1] + inputs[l]``, from the other end with ``reverse``.

    The decay is the same for all tokens, so the states of ``2^k`` tokens make those of ``2^(k+1)`` at once:
    ``x[l] + decay^(2^k) x[l - 2^k]``. That is log2(L) elementwise steps, which compile fast and run on all tokens
    side by side. The gradient is the same recurrence from the other end; of the states only the result is kept.

    Args:
        decay: complex (P,).
        inputs: complex (B, L, P).
        reverse: whether the last token is the first.
    """
    return diagonal_recurrence(decay, inputs, reverse)


# Jitted, so that analysis.flops finds it by name.
@functools.partial(jax.jit, static_argnames="reverse")
def diagonal_recurrence(decay: Pair, x: Pair, reverse: bool) -> Pair:
    """Return what :func:`recur` does, without its gradient."""
    for k in range(math.ceil(math.log2(x[0].shape[1]))):
        more = product(decay, (_later(x[0], 2**k, reverse), _later(x[1], 2**k, reverse)))
        x = x[0] + more[0], x[1] + more[1]
        decay = product(decay, decay)
    return x


def _later(x: jax.Array, tokens: int, reverse: bool) -> jax.Array:
    """Return x (B, L, P) moved on by some tokens, zeros before it."""
    if reverse:
        return jnp.pad(x[:, tokens:], ((0, 0), (0, tokens), (0, 0)))
    return jnp.pad(x[:, :-tokens], ((0, 0), (tokens, 0), (0, 0)))


def _forward(decay: Pair, inputs: Pair, reverse: bool) -> tuple[Pair, tuple[Pair, Pair]]:
    states = diagonal_recurrence(decay, inputs, reverse)
    return states, (decay, states)


def _backward(reverse: bool, kept: tuple[Pair, Pair], cotangents: Pair) -> tuple[Pair, Pair]:
    decay, states = kept
    of_inputs = diagonal_recurrence(conjugate(decay), cotangents, not reverse)
    before = _later(states[0], 1, reverse), _later(states[1], 1, reverse)
    real, imaginary = product(of_inputs, conjugate(before))
    return (real.sum((0, 1)), imaginary.sum((0, 1))), of_inputs


recur.defvjp(_forward, _backward)
