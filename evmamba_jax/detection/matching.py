"""Which object an anchor is trained for."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evmamba_jax.detection.boxes import overlaps


class Objects(NamedTuple):
    """The objects of images, padded to one number G of at least 1; what stands in padding does not matter.

    Attributes:
        boxes: (..., G, 4), x0 y0 x1 y1 in pixels of the image, each with an area.
        labels: (..., G) integers from 0.
        valid: (..., G) booleans, False for padding.
        masks: (..., G, H, W) booleans or integers 0 and 1, as large as the padded images, or the same as
            :class:`evmamba_jax.detection.masks.PackedMasks`; None where nothing needs any.
    """

    boxes: jax.Array
    labels: jax.Array
    valid: jax.Array
    masks: Any = None


class Matched(NamedTuple):
    """What an anchor is for.

    Attributes:
        index: (N,) int32: the number of an object from 1, 0 for background, -1 for an anchor that is left out.
        overlap: (N,) the largest overlap with an object; -1 where an anchor takes no part, 0 without objects.
    """

    index: jax.Array
    overlap: jax.Array


@dataclasses.dataclass(frozen=True)
class Matcher:
    """Matches anchors with objects by the largest overlap.

    Afterwards every object gets the anchors that overlap it most, all of them in a tie, even if another object overlaps
    them more; of two objects the later one gets them. Without ``reassigns`` they are for the object that overlaps them
    most all the same.

    Attributes:
        positive: overlap from which on an anchor is for its object.
        negative: overlap below which it is background; between the two it is left out.
        minimum: overlap that an object needs to get its best anchors; None leaves this rule out. With 0 an object that
            touches no anchor gets all that touch none, as in the official code.
        reassigns: False as in Detectron2.
        ignored: share of its area in one ignored region above which an anchor is left out; None: regions do nothing.

    Source: mmdet 3.3.0 ``mmdet/models/task_modules/assigners/max_iou_assigner.py``; hustvl/Vim
    ``det/detectron2/modeling/matcher.py`` at dd0358a.
    """

    positive: float
    negative: float
    minimum: float | None = 0.0
    reassigns: bool = True
    ignored: float | None = None

    def __call__(
        self,
        anchors: jax.Array,
        boxes: jax.Array,
        valid: jax.Array,
        *,
        inside: jax.Array | None = None,
        regions: jax.Array | None = None,
    ) -> Matched:
        """Match the anchors of one image.

        Args:
            anchors: (N, 4), float32 or float64.
            boxes: (G, 4) of the objects, of the same type.
            valid: (G,) False for padding.
            inside: (N,) False for anchors that take no part; None: all do.
            regions: (R, 4) to be ignored; regions without an area touch nothing.
        """
        takes_part = jnp.ones(len(anchors), bool) if inside is None else inside
        counted = takes_part
        if self.ignored is not None and regions is not None:
            share = overlaps(anchors, regions, "iof").max(1, initial=0)
            counted = counted & (share <= jnp.asarray(self.ignored, share.dtype))
        # One value for the largest and for what is compared with it; a compiler might else compute it twice.
        overlap = jax.lax.optimization_barrier(overlaps(boxes, anchors))
        overlap = jnp.where(valid[:, None] & counted, overlap, -1)
        threshold = lambda number: jnp.asarray(number, overlap.dtype)  # noqa: E731

        best = overlap.max(0)
        background = jnp.where((best >= 0) & (best < threshold(self.negative)), 0, -1)
        nearest = overlap.argmax(0) + 1
        index = jnp.where(best >= threshold(self.positive), nearest, background)
        if self.minimum is not None:
            most = overlap.max(1)
            given = valid & (most >= threshold(self.minimum))
            chosen = (overlap == most[:, None]) & given[:, None]
            number = jnp.arange(1, len(boxes) + 1)[:, None]
            last = jnp.where(chosen, number, 0).max(0)
            index = jnp.where(last > 0, last if self.reassigns else nearest, index)
        any_object = valid.any()
        index = jnp.where(any_object, index, 0)
        best = jnp.where(any_object, best, 0)
        return Matched(jnp.where(takes_part, index, -1).astype(jnp.int32), jnp.where(takes_part, best, -1))
