"""The gradients of a depthwise convolution as a TPU takes them, against slow loops in float64."""

import functools
import itertools

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_gradient_equals_slow_loops(name, dtype):
    sides, size, stride, padding = SHAPES[name]
    out = tuple((n + sum(pad) - k) // stride + 1 for n, pad, k in zip(sides, padding, size, strict=True))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *sides, 3)), dtype)
    dy = jnp.asarray(rng.normal(size=(2, *out, 3)), dtype)
    gradient_of = functools.partial(_kernel_gradient, size=size, strides=(stride,) * len(size), padding=padding)
    gradient = jax.jit(gradient_of)(x, dy)
    assert gradient.dtype == jnp.float32
    expected = slow_kernel_gradient(np.asarray(x, np.float64), np.asarray(dy, np.float64), size, stride, padding)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_tpu_takes_the_kernel_gradient_as_sums(backwards):
    conv = depthwise_conv(3, (4,), padding=[(3, 0)], backwards=backwards, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(conv)
    x = jnp.ones((2, 6, 3))

    def loss(params, x):
        return jnp.square(nnx.merge(graphdef, params)(x)).sum()

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(params, x)
    tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert tpu.count("stablehlo.convolution") == 2  # forward, and for the gradient of x
    assert "batch_group_count = 3" not in tpu
    other = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert other.count("stablehlo.convolution") == 3
    assert "batch_group_count = 3" in other
