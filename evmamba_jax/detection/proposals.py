"""Region proposals: which anchors hold an object whatever its class, and the boxes that these become.

Source: Ren et al., Faster R-CNN (arXiv:1506.01497), section 3.1; mmdet 3.3.0 ``mmdet/models/dense_heads/rpn_head.py``.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from evmamba_jax.detection import per_anchor
from evmamba_jax.detection.anchors import Anchors
from evmamba_jax.detection.boxes import clip
from evmamba_jax.detection.losses import binary_cross_entropy
from evmamba_jax.detection.matching import Matcher, Objects
from evmamba_jax.detection.nms import batched_nms
from evmamba_jax.detection.per_anchor import CODER, Raw, Targets

MATCHER = Matcher(positive=0.7, negative=0.3, minimum=0.3)
OVERLAP = 0.7  # above which a better proposal of the same level drops one


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many anchors of a level become proposals, and how many of these an image has at most."""

    per_level: int
    total: int


class Proposals(NamedTuple):
    """Boxes that may hold an object, in order of falling scores.

    Attributes:
        boxes: (B, P, 4); 0 for padding.
        scores: (B, P) from 0 to 1; 0 for padding.
        valid: (B, P) False for padding.
    """

    boxes: jax.Array
    scores: jax.Array
    valid: jax.Array


def targets(raw: Raw, objects: Objects, padded: jax.Array, anchors: Anchors, sizes: jax.Array | None = None) -> Targets:
    """Return what anchors are trained for: 0 is an object, 1 background; see :func:`per_anchor.targets`."""
    of_one_class = objects._replace(labels=jnp.zeros_like(objects.labels))
    return per_anchor.targets(raw, of_one_class, padded, anchors, MATCHER, sizes)


def losses(raw: Raw, wanted: Targets, of_boxes: per_anchor.Loss) -> tuple[jax.Array, jax.Array]:
    """Return the losses (L,) of each level: cross entropy of all counted anchors, one of the deltas of positive ones.

    Args:
        raw: of a batch.
        wanted: of the same.
        of_boxes: as for :func:`per_anchor.losses`.
    """

    def of_objects(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return binary_cross_entropy(logits, (labels == 0)[..., None])

    return per_anchor.losses(raw, wanted, of_objects, of_boxes)


def proposals(raw: Raw, sizes: jax.Array, anchors: Anchors, limits: Limits) -> Proposals:
    """Return the proposals of a batch, without a gradient.

    Args:
        raw: of the batch.
        sizes: (B, 2) height and width of every image before padding, to which boxes are limited. Boxes without an area,
            such as those beyond, are left out.
        anchors: of the model.
        limits: numbers of boxes.
    """
    logits, deltas = jax.lax.stop_gradient(raw).by_anchor()
    places = anchors.boxes(raw.sizes, deltas[0].dtype)

    def of_image(logits: list, deltas: list, size: jax.Array) -> Proposals:
        boxes, best, levels = [], [], []
        for level, (place, logit, delta) in enumerate(zip(places, logits, deltas, strict=True)):
            score, index = jax.lax.top_k(logit[:, 0], min(limits.per_level, len(logit)))
            boxes.append(clip(CODER.decode(place[index], delta[index]), size))
            best.append(score)
            levels.append(jnp.full(len(score), level))
        boxes, best, levels = jnp.concatenate(boxes), jnp.concatenate(best), jnp.concatenate(levels)
        valid = (boxes[:, 2:] > boxes[:, :2]).all(1)
        index, count = batched_nms(boxes, best, levels, OVERLAP, limit=limits.total, valid=valid)
        there = jnp.arange(limits.total) < count
        return Proposals(
            jnp.where(there[:, None], boxes[index], 0), jnp.where(there, nnx.sigmoid(best[index]), 0), there
        )

    return jax.vmap(of_image)(logits, deltas, sizes)
