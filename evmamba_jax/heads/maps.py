"""The four maps that a head asks for, at 4, 8, 16 and 32 pixels, from a backbone whose maps all have one size.

Backbones of four stages give these maps themselves, with ``out_norms=True`` through the official out norms.

Source: hustvl/Vim ``seg/backbone/vim.py`` at dd0358a, after BEiT's segmenter.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.typing import Dtype, Initializer

from evmamba_jax.errors import UserError
from evmamba_jax.layers import initializers as init
from evmamba_jax.layers.activations import gelu
from evmamba_jax.layers.norm import BatchNorm

STRIDES = (4, 8, 16, 32)


class Deconv(nnx.Module):
    """A transposed convolution, 2x2 of stride 2: each pixel becomes four.

    Args:
        c_in: channels of the input.
        c_out: channels of the output.
        dtype: compute type.
        rngs: source of the initial values.
        kernel_init: of the kernel; None: PyTorch's.
        bias_init: of the bias; None: PyTorch's.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
    ):
        draw = init.within((4 * c_out) ** -0.5)
        self.kernel = nnx.Param((kernel_init or draw)(rngs.params(), (2, 2, c_in, c_out), jnp.float32))
        self.bias = nnx.Param((bias_init or draw)(rngs.params(), (c_out,), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, c_in) to (B, 2H, 2W, c_out)."""
        dtype = self.dtype or jnp.promote_types(x.dtype, self.kernel.dtype)
        x, kernel, bias = (array.astype(dtype) for array in (x, self.kernel[...], self.bias[...]))
        return rearrange(jnp.einsum("bhwc,ijco->bhwijo", x, kernel), "b h w i j o -> b (h i) (w j) o") + bias


class Enlarge(nnx.Module):
    """Twice or four times the size: a Deconv, and for four times a norm, GELU and another.

    Args:
        widths: channels of the input, and of what each Deconv gives.
        norm: makes the norm of so many channels.
        dtype: compute type.
        rngs: source of the initial values.
    """

    def __init__(self, widths: Sequence[int], *, norm: Any = BatchNorm, dtype: Dtype | None, rngs: nnx.Rngs):
        layer = {"dtype": dtype, "rngs": rngs}
        self.conv1 = Deconv(widths[0], widths[1], **layer)
        self.norm = norm(widths[1], **layer) if len(widths) == 3 else None
        self.conv2 = Deconv(widths[1], widths[2], **layer) if len(widths) == 3 else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, factor H, factor W, C of the last)."""
        x = self.conv1(x)
        return x if self.norm is None or self.conv2 is None else self.conv2(gelu(self.norm(x)))


def check_stride(stride: int) -> None:
    """Raise a UserError unless maps of this stride can be made into maps of STRIDES."""
    if stride not in (4, 8, 16):
        raise UserError(f"maps every {stride} pixels make no pyramid of {STRIDES}: take a stride of 4, 8 or 16")


def reduced(x: jax.Array, side: int) -> jax.Array:
    """Return the maximum of each ``side`` x ``side`` cells of (B, H, W, C); cells beyond the last whole one are left
    out."""
    return nnx.max_pool(x, (side, side), (side, side))


class PlainPyramid(nnx.Module):
    """Four maps of one size to maps at 4, 8, 16 and 32 pixels: enlarged, as they are, or by maximum pooling.

    Args:
        width: channels C, which every map keeps.
        stride: pixels between the maps' cells: 4, 8 or 16.
        dtype: compute type.
        rngs: source of the initial values.

    Raises:
        UserError: another stride.
    """

    def __init__(self, width: int, stride: int, *, dtype: Dtype | None = None, rngs: nnx.Rngs):
        check_stride(stride)
        self.stride = stride
        widths = [[width] * (stride // wanted).bit_length() for wanted in STRIDES if wanted < stride]
        self.enlarge = nnx.List([Enlarge(own, dtype=dtype, rngs=rngs) for own in widths])

    def __call__(self, maps: list[jax.Array]) -> list[jax.Array]:
        """Map four (B, H, W, C) to four of other sizes; cells beyond the last whole one are left out."""
        made = []
        for i, (x, wanted) in enumerate(zip(maps, STRIDES, strict=True)):
            if wanted < self.stride:
                x = self.enlarge[i](x)
            elif wanted > self.stride:
                x = reduced(x, wanted // self.stride)
            made.append(x)
        return made
