"""A round of an R-CNN: how its boxes are trained, and where it moves them.

Source: Cai and Vasconcelos, Cascade R-CNN (arXiv:1906.09756); mmdet 3.3.0.
"""

import dataclasses

import jax
import jax.numpy as jnp

from evmamba_jax.detection.boxes import DeltaCoder, clip
from evmamba_jax.detection.losses import giou, l1, mean_over
from evmamba_jax.detection.matching import Matcher
from evmamba_jax.detection.sampling import Regions


@dataclasses.dataclass(frozen=True)
class Round:
    """How a round is trained.

    Attributes:
        coder: of its boxes.
        matcher: of its candidates with objects.
        weight: of its losses.
        giou: weight of GIoU's loss of the decoded boxes; None takes L1 of the deltas.
        sampled: False takes all regions of the round before as it moves them, those that are objects too, but for the
            ones that it leaves without an area.
    """

    coder: DeltaCoder
    matcher: Matcher
    weight: float = 1.0
    giou: float | None = None
    sampled: bool = True


def of_label(deltas: jax.Array, labels: jax.Array) -> jax.Array:
    """Return of deltas (B, R, D, 4) those of each region's label (B, R): (B, R, 4); of background any."""
    own = jnp.minimum(labels, deltas.shape[2] - 1)
    return jnp.take_along_axis(deltas, own[..., None, None], 2)[:, :, 0]


def refined(
    coder: DeltaCoder, boxes: jax.Array, labels: jax.Array, logits: jax.Array, deltas: jax.Array, sizes: jax.Array
) -> jax.Array:
    """Return where a round moves boxes (B, R, 4), within images of ``sizes`` (B, 2), without a gradient.

    Args:
        coder: of the round.
        boxes: what it began with.
        labels: (B, R) integers; K, the background's, stands for the class that the logits hold for the likeliest.
        logits: (B, R, K + 1).
        deltas: (B, R, K, 4), or (B, R, 1, 4) where one box serves all classes.
        sizes: height and width.

    Source: mmdet 3.3.0 ``mmdet/models/roi_heads/bbox_heads/bbox_head.py``, ``refine_bboxes``.
    """
    logits, deltas = jax.lax.stop_gradient((logits, deltas))
    likeliest = logits[..., :-1].argmax(-1)
    labels = jnp.where(labels == logits.shape[-1] - 1, likeliest, labels)
    return jax.vmap(clip)(coder.decode(boxes, of_label(deltas, labels)), sizes)


def box_loss(one: Round, of: Regions, deltas: jax.Array, wanted: jax.Array, count: jax.Array) -> jax.Array:
    """Return the loss of the boxes of positive regions: of deltas (B, S, 4) that should lead to ``wanted``."""
    whole = jnp.asarray([0, 0, 1, 1], of.boxes.dtype)  # stands for boxes that have no object
    positive = of.positive[..., None]
    boxes, wanted = jnp.where(positive, of.boxes, whole), jnp.where(positive, wanted, whole)
    if one.giou is None:
        return mean_over(l1(deltas, one.coder.encode(boxes, wanted)), positive, count)
    return mean_over(giou(one.coder.decode(boxes, deltas), wanted), of.positive, count) * one.giou
