"""The projection's products where the image is bfloat16: its exact values, and a factor split into two halves."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    """Return x (M, E) @ weight (E, C) of float32, where the values of x are of ``dtype``.

    Those of bfloat16 are multiplied as such, with the upper and the lower half of the other factor: faster than in
    TF32, to more bits, and without a float32 copy of the image.
    """
    if dtype != jnp.bfloat16:
        return x @ weight
    upper, lower = jnp.split(_dot(_narrow(x, dtype), _halves(weight), 1, 0), 2, 1)
    return upper + lower


def _forward(x, weight, dtype):
    return product(x, weight, dtype), (x, weight)


def _backward(dtype, kept, dy):
    x, weight = kept
    dx = dy @ weight.T
    if dtype != jnp.bfloat16:
        return dx, x.T @ dy
    upper, lower = jnp.split(_dot(_narrow(x, dtype), _halves(dy), 0, 0), 2, 1)
    return dx, upper + lower


product.defvjp(_forward, _backward)


def _narrow(x: jax.Array, dtype: Any) -> jax.Array:
    # Without the barrier, XLA of JAX 0.10.2 fuses the reading of a sub-lattice into the product and cannot tile that.
    return lax.optimization_barrier(x.astype(dtype))


def _halves(x: jax.Array) -> jax.Array:
    """Return float32 columns as bfloat16 and, beside them, as bfloat16 what that leaves of them."""
    upper = lax.reduce_precision(x, 8, 7)  # XLA may leave out a conversion there and back
    return jnp.concatenate([upper, x - upper], 1).astype(jnp.bfloat16)


def _dot(x: jax.Array, y: jax.Array, axis_x: int, axis_y: int) -> jax.Array:
    return lax.dot_general(x, y, (((axis_x,), (axis_y,)), ((), ())), preferred_element_type=jnp.float32)
