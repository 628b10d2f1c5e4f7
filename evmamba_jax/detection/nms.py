"""Non-maximum suppression with fixed shapes: the exact greedy result."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from evmamba_jax.detection.boxes import overlaps

TILE = 256  # boxes decided at a time


class Kept(NamedTuple):
    """What is left of N boxes, in order of falling scores.

    Attributes:
        index: (limit,) int32 into the boxes; 0 beyond ``count``.
        count: () int32, how many there are.
    """

    index: jax.Array
    count: jax.Array


def nms(boxes: jax.Array, scores: jax.Array, threshold: float, *, limit: int, valid: jax.Array | None = None) -> Kept:
    """Keep the boxes that overlap no kept box of a higher score by more than ``threshold``.

    Args:
        boxes: (N, 4), float32 or float64.
        scores: (N,); of equal scores the lower index comes first.
        threshold: overlap above which a box is dropped; one that equals it is kept.
        limit: the most boxes to keep, those with the highest scores; the time grows with it.
        valid: (N,) False for boxes that take no part; None: all do.
    """
    return batched_nms(boxes, scores, jnp.zeros(len(boxes), jnp.int32), threshold, limit=limit, valid=valid)


def batched_nms(
    boxes: jax.Array,
    scores: jax.Array,
    groups: jax.Array,
    threshold: float,
    *,
    limit: int,
    valid: jax.Array | None = None,
) -> Kept:
    """Do what :func:`nms` does, where only boxes of one group drop each other.

    Groups are compared. The official code shifts each to a place of its own instead, which in float32 rounds the boxes
    of high groups to 1/128 pixel.

    Args:
        boxes: (N, 4), float32 or float64.
        scores: (N,).
        groups: (N,) integers.
        threshold: as for :func:`nms`.
        limit: of all groups together.
        valid: as for :func:`nms`.

    Source: mmcv 2.1.0 ``mmcv/ops/nms.py``. The boxes are decided in tiles, each against the kept ones of the tiles
    before and within itself by iteration until nothing changes, as in TensorFlow Model Garden's
    ``official/vision/ops/nms.py``.
    """
    count = len(boxes)
    valid = jnp.ones(count, bool) if valid is None else valid
    # Two keys: what takes no part goes behind the lowest score.
    order = jnp.lexsort((-scores, ~valid))
    tiles = -(-count // TILE)
    padded = lambda array: jnp.pad(array[order], ((0, tiles * TILE - count),) + ((0, 0),) * (array.ndim - 1))  # noqa: E731
    boxes, groups, valid = padded(boxes), padded(groups), padded(valid)
    most = jnp.asarray(threshold, boxes.dtype)
    earlier = jnp.arange(TILE)[:, None] < jnp.arange(TILE)

    def drops(above: jax.Array, below: jax.Array) -> jax.Array:
        """Return which of the boxes ``above`` would drop which of those ``below``, given by their places."""
        same = groups[above][:, None] == groups[below]
        return same & (overlaps(boxes[above], boxes[below]) > most)

    def unfinished(state):
        tile, _, found = state
        # Boxes that take no part are the last ones.
        return (tile < tiles) & (found < limit) & valid[jnp.minimum(tile, tiles - 1) * TILE]

    def decide(state):
        tile, kept, found = state
        places = tile * TILE + jnp.arange(TILE)
        before = (jnp.arange(limit) < found)[:, None]
        alive = valid[places] & ~(drops(kept, places) & before).any(0)
        within = drops(places, places) & earlier

        def step(state):
            stays, _ = state
            then = alive & ~(within & stays[:, None]).any(0)
            return then, (then != stays).any()

        # The first box is right at once, and each further one when those before it are: the fixed point is greedy.
        stays, _ = lax.while_loop(lambda state: state[1], step, (alive, jnp.asarray(True)))
        slots = jnp.where(stays, found + jnp.cumsum(stays) - 1, limit)
        kept = kept.at[slots].set(places.astype(jnp.int32), mode="drop")
        return tile + 1, kept, jnp.minimum(found + stays.sum(dtype=jnp.int32), limit)

    start = (jnp.int32(0), jnp.zeros(limit, jnp.int32), jnp.int32(0))
    _, kept, found = lax.while_loop(unfinished, decide, start)
    index = jnp.where(jnp.arange(limit) < found, order[jnp.minimum(kept, count - 1)], 0)
    return Kept(index.astype(jnp.int32), found)


class BestPairs(NamedTuple):
    """The best pairs of a box and a class, in order of falling scores; zeros beyond ``count``.

    Attributes:
        boxes: (limit, 4).
        scores: (limit,).
        labels: (limit,) int32.
        index: (limit,) int32: box * K + label.
        count: () int32.
    """

    boxes: jax.Array
    scores: jax.Array
    labels: jax.Array
    index: jax.Array
    count: jax.Array


def multiclass_nms(
    boxes: jax.Array, scores: jax.Array, score_threshold: float, threshold: float, *, limit: int
) -> BestPairs:
    """Keep the best boxes of every class, each class by itself.

    Args:
        boxes: (N, K, 4), a box for each class, float32 or float64.
        scores: (N, K) without the background.
        score_threshold: pairs with a score above it take part.
        threshold: as for :func:`nms`.
        limit: of all classes together.

    Source: mmdet 3.3.0 ``mmdet/models/layers/bbox_nms.py``.
    """
    classes = scores.shape[1]
    boxes, scores = boxes.reshape(-1, 4), scores.reshape(-1)
    groups = jnp.arange(len(scores)) % classes
    valid = scores > jnp.asarray(score_threshold, scores.dtype)
    index, count = batched_nms(boxes, scores, groups, threshold, limit=limit, valid=valid)
    found = jnp.arange(limit) < count
    return BestPairs(
        jnp.where(found[:, None], boxes[index], 0),
        jnp.where(found, scores[index], 0),
        jnp.where(found, index % classes, 0),
        index,
        count,
    )
