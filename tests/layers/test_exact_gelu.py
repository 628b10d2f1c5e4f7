"""GELU beside the C library's error function, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evmamba_jax.layers.activations import gelu

# Of value and, twice that, derivative, in units of the larger of x and 1.
BOUNDS = {"float64": 4e-16, "float32": 2e-7, "float16": 2e-3}


@pytest.mark.parametrize("dtype", BOUNDS)
def test_gelu_and_its_derivative(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.linspace(-12, 12, 4801).astype(dtype)
        y, pull = jax.vjp(gelu, x)
        (dx,) = pull(jnp.ones_like(x))
    assert y.dtype == dx.dtype == dtype
    wide = np.asarray(x, np.float64)
    phi = np.array([0.5 * math.erfc(-v * math.sqrt(0.5)) for v in wide])
    slope = phi + wide * np.exp(-0.5 * wide**2) / math.sqrt(2 * math.pi)
    scale = BOUNDS[dtype] * np.maximum(np.abs(wide), 1)
    assert (np.abs(np.asarray(y, np.float64) - wide * phi) <= scale).all()
    assert (np.abs(np.asarray(dx, np.float64) - slope) <= 2 * scale).all()
