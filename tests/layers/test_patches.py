"""Attention over windows of a map, and the downsampling of ConvNeXt, against slow ones."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evmamba_jax.arrays import merge, split
from evmamba_jax.counting.program import equations
from evmamba_jax.errors import UserError
from evmamba_jax.layers.patches import AttentionDownsample, NormDownsample


def slow(x, score, window, stride, padding):
    """Window by window, pixel by pixel."""
    (batch, height, width, channels), ends = x.shape, []
    for side in (height, width):
        last = side + padding - window if padding else side - 1
        ends.append(list(range(-padding, last + 1, stride)))
    pooled = np.zeros((batch, len(ends[0]), len(ends[1]), channels))
    for b, i, j in np.ndindex(*pooled.shape[:3]):
        rows, columns = (
            range(max(at, 0), min(at + window, n)) for at, n in ((ends[0][i], height), (ends[1][j], width))
        )
        pixels = np.array([x[b, r, c] for r in rows for c in columns])
        weights = np.exp(pixels @ score)
        pooled[b, i, j] = weights / weights.sum() @ pixels
    return pooled


@pytest.mark.parametrize(
    ("height", "width", "window", "stride", "padding"),
    [
        (6, 7, 2, 2, 0),
        (7, 5, 3, 2, 1),
        (1, 1, 2, 2, 0),
        (5, 9, 3, 3, 0),
        (8, 6, 1, 2, 0),
        (6, 6, 3, 1, 2),
        (1, 2, 3, 2, 1),
    ],
)
def test_attention_downsampling_equals_a_slow_one(height, width, window, stride, padding):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, height, width, 3))
    layer = AttentionDownsample(3, window=window, stride=stride, padding=padding, rngs=nnx.Rngs(0))
    structure, params, _ = split(layer)
    params = {path: rng.normal(size=array.shape) for path, array in params.items()}
    with jax.enable_x64(True):
        y = jax.jit(lambda params, x: merge(structure, params, {})(x))(params, x)
    wanted = slow(x, params["score"], window, stride, padding) @ params["expand.kernel"]
    chex.assert_trees_all_close(np.asarray(y), wanted, rtol=1e-11, atol=1e-12)


def test_its_softmax_is_float32_in_bfloat16_and_nothing_is_gathered():
    layer = AttentionDownsample(4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: layer(x).astype(jnp.float32).sum()))(
        jnp.zeros((1, 6, 7, 4), jnp.bfloat16)
    )
    found = list(equations(jaxpr.jaxpr))
    assert {e.outvars[0].aval.dtype for e in found if e.primitive.name == "exp"} == {jnp.dtype(jnp.float32)}
    assert not [e for e in found if "gather" in e.primitive.name or "scatter" in e.primitive.name]


@pytest.mark.parametrize("options", [{"window": 0}, {"stride": 0}, {"padding": -1}, {"padding": 2}])
def test_windows_that_cannot_be_are_refused(options):
    with pytest.raises(UserError, match="is not allowed: window and stride must be 1 or more"):
        AttentionDownsample(3, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3), (1, 1)])
def test_norm_downsampling_equals_a_slow_one(height, width):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, height, width, 3))
    structure, params, _ = split(NormDownsample(3, rngs=nnx.Rngs(0)))
    params = {path: rng.normal(size=array.shape) for path, array in params.items()}
    with jax.enable_x64(True):
        y = jax.jit(lambda params, x: merge(structure, params, {})(x))(params, x)
    z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    z = z * params["norm.scale"] + params["norm.bias"]
    wanted = np.zeros((2, -(-height // 2), -(-width // 2), 6)) + params["conv.bias"]
    for b, i, j in np.ndindex(2, height, width):
        wanted[b, i // 2, j // 2] += z[b, i, j] @ params["conv.kernel"][i % 2, j % 2]
    chex.assert_trees_all_close(np.asarray(y), wanted, rtol=1e-11, atol=1e-12)
