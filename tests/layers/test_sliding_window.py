"""Sliding-window attention against a slow loop over pixels, and what it must not do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evmamba_jax.counting.program import equations
from evmamba_jax.errors import UserError
from evmamba_jax.layers.attention import attend
from evmamba_jax.layers.sliding_window import SlidingWindowAttention, sliding_window_attention


def span(at, radius, length, edges):
    """Return the rows, or columns, that one of them sees."""
    if edges == "clip":
        return [other for other in range(length) if abs(other - at) <= radius]
    whole = min(2 * radius + 1, length)
    first = min(max(at - radius, 0), length - whole)
    return range(first, first + whole)


def slow(q, k, v, radius, edges):
    """Pixel by pixel."""
    y = np.zeros_like(v)
    batch, height, width, heads, d = q.shape
    for b, i, j, h in np.ndindex(batch, height, width, heads):
        seen = [(r, c) for r in span(i, radius, height, edges) for c in span(j, radius, width, edges)]
        scores = np.array([q[b, i, j, h] @ k[b, r, c, h] for r, c in seen]) / np.sqrt(d)
        weights = np.exp(scores - scores.max())
        y[b, i, j, h] = sum(w * v[b, r, c, h] for w, (r, c) in zip(weights / weights.sum(), seen, strict=True))
    return y


def arrays(height, width):
    return np.random.default_rng(0).normal(size=(3, 1, height, width, 2, 3))


@pytest.mark.parametrize("edges", ["clip", "shift"])
@pytest.mark.parametrize(
    ("height", "width", "radius", "tile"),
    [
        (11, 13, 2, 4),  # tiles of 4 and of 4, the last ones over the end
        (9, 7, 3, 2),  # a radius larger than a tile
        (10, 3, 4, 3),  # all columns seen
        (1, 12, 1, 5),
        (6, 5, 0, 4),
    ],
)
def test_equals_a_slow_one(height, width, radius, tile, edges):
    q, k, v = arrays(height, width)
    run = jax.jit(lambda *x: sliding_window_attention(*x, radius, edges=edges, tile=tile))
    with jax.enable_x64(True):
        y = run(*map(jnp.asarray, (q, k, v)))
    assert y.dtype == np.float64
    chex.assert_trees_all_close(np.asarray(y), slow(q, k, v, radius, edges), rtol=1e-11, atol=1e-12)


def test_gradients_of_tiles_are_those_of_one_tile():
    """One tile is attention with a mask, without a loop that computes its scores again."""
    q, k, v = arrays(9, 7)

    def gradient(tile):
        def loss(q, k, v):
            return (sliding_window_attention(q, k, v, 2, edges="shift", tile=tile) * jnp.cos(jnp.asarray(v))).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    with jax.enable_x64(True):
        chex.assert_trees_all_close(gradient(2), gradient(16), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("edges", ["clip", "shift"])
@pytest.mark.parametrize(("height", "width", "radius"), [(5, 9, 9), (8, 8, 8), (1, 1, 1), (7, 4, 40)])
def test_a_radius_over_the_map_is_full_attention(height, width, radius, edges):
    q, k, v = map(jnp.float32, arrays(height, width))
    y = sliding_window_attention(q, k, v, radius, edges=edges, tile=3)
    flat = (x.reshape(1, height * width, 2, 3) for x in (q, k, v))
    chex.assert_trees_all_close(y, attend(*flat).reshape(y.shape), atol=1e-6)


def program(height, radius, dtype=jnp.float32):
    """Return the gradient's program on a square map."""
    shape = jax.ShapeDtypeStruct((2, height, height, 2, 8), dtype)
    loss = lambda *x: sliding_window_attention(*x, radius).astype(jnp.float32).sum()  # noqa: E731
    return jax.jit(jax.grad(loss, (0, 1, 2))).trace(shape, shape, shape)


def test_nothing_is_gathered():
    names = {equation.primitive.name for equation in equations(program(32, 3).jaxpr.jaxpr)}
    assert "exp" in names
    assert not [name for name in names if "gather" in name or "scatter" in name]


def test_memory_grows_with_the_side_of_the_map():
    def temporaries(height):
        return program(height, 3).lower().compile().memory_analysis().temp_size_in_bytes

    scores = 4 * 2 * 2 * 8 * 8 * 14 * 14  # bytes of a tile
    small, large = temporaries(64), temporaries(128)
    # Scores of one row of 16 tiles, a few copies of them, and the map with its halos; there are 256 tiles.
    assert large < 256 * scores
    assert large < 3 * small


def test_softmax_is_float32_in_bfloat16():
    exponentials = [e for e in equations(program(16, 2, jnp.bfloat16).jaxpr.jaxpr) if e.primitive.name == "exp"]
    assert exponentials
    assert {equation.outvars[0].aval.dtype for equation in exponentials} == {jnp.dtype(jnp.float32)}


def test_what_cannot_be_is_refused():
    q = jnp.zeros((1, 4, 4, 2, 3))
    with pytest.raises(UserError, match="radius=-1 and tile=8 are not allowed"):
        sliding_window_attention(q, q, q, -1)
    with pytest.raises(UserError, match="unknown edges 'clop', did you mean 'clip'"):
        sliding_window_attention(q, q, q, 1, edges="clop")
    with pytest.raises(UserError, match="num_heads has 3 for a stage of width 8"):
        SlidingWindowAttention(8, 3, radius=1, rngs=nnx.Rngs(0))
