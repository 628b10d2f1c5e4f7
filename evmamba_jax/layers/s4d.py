"""S4D: a diagonal state-space model for each channel, which does not depend on the input, as a convolution."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from evmamba_jax.errors import UserError, one_of
from evmamba_jax.layers import initializers
from evmamba_jax.layers.discretization import power, product, zero_order_hold
from evmamba_jax.ops import convolve

Init = Literal["lin", "inv", "legs"]


def _inverse(states: int) -> np.ndarray:
    return states / math.pi * (states / (2 * np.arange(states // 2) + 1) - 1)


# The initial imaginary parts of the N/2 eigenvalues, from N.
IMAGINARY = {
    "lin": lambda states: math.pi * np.arange(states // 2),
    "inv": _inverse,
    "legs": lambda states: initializers.hippo_legs(states)[0][states // 2 :],
}


class S4D(nnx.Module):
    """A linear system with N states for each channel of a sequence: ``y = K * u + D u``, before any activation.

    The eigenvalues A of a channel come in conjugate pairs, of which one half is kept; B is 1. With zero-order hold,
    ``K_l = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l)``. Parameters are named and shaped as the official
    ones: ``log_dt`` and ``D`` (E,), ``log_A_real`` and ``A_imag`` (E, N/2), ``C`` (E, N/2, 2). All is float32 or wider.

    Args:
        channels: E.
        d_state: state size N, even.
        bidirectional: add a second kernel, of parameters ``backward_*``, that goes from the last token to the first.
            Both include the token itself; the official second kernel meets the next one.
        init: initial imaginary parts of A: "lin" (pi n), "inv", or "legs" (of HiPPO-LegS); the real ones are -1/2.
        rngs: source of the initial values.

    Raises:
        UserError: an odd state size, an unknown ``init``.

    Source: Gu et al., On the Parameterization and Initialization of Diagonal State Space Models (arXiv:2206.11893);
    state-spaces/s4 ``models/s4/s4d.py``.
    """

    def __init__(self, channels: int, *, d_state: int, bidirectional: bool = False, init: Init = "lin", rngs: nnx.Rngs):
        imaginary = one_of("init", init, IMAGINARY)
        if d_state < 2 or d_state % 2:
            raise UserError(f"d_state={d_state} is not allowed with S4D: it must be even, 2 or more")
        pairs = d_state // 2
        self.prefixes = ("", "backward_") if bidirectional else ("",)
        for prefix in self.prefixes:
            drawn = {
                "log_dt": initializers.log_dt(rngs.params(), (channels,)),
                "log_A_real": initializers.full((channels, pairs), math.log(0.5)),
                "A_imag": jax.device_put(np.broadcast_to(imaginary(d_state), (channels, pairs)).astype(np.float32)),
                "C": initializers.normal(0.5**0.5)(rngs.params(), (channels, pairs, 2), jnp.float32),
            }
            for name, array in drawn.items():
                setattr(self, prefix + name, nnx.Param(array))
        self.D = nnx.Param(initializers.normal(1.0)(rngs.params(), (channels,), jnp.float32))

    def kernel(self, length: int, dtype: jnp.dtype, *, prefix: str = "") -> jax.Array:
        """Return the kernel (E, L), or with the prefix ``"backward_"`` that from the last token to the first."""

        @jax.checkpoint  # the terms of the sum, N/2 times the kernel, are computed again
        def terms(log_dt, log_a_real, a_imag, c):
            dt, a = jnp.exp(log_dt)[:, None], (-jnp.exp(log_a_real), a_imag)
            _, factor = zero_order_hold(a, dt)
            weight = product((c[..., 0], c[..., 1]), factor)
            decays = power((dt * a[0], dt * a[1]), jnp.arange(length, dtype=dtype)[:, None, None])
            return 2 * product(weight, decays)[0].sum(-1).T

        parameters = (getattr(self, prefix + name) for name in ("log_dt", "log_A_real", "A_imag", "C"))
        return terms(*(parameter[...].astype(dtype) for parameter in parameters))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map sequences (B, L, E) to (B, L, E), of the same type."""
        dtype = jnp.promote_types(x.dtype, self.D.dtype)
        length, u = x.shape[1], x.astype(dtype)
        # By lag, modulo 2L: a token l places before at l, one l places after at 2L - l.
        kernel = jnp.pad(self.kernel(length, dtype), ((0, 0), (0, length)))
        if len(self.prefixes) == 2:
            backward = self.kernel(length, dtype, prefix="backward_")
            kernel += jnp.roll(jnp.pad(backward[:, ::-1], ((0, 0), (length, 0))), 1, -1)
        y = convolve(u, kernel) + self.D[...].astype(dtype) * u
        return checkpoint_name(y.astype(x.dtype), "scan")
