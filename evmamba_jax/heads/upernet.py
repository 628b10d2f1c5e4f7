"""The head of UperNet: pooled context on the last map, then a pyramid from coarse to fine, all levels fused.

Source: Xiao et al., Unified Perceptual Parsing for Scene Understanding (arXiv:1807.10221); mmseg 1.2.2
``models/decode_heads/uper_head.py`` and ``psp_head.py`` with ``align_corners=False``.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.heads.conv import ConvNormReLU, PixelClassifier
from evmamba_jax.heads.resize import adaptive_average_pool, bilinear

POOLS = (1, 2, 3, 6)


class PyramidPooling(nnx.Module):
    """The map beside its means over coarse grids, fused by a 3x3 convolution.

    Args:
        in_channels: channels C of the map.
        width: channels D of each branch and of the result.
        pools: sides of the grids.
        dtype: compute type.
        rngs: source of the initial values.

    Source: Zhao et al., Pyramid Scene Parsing Network (arXiv:1612.01105), section 3.2.
    """

    def __init__(
        self, in_channels: int, width: int, *, pools: Sequence[int] = POOLS, dtype: Dtype | None, rngs: nnx.Rngs
    ):
        self.pools = tuple(pools)
        layer = {"dtype": dtype, "rngs": rngs}
        self.convs = nnx.List([ConvNormReLU(in_channels, width, 1, **layer) for _ in self.pools])
        self.bottleneck = ConvNormReLU(in_channels + len(self.pools) * width, width, 3, **layer)

    def branches(self, x: jax.Array) -> list[jax.Array]:
        """Return the branches [(B, H, W, D), ...] of a map (B, H, W, C) of any size."""
        pooled = (conv(adaptive_average_pool(x, side)) for conv, side in zip(self.convs, self.pools, strict=True))
        return [bilinear(branch, *x.shape[1:3]) for branch in pooled]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, D)."""
        return self.bottleneck(jnp.concatenate([x, *self.branches(x)], -1))


class UperHead(nnx.Module):
    """UperNet's head on maps from fine to coarse, of any sizes.

    Args:
        in_channels: channels of each map.
        num_classes: K.
        width: channels D of every level.
        pools: sides of the grids of the pyramid pooling.
        dropout: probability of dropping a channel before the classifier, in training.
        init_std: of the classifier, see there.
        dtype: compute type; logits and statistics are float32 or wider.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        width: int = 512,
        pools: Sequence[int] = POOLS,
        dropout: float = 0.1,
        init_std: float = 0.01,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        layer = {"dtype": dtype, "rngs": rngs}
        *finer, last = in_channels
        self.pooling = PyramidPooling(last, width, pools=pools, **layer)
        self.laterals = nnx.List([ConvNormReLU(c, width, 1, **layer) for c in finer])
        self.outputs = nnx.List([ConvNormReLU(width, width, 3, **layer) for _ in finer])
        self.fuse = ConvNormReLU(len(in_channels) * width, width, 3, **layer)
        self.classifier = PixelClassifier(width, num_classes, dropout=dropout, init_std=init_std, rngs=rngs)

    def __call__(self, maps: Sequence[jax.Array], *, key: jax.Array | None = None) -> jax.Array:
        """Return the logits (B, h, w, K) at the size of the first map.

        Args:
            maps: [(B, h, w, C), ...], as many as ``in_channels``.
            key: draws the dropout; needed in training mode.
        """
        *finer, last = maps
        levels = [conv(x) for conv, x in zip(self.laterals, finer, strict=True)]
        levels.append(self.pooling(last))
        for i in reversed(range(1, len(levels))):
            levels[i - 1] += bilinear(levels[i], *levels[i - 1].shape[1:3])
        *finer, last = levels
        outputs = [conv(x) for conv, x in zip(self.outputs, finer, strict=True)]
        outputs.append(last)
        fused = self.fuse(jnp.concatenate([bilinear(x, *levels[0].shape[1:3]) for x in outputs], -1))
        return self.classifier(fused, key)
