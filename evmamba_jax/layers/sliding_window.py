"""Attention of every pixel over the square around it."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.errors import UserError, one_of
from evmamba_jax.layers.attention import Attention, attend

Edges = Literal["clip", "shift"]

# From the row or column of queries, the radius and the length of the axis to the first row or column they see, and to
# the end of those.
_SPANS = {
    "clip": lambda at, radius, length: (np.maximum(at - radius, 0), np.minimum(at + radius + 1, length)),
    "shift": lambda at, radius, length: (
        first := np.clip(at - radius, 0, max(length - 2 * radius - 1, 0)),
        np.minimum(first + 2 * radius + 1, length),
    ),
}


def sliding_window_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, radius: int, *, edges: Edges = "clip", tile: int = 8
) -> jax.Array:
    """Return what each pixel of a map takes of the pixels at most ``radius`` rows and columns away.

    Queries go in tiles of about ``tile`` squared, each against the keys of a larger square, its halo, of which a mask
    that is known when the program is traced hides the rest. Rows of tiles run one after another, and the backward pass
    computes their scores again. So memory holds the scores of one row of tiles, ``tile**2 * (tile + 2 radius)**2`` for
    each tile and head, whatever the size of the map. Nothing is gathered.

    Args:
        q: queries (B, H, W, heads, d).
        k: keys of the same shape.
        v: values of the same shape.
        radius: 0 for the pixel alone; from max(H, W) on, attention over the whole map.
        edges: what a pixel near the border sees: with "clip" that part of its square which lies on the map; with
            "shift" a whole square, moved inwards, as far as the map has room for it.
        tile: side of the tiles, pixels.

    Returns:
        (B, H, W, heads, d) in the type of ``v``. Scores and softmax are float32 or wider.

    Raises:
        UserError: a negative radius, a tile of no pixel, unknown edges.

    Source: Hassani et al., Neighborhood Attention Transformer (arXiv:2204.07143), for "shift".
    """
    if radius < 0 or tile < 1:
        raise UserError(f"radius={radius} and tile={tile} are not allowed: the radius must be 0 or more, the tile 1")
    spans = one_of("edges", edges, _SPANS)
    height, width = q.shape[1:3]
    rows, columns = (_Tiles(length, radius, spans, tile) for length in (height, width))

    def row(tiles):
        q, kv, seen = tiles  # (B, t, W, heads, d), (B, halo, W, heads, 2d), (t, halo)
        q = rearrange(columns.cut(q, 2), "b t c s h d -> b c (t s) h d")
        kv = rearrange(columns.halos(kv, 2), "b t c s h d -> b c (t s) h d")
        k, v = jnp.split(kv, 2, -1)
        mask = seen[:, None, :, None] & columns.seen[:, None, :, None, :]
        y = attend(q, k, v, rearrange(mask, "c t s k l -> c 1 (t s) (k l)"))
        return rearrange(y, "b c (t s) h d -> b t (c s) h d", t=rows.tile)[:, :, :width]

    kv = rows.halos(jnp.concatenate([k, v], -1), 1)
    tiles = jnp.moveaxis(rows.cut(q, 1), 1, 0), jnp.moveaxis(kv, 1, 0), rows.seen
    if len(rows.starts) == 1:
        y = row(jax.tree.map(lambda one: one[0], tiles))
    else:
        y = rearrange(jax.lax.map(jax.checkpoint(row, prevent_cse=False), tiles), "r b t w h d -> b (r t) w h d")
    return y[:, :height]


class _Tiles:
    """How an axis of a map is cut into tiles of queries, and where each has its halo of keys.

    Attributes:
        tile: length of a tile; the last one may reach over the end of the axis.
        halo: length of a halo; each lies on the axis.
        starts: first entry of each halo.
        seen: which entries of the halo each query sees, boolean (tiles, tile, halo).
    """

    def __init__(self, length: int, radius: int, spans, tile: int):
        number = math.ceil(length / tile)
        self.tile = math.ceil(length / number)
        self.halo = min(self.tile + 2 * radius, length)
        self.padding = number * self.tile - length
        firsts = self.tile * np.arange(number)
        starts = np.clip(firsts - radius, 0, length - self.halo)
        self.starts = tuple(starts.tolist())
        # Queries over the end see what the last one sees, so that their softmax has something to see.
        queries = np.minimum(firsts[:, None] + np.arange(self.tile), length - 1)
        begin, end = spans(queries, radius, length)
        keys = starts[:, None] + np.arange(self.halo)
        self.seen = (keys[:, None] >= begin[..., None]) & (keys[:, None] < end[..., None])

    def cut(self, x: jax.Array, axis: int) -> jax.Array:
        """Return x with its axis cut in two, (tiles, tile)."""
        x = jnp.pad(x, [(0, self.padding if i == axis else 0) for i in range(x.ndim)])
        return x.reshape(*x.shape[:axis], -1, self.tile, *x.shape[axis + 1 :])

    def halos(self, x: jax.Array, axis: int) -> jax.Array:
        """Return x with two axes in place of one, (tiles, halo)."""
        return _overlapping(x, axis, self.starts, self.halo)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _overlapping(x: jax.Array, axis: int, starts: tuple[int, ...], size: int) -> jax.Array:
    """Return the slices of an axis that begin at ``starts``, along a new axis before it; the last one ends with it.

    The gradient adds slice after slice in place. As JAX has it, each is first padded to the whole length.
    """
    return jnp.stack([jax.lax.slice_in_dim(x, start, start + size, axis=axis) for start in starts], axis)


def _overlapping_backward(axis, starts, size, _, slices):
    x = jnp.zeros((*slices.shape[:axis], starts[-1] + size, *slices.shape[axis + 2 :]), slices.dtype)
    for number, start in enumerate(starts):
        more = jax.lax.index_in_dim(slices, number, axis, keepdims=False)
        more += jax.lax.slice_in_dim(x, start, start + size, axis=axis)
        x = jax.lax.dynamic_update_slice_in_dim(x, more, start, axis)
    return (x,)


_overlapping.defvjp(lambda x, *where: (_overlapping(x, *where), None), _overlapping_backward)


class SlidingWindowAttention(Attention):
    """Multi-head self-attention of every pixel of a map over the square around it, without position bias.

    Args:
        width: channels C.
        num_heads: heads, a divisor of C.
        radius: rows and columns that a pixel sees on each side of its own.
        edges: "clip" or "shift", as :func:`sliding_window_attention` takes it.
        dtype: compute type; the softmax is float32 or wider whatever it says.
        rngs: source of the initial values.

    Raises:
        UserError: a number of heads that does not divide C.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        radius: int,
        edges: Edges = "clip",
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(width, num_heads, dtype=dtype, rngs=rngs)
        self.radius = radius
        self.edges: Edges = edges

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, C)."""
        q, k, v = rearrange(self.qkv(x), "b y x (three h d) -> three b y x h d", three=3, h=self.num_heads)
        y = sliding_window_attention(q, k, v, self.radius, edges=self.edges)
        return self.proj(rearrange(y, "b y x h d -> b y x (h d)"))
