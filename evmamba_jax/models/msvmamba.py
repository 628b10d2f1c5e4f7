"""MSVMamba: multi-scale scan, one direction at full resolution and three at half; arXiv's models and NeurIPS's.

Source: Shi, Dong, Xu, Multi-Scale VMamba (arXiv:2405.14174); YuHengsss/MSVMamba ``classification/models/vmamba.py``,
branches master at c394019 (version 1) and v2 at fca4a39 (version 2). Where paper and code differ this file follows the
code: the three half-resolution scans are one sequence, and Base keeps its gate.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.errors import UserError
from evmamba_jax.layers.block import Block
from evmamba_jax.layers.mlp import gelu
from evmamba_jax.layers.norm import LayerNorm
from evmamba_jax.layers.patches import PATCHES
from evmamba_jax.layers.projections import Linear, depthwise_conv, pointwise_conv
from evmamba_jax.layers.pyramid import Pyramid, Stage, stage_parts
from evmamba_jax.layers.resize import resize
from evmamba_jax.layers.s6 import S6, default_dt_rank
from evmamba_jax.layers.squeeze_excite import SqueezeExcite
from evmamba_jax.models.registry import register
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


class MS2D(nnx.Module):
    """Multi-scale 2-D selective scan: rows at full resolution, the other three directions at half, gated and projected.

    Args:
        width: channels C of the map.
        version: 1 normalises every sequence and upsamples bilinearly; 2 upsamples to the nearest, then normalises.
        d_state: state size N of every channel.
        ssm_ratio: inner width E = ssm_ratio * C.
        gate: multiply the result with a second projection of the input.
        leak_state: scan the three directions as one sequence, each starting from the state the one before left.
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
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        inner = int(ssm_ratio * width)
        self.in_proj = Linear(width, (2 if gate else 1) * inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.conv2d = depthwise_conv(inner, dtype=dtype, rngs=rngs)
        self.conv2d_low = depthwise_conv(inner, (7, 7), stride=2, dtype=dtype, rngs=rngs)
        self.scan = S6(inner, 2, d_state=d_state, dt_rank=default_dt_rank(width), rngs=rngs)
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

    def _normalised(self, low: jax.Array) -> jax.Array:
        """Scan the half-resolution map and normalise every token before a pixel's three are added up."""
        sequences = jnp.stack([order.read(low) for order in self.low], 1)
        y = self.scan(rearrange(sequences, "b k l e -> (b k) 1 l e"), (Order(),), sets=(0,))
        y = rearrange(self.out_norm(y), "(b k) 1 l e -> b k l e", k=len(self.low))
        maps = (order.write(y[:, k], *low.shape[1:3]) for k, order in enumerate(self.low))
        return functools.reduce(jnp.add, maps)


class MSVMamba(Pyramid):
    """MSVMamba: four stages of blocks ``x + MS2D(norm(x))``, ``x + ConvFFN(norm(x))``, or ``x + norm(ConvFFN(x))``.

    Images of any size: from one pixel up in version 2, from 4x4 in version 1, whose stem cuts into patches.

    Args:
        width: channels C of the first stage; every stage doubles them.
        depths: blocks of each of the four stages.
        version: 1 for the models of arXiv v1, 2 for those of NeurIPS. It settles stem and downsampling (patches, or
            overlapping convolutions), the norm of the scans (of every sequence, or of their sum), the upsampling
            (bilinear, or nearest) and the norm of the ConvFFN (before, or after it).
        d_state: state size N of the scans.
        ssm_ratio: inner width of the scans over C.
        ffn_ratio: hidden width of the ConvFFN over C.
        gate: multiply the scans' result with SiLU of a second projection.
        leak_state: scan the three half-resolution directions as one sequence, as the official code does: the state
            runs from each into the next. False scans them one by one, as the paper has it, with the same parameters.
        num_classes, in_channels, drop_path_rate, out_norms, dtype, rngs: as all four-stage families have them, see
            :class:`~evmamba_jax.layers.pyramid.Pyramid`.

    Raises:
        UserError: depths that are not four, an unknown version.
    """

    def __init__(
        self,
        *,
        width: int = 96,
        depths: Sequence[int] = (2, 2, 9, 2),
        num_classes: int = 1000,
        in_channels: int = 3,
        version: Version = 2,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        ffn_ratio: float = 4.0,
        gate: bool = False,
        leak_state: bool = True,
        drop_path_rate: float = 0.0,
        out_norms: bool = False,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        if version not in (1, 2):
            raise UserError(f"unknown version {version!r} of MSVMamba; allowed: 1 (arXiv v1), 2 (NeurIPS)")
        stem, halve = PATCHES[version == 2]
        patch_embed = stem(in_channels, width, dtype=dtype, rngs=rngs)

        def block(_stage: int, _number: int, c: int, drop_path: float) -> Block:
            mixer = MS2D(
                c,
                version=version,
                d_state=d_state,
                ssm_ratio=ssm_ratio,
                gate=gate,
                leak_state=leak_state,
                dtype=dtype,
                rngs=rngs,
            )
            ffn = ConvFFN(c, int(ffn_ratio * c), dtype=dtype, rngs=rngs)
            return Block(c, mixer, ffn, drop_path=drop_path, post_norm=version == 2, dtype=dtype, rngs=rngs)

        parts = stage_parts(width, depths, drop_path_rate, block, functools.partial(halve, dtype=dtype, rngs=rngs))
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


_ARXIV = {"version": 1, "ssm_ratio": 2.0, "ffn_ratio": 2.0, "gate": True}

register("msvmamba_n", MSVMamba, width=48, depths=(1, 2, 5, 2), **_ARXIV)
register("msvmamba_m", MSVMamba, width=64, depths=(1, 2, 5, 2), **_ARXIV)
register("msvmamba_t", MSVMamba, width=96, depths=(1, 2, 9, 2), **_ARXIV)
register("msvmamba_t_v2", MSVMamba, width=96, depths=(2, 2, 9, 2))
register("msvmamba_s_v2", MSVMamba, width=96, depths=(2, 3, 20, 2))
register("msvmamba_b_v2", MSVMamba, width=128, depths=(2, 4, 18, 2), gate=True)
