"""The convolution of regions against a loop over its windows."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evmamba_jax.arrays import merge, split
from evmamba_jax.heads.region_conv import region_conv


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float64, 1e-12), (jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_region_conv_and_its_gradients_are_those_of_a_loop(dtype, limit):
    regions, rows, columns, c_in, c_out = 5, 4, 3, 6, 7
    rng = np.random.default_rng(0)
    drawn = (regions, rows, columns, c_in), (3, 3, c_in, c_out), (regions, rows, columns, c_out)
    with jax.enable_x64(True):
        x, kernel, dy = (jnp.asarray(rng.normal(size=shape), dtype) for shape in drawn)
        layer = {"padding": 1, "use_bias": False, "conv_general_dilated": region_conv, "dtype": dtype}
        graphdef, _, stats = split(nnx.Conv(c_in, c_out, (3, 3), rngs=nnx.Rngs(0), **layer))
        y, pull = jax.vjp(lambda x, kernel: merge(graphdef, {"kernel": kernel}, stats)(x), x, kernel)
        found = [np.asarray(value, np.float64) for value in (y, *pull(dy))]
        x, kernel, dy = (np.asarray(value, np.float64) for value in (x, kernel, dy))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = [np.zeros(dy.shape), np.zeros(padded.shape), np.zeros(kernel.shape)]
    for r, i, j in np.ndindex(regions, rows, columns):
        window = r, slice(i, i + 3), slice(j, j + 3)
        expected[0][r, i, j] = np.einsum("hwc,hwco->o", padded[window], kernel)
        expected[1][window] += kernel @ dy[r, i, j]
        expected[2] += padded[window][..., None] * dy[r, i, j]
    expected[1] = expected[1][:, 1:-1, 1:-1]
    scaled = [value / np.abs(value).max() for value in expected]
    chex.assert_trees_all_close([f / np.abs(e).max() for f, e in zip(found, expected, strict=True)], scaled, atol=limit)
