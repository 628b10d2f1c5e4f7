"""Linear layers and depthwise convolutions beside loops in float64, and what a CPU computes once."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evmamba_jax.layers.projections import Linear, depthwise_conv, pointwise_conv
from pallas_kernels.apart import read_once


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def pulled(module, x, dy):
    """Return the output of a module with one kernel, and the gradients of its kernel and of x."""
    graph, params = nnx.split(module)
    y, pull = jax.vjp(lambda params, x: nnx.merge(graph, params)(x), params, jnp.asarray(x, jnp.float32))
    d_params, dx = pull(jnp.asarray(dy, y.dtype))
    return y, d_params["kernel"][...], dx


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("layer", [Linear, pointwise_conv])
def test_linear_layers_and_their_gradients(layer, shape):
    module = layer(5, 7, use_bias=False, rngs=nnx.Rngs(0))
    x, dy = draw(0, *shape), draw(1, *shape[:-1], 7)
    kernel = np.asarray(module.kernel[...], np.float64)
    y, dk, dx = map(np.zeros_like, (dy, kernel, x))
    for at in np.ndindex(*shape[:-1]):
        for i, o in itertools.product(range(5), range(7)):
            y[at][o] += x[at][i] * kernel[i, o]
            dk[i, o] += x[at][i] * dy[at][o]
            dx[at][i] += dy[at][o] * kernel[i, o]
    for got, wanted in zip(pulled(module, x, dy), (y, dk, dx), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def slow_depthwise(x, kernel, dy, strides, padding):
    """Return output, gradient of the kernel (..., C) and gradient of x, pixel by pixel."""
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    y, dk, dx = map(np.zeros_like, (dy, kernel, x))
    for at in np.ndindex(*dy.shape[:-1]):
        for offsets in np.ndindex(*kernel.shape[:-1]):
            pixel = (at[0], *(i * s + o for i, s, o in zip(at[1:], strides, offsets, strict=True)))
            y[at] += x[pixel] * kernel[offsets]
            dk[offsets] += x[pixel] * dy[at]
            dx[pixel] += dy[at] * kernel[offsets]
    inside = tuple(slice(before, side - after) for (before, after), side in zip(padding, x.shape[1:-1], strict=True))
    return y, dk, dx[(slice(None), *inside)]


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [
        ((3, 3), 1, ((1, 1), (1, 1))),
        ((3, 3), 2, ((1, 1), (1, 1))),
        ((2, 3), 1, ((0, 1), (2, 0))),
        ((3, 3), 1, ((3, 3), (3, 3))),  # zeros beyond all that the kernel reaches
        ((4,), 1, ((3, 0),)),  # of Vim
        ((4,), 1, ((1, 2),)),  # of MambaVision
        ((5,), 3, ((2, 2),)),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_depthwise_convolutions_and_their_gradients(size, stride, padding, backwards):
    conv = depthwise_conv(
        3, size, stride=stride, padding=padding, backwards=backwards, use_bias=False, rngs=nnx.Rngs(0)
    )
    x = draw(0, 2, *(9, 6)[: len(size)], 3)
    kernel = np.asarray(conv.kernel[...], np.float64)[..., 0, :]
    turned = np.flip(kernel, range(len(size))) if backwards else kernel
    sides = [(n + sum(pad) - k) // stride + 1 for n, pad, k in zip(x.shape[1:-1], padding, size, strict=True)]
    dy = draw(1, 2, *sides, 3)
    y, dk, dx = slow_depthwise(x, turned, dy, [stride] * len(size), padding)
    dk = np.flip(dk, range(len(size))) if backwards else dk
    got_y, got_dk, got_dx = pulled(conv, x, dy)
    np.testing.assert_allclose(got_y, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got_dk[..., 0, :], dk, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got_dx, dx, rtol=1e-5, atol=1e-5)


def test_the_kernels_gradient_is_summed_in_float32():
    """4096 products of 1 and 1 are 4096; a sum in bfloat16 stops at 256."""
    conv = depthwise_conv(1, (1, 1), use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    _, dk, _ = pulled(conv, np.ones((1, 64, 64, 1)), np.ones((1, 64, 64, 1)))
    assert dk.item() == 4096


def test_what_is_read_often_is_computed_once():
    """XLA moves an exponential into a computation that reads it twice. ``read_once`` prevents that."""

    def stacked(x):
        return jnp.stack([x, x[:, ::-1]], 1)

    def readers(read):
        program = jax.jit(lambda x: read(jnp.exp(x) + 1)).lower(jnp.ones((3, 4, 4))).compile().as_text()
        parts = program.split("\n}\n")
        return sum("exponential(" in part and "concatenate(" in part for part in parts)

    assert readers(stacked) == 1
    assert readers(lambda x: read_once(stacked, x)) == 0
    x = draw(0, 3, 4, 4)
    np.testing.assert_allclose(read_once(stacked, jnp.asarray(x, jnp.float32)), stacked(jnp.asarray(x, jnp.float32)))
