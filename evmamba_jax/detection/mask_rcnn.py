"""Mask R-CNN: proposals of a pyramid, then class, box and mask of each; its losses, and the objects that it finds.

Settings are mmdet's ``configs/swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py``, on which the detectors of EfficientVMamba,
VMamba and MSVMamba are built.

Source: He et al., Mask R-CNN (arXiv:1703.06870); mmdet 3.3.0.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.detection import proposals as rpn
from evmamba_jax.detection.anchors import Anchors
from evmamba_jax.detection.boxes import DeltaCoder, clip
from evmamba_jax.detection.detector import Detections, Detector, sizes_of, with_backbone
from evmamba_jax.detection.losses import binary_cross_entropy, cross_entropy, l1, mean_over, of_class
from evmamba_jax.detection.masks import mask_targets
from evmamba_jax.detection.matching import Matcher, Objects
from evmamba_jax.detection.nms import multiclass_nms
from evmamba_jax.detection.per_anchor import Raw, Targets
from evmamba_jax.detection.proposals import Limits, Proposals, proposals
from evmamba_jax.detection.regions import extract
from evmamba_jax.detection.sampling import Chosen, Regions, Sampler, candidates, regions
from evmamba_jax.errors import UserError
from evmamba_jax.heads.fpn import FPN
from evmamba_jax.heads.maps import PlainPyramid
from evmamba_jax.heads.rcnn import BoxHead, MaskHead, RPNHead
from evmamba_jax.weights.convert import register
from evmamba_jax.weights.detectors import box_head, fpn, mask_head, rpn_head
from evmamba_jax.weights.layers import Row, below

STRIDES = (4, 8, 16, 32, 64)
CODER = DeltaCoder(stds=(0.1, 0.1, 0.2, 0.2))
MATCHER = Matcher(positive=0.5, negative=0.5, minimum=0.5)
BOX_SIZE, MASK_SIZE = 7, 14  # sides of what the heads see of a region

Choose = Callable[[jax.Array, jax.Array], Chosen]


def anchors_of(octave_base_scale: float = 8.0) -> Anchors:
    """Return Mask R-CNN's anchors, three a cell: the side of the square one, in strides."""
    return Anchors(strides=STRIDES, scales=(octave_base_scale,))


ANCHORS = anchors_of()  # of all published settings


@dataclasses.dataclass(frozen=True)
class Settings:
    """How many boxes there are of an image at most.

    Attributes:
        anchors: that losses are taken of.
        regions: that losses are taken of; masks of their positive ones.
        trained: proposals in training.
        tested: proposals otherwise.
    """

    anchors: Sampler = dataclasses.field(default=Sampler(256, 128))
    regions: Sampler = dataclasses.field(default=Sampler(512, 128))
    trained: Limits = dataclasses.field(default=Limits(2000, 1000))
    tested: Limits = dataclasses.field(default=Limits(1000, 1000))


class Features(NamedTuple):
    """The outputs from which all else follows.

    Attributes:
        levels: [(B, h, w, C), ...] of the pyramid, from fine to coarse.
        raw: of every anchor.
    """

    levels: list[jax.Array]
    raw: Raw


class Wanted(NamedTuple):
    """What is trained: the anchors that were chosen, and the regions."""

    anchors: Targets
    regions: Regions


class Losses(NamedTuple):
    """The losses: of proposals (L,) for each level, of regions (); their sum is what is trained."""

    rpn_classes: jax.Array
    rpn_boxes: jax.Array
    classes: jax.Array
    boxes: jax.Array
    masks: jax.Array

    @property
    def total(self) -> jax.Array:
        """The sum of all, ()."""
        return sum((loss.sum() for loss in self), jnp.zeros(()))


class MaskRCNN(Detector):
    """The detector: ``model(images)`` gives pyramid and proposals, ``loss`` and ``detect`` what follows from them.

    Args:
        backbone: a module whose ``features(images, key=key)`` gives maps of strides 4, 8, 16 and 32.
        widths: channels of these maps.
        pyramid: makes maps of these strides from a backbone that has one size.
        num_classes: K, without a background.
        width: channels of pyramid and convolutions.
        fc_width: channels of the box head.
        anchors: three a cell.
        settings: numbers of boxes.
        dtype: compute type of all these. Boxes, scores and losses are float32 or wider whatever it says.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        backbone: Any,
        widths: Sequence[int],
        pyramid: PlainPyramid | None,
        num_classes: int,
        *,
        width: int = 256,
        fc_width: int = 1024,
        anchors: Anchors = ANCHORS,
        settings: Settings = Settings(),
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(backbone, pyramid)
        layer = {"dtype": dtype, "rngs": rngs}
        self.num_classes = num_classes
        self.anchors = anchors
        self.settings = settings
        self.neck = FPN(widths, width, levels=len(anchors.strides), **layer)
        self.rpn = RPNHead(anchors.per_cell, width, width, **layer)
        self.box_head = BoxHead(num_classes, width, fc_width, size=BOX_SIZE, **layer)
        self.mask_head = MaskHead(num_classes, width, width, **layer)

    def outputs(self, maps: Sequence[jax.Array]) -> Features:
        """Return pyramid and proposals of the backbone's maps [(B, h, w, C), ...]."""
        levels = self.neck(maps)
        return Features(levels, Raw(*self.rpn(levels)))

    def loss(
        self,
        images: jax.Array,
        objects: Objects,
        padded: jax.Array | None = None,
        sizes: jax.Array | None = None,
        *,
        key: jax.Array,
    ) -> Losses:
        """Return the losses of a batch.

        Args:
            images: as for a call.
            objects: boxes (B, G, 4), labels and valid (B, G), masks (B, G, H, W).
            padded: (B, 2) integers: height and width of every image, each padded to a multiple of 32 by itself. Anchors
                of cells beyond take no part. None: the whole of ``images``.
            sizes: (B, 2) height and width of every image before padding, to which proposals are limited; None: as
                ``padded``.
            key: draws the anchors and regions that losses are taken of, and in training mode the drop path.

        Raises:
            UserError: objects without masks; otherwise as a call.
        """
        drop, first, second = jax.random.split(key, 3)
        padded = sizes_of(images, padded)
        features = self(images, key=drop)
        wanted = self.wanted(
            features,
            objects,
            padded,
            padded if sizes is None else sizes,
            lambda positive, negative: self.settings.anchors(positive, negative, first),
            lambda positive, negative: self.settings.regions(positive, negative, second),
        )
        return self.losses(features, objects, wanted)

    def detect(
        self,
        images: jax.Array,
        sizes: jax.Array | None = None,
        scales: jax.Array | None = None,
        *,
        limit: int = 100,
    ) -> Detections:
        """Return the objects found in a batch, with masks of 28x28 for :func:`evmamba_jax.detection.masks.paste`.

        Args:
            images: as for a call.
            sizes: (B, 2) height and width of every image before padding, to which boxes are limited; None: the whole of
                ``images``.
            scales: (B, 2) factors of width and height by which every picture was resized; boxes are then in
                the picture's pixels. None: in pixels of ``images``.
            limit: D, detections of an image at most.
        """
        features, sizes = self(images), sizes_of(images, sizes)
        found = proposals(features.raw, sizes, self.anchors, self.settings.tested)
        return self.detections(features, found, sizes, scales, limit=limit)

    def wanted(
        self,
        features: Features,
        objects: Objects,
        padded: jax.Array,
        sizes: jax.Array,
        choose_anchors: Choose,
        choose_regions: Choose,
    ) -> Wanted:
        """Return what is trained, without a gradient.

        Args:
            features: of the batch.
            objects: as for :meth:`loss`, and so the next two.
            padded: see there.
            sizes: see there.
            choose_anchors: takes some of the positive and negative anchors (B, N).
            choose_regions: takes some of the positive and negative candidates (B, G + P).
        """
        anchors = rpn.targets(features.raw, objects, padded, self.anchors)
        anchors = anchors.only(*choose_anchors(anchors.positive, anchors.negative))
        found = proposals(features.raw, sizes, self.anchors, self.settings.trained)
        of = candidates(objects, found.boxes, found.valid, MATCHER)
        chosen = choose_regions(of.index > 0, of.index == 0)
        return Wanted(anchors, regions(of, chosen, objects, self.settings.regions.count, self.num_classes))

    def losses(self, features: Features, objects: Objects, wanted: Wanted) -> Losses:
        """Return the losses of what is trained.

        Args:
            features: of the batch.
            objects: as for :meth:`loss`.
            wanted: of both.

        Raises:
            UserError: objects without masks.
        """
        if objects.masks is None:
            raise UserError("objects have no masks, and Mask R-CNN learns from them: give (B, G, H, W)")
        of = wanted.regions
        logits, deltas = self.of_boxes(features.levels, of.boxes)
        count = of.valid.sum()
        classes = mean_over(cross_entropy(logits, of.labels), of.valid, count)
        own = jnp.where(of.positive, of.labels, 0)  # the background has no box and no mask
        deltas = jnp.take_along_axis(deltas, own[..., None, None], 2)[:, :, 0]
        boxes = mean_over(l1(deltas, box_targets(of, objects)), of.positive[..., None], count)

        first = slice(self.settings.regions.positives)
        logits = self.of_masks(features.levels, of.boxes[:, first], own[:, first])
        each = binary_cross_entropy(logits, region_masks(of, objects, first, logits.shape[-1]))
        positive = of.positive[:, first]
        masks = mean_over(each, positive[..., None, None], positive.sum() * logits.shape[-1] ** 2)
        return Losses(*rpn.losses(features.raw, wanted.anchors), classes, boxes, masks)

    def detections(
        self,
        features: Features,
        found: Proposals,
        sizes: jax.Array,
        scales: jax.Array | None = None,
        *,
        limit: int = 100,
        score_threshold: float = 0.05,
        iou_threshold: float = 0.5,
    ) -> Detections:
        """Return the objects that proposals become.

        Of the pairs of a proposal and a class with a score above ``score_threshold`` those without a better box of the
        same class that overlaps them by more than ``iou_threshold``. Masks are of the boxes in ``images``.

        Args:
            features: of the batch.
            found: proposals.
            sizes: as for :meth:`detect`, and so the next two.
            scales: see there.
            limit: see there.
            score_threshold: from 0 to 1.
            iou_threshold: from 0 to 1.

        Source: mmdet 3.3.0 ``mmdet/models/roi_heads/standard_roi_head.py``.
        """
        logits, deltas = self.of_boxes(features.levels, found.boxes)
        scores = jnp.where(found.valid[..., None], jax.nn.softmax(logits)[..., :-1], 0)

        def of_image(boxes: jax.Array, deltas: jax.Array, scores: jax.Array, size: jax.Array) -> tuple:
            boxes = clip(CODER.decode(boxes[:, None], deltas), size)
            best = multiclass_nms(boxes, scores, score_threshold, iou_threshold, limit=limit)
            return best.boxes, best.scores, best.labels, best.count

        boxes, scores, labels, count = jax.vmap(of_image)(found.boxes, deltas, scores, sizes)
        masks = nnx.sigmoid(self.of_masks(features.levels, boxes, labels))
        if scales is not None:
            boxes = boxes / jnp.tile(scales, 2)[:, None].astype(boxes.dtype)
        there = jnp.arange(limit) < count[:, None]
        return Detections(boxes, scores, jnp.where(there, labels, -1), count, masks)

    def of_boxes(self, levels: Sequence[jax.Array], boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return logits (B, R, K + 1) and deltas (B, R, K, 4) of boxes (B, R, 4), float32 or wider."""
        logits, deltas = self.box_head(_regions(levels, boxes, BOX_SIZE))
        return _wide(logits, boxes), _wide(deltas, boxes)

    def of_masks(self, levels: Sequence[jax.Array], boxes: jax.Array, labels: jax.Array) -> jax.Array:
        """Return the logits (B, R, S, S) of the masks of boxes (B, R, 4) of these classes (B, R), float32 or wider."""
        logits = of_class(self.mask_head(_regions(levels, boxes, MASK_SIZE)), labels.ravel())
        return _wide(logits, boxes)


def _regions(levels: Sequence[jax.Array], boxes: jax.Array, size: int) -> jax.Array:
    """Return what a pyramid holds in boxes (B, R, 4): (B * R, S, S, C). The coarsest level is for proposals alone."""
    of_image = lambda levels, boxes: extract(levels, boxes, STRIDES[:-1], size)  # noqa: E731
    held = jax.vmap(of_image)(list(levels[:-1]), boxes)
    return held.reshape(-1, *held.shape[2:])


def _wide(x: jax.Array, boxes: jax.Array) -> jax.Array:
    """Return (B * R, ...) as (B, R, ...), float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(*boxes.shape[:2], *x.shape[1:])


def box_targets(of: Regions, objects: Objects) -> jax.Array:
    """Return the deltas (B, S, 4) from regions to their objects; 0 for those of background."""
    whole = jnp.asarray([0, 0, 1, 1], of.boxes.dtype)  # stands for boxes that have no object
    positive = of.positive[..., None]
    wanted = jnp.take_along_axis(objects.boxes, of.number[..., None], 1).astype(of.boxes.dtype)
    return CODER.encode(jnp.where(positive, of.boxes, whole), jnp.where(positive, wanted, whole))


def region_masks(of: Regions, objects: Objects, rows: slice, size: int) -> jax.Array:
    """Return the parts of their objects' masks that lie in these rows' boxes: (B, P, size, size) booleans."""
    cut = jax.vmap(lambda masks, number, boxes: mask_targets(masks, number, boxes, size))
    return cut(objects.masks, of.number[:, rows], of.boxes[:, rows])


def head_rows(model: MaskRCNN) -> list[Row]:
    """Return the official names of pyramid and heads, as mmdet's checkpoints have them."""
    return [
        *below("neck", "neck", fpn(len(model.neck.laterals), len(model.neck.extra))),
        *below("rpn", "rpn_head", rpn_head()),
        *below("box_head", "roi_head.bbox_head", box_head(BOX_SIZE)),
        *below("mask_head", "roi_head.mask_head", mask_head(len(model.mask_head.convs))),
    ]


register(MaskRCNN, lambda model: with_backbone(model, head_rows(model)))
