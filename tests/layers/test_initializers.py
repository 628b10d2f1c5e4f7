"""Initial values: NumPy's are JAX's."""

import jax
import numpy as np
import pytest

from evmamba_jax.layers import initializers as init

SHAPE = (3, 41, 300)  # more numbers than one piece has


@pytest.fixture(scope="module")
def key():
    return jax.random.fold_in(jax.random.key(3), 7)


def test_bits_are_those_of_jax(key):
    np.testing.assert_array_equal(init._bits(key, 70_001), jax.random.bits(key, (70_001,)))


@pytest.mark.parametrize(
    ("ours", "jaxs"),
    [
        (init.normal(0.02), lambda key: 0.02 * jax.random.normal(key, SHAPE)),
        (init.uniform(-3, 5), lambda key: jax.random.uniform(key, SHAPE, minval=-3, maxval=5)),
        (init.torch_default, lambda key: jax.random.uniform(key, SHAPE, minval=-(123**-0.5), maxval=123**-0.5)),
        (init.stacked_default, lambda key: jax.random.uniform(key, SHAPE, minval=-(41**-0.5), maxval=41**-0.5)),
    ],
)
def test_numbers_are_those_of_jax(key, ours, jaxs):
    np.testing.assert_allclose(ours(key, SHAPE), jaxs(key), rtol=2e-5, atol=1e-7)


def test_a_traced_key_draws_the_same(key):
    drawn = init.dt_bias(key, (2, 50))
    np.testing.assert_allclose(jax.jit(lambda key: init.dt_bias(key, (2, 50)))(key), drawn, rtol=1e-5)
    step = np.log1p(np.exp(np.asarray(drawn, np.float64)))  # softplus
    assert 0.001 * (1 - 1e-4) <= step.min() < 0.002
    assert 0.05 < step.max() <= 0.1 * (1 + 1e-4)
