"""From image to patches, and from one resolution to the next."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.errors import UserError
from evmamba_jax.layers import initializers as init
from evmamba_jax.layers.activations import gelu
from evmamba_jax.layers.norm import LayerNorm
from evmamba_jax.layers.projections import Linear, conv, pointwise_conv


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
        # The row offset varies first in the official concatenation.
        x = rearrange(_to_even(x), "b (h dh) (w dw) c -> b h w (dw dh c)", dh=2, dw=2)
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


class NormDownsample(nnx.Module):
    """Downsampling of ConvNeXt: LayerNorm, then a 2x2 convolution of stride 2 from C to 2C.

    Source: Liu et al., A ConvNet for the 2020s (arXiv:2201.03545), section 2.6.
    """

    def __init__(self, width: int, *, dtype: Dtype | None = None, rngs: nnx.Rngs):
        self.norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.conv = conv(width, 2 * width, 2, stride=2, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, ceil(H/2), ceil(W/2), 2C); odd sizes are padded with zeros below and right."""
        return self.conv(_to_even(self.norm(x)))


class AttentionDownsample(nnx.Module):
    """Downsampling by attention: of each window a mean, weighted by the softmax of a learned score, then C to 2C.

    Args:
        width: channels C.
        window: side of the windows, pixels.
        stride: from one window to the next.
        padding: pixels that windows may reach over each border of the map; less than ``window``. What is not on the
            map has no weight. Without padding, a window starts at every ``stride``-th pixel of the map, and the last
            ones may be cut by its border; with padding there are whole windows only, as of a convolution.
        dtype: compute type; the softmax is float32 or wider whatever it says.
        rngs: source of the initial values.

    Raises:
        UserError: windows or strides of no pixel, a padding of whole windows.
    """

    def __init__(
        self,
        width: int,
        *,
        window: int = 2,
        stride: int = 2,
        padding: int = 0,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        if min(window, stride) < 1 or not 0 <= padding < window:
            raise UserError(
                f"window={window}, stride={stride}, padding={padding} is not allowed: window and stride must be 1 or "
                "more, the padding from 0 to below the window"
            )
        self.score = nnx.Param(init.linear_normal(rngs.params(), (width,), jnp.float32))
        self.expand = pointwise_conv(width, 2 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.window, self.stride, self.padding = window, stride, padding

    def pool(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to the means of its windows (B, h, w, C), by default ceil(H/2) and ceil(W/2) of them."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scores = jnp.einsum("bhwc,c->bhw", x, self.score[...].astype(x.dtype), preferred_element_type=wide)
        window, stride, before = self.window, self.stride, self.padding
        # Windows along each axis, and the zeros after the map that the last of them needs.
        counts = [(side + 2 * before - window) // stride + 1 if before else -(-side // stride) for side in x.shape[1:3]]
        after = [
            max((n - 1) * stride + window - before - side, 0) for n, side in zip(counts, x.shape[1:3], strict=True)
        ]
        pads = [(0, 0), *((before, end) for end in after)]
        scores = jnp.pad(scores, pads, constant_values=-jnp.inf)
        x = jnp.pad(x, [*pads, (0, 0)])

        def each(array):
            """Return one pixel of every window, for each place in a window: (window^2, B, h, w, ...)."""
            ends = [(n - 1) * stride + 1 for n in counts]
            places = [(i, j) for i in range(window) for j in range(window)]
            return jnp.stack([array[:, i : i + ends[0] : stride, j : j + ends[1] : stride] for i, j in places])

        weights = nnx.softmax(each(scores), axis=0).astype(x.dtype)
        return jnp.einsum("kbhw,kbhwc->bhwc", weights, each(x), preferred_element_type=wide).astype(x.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, h, w, 2C), by default (B, ceil(H/2), ceil(W/2), 2C)."""
        return self.expand(self.pool(x))


def _to_even(x: jax.Array) -> jax.Array:
    """Pad odd sides of a map (B, H, W, C) with zeros below and right."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))


# What VMamba and MSVMamba start and halve their maps with: (stem, downsampling), by whether their patches overlap.
PATCHES = {False: (PatchEmbed, PatchMerging), True: (OverlapPatchEmbed, ConvDownsample)}
