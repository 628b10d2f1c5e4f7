"""What is said of every anchor, what every anchor is trained for, and losses of both."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from evmamba_jax.detection.anchors import Anchors
from evmamba_jax.detection.boxes import DeltaCoder, within
from evmamba_jax.detection.losses import mean_over
from evmamba_jax.detection.matching import Matcher, Objects

Loss = Callable[[jax.Array, jax.Array], jax.Array]
CODER = DeltaCoder()


class Raw(NamedTuple):
    """What a head says of every anchor, for each level.

    Attributes:
        logits: [(B, h, w, A * K), ...], anchor-major.
        deltas: [(B, h, w, A * 4), ...], anchor-major.
    """

    logits: list[jax.Array]
    deltas: list[jax.Array]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(rows, columns) of the levels."""
        return [(level.shape[1], level.shape[2]) for level in self.deltas]

    @property
    def classes(self) -> int:
        """K."""
        return self.logits[0].shape[-1] * 4 // self.deltas[0].shape[-1]

    def by_anchor(self) -> tuple[list[jax.Array], list[jax.Array]]:
        """Return logits [(B, h * w * A, K), ...] and deltas [(B, h * w * A, 4), ...], float32 or wider."""

        def flat(levels: Sequence[jax.Array], last: int) -> list[jax.Array]:
            wide = jnp.promote_types(levels[0].dtype, jnp.float32)
            return [level.astype(wide).reshape(len(level), -1, last) for level in levels]

        return flat(self.logits, self.classes), flat(self.deltas, 4)


class Targets(NamedTuple):
    """What the anchors of all levels are trained for.

    Attributes:
        labels: (B, N) int32; K for background.
        counted: (B, N) False for anchors that are left out.
        positive: (B, N) True for anchors that are for an object.
        deltas: (B, N, 4) to that object; 0 for the others.
        count: () what losses are divided by: of positive anchors, at least one an image; of sampled ones, at least one
            positive and one negative an image.
    """

    labels: jax.Array
    counted: jax.Array
    positive: jax.Array
    deltas: jax.Array
    count: jax.Array

    @property
    def negative(self) -> jax.Array:
        """(B, N) True for anchors that are background."""
        return self.counted & ~self.positive

    def only(self, positive: jax.Array, negative: jax.Array, count: int | None = None) -> "Targets":
        """Return what is left when of the anchors only these (B, N) are taken.

        Losses are then divided by ``count``, or by how many are taken where it is None.
        """
        taken = sum(jnp.maximum(kind.sum(1), 1).sum() for kind in (positive, negative))
        by = jnp.asarray(taken if count is None else count)
        return self._replace(counted=positive | negative, positive=positive, count=by)


def targets(
    raw: Raw,
    objects: Objects,
    padded: jax.Array | None,
    anchors: Anchors,
    matcher: Matcher,
    sizes: jax.Array | None = None,
) -> Targets:
    """Return what the anchors of a batch are trained for.

    Crowds have no influence in the official settings: leave them out of ``objects``.

    Args:
        raw: of the batch.
        objects: boxes (B, G, 4), labels and valid (B, G).
        padded: (B, 2) integers: height and width of every image, each padded to a multiple of 32 by itself. Anchors of
            cells beyond take no part. None: all do.
        anchors: of the model.
        matcher: which anchors are for which objects.
        sizes: (B, 2) height and width of every image, where anchors that reach beyond it take no part; None: they do.
    """
    dtype = jnp.promote_types(raw.deltas[0].dtype, jnp.float32)
    places = jnp.concatenate(anchors.boxes(raw.sizes, dtype))

    def of_image(objects: Objects, image: jax.Array | None, size: jax.Array | None) -> tuple[jax.Array, ...]:
        boxes, labels, valid = objects.boxes.astype(dtype), objects.labels, objects.valid
        inside = jnp.ones(len(places), bool)
        if image is not None:
            inside = jnp.concatenate(anchors.inside(raw.sizes, image))
        if size is not None:
            inside = inside & within(places, size)
        index = matcher(places, boxes, valid, inside=inside).index
        positive, number = index > 0, jnp.maximum(index - 1, 0)
        label = jnp.where(positive, labels[number], raw.classes).astype(jnp.int32)
        # An anchor is no step away from itself.
        deltas = CODER.encode(places, jnp.where(positive[:, None], boxes[number], places))
        return label, index >= 0, positive, deltas

    label, counted, positive, deltas = jax.vmap(of_image)(objects, padded, sizes)
    count = jnp.maximum(positive.sum(1), 1).sum()
    return Targets(label, counted, positive, deltas, count)


def losses(raw: Raw, wanted: Targets, of_classes: Loss, of_boxes: Loss) -> tuple[jax.Array, jax.Array]:
    """Return the losses of classes and boxes (L,) of each level.

    Args:
        raw: of a batch.
        wanted: of the same.
        of_classes: of logits (B, n, K) and labels (B, n): (B, n, K).
        of_boxes: of deltas (B, n, 4) and those wanted: (B, n, 4).
    """
    start, classes, boxes = 0, [], []
    for logits, deltas in zip(*raw.by_anchor(), strict=True):
        level = slice(start, start + logits.shape[1])
        start = level.stop
        each = of_classes(logits, wanted.labels[:, level])
        classes.append(mean_over(each, wanted.counted[:, level, None], wanted.count))
        distance = of_boxes(deltas, wanted.deltas[:, level])
        boxes.append(mean_over(distance, wanted.positive[:, level, None], wanted.count))
    return jnp.stack(classes), jnp.stack(boxes)
