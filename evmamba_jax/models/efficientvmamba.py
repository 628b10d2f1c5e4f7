"""EfficientVMamba: atrous selective scan for light-weight visual state-space models.

Source: Pei, Huang, Xu, EfficientVMamba (arXiv:2403.09977); TerryPei/EfficientVMamba
``classification/models/vmamba_efficient.py`` at 0bc5ee2, whose released weights this file computes exactly.
"""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.layers.activations import gelu
from evmamba_jax.layers.backbone import StagedBackbone, StagedConfig
from evmamba_jax.layers.drop_path import DropPath
from evmamba_jax.layers.inverted_residual import InvertedResidual
from evmamba_jax.layers.norm import BatchNorm, LayerNorm
from evmamba_jax.layers.patches import PatchEmbed, PatchMerging
from evmamba_jax.layers.projections import depthwise_conv, pointwise_conv
from evmamba_jax.layers.squeeze_excite import SqueezeExcite
from evmamba_jax.layers.ss2d import SS2D
from evmamba_jax.models.registry import ModelCard, register
from evmamba_jax.ranges import ranged
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
    """Efficient visual state-space block: atrous scan (``scan``: SS2D's options) and convolution, one gate for both."""

    def __init__(self, width: int, *, drop_path: float, dtype: Dtype | None, rngs: nnx.Rngs, **scan: Any):
        self.norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.op = SS2D(width, ATROUS, **scan, dtype=dtype, rngs=rngs)
        self.conv_branch = ConvBranch(width, dtype=dtype, rngs=rngs)
        self.se = SqueezeExcite(width, norm=True, act="gelu", dtype=dtype, rngs=rngs)  # half of the official BiAttn
        self.drop_path = DropPath(drop_path)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, C); ``key`` draws the drop path in training mode."""
        y = self.norm(x)
        return x + self.drop_path(self.se(self.op(y)) + self.se(self.conv_branch(y)), key)


@dataclasses.dataclass(frozen=True)
class EfficientVMambaConfig(StagedConfig):
    """Options of EfficientVMamba; every family of four stages has the others.

    Attributes:
        patch_size: stride of the stem.
        d_state: state size N of the scans.
        ssm_ratio: inner width of the scans over C.
    """

    width: int = 48
    patch_size: int = ranged(4, least=1)
    d_state: int = ranged(16, least=1)
    ssm_ratio: float = ranged(2.0, above=0)


class EfficientVMamba(StagedBackbone):
    """EfficientVMamba: EVSS blocks in the first two stages, inverted residuals in the last two.

    Images of any size from one patch up; odd maps are padded with zeros below and right, and the padding advances the
    states, as it does in the official code.
    """

    def __init__(self, config: EfficientVMambaConfig, *, rngs: nnx.Rngs):
        layer = {"dtype": config.dtype, "rngs": rngs}
        scan = config.pick("d_state", "ssm_ratio", "implementation")

        def block(stage: int, _: int, c: int, drop_path: float) -> nnx.Module:
            if stage < 2:
                return EVSSBlock(c, drop_path=drop_path, **scan, **layer)
            return InvertedResidual(c, squeeze_excite=8, drop_path=drop_path, **layer)

        stem = PatchEmbed(config.in_channels, config.width, config.patch_size, **layer)
        super().__init__(config, stem, block, functools.partial(PatchMerging, **layer), rngs=rngs)


_card = functools.partial(
    ModelCard,
    paper="2403.09977",
    licence="Apache-2.0",
    licence_note="as README and Hugging Face pages say; the repository has no LICENSE file",
)
_HUB = "https://huggingface.co/TerryPei/EfficientVMamba-"

# The yaml of S says width 96; its training log and its weights have 64, which alone gives the published 11 M.
# fmt: off
register("evmamba_t", EfficientVMamba, EfficientVMambaConfig(width=48),
         _card(6_493_660, 787_921_152, 0.8e9, 76.5, None, _HUB + "Tiny/tree/main", "efficient_vmamba_tiny.ckpt"))
register("evmamba_s", EfficientVMamba, EfficientVMambaConfig(width=64),
         _card(11_273_688, 1_317_888_000, 1.3e9, 78.7, None, _HUB + "Small/tree/main", "efficient_vmamba_small.ckpt",
               note="The official yaml says width 96; these weights have width 64."))
register("evmamba_b", EfficientVMamba, EfficientVMambaConfig(width=96, depths=(2, 2, 9, 2)),
         _card(33_717_136, 3_951_363_072, 4.0e9, 81.8, None, _HUB + "Base/tree/main", "efficient_vmamba_base.ckpt"))
# fmt: on
