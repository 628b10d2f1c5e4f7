"""RetinaNet: a backbone, a pyramid, one head for all levels; its losses, and the boxes that it finds.

Settings are mmdet's ``configs/_base_/models/retinanet_r50_fpn.py``, with which EfficientVMamba's paper compares.

Source: Lin et al., Focal Loss for Dense Object Detection (arXiv:1708.02002); mmdet 3.3.0.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.detection import per_anchor
from evmamba_jax.detection.anchors import Anchors
from evmamba_jax.detection.boxes import clip, has_area
from evmamba_jax.detection.detector import Detections, Detector, sizes_of, with_backbone
from evmamba_jax.detection.losses import l1, sigmoid_focal
from evmamba_jax.detection.matching import Matcher, Objects
from evmamba_jax.detection.nms import batched_nms
from evmamba_jax.detection.per_anchor import CODER, Raw, Targets, targets
from evmamba_jax.heads.fpn import FPN
from evmamba_jax.heads.maps import PlainPyramid
from evmamba_jax.heads.retinanet import RetinaNetHead
from evmamba_jax.weights.convert import register
from evmamba_jax.weights.detectors import fpn, retinanet_head
from evmamba_jax.weights.layers import Row, below

STRIDES = (8, 16, 32, 64, 128)
MATCHER = Matcher(positive=0.5, negative=0.4)


def anchors_of(octave_base_scale: float = 4.0) -> Anchors:
    """Return RetinaNet's anchors, nine a cell: the side of the smallest square one, in strides, as mmdet names it."""
    return Anchors(strides=STRIDES, scales=tuple(octave_base_scale * 2 ** (i / 3) for i in range(3)))


ANCHORS = anchors_of()  # of all published settings


class Losses(NamedTuple):
    """The two losses (L,) of each level; their sum is what is trained."""

    classes: jax.Array
    boxes: jax.Array

    @property
    def total(self) -> jax.Array:
        """The sum over levels of both, ()."""
        return self.classes.sum() + self.boxes.sum()


class RetinaNet(Detector):
    """The detector: ``model(images)`` gives raw outputs, ``loss`` and ``detect`` what follows from them.

    Args:
        backbone: a module whose ``features(images, key=key)`` gives maps of strides 4, 8, 16 and 32.
        widths: channels of these maps.
        pyramid: makes maps of these strides from a backbone that has one size.
        num_classes: K, without a background.
        width: channels of pyramid and head.
        anchors: nine a cell.
        init_std: deviation of the head's initial values.
        dtype: compute type of both. Boxes, scores and losses are float32 or wider whatever it says.
        rngs: source of the initial values.
    """

    losses = Losses._fields

    def __init__(
        self,
        backbone: Any,
        widths: Sequence[int],
        pyramid: PlainPyramid | None,
        num_classes: int,
        *,
        width: int = 256,
        anchors: Anchors = ANCHORS,
        init_std: float = 0.01,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        layer = {"dtype": dtype, "rngs": rngs}
        super().__init__(backbone, pyramid)
        self.anchors = anchors
        levels = len(anchors.strides)
        self.neck = FPN(widths, width, start_level=1, levels=levels, extra="on_input", **layer)
        self.head = RetinaNetHead(num_classes, anchors.per_cell, width, width, init_std=init_std, **layer)

    def outputs(self, maps: Sequence[jax.Array]) -> Raw:
        """Return the raw outputs of the backbone's maps [(B, h, w, C), ...]."""
        return Raw(*self.head(self.neck(maps)))

    @property
    def class_layers(self) -> tuple[str, ...]:
        """The path of the layer that tells classes."""
        return ("head.cls",)

    def loss(
        self,
        images: jax.Array,
        objects: Objects,
        padded: jax.Array | None = None,
        sizes: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> Losses:
        """Return the losses of a batch.

        Args:
            images: as for a call.
            objects: boxes (B, G, 4), labels and valid (B, G).
            padded: (B, 2) integers: height and width of every image, each padded to a multiple of 32 by itself. Anchors
                of cells beyond take no part. None: the whole of ``images``.
            sizes: of no influence here; detectors with proposals limit these to it.
            key: as for a call.
        """
        raw = self(images, key=key)
        return losses(raw, targets(raw, objects, sizes_of(images, padded), self.anchors, MATCHER))

    def detect(
        self,
        images: jax.Array,
        sizes: jax.Array | None = None,
        scales: jax.Array | None = None,
        *,
        candidates: int = 1000,
        limit: int = 100,
    ) -> Detections:
        """Return the objects found in a batch.

        Args:
            images: as for a call.
            sizes: (B, 2) height and width of every image before padding, to which boxes are limited; None: the whole of
                ``images``.
            scales: (B, 2) factors of width and height by which every picture was resized; boxes are then in
                the picture's pixels. None: in pixels of ``images``.
            candidates: pairs of an anchor and a class that a level contributes, at most.
            limit: D, detections of an image at most.
        """
        sizes = sizes_of(images, sizes)
        return detections(self(images), sizes, scales, candidates=candidates, limit=limit, anchors=self.anchors)


def head_rows(model: RetinaNet) -> list[Row]:
    """Return the official names of pyramid and head, as mmdet's checkpoints have them."""
    neck = fpn(len(model.neck.laterals), len(model.neck.extra))
    return [*below("neck", "neck", neck), *below("head", "bbox_head", retinanet_head(len(model.head.cls_tower)))]


register(RetinaNet, lambda model: with_backbone(model, head_rows(model)))


def losses(raw: Raw, wanted: Targets) -> Losses:
    """Return the losses of a batch: focal of all counted anchors, L1 of the deltas of positive ones."""
    return Losses(*per_anchor.losses(raw, wanted, sigmoid_focal, l1))


def detections(
    raw: Raw,
    sizes: jax.Array,
    scales: jax.Array | None = None,
    *,
    candidates: int = 1000,
    limit: int = 100,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    anchors: Anchors = ANCHORS,
) -> Detections:
    """Return the objects that raw outputs tell of.

    Of every level the pairs of an anchor and a class with a score above ``score_threshold``, the best ``candidates`` of
    them; of all levels together those without a better box of the same class that overlaps them by more than
    ``iou_threshold``. Boxes without an area, such as those of anchors beyond the image, are left out.

    Args:
        raw: of a batch.
        sizes: as for :meth:`RetinaNet.detect`, and so the next three.
        scales: see there.
        candidates: see there.
        limit: see there.
        score_threshold: from 0 to 1.
        iou_threshold: from 0 to 1.
        anchors: of the model.

    Source: mmdet 3.3.0 ``mmdet/models/dense_heads/base_dense_head.py``.
    """
    logits, deltas = raw.by_anchor()
    places = anchors.boxes(raw.sizes, deltas[0].dtype)
    scales = jnp.ones((len(sizes), 2)) if scales is None else scales

    def of_image(logits: list, deltas: list, size: jax.Array, scale: jax.Array) -> Detections:
        found = [best_pairs(nnx.sigmoid(level), score_threshold, candidates) for level in logits]
        boxes = [
            clip(CODER.decode(level[anchor], delta[anchor]), size)
            for level, delta, (_, anchor, _) in zip(places, deltas, found, strict=True)
        ]
        boxes = jnp.concatenate(boxes)
        boxes = boxes / jnp.tile(scale, 2).astype(boxes.dtype)
        scores, labels = (jnp.concatenate([level[part] for level in found]) for part in (0, 2))
        valid = (scores > 0) & has_area(boxes)
        index, count = batched_nms(boxes, scores, labels, iou_threshold, limit=limit, valid=valid)
        there = jnp.arange(limit) < count
        return Detections(
            jnp.where(there[:, None], boxes[index], 0),
            jnp.where(there, scores[index], 0),
            jnp.where(there, labels[index], -1),
            count,
        )

    return jax.vmap(of_image)(logits, deltas, sizes, scales)


def best_pairs(scores: jax.Array, threshold: float, limit: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return score, anchor and class of the best pairs of ``scores`` (N, K), those not above ``threshold`` with 0.

    Of equal scores the lower anchor comes first, then the lower class. The anchors of the best ``limit`` pairs are
    among the ``limit`` anchors whose best class has the highest score, ties included: so thousands of pairs are sorted
    in place of millions.
    """
    scores = jnp.where(scores > jnp.asarray(threshold, scores.dtype), scores, 0)
    _, anchors = jax.lax.top_k(scores.max(1), min(limit, len(scores)))
    anchors = jnp.sort(anchors)
    pairs = scores[anchors].ravel()
    best, index = jax.lax.top_k(pairs, min(limit, len(pairs)))
    return best, anchors[index // scores.shape[1]], (index % scores.shape[1]).astype(jnp.int32)
