"""The gradient of a depthwise kernel as a TPU takes it, against slow loops in float64."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evmamba_jax.layers.projections import _kernel_gradient, depthwise_conv

SHAPES = {  # sides, size of the kernel, strides, padding
    "3x3": ((5, 4), (3, 3), 1, ((1, 1), (1, 1))),
    "3x3 in steps": ((5, 6), (3, 3), 2, ((1, 1), (1, 1))),
    "7x7 in steps": ((9, 8), (7, 7), 2, ((3, 3), (3, 3))),
    "4 looking back": ((6,), (4,), 1, ((3, 0),)),
    "3": ((7,), (3,), 1, ((1, 1),)),
}


def slow_kernel_gradient(x, dy, size, stride, padding):
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    gradient = np.zeros((*size, 1, x.shape[-1]))
    for pixel in itertools.product(*map(range, dy.shape[1:-1])):
        for place in itertools.product(*map(range, size)):
            at = tuple(stride * one + offset for one, offset in zip(pixel, place, strict=True))
            gradient[place][0] += np.sum(x[(slice(None), *at)] * dy[(slice(None), *pixel)], 0)
    return gradient


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("channels", [3, 257])  # in one piece, 3x3 in three
def test_kernel_gradient_equals_slow_loops(name, channels):
    sides, size, stride, padding = SHAPES[name]
    out = tuple((n + sum(pad) - k) // stride + 1 for n, pad, k in zip(sides, padding, size, strict=True))
    rng = np.random.default_rng(0)
    shapes = (2, *sides, channels), (*size, 1, channels), (2, *out, channels)
    x, kernel, dy = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    axes = "HW"[-len(size) :]

    def convolution(x, kernel):
        numbers = f"N{axes}C", f"{axes}IO", f"N{axes}C"
        groups = {"feature_group_count": kernel.shape[-1], "dimension_numbers": numbers}
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * len(size), padding, **groups)

    gradient = jax.jit(functools.partial(_kernel_gradient, convolution))(x, kernel, dy)
    expected = slow_kernel_gradient(*(array.astype(np.float64) for array in (x, dy)), size, stride, padding)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "size", "groups"), [(192, (3, 3), [96, 96]), (512, (3, 3), [512]), (192, (4,), [192])]
)
def test_a_tpu_takes_the_kernel_gradient_in_pieces(channels, size, groups):
    conv = depthwise_conv(channels, size, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(conv)

    def loss(params, x):
        return jnp.square(nnx.merge(graphdef, params)(x)).sum()

    x = jnp.ones((2, *(6 for _ in size), channels))
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(params, x)
    for platform, expected in (("tpu", groups), ("cuda", [channels])):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert [int(count) for count in re.findall(r"batch_group_count = (\d+)", text) if count != "1"] == expected
        assert text.count("stablehlo.convolution") == 2 + len(expected)  # forward, and for the gradient of x
