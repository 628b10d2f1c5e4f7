"""From image to patches, and from one resolution to the next."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.layers.norm import LayerNorm
from evmamba_jax.layers.projections import Linear, patch_conv


class PatchEmbed(nnx.Module):
    """Stem "v1": a convolution over non-overlapping patches, then LayerNorm.

    Source: TerryPei/EfficientVMamba ``patch_embed``; MzeroMiko/VMamba ``_make_patch_embed``.
    """

    def __init__(self, in_channels: int, width: int, patch_size: int, *, dtype: Dtype | None = None, rngs: nnx.Rngs):
        self.proj = patch_conv(in_channels, width, patch_size, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (B, H, W, in_channels) to patches (B, H // p, W // p, width)."""
        return self.norm(self.proj(x))


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
