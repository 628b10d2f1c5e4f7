"""GELU against the error function in float64, in every type; in bfloat16 at every number there is."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evmamba_jax.layers.activations import gelu

VALUE_ERROR, SLOPE_ERROR = 2.6e-5, 1.2e-4  # what the docstring promises, before the rounding to bfloat16


def exact(x):
    """Value and derivative of x Phi(x) for finite x (n,) in float64."""
    phi = np.array([math.erfc(-one / math.sqrt(2)) / 2 for one in x])
    return x * phi, phi + x * np.exp(-np.square(np.minimum(np.abs(x), 30)) / 2) / math.sqrt(2 * math.pi)


def half_step(x):
    """Half the distance between neighbours in bfloat16, which has 8 digits, around x: the error of rounding to it."""
    return np.ldexp(0.5, np.frexp(x)[1] - 8)


def value_and_slope(x):
    return jax.jit(lambda x: jax.jvp(gelu, (x,), (jnp.ones_like(x),)))(x)


def test_gelu_in_bfloat16_at_every_number():
    bits = np.arange(2**16, dtype=np.uint16)
    finite = bits[(bits & 0x7F80) != 0x7F80]  # an exponent of ones alone is infinite or not a number
    x = jax.lax.bitcast_convert_type(jnp.asarray(finite), jnp.bfloat16)
    value, slope = value_and_slope(x)
    assert value.dtype == slope.dtype == jnp.bfloat16
    x, value, slope = (np.asarray(array, np.float64) for array in (x, value, slope))
    true_value, true_slope = exact(x)
    # Where the error pushes a number over a power of two, the step above that power counts.
    assert (np.abs(value - true_value) <= VALUE_ERROR + half_step(np.abs(true_value) + VALUE_ERROR)).all()
    assert (np.abs(slope - true_slope) <= SLOPE_ERROR + half_step(np.abs(true_slope) + SLOPE_ERROR)).all()


def test_gelu_in_bfloat16_at_its_ends():
    value, slope = value_and_slope(jnp.asarray([math.inf, -math.inf, math.nan], jnp.bfloat16))
    np.testing.assert_allclose(np.asarray(value, np.float64), [math.inf, 0, math.nan], atol=VALUE_ERROR)
    np.testing.assert_allclose(np.asarray(slope, np.float64), [1, 0, math.nan], atol=SLOPE_ERROR)


def test_gelu_in_bfloat16_backward():
    x = jnp.asarray([-5, -1, -0.25, 0, 0.5, 3], jnp.bfloat16)
    dy = jnp.asarray([1, -2, 0.5, 4, 1, 0.125], jnp.bfloat16)
    _, pull = jax.vjp(gelu, x)
    slope = exact(np.asarray(x, np.float64))[1] * np.asarray(dy, np.float64)
    np.testing.assert_allclose(np.asarray(pull(dy)[0], np.float64), slope, rtol=2**-9, atol=4 * SLOPE_ERROR)


# Of the value and, twice that, of the derivative, in units of the larger of x and 1, as Phi itself is rounded.
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 4e-16), ("float32", 2e-7), ("float16", 2e-3)])
def test_gelu_is_exact_in_other_types(dtype, bound):
    with jax.enable_x64(dtype == "float64"):
        x = np.linspace(-12, 12, 4801).astype(dtype)
        found = value_and_slope(jnp.asarray(x))
        assert [array.dtype for array in found] == [dtype, dtype]
        value, slope = (np.asarray(array, np.float64) for array in found)
    true_value, true_slope = exact(x.astype(np.float64))
    bounds = bound * np.maximum(np.abs(x), 1)
    assert (np.abs(value - true_value) <= bounds).all()
    assert (np.abs(slope - true_slope) <= 2 * bounds).all()
