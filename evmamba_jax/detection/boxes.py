"""Boxes (x0, y0, x1, y1) in pixels: how far two overlap, and their coding as deltas of other boxes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

EPSILON = 1e-6  # the smallest area that is divided by
LARGEST_DELTA = math.log(1000 / 16)  # of width and height


def overlaps(a: jax.Array, b: jax.Array, mode: Literal["iou", "iof", "giou"] = "iou") -> jax.Array:
    """Return how far each box of ``a`` overlaps each of ``b``.

    Which anchors are an object's best is often decided by the last bit, so this is the official order of operations,
    each rounded by itself: ``w * h / max(area_a + area_b - w * h, 1e-6)``.

    Args:
        a: (..., N, 4), float32 or float64.
        b: (..., M, 4) of the same type.
        mode: "iou" divides the common area by the area of the union, "iof" by the area of the box of ``a``; "giou" is
            what :func:`generalized` gives.

    Returns:
        (..., N, M) of the same type.

    Source: mmdet 3.3.0 ``mmdet/structures/bbox/bbox_overlaps.py``.
    """
    a, b = a[..., :, None, :], b[..., None, :, :]
    if mode == "giou":
        return generalized(a, b)
    common = _common(a, b)
    whole = area(a) if mode == "iof" else area(a) + area(b) - common
    return common / jnp.maximum(whole, EPSILON)


def generalized(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return how far boxes overlap less how much of the box around both is of neither: from -1 to 1.

    Args:
        a: (..., 4), float32 or float64.
        b: of the same type and a shape that broadcasts.

    Returns:
        (...) of the same type. Its gradient has half from each of two equal coordinates, as the official one.

    Source: Rezatofighi et al., Generalized Intersection over Union (arXiv:1902.09630).
    """
    common = _common(a, b)
    union = jnp.maximum(area(a) + area(b) - common, EPSILON)
    around = _product(jnp.maximum(a[..., 2:], b[..., 2:]) - jnp.minimum(a[..., :2], b[..., :2]))
    around = jnp.maximum(around, EPSILON)
    return common / union - (around - union) / around


def area(boxes: jax.Array) -> jax.Array:
    """Return the area of boxes (..., 4), negative where one side is."""
    return _rounded((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]))


def _common(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the area that boxes have in common."""
    return _product(jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2]))


def _product(sides: jax.Array) -> jax.Array:
    """Return the area of sides (..., 2), 0 where one is negative."""
    sides = jnp.where(sides >= 0, sides, 0)  # at 0 with the gradient of what it is, unlike the maximum
    return _rounded(sides[..., 0] * sides[..., 1])


def _rounded(product: jax.Array) -> jax.Array:
    """Return a finite product as it is, but keep compilers from fusing it with an addition, unrounded."""
    return jnp.maximum(product, jnp.finfo(product.dtype).min)


@dataclasses.dataclass(frozen=True)
class DeltaCoder:
    """Boxes as deltas of other boxes: the step of the centre over the size, and the logarithm of the sizes' ratio.

    Attributes:
        stds: what the four deltas are divided by.
        smallest: the smallest delta of width and height that counts; Detectron2 has no limit.

    Source: Girshick et al., R-CNN (arXiv:1311.2524), appendix C; mmdet 3.3.0
    ``mmdet/models/task_modules/coders/delta_xywh_bbox_coder.py``.
    """

    stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
    smallest: float = -LARGEST_DELTA

    def encode(self, boxes: jax.Array, targets: jax.Array) -> jax.Array:
        """Return the deltas (..., 4) that lead from ``boxes`` (..., 4) to ``targets`` (..., 4), both with an area."""
        centre, size = _centre_and_size(boxes)
        target_centre, target_size = _centre_and_size(targets)
        deltas = jnp.concatenate([(target_centre - centre) / size, jnp.log(target_size / size)], -1)
        return deltas / jnp.asarray(self.stds, deltas.dtype)

    def decode(self, boxes: jax.Array, deltas: jax.Array) -> jax.Array:
        """Return where the deltas (..., 4) lead from ``boxes`` (..., 4); sizes grow by a factor of 62.5 at most."""
        deltas = deltas * jnp.asarray(self.stds, deltas.dtype)
        centre, size = _centre_and_size(boxes)
        centre = centre + size * deltas[..., :2]
        half = size * jnp.exp(jnp.clip(deltas[..., 2:], self.smallest, LARGEST_DELTA)) * 0.5
        return jnp.concatenate([centre - half, centre + half], -1)


def _centre_and_size(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) * 0.5, high - low


def clip(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Return boxes (..., 4) with their corners moved into an image of ``size`` (2,), its height and width.

    The largest coordinate is the size itself, not the last pixel.
    """
    height, width = size[0], size[1]
    limits = jnp.stack([width, height, width, height]).astype(boxes.dtype)
    return jnp.clip(boxes, 0, limits)


def has_area(boxes: jax.Array) -> jax.Array:
    """Return which boxes (..., 4) have one."""
    return (boxes[..., 2:] > boxes[..., :2]).all(-1)


def within(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Return which boxes (..., 4) lie wholly in an image of ``size`` (2,), its height and width; their ends before it.

    Source: mmdet 3.3.0 ``mmdet/models/task_modules/prior_generators/utils.py``, ``anchor_inside_flags``.
    """
    return (boxes[..., :2] >= 0).all(-1) & (boxes[..., 2:] < jnp.flip(size)).all(-1)
