"""Attention over long sequences, some queries after the others, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evmamba_jax.layers import attention


def slow(q, k, v):
    """Return the means that queries (B, L, heads, d) take, in float64, head by head."""
    means = np.zeros_like(q)
    for image, head in np.ndindex(q.shape[0], q.shape[2]):
        scores = q[image, :, head] @ k[image, :, head].T / np.sqrt(q.shape[-1])
        shares = np.exp(scores - scores.max(1, keepdims=True))
        means[image, :, head] = shares / shares.sum(1, keepdims=True) @ v[image, :, head]
    return means


@pytest.mark.parametrize("length", [256, 300])
def test_queries_that_take_turns_find_what_all_at_once_find(length, monkeypatch):
    q, k, v, by = np.random.default_rng(0).normal(size=(4, 2, length, 2, 4))
    with jax.enable_x64(True):
        gradients = jax.grad(lambda *x: (attention.attend(*x) * by).sum(), (0, 1, 2))
        at_once = gradients(q, k, v)
        monkeypatch.setattr(attention, "WHOLE", 256 * 256 - 1)
        monkeypatch.setattr(attention, "PART", 2 * 128 * length)
        np.testing.assert_allclose(attention.attend(q, k, v), slow(q, k, v), rtol=1e-10)
        for found, wanted in zip(gradients(q, k, v), at_once, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_gradients_of_many_parts_are_added_up_in_float32(monkeypatch):
    """In bfloat16 their sum would be some times as far off as that of all at once."""
    exact = np.random.default_rng(0).normal(size=(3, 1, 2048, 1, 8)).astype(np.float32)
    gradients = jax.jit(jax.grad(lambda q, k, v: (attention.attend(q, k, v) ** 2).astype(jnp.float32).sum(), (1, 2)))
    wanted, rounded = gradients(*exact), gradients(*exact.astype(jnp.bfloat16))
    monkeypatch.setattr(attention, "WHOLE", 1)
    monkeypatch.setattr(attention, "PART", 1)
    jax.clear_caches()
    for found, other, right in zip(gradients(*exact.astype(jnp.bfloat16)), rounded, wanted, strict=True):
        error, usual = (np.linalg.norm(np.float32(one) - right) for one in (found, other))
        assert 0 < error < 1.2 * usual


def test_mambavisions_window_under_a_detector_has_no_array_of_all_its_scores():
    shape = jax.ShapeDtypeStruct((2, 12_544, 8, 40), jnp.bfloat16)
    loss = lambda *x: attention.attend(*x).astype(jnp.float32).sum()  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(shape, shape, shape))
    assert "f32[2,8,256,12544]" in program
    assert "12544,12544]" not in program
