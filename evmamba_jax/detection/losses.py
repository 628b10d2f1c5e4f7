"""Losses of detectors: sums over anchors, divided by a number of anchors that the caller counts."""

import jax
import jax.numpy as jnp
from flax import nnx

from evmamba_jax.detection.boxes import generalized


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


def smooth_l1(predicted: jax.Array, targets: jax.Array, beta: float) -> jax.Array:
    """Return the absolute differences less half of ``beta``, below ``beta`` rounded to a parabola; not added up.

    Source: Girshick, Fast R-CNN (arXiv:1504.08083), section 2.3; mmdet 3.3.0
    ``mmdet/models/losses/smooth_l1_loss.py``.
    """
    distance = jnp.abs(predicted - targets)
    return jnp.where(distance < beta, 0.5 * distance * distance / beta, distance - 0.5 * beta)


def giou(predicted: jax.Array, targets: jax.Array) -> jax.Array:
    """Return by how much boxes (..., 4) miss others, (...) from 0 to 2: one less their generalized overlap."""
    return 1 - generalized(predicted, targets)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross entropy where one class is right.

    Args:
        logits: (..., K), float32 or wider.
        labels: (...) integers from 0.

    Returns:
        (...), not added up.
    """
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the cross entropy of answers that are each right (1) or wrong (0); not added up."""
    return nnx.softplus(logits) - logits * targets.astype(logits.dtype)


def of_class(maps: jax.Array, labels: jax.Array) -> jax.Array:
    """Return of maps (R, H, W, K) the one of each region's class, (R, H, W), for labels (R,) integers from 0."""
    return jnp.take_along_axis(maps, labels[:, None, None, None], -1)[..., 0]


def mean_over(losses: jax.Array, weights: jax.Array, count: jax.Array) -> jax.Array:
    """Return the sum of weighted losses over ``count``.

    Args:
        losses: of any shape, float32 or wider.
        weights: of a shape that broadcasts to theirs, numbers or booleans.
        count: () number to divide by. The machine epsilon is added, as in the official code.

    Source: mmdet 3.3.0 ``mmdet/models/losses/utils.py``, ``weight_reduce_loss``.
    """
    return (losses * weights.astype(losses.dtype)).sum() / (count.astype(losses.dtype) + jnp.finfo(losses.dtype).eps)
