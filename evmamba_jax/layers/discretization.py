"""Diagonal linear systems x' = a x + u with complex a, in steps of time: on pairs (real, imaginary) of real arrays.

Pairs, because accelerators have no complex products, and a TPU hardly complex numbers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]


def product(a: Pair, b: Pair) -> Pair:
    """Return a * b."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def conjugate(a: Pair) -> Pair:
    """Return the complex conjugate of a."""
    return a[0], -a[1]


def _over(a: Pair, b: Pair) -> Pair:
    square = b[0] * b[0] + b[1] * b[1]
    real, imaginary = product(a, conjugate(b))
    return real / square, imaginary / square


def power(a: Pair, time: jax.Array) -> Pair:
    """Return exp(a * time)."""
    size, angle = jnp.exp(a[0] * time), a[1] * time
    return size * jnp.cos(angle), size * jnp.sin(angle)


def zero_order_hold(a: Pair, dt: jax.Array) -> tuple[Pair, Pair]:
    """Return what the state and the input of a step are multiplied with: exp(dt a) and (exp(dt a) - 1) / a."""
    decay = power(a, dt)
    # exp(dt a) - 1 without the difference of two numbers near 1.
    real = jnp.expm1(dt * a[0]) * jnp.cos(dt * a[1]) - 2 * jnp.square(jnp.sin(dt * a[1] / 2))
    return decay, _over((real, decay[1]), a)


def bilinear(a: Pair, dt: jax.Array) -> tuple[Pair, Pair]:
    """Return the same by the trapezoidal rule: (1 + dt a / 2) / (1 - dt a / 2) and dt / (1 - dt a / 2)."""
    real, imaginary = dt * a[0] / 2, dt * a[1] / 2
    below = 1 - real, -imaginary
    return _over((1 + real, imaginary), below), _over((dt, jnp.zeros_like(dt)), below)


DISCRETIZATIONS: dict[str, Callable[[Pair, jax.Array], tuple[Pair, Pair]]] = {
    "zoh": zero_order_hold,
    "bilinear": bilinear,
}
