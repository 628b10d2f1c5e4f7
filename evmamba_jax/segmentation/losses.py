"""What a segmenter is trained with: cross-entropy over pixels, some of them ignored.

Source: mmseg 1.2.2 ``models/losses/cross_entropy_loss.py`` and ``accuracy.py``.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

IGNORED = 255  # the label of pixels that do not count


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, class_weights: Sequence[float] = (), over_counted: bool = False
) -> jax.Array:
    """Return the cross-entropy summed over the counted pixels, divided by the number of ALL pixels of the batch.

    Ignored pixels so make the loss smaller: all published configurations have it that way.

    Args:
        logits: (..., K).
        labels: (...) integers from 0 to K - 1, or 255 for pixels that are ignored.
        class_weights: factors of the pixels of each class, K numbers; none: all 1 (mmseg's ``class_weight``).
        over_counted: divide by the number of counted pixels instead (mmseg's ``avg_non_ignore``).

    Returns:
        A scalar, float32 or wider.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # A comparison, not an index: its gradient needs no scatter.
    chosen = labels[..., None].astype(jnp.int32) == jnp.arange(logits.shape[-1])
    counted = labels != IGNORED
    loss = jnp.where(chosen, jax.nn.log_softmax(logits), 0)
    if class_weights:
        loss = loss * jnp.asarray(class_weights, loss.dtype)
    loss = loss.sum(-1)
    total = -jnp.where(counted, loss, 0).sum()
    return total / (jnp.maximum(counted.sum(), 1) if over_counted else labels.size)


def pixel_accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the share of the counted pixels whose largest logit is the label's, in percent; arguments as above."""
    counted = labels != IGNORED
    right = (logits.argmax(-1) == labels) & counted
    return 100.0 * right.sum() / jnp.maximum(counted.sum(), 1)
