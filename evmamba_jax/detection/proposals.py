"""Region proposals: which anchors hold an object whatever its class, and the boxes that these become.

Source: Ren et al., Faster R-CNN (arXiv:1506.01497), section 3.1; mmdet 3.3.0 ``mmdet/models/dense_heads/rpn_head.py``.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from evmamba_jax.detection import per_anchor
from evmamba_jax.detection.anchors import Anchors
from evmamba_jax.detection.boxes import DeltaCoder, clip, has_area
from evmamba_jax.detection.losses import binary_cross_entropy, l1, smooth_l1
from evmamba_jax.detection.matching import Matcher, Objects
from evmamba_jax.detection.nms import batched_nms
from evmamba_jax.detection.per_anchor import CODER, Raw, Targets

OVERLAP = 0.7  # above which a better proposal of the same level drops one


@dataclasses.dataclass(frozen=True)
class Rules:
    """How proposals are trained. The defaults are Mask R-CNN's in mmdet.

    Attributes:
        matcher: of anchors with objects.
        coder: of boxes.
        beta: where the L1 loss of deltas becomes a parabola; None: nowhere.
        trained: which anchors are: those whose ``cells`` begin in the padded image, of these the ones that lie
            ``within`` the image, or ``all``.
    """

    matcher: Matcher = dataclasses.field(default=Matcher(positive=0.7, negative=0.3, minimum=0.3))
    coder: DeltaCoder = CODER
    beta: float | None = None
    trained: Literal["cells", "within", "all"] = "cells"


RULES = Rules()


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


def targets(
    raw: Raw, objects: Objects, padded: jax.Array, sizes: jax.Array, anchors: Anchors, rules: Rules = RULES
) -> Targets:
    """Return what anchors are trained for: 0 is an object, 1 background; see :func:`per_anchor.targets`."""
    of_one_class = objects._replace(labels=jnp.zeros_like(objects.labels))
    cells = None if rules.trained == "all" else padded
    image = sizes if rules.trained == "within" else None
    return per_anchor.targets(raw, of_one_class, cells, anchors, rules.matcher, image)


def losses(raw: Raw, wanted: Targets, rules: Rules = RULES) -> tuple[jax.Array, jax.Array]:
    """Return the losses (L,) of each level: cross entropy of all counted anchors, L1 of the deltas of positive ones."""

    def of_objects(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return binary_cross_entropy(logits, (labels == 0)[..., None])

    of_boxes = l1 if rules.beta is None else functools.partial(smooth_l1, beta=rules.beta)
    return per_anchor.losses(raw, wanted, of_objects, of_boxes)


def proposals(raw: Raw, sizes: jax.Array, anchors: Anchors, limits: Limits, coder: DeltaCoder = CODER) -> Proposals:
    """Return the proposals of a batch, without a gradient.

    Args:
        raw: of the batch.
        sizes: (B, 2) height and width of every image before padding, to which boxes are limited. Boxes without an area,
            such as those beyond, are left out.
        anchors: of the model.
        limits: numbers of boxes.
        coder: of the boxes.
    """
    logits, deltas = jax.lax.stop_gradient(raw).by_anchor()
    places = anchors.boxes(raw.sizes, deltas[0].dtype)

    def of_image(logits: list, deltas: list, size: jax.Array) -> Proposals:
        boxes, best, levels = [], [], []
        for level, (place, logit, delta) in enumerate(zip(places, logits, deltas, strict=True)):
            score, index = jax.lax.top_k(logit[:, 0], min(limits.per_level, len(logit)))
            boxes.append(clip(coder.decode(place[index], delta[index]), size))
            best.append(score)
            levels.append(jnp.full(len(score), level))
        boxes, best, levels = jnp.concatenate(boxes), jnp.concatenate(best), jnp.concatenate(levels)
        index, count = batched_nms(boxes, best, levels, OVERLAP, limit=limits.total, valid=has_area(boxes))
        there = jnp.arange(limits.total) < count
        return Proposals(
            jnp.where(there[:, None], boxes[index], 0), jnp.where(there, nnx.sigmoid(best[index]), 0), there
        )

    return jax.vmap(of_image)(logits, deltas, sizes)
