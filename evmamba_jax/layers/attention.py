"""Multi-head attention, written out."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.errors import UserError
from evmamba_jax.layers.channels import Group, Member
from evmamba_jax.layers.projections import Linear

WHOLE = 2**24  # scores of a head up to which they are taken at once, 4096 tokens by 4096
PART = 2**22  # scores of a head in each part of a longer attention, about
_ROWS = 128  # queries of a part are a multiple of this, a TPU's lanes


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Return the means of ``v`` that queries take by their softmax over the keys.

    Args:
        q: queries (..., Q, heads, d).
        k: keys (..., K, heads, d).
        v: values of the same shape.
        mask: which keys a query sees, boolean, of a shape that broadcasts to (..., heads, Q, K); each query sees one at
            least. None for all.

    Returns:
        (..., Q, heads, d) in the type of ``v``. Scores and softmax are float32 or wider.

    Without a mask, queries of more than ``WHOLE`` scores take turns, and the way back computes scores again: the 12,544
    tokens of MambaVision's window under a detector have 10 GB of them for two images.
    """
    if mask is None and q.shape[-3] * k.shape[-3] > WHOLE:
        return _in_turns(q, k, v)
    return _means(q, k, v, mask)


def _means(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    # Written out: jax.nn.dot_product_attention takes the softmax of float64 scores in float32.
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    return jnp.einsum("...hqk,...khd->...qhd", nnx.softmax(scores).astype(v.dtype), v)


def _in_turns(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Return what ``attend`` does without a mask, for some queries after the others."""
    length = q.shape[-3]
    rows = max(PART // k.shape[-3] // _ROWS, 1) * _ROWS
    padding = [(0, 0)] * q.ndim
    padding[-3] = 0, -length % rows
    parts = rearrange(jnp.pad(q, padding), "... (n r) h d -> n ... r h d", r=rows)
    # Wide outside of the loop, which adds up the gradients of all parts in their type.
    types, wide = (k.dtype, v.dtype), jnp.promote_types(q.dtype, jnp.float32)
    k, v = k.astype(wide), v.astype(wide)

    @jax.checkpoint  # or every part's scores would be kept
    def means_of(part: jax.Array) -> jax.Array:
        return _means(part, k.astype(types[0]), v.astype(types[1]), None)

    means = jax.lax.map(means_of, parts)
    return rearrange(means, "n ... r h d -> ... (n r) h d")[..., :length, :, :]


def check_heads(width: int, num_heads: int) -> None:
    """Raise a UserError for a number of heads that does not divide the width."""
    if width % num_heads:
        raise UserError(f"num_heads has {num_heads} for a stage of width {width}: take a divisor of the width")


class Attention(nnx.Module):
    """Multi-head self-attention over all tokens of a sequence, without position bias.

    Args:
        width: channels C.
        num_heads: heads, a divisor of C.
        dtype: compute type; the softmax is float32 or wider whatever it says.
        rngs: source of the initial values.

    Raises:
        UserError: a number of heads that does not divide C.
    """

    def __init__(self, width: int, num_heads: int, *, dtype: Dtype | None = None, rngs: nnx.Rngs):
        check_heads(width, num_heads)
        self.num_heads = num_heads
        self.head_width = width // num_heads
        self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map sequences (B, L, C) to (B, L, C)."""
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b l h d", three=3, h=self.num_heads)
        return self.proj(rearrange(attend(q, k, v), "b l h d -> b l (h d)"))

    def channel_groups(self) -> list[Group]:
        """Return the heads, each as one channel."""
        inner, span = self.proj.kernel.shape[0], self.head_width
        members = []
        for part in range(3):  # queries, keys, values
            at = {"offset": part * inner, "span": span}
            members += [Member("qkv.kernel", 1, **at, weight=True), Member("qkv.bias", 0, **at)]
        return [Group("", self.num_heads, (*members, Member("proj.kernel", 0, span=span, weight=True)))]

    def channels_cut(self) -> None:
        """Count the heads that are left; each is as wide as before."""
        self.num_heads = self.proj.kernel.shape[0] // self.head_width
