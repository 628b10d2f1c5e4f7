"""Losses of detectors: sums over anchors, divided by a number of anchors that the caller counts."""

import jax
import jax.numpy as jnp
from flax import nnx


def sigmoid_focal(logits: jax.Array, labels: jax.Array, *, alpha: float = 0.25, gamma: float = 2.0) -> jax.Array:
    """Return the focal loss of every anchor and class.

    Args:
        logits: (..., K), float32 or wider.
        labels: (...) integers; K is the background, for which no class is right.
        alpha: weight of the right class; the others have ``1 - alpha``.
        gamma: power of the probability of the wrong answer.

    Returns:
        (..., K), not added up.

    Source: Lin et al., Focal Loss (arXiv:1708.02002), section 3; mmdet 3.3.0 ``mmdet/models/losses/focal_loss.py``.
    """
    right = labels[..., None] == jnp.arange(logits.shape[-1])
    signed = jnp.where(right, logits, -logits)
    weight = jnp.where(right, alpha, 1 - alpha) * nnx.sigmoid(-signed) ** gamma
    return weight * nnx.softplus(-signed)


def l1(predicted: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the absolute differences of two arrays, not added up."""
    return jnp.abs(predicted - targets)


def mean_over(losses: jax.Array, weights: jax.Array, count: jax.Array) -> jax.Array:
    """Return the sum of weighted losses over ``count``.

    Args:
        losses: of any shape, float32 or wider.
        weights: of a shape that broadcasts to theirs, numbers or booleans.
        count: () number to divide by. The machine epsilon is added, as in the official code.

    Source: mmdet 3.3.0 ``mmdet/models/losses/utils.py``, ``weight_reduce_loss``.
    """
    return (losses * weights.astype(losses.dtype)).sum() / (count.astype(losses.dtype) + jnp.finfo(losses.dtype).eps)
