"""What heads are made of: a convolution with norm and ReLU, and the classifier of each pixel."""

import math

import jax
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.layers import initializers as init
from evmamba_jax.layers.drop_path import Drop
from evmamba_jax.layers.norm import BatchNorm


class ConvNormReLU(nnx.Module):
    """A square convolution without bias that keeps the size, BatchNorm, ReLU.

    Args:
        c_in: channels of the input.
        c_out: channels of the output.
        size: side of the kernel, odd.
        dtype: compute type; the norm's statistics are float32 or wider.
        rngs: source of the initial values, Kaiming normal by the fan out.

    Source: mmcv's ``ConvModule`` as mmseg's heads and mmdet's box heads configure it.
    """

    def __init__(self, c_in: int, c_out: int, size: int, *, dtype: Dtype | None, rngs: nnx.Rngs):
        layer = {
            "use_bias": False,
            "kernel_init": init.normal(math.sqrt(2 / (c_out * size * size))),
            "dtype": dtype,
            "rngs": rngs,
        }
        if size == 1:
            self.conv = nnx.Linear(c_in, c_out, **layer)
        else:
            self.conv = nnx.Conv(c_in, c_out, (size, size), padding=size // 2, **layer)
        self.norm = BatchNorm(c_out, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, counted: jax.Array | None = None) -> jax.Array:
        """Map (B, H, W, c_in) to (B, H, W, c_out); the norm's statistics are of the rows that are ``counted`` (B,)."""
        return nnx.relu(self.norm(self.conv(x), counted))


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
        rngs: source of the initial values, normal with deviation 0.01.

    Source: mmseg's ``BaseDecodeHead.cls_seg``.
    """

    def __init__(self, width: int, num_classes: int, *, dropout: float, rngs: nnx.Rngs):
        self.dropout = Dropout2d(dropout)
        # No dtype: the kernel is float32, and so is what it gives.
        self.conv = nnx.Linear(width, num_classes, kernel_init=init.normal(0.01), bias_init=init.zeros, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, K); ``key`` draws the dropout in training mode."""
        return self.conv(self.dropout(x, key))
