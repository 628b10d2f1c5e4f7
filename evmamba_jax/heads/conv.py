"""What heads are made of: a convolution with norm and ReLU, and the classifier of each pixel."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.typing import Dtype, Initializer

from evmamba_jax.layers import initializers as init
from evmamba_jax.layers.drop_path import Drop
from evmamba_jax.layers.norm import BatchNorm, LayerNorm

# Over channels, as Detectron2's "LN" is.
ChannelNorm = functools.partial(LayerNorm, epsilon=1e-6)


class ConvNorm(nnx.Module):
    """A square convolution without bias that keeps the size, then a norm.

    Args:
        c_in: channels of the input.
        c_out: channels of the output.
        size: side of the kernel, odd.
        norm: makes the norm of so many channels.
        kernel_init: of the kernel; None: Kaiming's normal by the fan out.
        convolution: what a kernel larger than 1x1 is applied with.
        dtype: compute type; the norm's statistics are float32 or wider.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int,
        *,
        norm: Any = BatchNorm,
        kernel_init: Initializer | None = None,
        convolution: Callable[..., jax.Array] = jax.lax.conv_general_dilated,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ):
        layer = {
            "use_bias": False,
            "kernel_init": kernel_init or init.normal(math.sqrt(2 / (c_out * size * size))),
            "dtype": dtype,
            "rngs": rngs,
        }
        if size == 1:
            self.conv = nnx.Linear(c_in, c_out, **layer)
        else:
            self.conv = nnx.Conv(
                c_in, c_out, (size, size), padding=size // 2, conv_general_dilated=convolution, **layer
            )
        self.norm = norm(c_out, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, counted: jax.Array | None = None) -> jax.Array:
        """Map (B, H, W, c_in) to (B, H, W, c_out); BatchNorm's statistics are of the rows that are ``counted`` (B,)."""
        x = self.conv(x)
        return self.norm(x, counted) if isinstance(self.norm, BatchNorm) else self.norm(x)


class ConvNormReLU(ConvNorm):
    """A ConvNorm, then ReLU.

    Source: mmcv's ``ConvModule`` as mmseg's heads and mmdet's box heads configure it.
    """

    def __call__(self, x: jax.Array, counted: jax.Array | None = None) -> jax.Array:
        """Do what ConvNorm does, and set negative values to 0."""
        return nnx.relu(super().__call__(x, counted))


class Dropout2d(Drop):
    """Drop whole channels of a sample. Source: torch's ``Dropout2d``."""

    NAME = "dropout"

    def drawn(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return (B, 1, ..., C)."""
        return (shape[0], *(1,) * (len(shape) - 2), shape[-1])


class PixelClassifier(nnx.Module):
    """Dropout of whole channels, then the logits of each pixel, float32 or wider whatever the compute type.

    Args:
        width: channels C of the map.
        num_classes: K.
        dropout: probability of dropping a channel, in training.
        init_std: deviation of the initial values, which are normal; the official one is 0.01.
        rngs: source of the initial values.

    Source: mmseg's ``BaseDecodeHead.cls_seg``.
    """

    def __init__(self, width: int, num_classes: int, *, dropout: float, init_std: float = 0.01, rngs: nnx.Rngs):
        self.dropout = Dropout2d(dropout)
        # No dtype: the kernel is float32, and so is what it gives.
        self.conv = nnx.Linear(width, num_classes, kernel_init=init.normal(init_std), bias_init=init.zeros, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, K); ``key`` draws the dropout in training mode."""
        return self.conv(self.dropout(x, key))
