"""One vector for a map: a mean over its pixels, weighted by attention."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.layers import initializers as init
from evmamba_jax.layers.attention import attend, check_heads
from evmamba_jax.layers.projections import Linear


class AttentionPool(nnx.Module):
    """Attention of one learned query over all pixels of a map, then a projection.

    Args:
        width: channels C.
        num_heads: heads, a divisor of C.
        dtype: compute type; the softmax is float32 or wider whatever it says.
        rngs: source of the initial values.

    Raises:
        UserError: a number of heads that does not divide C.

    Source: Radford et al., CLIP (arXiv:2103.00020), section 2.4, with a learned query in place of the mean's.
    """

    def __init__(self, width: int, num_heads: int, *, dtype: Dtype | None = None, rngs: nnx.Rngs):
        check_heads(width, num_heads)
        self.num_heads = num_heads
        self.query = nnx.Param(init.linear_normal(rngs.params(), (width,), jnp.float32))
        self.key = Linear(width, width, dtype=dtype, rngs=rngs)
        self.value = Linear(width, width, dtype=dtype, rngs=rngs)
        self.proj = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, C)."""
        k, v = (rearrange(layer(x), "b y x (h d) -> b (y x) h d", h=self.num_heads) for layer in (self.key, self.value))
        q = self.query[...].astype(k.dtype).reshape(1, *k.shape[2:])
        y = attend(jnp.broadcast_to(q, (len(k), *q.shape)), k, v)
        return self.proj(rearrange(y, "b 1 h d -> b (h d)"))
