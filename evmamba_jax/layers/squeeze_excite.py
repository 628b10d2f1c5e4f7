"""Squeeze-and-excitation."""

from collections.abc import Callable

import jax
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.layers.activations import ACTIVATIONS, Activation
from evmamba_jax.layers.norm import LayerNorm
from evmamba_jax.layers.projections import Linear


class SqueezeExcite(nnx.Module):
    """Scale channels by a gate made from their means: two layers, an activation between them and a sigmoid at the end.

    Args:
        width: channels C.
        reduction: C over the channels between the layers.
        norm: normalise before the mean; the gate multiplies the input that is not normalised.
        layer: builds the two layers: ``Linear`` or ``pointwise_conv``, which start differently.
        act: activation between them.
        use_bias: give the layers a bias.
        dtype: compute type.
        rngs: source of the initial values.

    Source: Hu et al., Squeeze-and-Excitation Networks; EfficientVMamba's ``BiAttn`` has the norm.
    """

    def __init__(
        self,
        width: int,
        reduction: int = 8,
        *,
        norm: bool = False,
        layer: Callable[..., nnx.Module] = Linear,
        act: Activation = "relu",
        use_bias: bool = True,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.norm = LayerNorm(width, dtype=dtype, rngs=rngs) if norm else None
        self.reduce = layer(width, width // reduction, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.expand = layer(width // reduction, width, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.act = ACTIVATIONS[act]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, ..., C) to (B, ..., C); the means are over all axes between."""
        mean = (x if self.norm is None else self.norm(x)).mean(tuple(range(1, x.ndim - 1)), keepdims=True)
        return x * nnx.sigmoid(self.expand(self.act(self.reduce(mean))))
