"""EfficientVMamba: atrous selective scan for light-weight visual state-space models.

Source: Pei, Huang, Xu, EfficientVMamba (arXiv:2403.09977); TerryPei/EfficientVMamba
``classification/models/vmamba_efficient.py`` at 0bc5ee2, whose released weights this file computes exactly.
"""

import functools
from collections.abc import Sequence

import jax
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.layers.drop_path import DropPath
from evmamba_jax.layers.mlp import gelu
from evmamba_jax.layers.norm import BatchNorm, LayerNorm
from evmamba_jax.layers.patches import PatchEmbed, PatchMerging
from evmamba_jax.layers.projections import depthwise_conv, pointwise_conv
from evmamba_jax.layers.pyramid import Pyramid, Stage, stage_parts
from evmamba_jax.layers.squeeze_excite import SqueezeExcite
from evmamba_jax.layers.ss2d import SS2D
from evmamba_jax.models.registry import register
from pallas_kernels import ATROUS


class ConvBranch(nnx.Module):
    """The local branch of an EVSS block: depthwise 3x3, BatchNorm, GELU, 1x1."""

    def __init__(self, width: int, *, dtype: Dtype | None, rngs: nnx.Rngs):
        self.dw = depthwise_conv(width, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(width, dtype=dtype, rngs=rngs)
        self.pw = pointwise_conv(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, C)."""
        return self.pw(gelu(self.norm(self.dw(x))))


class EVSSBlock(nnx.Module):
    """Efficient visual state-space block: atrous scan and convolution side by side, one gate shared by both."""

    def __init__(
        self, width: int, *, d_state: int, ssm_ratio: float, drop_path: float, dtype: Dtype | None, rngs: nnx.Rngs
    ):
        self.norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.op = SS2D(width, ATROUS, d_state=d_state, ssm_ratio=ssm_ratio, dtype=dtype, rngs=rngs)
        self.conv_branch = ConvBranch(width, dtype=dtype, rngs=rngs)
        self.se = SqueezeExcite(width, norm=True, act="gelu", dtype=dtype, rngs=rngs)  # half of the official BiAttn
        self.drop_path = DropPath(drop_path)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, C); ``key`` draws the drop path in training mode."""
        y = self.norm(x)
        return x + self.drop_path(self.se(self.op(y)) + self.se(self.conv_branch(y)), key)


class InvertedResidual(nnx.Module):
    """MobileNetV2 block with ReLU and squeeze-and-excitation: 1x1 up, depthwise 3x3, gate, 1x1 down."""

    def __init__(
        self,
        width: int,
        *,
        expansion: int = 4,
        drop_path: float,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ):
        mid = expansion * width
        self.pw1 = pointwise_conv(width, mid, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm1 = BatchNorm(mid, dtype=dtype, rngs=rngs)
        self.dw = depthwise_conv(mid, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm2 = BatchNorm(mid, dtype=dtype, rngs=rngs)
        self.se = SqueezeExcite(mid, layer=pointwise_conv, dtype=dtype, rngs=rngs)
        self.pw2 = pointwise_conv(mid, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm3 = BatchNorm(width, dtype=dtype, rngs=rngs)
        self.drop_path = DropPath(drop_path)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, C); ``key`` draws the drop path in training mode."""
        y = nnx.relu(self.norm1(self.pw1(x)))
        y = self.se(nnx.relu(self.norm2(self.dw(y))))
        return x + self.drop_path(self.norm3(self.pw2(y)), key)


class EfficientVMamba(Pyramid):
    """EfficientVMamba: EVSS blocks in the first two stages, inverted residuals in the last two.

    Images of any size from one patch up; odd maps are padded with zeros below and right, and the padding advances the
    states, as it does in the official code.

    Args:
        width: channels C of the first stage; every stage doubles them.
        depths: blocks of each of the four stages.
        patch_size: stride of the stem.
        d_state: state size N of the scans.
        ssm_ratio: inner width of the scans over C.
        num_classes, in_channels, drop_path_rate, out_norms, dtype, rngs: as all four-stage families have them, see
            :class:`~evmamba_jax.layers.pyramid.Pyramid`.
    """

    def __init__(
        self,
        *,
        width: int = 48,
        depths: Sequence[int] = (2, 2, 4, 2),
        num_classes: int = 1000,
        in_channels: int = 3,
        patch_size: int = 4,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        drop_path_rate: float = 0.0,
        out_norms: bool = False,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        patch_embed = PatchEmbed(in_channels, width, patch_size, dtype=dtype, rngs=rngs)

        def block(stage: int, _: int, c: int, drop_path: float) -> nnx.Module:
            if stage < 2:
                return EVSSBlock(c, d_state=d_state, ssm_ratio=ssm_ratio, drop_path=drop_path, dtype=dtype, rngs=rngs)
            return InvertedResidual(c, drop_path=drop_path, dtype=dtype, rngs=rngs)

        downsample = functools.partial(PatchMerging, dtype=dtype, rngs=rngs)
        parts = stage_parts(width, depths, drop_path_rate, block, downsample)
        super().__init__(
            patch_embed,
            [Stage(*part) for part in parts],
            width,
            num_classes=num_classes,
            out_norms=out_norms,
            in_channels=in_channels,
            dtype=dtype,
            rngs=rngs,
        )


# The yaml of S says width 96; its training log and its weights have 64, which alone gives the published 11 M.
register("evmamba_t", EfficientVMamba, width=48, depths=(2, 2, 4, 2))
register("evmamba_s", EfficientVMamba, width=64, depths=(2, 2, 4, 2))
register("evmamba_b", EfficientVMamba, width=96, depths=(2, 2, 9, 2))
