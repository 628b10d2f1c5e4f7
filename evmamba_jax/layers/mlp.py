"""The two-layer perceptron of the blocks."""

import jax
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.layers.activations import gelu
from evmamba_jax.layers.channels import Group, Member
from evmamba_jax.layers.projections import Linear


class Mlp(nnx.Module):
    """Linear, GELU, linear, both with bias. Source: timm ``Mlp``.

    Args:
        width: channels C in and out.
        hidden: channels between.
        dtype: compute type.
        rngs: source of the initial values.
    """

    def __init__(self, width: int, hidden: int, *, dtype: Dtype | None = None, rngs: nnx.Rngs):
        self.fc1 = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (..., C) to (..., C)."""
        return self.fc2(gelu(self.fc1(x)))

    def channel_groups(self) -> list[Group]:
        """Return the channels between."""
        members = Member("fc1.kernel", 1, weight=True), Member("fc1.bias", 0), Member("fc2.kernel", 0, weight=True)
        return [Group("", self.fc2.kernel.shape[0], members)]
