"""From image to patches, and from one resolution to the next."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.layers.mlp import gelu
from evmamba_jax.layers.norm import LayerNorm
from evmamba_jax.layers.projections import Linear, conv


class Stem(nnx.Module):
    """The first layer of a model, from images (B, H, W, in_channels) to the map of its first stage.

    Attributes:
        smallest: the smallest height and width it takes; pixels.
    """

    smallest: int


class PatchEmbed(Stem):
    """Stem "v1": a convolution over non-overlapping patches, then LayerNorm.

    Source: TerryPei/EfficientVMamba ``patch_embed``; MzeroMiko/VMamba ``_make_patch_embed``.
    """

    def __init__(
        self, in_channels: int, width: int, patch_size: int = 4, *, dtype: Dtype | None = None, rngs: nnx.Rngs
    ):
        self.smallest = patch_size
        self.proj = conv(in_channels, width, patch_size, stride=patch_size, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (B, H, W, in_channels) to patches (B, H // p, W // p, width)."""
        return self.norm(self.proj(x))


class OverlapPatchEmbed(Stem):
    """Stem "v2": two 3x3 convolutions of stride 2, each with LayerNorm, GELU between.

    Source: MzeroMiko/VMamba ``_make_patch_embed_v2``.
    """

    def __init__(self, in_channels: int, width: int, *, dtype: Dtype | None = None, rngs: nnx.Rngs):
        half = width // 2
        self.smallest = 1
        self.conv1 = conv(in_channels, half, 3, stride=2, padding=1, dtype=dtype, rngs=rngs)
        self.norm1 = LayerNorm(half, dtype=dtype, rngs=rngs)
        self.conv2 = conv(half, width, 3, stride=2, padding=1, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (B, H, W, in_channels) to (B, ceil(H/4), ceil(W/4), width)."""
        return self.norm2(self.conv2(gelu(self.norm1(self.conv1(x)))))


class PatchMerging(nnx.Module):
    """Downsampling "v1": four neighbours side by side, LayerNorm, projection from 4C to 2C.

    Source: Swin Transformer section 3.1; TerryPei/EfficientVMamba ``PatchMerging2D``.
    """

    def __init__(self, width: int, *, dtype: Dtype | None = None, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * width, dtype=dtype, rngs=rngs)
        self.reduction = Linear(4 * width, 2 * width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, ceil(H/2), ceil(W/2), 2C); odd sizes are padded with zeros below and right."""
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        # The row offset varies first in the official concatenation.
        x = rearrange(x, "b (h dh) (w dw) c -> b h w (dw dh c)", dh=2, dw=2)
        return self.reduction(self.norm(x))


class ConvDownsample(nnx.Module):
    """Downsampling "v3": a 3x3 convolution of stride 2 from C to 2C, then LayerNorm.

    Source: MzeroMiko/VMamba ``_make_downsample_v3``.
    """

    def __init__(self, width: int, *, dtype: Dtype | None = None, rngs: nnx.Rngs):
        self.conv = conv(width, 2 * width, 3, stride=2, padding=1, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(2 * width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, ceil(H/2), ceil(W/2), 2C)."""
        return self.norm(self.conv(x))


# What VMamba and MSVMamba start and halve their maps with: (stem, downsampling), by whether their patches overlap.
PATCHES = {False: (PatchEmbed, PatchMerging), True: (OverlapPatchEmbed, ConvDownsample)}
