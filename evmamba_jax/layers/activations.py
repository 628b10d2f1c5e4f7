"""Activations, and by name those that a model may choose from."""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

Activation = Literal["silu", "gelu", "relu"]


def gelu(x: jax.Array) -> jax.Array:
    """Return x Phi(x), as ``torch.nn.GELU()`` does, Phi being the normal distribution function.

    In bfloat16 the value lies within 2.6e-5 of x Phi(x), its derivative within 1.2e-4 of the true one, before each is
    rounded to bfloat16, whose steps are 0.0078 from 1 on. A TPU has no instruction for the error function: the exact
    GELU keeps its vector unit busy for longer than the matrix products of an MLP take.

    All other types get the exact function: from float32 on by erf, as PyTorch has it, within a rounding of the larger
    of x and 1. JAX's own takes erfc, which keeps the relative error of tiny values; on a CPU it takes more than twice
    as long, and the backward pass keeps twice as much.

    Args:
        x: (...), of any floating type.

    Returns:
        (...) of the same type; in bfloat16 the infinities give infinity and what lies within the bound of 0.
    """
    if x.dtype == jnp.bfloat16:
        return _short_gelu(x)
    if jnp.finfo(x.dtype).bits < 32:
        return nnx.gelu(x, approximate=False)  # 1 + erf would be rounded first
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


# Phi(x) = (1 + tanh(x p(x^2))) / 2: the p of degree 2 whose largest error of x Phi(x) is smallest. From 6 on
# Phi is 1 in float32, and p, by which the argument falls again beyond 8, is not asked.
_P = (0.797507884, 0.0370056456, -3.51516805e-4)
_SLOPE = tuple((2 * k + 1) * p for k, p in enumerate(_P))  # the derivative of x p(x^2) is another polynomial in x^2
_FAR = 6.0


@jax.custom_jvp
def _short_gelu(x: jax.Array) -> jax.Array:
    x = jnp.maximum(x.astype(jnp.float32), -_FAR)  # below, -infinity times 0 would not be a number
    return (x * (0.5 + 0.5 * _tangent(jnp.minimum(x, _FAR)))).astype(jnp.bfloat16)


@_short_gelu.defjvp
def _short_gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    near = jnp.clip(x.astype(jnp.float32), -_FAR, _FAR)
    tangent = _tangent(near)
    slope = (0.5 + 0.5 * tangent) * (1 + near * (1 - tangent) * _polynomial(near * near, _SLOPE))
    return _short_gelu(x), (slope * dx.astype(jnp.float32)).astype(jnp.bfloat16)


def _tangent(x: jax.Array) -> jax.Array:
    return jnp.tanh(x * _polynomial(x * x, _P))


def _polynomial(x: jax.Array, coefficients: tuple[float, ...]) -> jax.Array:
    constant, linear, square = coefficients
    return constant + x * (linear + x * square)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"silu": nnx.silu, "gelu": gelu, "relu": nnx.relu}
