"""MobileNetV2's block."""

from collections.abc import Callable

import jax
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.layers.channels import Member
from evmamba_jax.layers.drop_path import DropPath
from evmamba_jax.layers.norm import BatchNorm
from evmamba_jax.layers.projections import depthwise_conv, pointwise_conv
from evmamba_jax.layers.squeeze_excite import SqueezeExcite


class InvertedResidual(nnx.Module):
    """``x + branch(x)``: 1x1 up, depthwise, 1x1 down, BatchNorm after each, an activation after the first two.

    Args:
        width: channels C.
        expansion: channels between over C.
        size: of the depthwise kernel: two numbers for an image, one for a sequence.
        act: the activation.
        squeeze_excite: C over the channels of a gate before the last 1x1; None for no gate.
        drop_path: probability of dropping the branch of a sample.
        dtype: compute type.
        rngs: source of the initial values.

    Source: Sandler et al., MobileNetV2 (arXiv:1801.04381), section 3.
    """

    def __init__(
        self,
        width: int,
        *,
        expansion: int = 4,
        size: tuple[int, ...] = (3, 3),
        act: Callable[[jax.Array], jax.Array] = nnx.relu,
        squeeze_excite: int | None = None,
        drop_path: float = 0.0,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        mid = expansion * width
        layer = {"dtype": dtype, "rngs": rngs}
        gate = {"layer": pointwise_conv, **layer}
        self.pw1 = pointwise_conv(width, mid, use_bias=False, **layer)
        self.norm1 = BatchNorm(mid, **layer)
        self.dw = depthwise_conv(mid, size, use_bias=False, **layer)
        self.norm2 = BatchNorm(mid, **layer)
        self.se = None if squeeze_excite is None else SqueezeExcite(mid, squeeze_excite, **gate)
        self.pw2 = pointwise_conv(mid, width, use_bias=False, **layer)
        self.norm3 = BatchNorm(width, **layer)
        self.drop_path = DropPath(drop_path)
        self.act = act

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Map (B, ..., C) to (B, ..., C); ``key`` draws the drop path in training mode."""
        y = self.act(self.norm1(self.pw1(x)))
        y = self.act(self.norm2(self.dw(y)))
        y = y if self.se is None else self.se(y)
        return x + self.drop_path(self.norm3(self.pw2(y)), key)

    def outer_members(self, path: str) -> tuple[Member, ...]:
        """Return what has the channels C, as members of the group of a layer around this one."""
        weights = Member(f"{path}.pw1.kernel", 0, weight=True), Member(f"{path}.pw2.kernel", 1, weight=True)
        norm = [Member(f"{path}.norm3.{name}", 0) for name in ("scale", "bias")]
        return (*weights, *norm, *(Member(f"{path}.norm3.{name}", 0, statistic=True) for name in ("mean", "var")))
