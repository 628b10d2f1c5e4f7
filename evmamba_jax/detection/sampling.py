"""Which anchors and which regions losses are taken of: few, of which enough are for objects."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from evmamba_jax.detection.matching import Matcher, Objects


class Chosen(NamedTuple):
    """What was taken.

    Attributes:
        positive: (B, N) booleans, of what is for an object.
        negative: (B, N) booleans, of the background.
    """

    positive: jax.Array
    negative: jax.Array


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Takes some at random: of the positive ones up to a number, and as many negative ones as then are missing.

    Attributes:
        count: to take of an image.
        positives: of them at most for an object.

    Source: Ren et al., Faster R-CNN (arXiv:1506.01497), section 3.1.2; mmdet 3.3.0
    ``mmdet/models/task_modules/samplers/random_sampler.py``.
    """

    count: int
    positives: int

    def __call__(self, positive: jax.Array, negative: jax.Array, key: jax.Array) -> Chosen:
        """Return what is taken of ``positive`` and ``negative`` (B, N) by chance of ``key``."""

        def of_image(positive: jax.Array, negative: jax.Array, key: jax.Array) -> Chosen:
            first, second = jax.random.split(key)
            positive = _some(positive, self.positives, jnp.asarray(self.positives), first)
            return Chosen(positive, _some(negative, self.count, self.count - positive.sum(), second))

        return jax.vmap(of_image)(positive, negative, jax.random.split(key, len(positive)))


def _some(of: jax.Array, most: int, count: jax.Array, key: jax.Array) -> jax.Array:
    """Return ``count`` of ``of`` (N,), all where there are fewer; ``most`` is at least ``count``."""
    chance = jnp.where(of, jax.random.uniform(key, of.shape), -1)
    best, index = jax.lax.top_k(chance, min(most, len(of)))
    taken = (best >= 0) & (jnp.arange(len(best)) < count)
    return jnp.zeros(of.shape, bool).at[index].set(taken)


class Candidates(NamedTuple):
    """Boxes that may be trained on: the objects themselves, then what was proposed.

    Attributes:
        boxes: (B, N, 4).
        index: (B, N) the number of an object from 1, 0 for background, -1 for what takes no part.
        added: (B, N) True for the objects themselves.
    """

    boxes: jax.Array
    index: jax.Array
    added: jax.Array


class Regions(NamedTuple):
    """Boxes that are trained on, S of an image: those of objects, then those of background, then padding.

    Attributes:
        boxes: (B, S, 4).
        number: (B, S) the object of each from 0; 0 where it has none.
        labels: (B, S) int32; the number of classes for background.
        positive: (B, S) True for those of objects.
        valid: (B, S) False for padding.
        added: (B, S) True for those that are the objects themselves.
    """

    boxes: jax.Array
    number: jax.Array
    labels: jax.Array
    positive: jax.Array
    valid: jax.Array
    added: jax.Array


def candidates(
    objects: Objects, boxes: jax.Array, valid: jax.Array, matcher: Matcher, *, add: bool = True
) -> Candidates:
    """Return objects and boxes with what they are for.

    Args:
        objects: boxes (B, G, 4) and valid (B, G). An object is for itself.
        boxes: (B, P, 4), float32 or float64.
        valid: (B, P) False for padding.
        matcher: which boxes are for which objects.
        add: False leaves the objects themselves out.

    Source: mmdet 3.3.0 ``mmdet/models/task_modules/samplers/base_sampler.py``.
    """
    own = jnp.where(objects.valid[..., None], objects.boxes, 0).astype(boxes.dtype)
    match = jax.vmap(lambda boxes, own, there, valid: matcher(boxes, own, there, inside=valid).index)
    index = match(boxes, own, objects.valid, valid)
    found = Candidates(boxes, index, jnp.zeros_like(valid))
    if not add:
        return found
    themselves = jnp.where(objects.valid, jnp.arange(1, own.shape[1] + 1), -1).astype(jnp.int32)
    added = Candidates(own, themselves, objects.valid)
    return jax.tree.map(lambda *both: jnp.concatenate(both, 1), added, found)


def regions(of: Candidates, chosen: Chosen, objects: Objects, count: int, classes: int) -> Regions:
    """Return the candidates that were chosen, at most ``count`` of an image; ``classes`` is the background's label."""

    def of_image(of: Candidates, chosen: Chosen, labels: jax.Array) -> Regions:
        rank = jnp.where(chosen.positive, 0, jnp.where(chosen.negative, 1, 2))
        rank = jnp.pad(rank, (0, max(0, count - len(rank))), constant_values=2)
        place = jnp.argsort(rank)[:count]  # stable: candidates keep their order
        rank, place = rank[place], jnp.minimum(place, len(of.boxes) - 1)
        positive, valid = rank == 0, rank < 2
        number = jnp.where(positive, of.index[place] - 1, 0)
        return Regions(
            jnp.where(valid[:, None], of.boxes[place], 0),
            number,
            jnp.where(positive, labels[number], classes).astype(jnp.int32),
            positive,
            valid,
            positive & of.added[place],
        )

    return jax.vmap(of_image)(of, chosen, objects.labels)
