"""Resizing against slow loops written from PyTorch's definition, and a few numbers that PyTorch gave."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evmamba_jax.layers.resize import resize

SIZES = [((5, 4), (9, 7)), ((3, 3), (5, 6)), ((1, 2), (4, 3)), ((7, 9), (3, 4)), ((4, 5), (4, 5)), ((14, 1), (24, 2))]


def slow(x, height, width, method):
    """Resize x (H, W, C) pixel by pixel; the outermost pixels repeat beyond the border."""
    y = np.zeros((height, width, x.shape[2]))
    for i in range(height):
        for j in range(width):
            for row, of_row in taps(i, x.shape[0] / height, method):
                for column, of_column in taps(j, x.shape[1] / width, method):
                    inside = (min(max(row, 0), x.shape[0] - 1), min(max(column, 0), x.shape[1] - 1))
                    y[i, j] += of_row * of_column * x[inside]
    return y


def taps(i, scale, method):
    """Return [(place, weight), ...] of the pixels that output i is made of."""
    if method == "nearest":
        return [(math.floor(i * scale), 1)]
    place = (i + 0.5) * scale - 0.5
    if method == "bilinear":
        place = max(place, 0)
        below = math.floor(place)
        return [(below, 1 - (place - below)), (below + 1, place - below)]
    below, t = math.floor(place), place - math.floor(place)
    return list(zip(range(below - 1, below + 3), map(cubic, (t + 1, t, 1 - t, 2 - t)), strict=True))


def cubic(distance, a=-0.75):
    """Keys' kernel, its two pieces written out."""
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("old", "new"), SIZES)
def test_equals_slow_loops_in_float64(method, old, new):
    x = np.random.default_rng(0).normal(size=(2, *old, 3))
    with jax.enable_x64(True):
        y = resize(jnp.asarray(x), *new, method)
        assert y.dtype == np.float64
        chex.assert_trees_all_close(y, np.stack([slow(a, *new, method) for a in x]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic"])
def test_keeps_type_constants_and_linearity_of_gradients(method):
    x = jnp.full((1, 5, 4, 2), 3.0, jnp.bfloat16)
    y = resize(x, 9, 7, method)
    assert y.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(y, jnp.full((1, 9, 7, 2), 3.0, jnp.bfloat16))
    gradient = jax.grad(lambda x: resize(x, 9, 7, method).sum())(x.astype(jnp.float32))
    np.testing.assert_allclose(gradient.sum((1, 2)), 9 * 7, rtol=1e-5)  # each output's weights sum to 1


# What torch.nn.functional.interpolate(size=(4, n), mode=...) of PyTorch 2.13 makes of four equal rows, align_corners
# False where it applies.
@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("nearest", [0, 0, 1, 1, 4, 4, 9]),
        ("nearest", [0, 1, 4]),
        ("bilinear", [0, 0.3571429, 0.9285714, 2.5, 4.3571429, 7.2142857, 9]),
        ("bilinear", [0.1666667, 2.5, 8.1666667]),
        ("bicubic", [-0.0992165, 0.15625, 0.8042092, 2.125, 4.4246538, 7.4807762, 9.4960824]),
        ("bicubic", [0.0914352, 2.125, 8.3344907]),
    ],
)
def test_equals_pytorch(method, expected):
    x = jnp.broadcast_to(jnp.array([0.0, 1.0, 4.0, 9.0]), (1, 4, 4))[..., None]
    np.testing.assert_allclose(resize(x, 4, len(expected), method)[0, 2, :, 0], expected, atol=2e-6)


def test_nearest_rounds_as_pytorch_where_float32_falls_short():
    """Pixel 41 of 82 begins the second half, yet PyTorch's 41 * (2 / 82) is below 1 in float32."""
    y = resize(jnp.arange(2.0).reshape(1, 1, 2, 1), 1, 82, "nearest")[0, 0, :, 0]
    assert y[41] == 0
    assert y[42] == 1
