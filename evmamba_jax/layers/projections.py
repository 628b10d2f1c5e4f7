"""Linear and convolution layers with the initial values of the official code."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.layers import initializers as init
from evmamba_jax.layers.dots import dot_rows
from pallas_kernels.apart import read_once

# torch.nn.Linear in the official models: normal(0, .02), bias 0.
Linear = functools.partial(nnx.Linear, kernel_init=init.linear_normal, bias_init=init.zeros, dot_general=dot_rows)


def pointwise_conv(
    c_in: int, c_out: int, *, use_bias: bool = True, dtype: Dtype | None = None, rngs: nnx.Rngs
) -> nnx.Linear:
    """Build a 1x1 convolution: a matrix product over channels, with a convolution's initial values."""
    return nnx.Linear(
        c_in,
        c_out,
        use_bias=use_bias,
        kernel_init=init.torch_default,
        bias_init=init.torch_bias(c_in),
        dot_general=dot_rows,
        dtype=dtype,
        rngs=rngs,
    )


def conv(
    c_in: int,
    c_out: int,
    size: int,
    *,
    stride: int = 1,
    padding: int = 0,
    use_bias: bool = True,
    dtype: Dtype | None = None,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Build a square convolution with ``padding`` zeros on each side; pixels beyond the last stride are dropped."""
    return nnx.Conv(
        c_in,
        c_out,
        (size, size),
        strides=stride,
        padding=padding,
        use_bias=use_bias,
        kernel_init=init.torch_default,
        bias_init=init.torch_bias(c_in * size * size),
        dtype=dtype,
        rngs=rngs,
    )


def depthwise_conv(
    channels: int,
    size: tuple[int, ...] = (3, 3),
    *,
    stride: int = 1,
    padding: Sequence[tuple[int, int]] | None = None,
    backwards: bool = False,
    use_bias: bool = True,
    dtype: Dtype | None = None,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Build a depthwise convolution over an image or, with one number in ``size``, a sequence.

    Args:
        channels: C, each convolved by itself.
        size: of the kernel along each axis.
        stride: along every axis.
        padding: zeros (before, after) on each axis; half the kernel on both sides when not given.
        backwards: apply the kernel from its last entry to its first, as a convolution of the reversed input does.
        use_bias: add a bias.
        dtype: compute type.
        rngs: source of the initial values.
    """
    return nnx.Conv(
        channels,
        channels,
        size,
        strides=stride,
        padding=[(k // 2, k // 2) for k in size] if padding is None else padding,
        feature_group_count=channels,
        use_bias=use_bias,
        kernel_init=init.torch_default,
        bias_init=init.torch_bias(math.prod(size)),
        conv_general_dilated=_depthwise_backwards if backwards else _depthwise,
        dtype=dtype,
        rngs=rngs,
    )


def _depthwise(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]], **options: Any
) -> jax.Array:
    """Convolve x (B, ..., C) with kernel (..., 1, C), the way the platform lowered for does it best.

    XLA's CPU back end takes grouped convolutions one group at a time; as a sum of shifted products it runs 20 to 40
    times faster forward and 2 to 12 times faster backward. On a TPU the convolution is left alone but for the gradient
    of its kernel, by :func:`_kernel_gradient`.
    """
    return _convolve(x, kernel, tuple(strides), tuple(map(tuple, padding)), tuple(options.items()))


# The platform is chosen within the gradient's rule, not the rule within a platform's branch: JAX gives what a rule
# computes the source line of its call, but not within a branch.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(x, kernel, strides, padding, options):
    on_cpu = functools.partial(_shifted_products, strides=strides, padding=padding)
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=_convolution(strides, padding, options))


def _convolution(strides, padding, options):
    def convolution(x, kernel):
        groups = {"feature_group_count": kernel.shape[-1]}
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **dict(options) | groups)

    return convolution


def _convolve_fwd(x, kernel, *how):
    return _convolve(x, kernel, *how), (x, kernel)


def _convolve_bwd(strides, padding, options, kept, dy):
    convolution = _convolution(strides, padding, options)

    def plain(x, kernel, dy):
        return jax.vjp(convolution, x, kernel)[1](dy)

    def on_tpu(x, kernel, dy):
        (dx,) = jax.linear_transpose(lambda x: convolution(x, kernel), x)(dy)
        return dx, _kernel_gradient(convolution, x, kernel, dy)

    on_cpu = functools.partial(_gradients_on_cpu, strides=strides, padding=padding)
    return jax.lax.platform_dependent(*kept, dy, cpu=on_cpu, tpu=on_tpu, default=plain)


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _kernel_gradient(
    convolution: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, kernel: jax.Array, dy: jax.Array
) -> jax.Array:
    """Return the gradient of a kernel (..., 1, C) from the gradient dy (B, ..., C).

    Of 3x3 kernels up to 384 channels at most 128 at a time: where x and dy lie on a TPU's chip already, XLA takes the
    whole convolution pixel by pixel, at 192 channels five times as long as in pieces. In an inverted residual of 768
    channels pieces took longer than the whole; other kernels are not measured.
    """
    channels = kernel.shape[-1]
    pieces = -(-channels // 128) if kernel.shape[:-2] == (3, 3) and channels <= 384 else 1
    gradients = []
    split = (jnp.array_split(array, pieces, -1) for array in (x, kernel, dy))
    for some_x, some_kernel, some_dy in zip(*split, strict=True):
        gradients += jax.linear_transpose(functools.partial(convolution, some_x), some_kernel)(some_dy)
    return jnp.concatenate(gradients, -1)


# Jitted, so that a 7x7 kernel's 49 products are traced once for all blocks of one shape.
@functools.partial(jax.jit, static_argnames=("strides", "padding"))
def _shifted_products(x, kernel, *, strides, padding):
    return read_once(functools.partial(_sum_of_products, strides=strides, padding=padding), x, kernel)


def _sum_of_products(x, kernel, strides, padding):
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    offsets = itertools.product(*map(range, kernel.shape[:-2]))
    places = ((place, _shifted(x, place, kernel.shape[:-2], strides)) for place in offsets)
    return functools.reduce(jnp.add, (pixels * kernel[place][0] for place, pixels in places))


def _shifted(x, offsets, size, strides):
    """Return what the entry of a kernel at ``offsets`` is multiplied with, of a padded x."""
    spans = [side - k + 1 for side, k in zip(x.shape[1:-1], size, strict=True)]
    axes = zip(offsets, spans, strides, strict=True)
    return x[(slice(None), *(slice(start, start + span, step) for start, span, step in axes))]


@functools.partial(jax.jit, static_argnames=("strides", "padding"))
def _gradients_on_cpu(x, kernel, dy, *, strides, padding):
    """Return the gradients of x and of the kernel from dy (B, ..., C)."""
    size = kernel.shape[:-2]
    around = tuple((k - 1 - before, k - 1 - after) for k, (before, after) in zip(size, padding, strict=True))
    if set(strides) == {1} and min(map(min, around)) >= 0:
        dx = _shifted_products(dy, jnp.flip(kernel, range(len(size))), strides=strides, padding=around)
    else:
        pull = jax.vjp(lambda x: _sum_of_products(x, kernel, strides, padding), x)[1]
        (dx,) = read_once(pull, dy)
    return dx, _kernel_gradient_by_rows(jnp.pad(x, ((0, 0), *padding, (0, 0))), dy, size, strides).astype(kernel.dtype)


def _kernel_gradient_by_rows(x, dy, size, strides):
    """Return the gradient (..., 1, C) of a kernel of this size from a padded x and dy, by rows of the images.

    In a row of a few images all sums stay in the cache; over whole images each would read both maps from memory again.
    Every image has sums of its own until the end, so that a batch that devices divide is not gathered. Sums are float32
    or wider.
    """
    wide = jnp.promote_types(dy.dtype, jnp.float32)
    batch, *rows, _, channels = dy.shape

    def row_of(maps, place):
        maps = jax.lax.dynamic_slice(maps, (0, *place, 0, 0), (batch, *(1 for _ in rows), maps.shape[-2], channels))
        return maps.reshape(batch, -1, channels).astype(wide)

    def add_row(sums, row):
        place = jnp.unravel_index(row, rows)
        products, dy_row = [], row_of(dy, place)
        for offsets in itertools.product(*map(range, size[:-1])):
            x_row = row_of(x, [i * s + o for i, s, o in zip(place, strides, offsets, strict=False)])
            products += [_shifted(x_row, (o,), size[-1:], strides[-1:]) * dy_row for o in range(size[-1])]
        return sums + jnp.stack([product.sum(1) for product in products]), None

    sums = jnp.zeros((math.prod(size), batch, channels), wide)
    sums, _ = jax.lax.scan(add_row, sums, jnp.arange(math.prod(rows)))
    return sums.sum(1).reshape(*size, 1, channels)


def _depthwise_backwards(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    return _depthwise(x, jnp.flip(kernel, range(kernel.ndim - 2)), *args, **options)
