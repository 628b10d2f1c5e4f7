"""MSVMamba: multi-scale scan, one direction at full resolution and three at half; arXiv's models and NeurIPS's.

Source: Shi, Dong, Xu, Multi-Scale VMamba (arXiv:2405.14174); YuHengsss/MSVMamba ``classification/models/vmamba.py``,
branches master at c394019 (version 1) and v2 at fca4a39 (version 2). Where paper and code differ this file follows the
code: the three half-resolution scans are one sequence, and Base keeps its gate.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.layers.activations import gelu
from evmamba_jax.layers.backbone import StagedBackbone, StagedConfig
from evmamba_jax.layers.block import Block
from evmamba_jax.layers.channels import Group, Member, conv_members, scan_members
from evmamba_jax.layers.norm import LayerNorm, counted
from evmamba_jax.layers.patches import PATCHES
from evmamba_jax.layers.projections import Linear, depthwise_conv, pointwise_conv
from evmamba_jax.layers.resize import resize
from evmamba_jax.layers.s6 import S6, default_dt_rank
from evmamba_jax.layers.squeeze_excite import SqueezeExcite
from evmamba_jax.models.registry import ModelCard, register
from evmamba_jax.ranges import ranged
from pallas_kernels import Chain, Order

Version = Literal[1, 2]

# The directions at half resolution; rows from the first pixel on are scanned at full resolution.
LOW = (Order(reverse=True), Order(column_major=True), Order(column_major=True, reverse=True))


class ConvFFN(nnx.Module):
    """Feed-forward network that also mixes neighbours: 1x1, plus its own depthwise 3x3, GELU, 1x1."""

    def __init__(self, width: int, hidden: int, *, dtype: Dtype | None = None, rngs: nnx.Rngs):
        self.pw1 = pointwise_conv(width, hidden, dtype=dtype, rngs=rngs)
        self.dw = depthwise_conv(hidden, dtype=dtype, rngs=rngs)
        self.pw2 = pointwise_conv(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, C)."""
        x = self.pw1(x)
        return self.pw2(gelu(x + self.dw(x)))

    def channel_groups(self) -> list[Group]:
        """Return the channels between."""
        first = Member("pw1.kernel", 1, weight=True), Member("pw1.bias", 0)
        members = *first, *conv_members("dw", self.dw), Member("pw2.kernel", 0, weight=True)
        return [Group("", self.pw2.kernel.shape[0], members)]


class MS2D(nnx.Module):
    """Multi-scale 2-D selective scan: rows at full resolution, the other three directions at half, gated and projected.

    Args:
        width: channels C of the map.
        version: 1 normalises every sequence and upsamples bilinearly; 2 upsamples to the nearest, then normalises.
        d_state: state size N of every channel.
        ssm_ratio: inner width E = ssm_ratio * C.
        gate: multiply the result with a second projection of the input.
        leak_state: scan the three directions as one sequence, each starting from the state the one before left.
        implementation: passed to :func:`pallas_kernels.scan2d`.
        dtype: compute type; the recurrence is float32 or wider whatever it says.
        rngs: source of the initial values.

    Source: Multi-Scale VMamba, "Multi-Scale 2D Scanning"; YuHengsss/MSVMamba ``SS2D``, its sscore_type
    multiscale_4scan_12 (version 1) and forward types vms and vms_noz (version 2).
    """

    def __init__(
        self,
        width: int,
        *,
        version: Version,
        d_state: int = 1,
        ssm_ratio: float,
        gate: bool,
        leak_state: bool = True,
        implementation: str | None = None,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        inner = int(ssm_ratio * width)
        self.in_proj = Linear(width, (2 if gate else 1) * inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.conv2d = depthwise_conv(inner, dtype=dtype, rngs=rngs)
        self.conv2d_low = depthwise_conv(inner, (7, 7), stride=2, dtype=dtype, rngs=rngs)
        scan = {"d_state": d_state, "dt_rank": default_dt_rank(width), "implementation": implementation}
        self.scan = S6(inner, 2, **scan, rngs=rngs)
        self.out_norm = LayerNorm(inner, dtype=dtype, rngs=rngs)
        self.se = SqueezeExcite(inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.out_proj = Linear(inner, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.version = version
        self.gate = gate
        self.low: tuple[Order | Chain, ...] = (Chain(LOW),) if leak_state else LOW

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, C)."""
        x = self.in_proj(x)
        z = None
        if self.gate:
            x, z = jnp.split(x, 2, axis=-1)
        full, low = nnx.silu(self.conv2d(x)), nnx.silu(self.conv2d_low(x))
        height, width = full.shape[1:3]
        if self.version == 1:
            y = self.out_norm(self.scan(full, (Order(),), sets=(1,)))
            y = y + resize(self._normalised(low), height, width, "bilinear")
        else:
            y = self.scan(full, (Order(),), sets=(0,))
            y = self.out_norm(y + resize(self.scan(low, self.low, sets=(1,) * len(self.low)), height, width, "nearest"))
        y = self.se(y)
        return self.out_proj(y if z is None else y * nnx.silu(z))

    def channel_groups(self) -> list[Group]:
        """Return the channels of the scans."""
        inner = self.out_proj.kernel.shape[0]
        members = [Member("in_proj.kernel", 1, half * inner, weight=True) for half in range(2 if self.gate else 1)]
        members += [*conv_members("conv2d", self.conv2d), *conv_members("conv2d_low", self.conv2d_low)]
        members += [*scan_members("scan"), Member("out_norm.scale", 0), Member("out_norm.bias", 0)]
        members += [Member("se.reduce.kernel", 0, weight=True), Member("se.expand.kernel", 1, weight=True)]
        return [Group("", inner, (*members, Member("out_proj.kernel", 0, weight=True)))]

    def channels_cut(self) -> None:
        """Let the norm go on dividing by the channels that there were."""
        self.out_norm = counted(self.out_norm)

    def _normalised(self, low: jax.Array) -> jax.Array:
        """Scan the half-resolution map and normalise every token before a pixel's three are added up."""
        sequences = jnp.stack([order.read(low) for order in self.low], 1)
        y = self.scan(rearrange(sequences, "b k l e -> (b k) 1 l e"), (Order(),), sets=(0,))
        y = rearrange(self.out_norm(y), "(b k) 1 l e -> b k l e", k=len(self.low))
        maps = (order.write(y[:, k], *low.shape[1:3]) for k, order in enumerate(self.low))
        return functools.reduce(jnp.add, maps)


@dataclasses.dataclass(frozen=True)
class MSVMambaConfig(StagedConfig):
    """Options of MSVMamba; every family of four stages has the others.

    Attributes:
        version: 1 for the models of arXiv v1, 2 for NeurIPS's. It settles stem and downsampling (patches, or
            overlapping convolutions), the norm of the scans (of every sequence, or of their sum), the upsampling
            (bilinear, or nearest) and the norm of the ConvFFN (before, or after it).
        d_state: state size N of the scans.
        ssm_ratio: inner width of the scans over C.
        ffn_ratio: hidden width of the ConvFFN over C.
        gate: multiply the scans' result with SiLU of a second projection.
        leak_state: scan the three half-resolution directions as one sequence, as the official code does: the state
            runs from each into the next. False scans them one by one, as the paper has it, with the same parameters.

    """

    width: int = ranged(96, least=2)  # of which an overlapping stem takes half
    depths: Sequence[int] = (2, 2, 9, 2)
    version: Version = 2
    d_state: int = ranged(1, least=1)
    ssm_ratio: float = ranged(1.0, above=0)
    ffn_ratio: float = ranged(4.0, above=0)
    gate: bool = False
    leak_state: bool = True


class MSVMamba(StagedBackbone):
    """MSVMamba: four stages of blocks ``x + MS2D(norm(x))``, ``x + ConvFFN(norm(x))``, or ``x + norm(ConvFFN(x))``.

    Images of any size: from one pixel up in version 2, from 4x4 in version 1, whose stem cuts into patches.
    """

    def __init__(self, config: MSVMambaConfig, *, rngs: nnx.Rngs):
        layer = {"dtype": config.dtype, "rngs": rngs}
        scan = config.pick("version", "d_state", "ssm_ratio", "gate", "leak_state", "implementation")

        def block(_stage: int, _number: int, c: int, drop_path: float) -> Block:
            mixer = MS2D(c, **scan, **layer)
            ffn = ConvFFN(c, int(config.ffn_ratio * c), **layer)
            return Block(c, mixer, ffn, drop_path=drop_path, post_norm=config.version == 2, **layer)

        stem, halve = PATCHES[config.version == 2]
        patch_embed = stem(config.in_channels, config.width, **layer)
        super().__init__(config, patch_embed, block, functools.partial(halve, **layer), rngs=rngs)


_card = functools.partial(
    ModelCard,
    paper="2405.14174",
    licence="none stated",
    licence_note="neither the repository nor its README names one, so all rights are reserved: ask the authors",
)
_card_v2 = functools.partial(
    _card, licence="MIT", licence_note="as the Hugging Face page says; the repository has no LICENSE file"
)
_DRIVE = "https://drive.google.com/drive/folders/"
_HUB = "https://huggingface.co/YuhengSSS/MSVMamba/blob/main/"

_ARXIV = MSVMambaConfig(version=1, ssm_ratio=2.0, ffn_ratio=2.0, gate=True)

# fmt: off
register("msvmamba_n", MSVMamba, dataclasses.replace(_ARXIV, width=48, depths=(1, 2, 5, 2)),
         _card(6_864_136, 860_927_616, 0.9e9, 77.3, None, _DRIVE + "1J41w3ApitQhp2O3wHmJoOs4U032uqebK", None))
register("msvmamba_m", MSVMamba, dataclasses.replace(_ARXIV, width=64, depths=(1, 2, 5, 2)),
         _card(11_879_272, 1_502_937_600, 1.5e9, 79.8, None, _DRIVE + "1jfl2GmuKcUB8sPwRlyHK_wT0MjqgljYk", None))
register("msvmamba_t", MSVMamba, dataclasses.replace(_ARXIV, depths=(1, 2, 9, 2)),
         _card(33_046_312, 4_557_589_248, 4.6e9, 82.8, None, _DRIVE + "1ddNWk89ohcxxMuVEaJ2Y5A6xeBKgA7lU", None))
register("msvmamba_t_v2", MSVMamba, MSVMambaConfig(),
         _card_v2(32_263_720, 5_099_654_016, 5.0e9, 83.0, None, _HUB, "msvmambav3_tiny_224.pth"))
register("msvmamba_s_v2", MSVMamba, MSVMambaConfig(depths=(2, 3, 20, 2)),
         _card_v2(50_216_296, 8_720_662_272, 8.8e9, 84.1, None, _HUB, "msvmambav3_small_224.pth"))
register("msvmamba_b_v2", MSVMamba, MSVMambaConfig(width=128, depths=(2, 4, 18, 2), gate=True),
         _card_v2(90_591_976, 16_214_731_776, 16.3e9, 84.4, None, _HUB, "msvmambav3_base_224.pth"))
# fmt: on
