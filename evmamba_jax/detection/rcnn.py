"""What R-CNNs share: proposals of a pyramid, then class, box and mask of each, in one round or several.

Source: He et al., Mask R-CNN (arXiv:1703.06870); Cai and Vasconcelos, Cascade R-CNN (arXiv:1906.09756); mmdet 3.3.0.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from evmamba_jax.detection import proposals as rpn
from evmamba_jax.detection.anchors import Anchors
from evmamba_jax.detection.boxes import clip, has_area
from evmamba_jax.detection.detector import Detections, Detector, sizes_of
from evmamba_jax.detection.losses import binary_cross_entropy, cross_entropy, mean_over, of_class
from evmamba_jax.detection.masks import mask_targets
from evmamba_jax.detection.matching import Objects
from evmamba_jax.detection.nms import multiclass_nms
from evmamba_jax.detection.per_anchor import Raw
from evmamba_jax.detection.proposals import Limits, Proposals, Rules, proposals
from evmamba_jax.detection.regions import extract
from evmamba_jax.detection.rounds import Round, box_loss, of_label, refined
from evmamba_jax.detection.sampling import Chosen, Regions, Sampler, candidates, regions
from evmamba_jax.errors import UserError
from evmamba_jax.heads.fpn import FPN
from evmamba_jax.heads.rcnn import BoxHead, MaskHead, RPNHead

STRIDES = (4, 8, 16, 32, 64)
BOX_SIZE, MASK_SIZE = 7, 14  # sides of what the heads see of a region

Choose = Callable[[jax.Array, jax.Array], Chosen]


def anchors_of(octave_base_scale: float = 8.0) -> Anchors:
    """Return the anchors of R-CNNs, three a cell: the side of the square one, in strides."""
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

    def limited(self, *, regions: int | None = None, proposals: int | None = None) -> "Settings":
        """Return settings with other numbers of regions, a quarter of them of objects, and of proposals; None: these.

        Args:
            regions: that losses are taken of.
            proposals: of a level and of an image, in training and otherwise.
        """
        own: dict[str, Any] = {} if regions is None else {"regions": Sampler(regions, regions // 4)}
        if proposals is not None:
            own |= dict.fromkeys(("trained", "tested"), Limits(proposals, proposals))
        return dataclasses.replace(self, **own)


class Features(NamedTuple):
    """The outputs from which all else follows.

    Attributes:
        levels: [(B, h, w, C), ...] of the pyramid, from fine to coarse.
        raw: of every anchor.
    """

    levels: list[jax.Array]
    raw: Raw


@dataclasses.dataclass(frozen=True)
class Heads:
    """What makes the heads: of proposals, of boxes for each round, of masks."""

    rpn: Callable[..., RPNHead] = RPNHead
    box: Callable[..., BoxHead] = BoxHead
    mask: Callable[..., MaskHead] = MaskHead


class Losses(NamedTuple):
    """The losses: of proposals (L,) for each level, of regions (T,) for each round; their sum is what is trained.

    Masks have one for each round with a mask head.
    """

    rpn_classes: jax.Array
    rpn_boxes: jax.Array
    classes: jax.Array
    boxes: jax.Array
    masks: jax.Array

    @property
    def total(self) -> jax.Array:
        """The sum of all, ()."""
        return sum((loss.sum() for loss in self), jnp.zeros(()))


class Trained(NamedTuple):
    """What a round was trained with.

    Attributes:
        regions: S of an image.
        logits: (B, S, K + 1).
        boxes: (B, S, 4) the boxes of the regions' objects; of no meaning for background.
        masks: (B, P, M, M) booleans, of the first regions, which are those of objects; None without a mask head.
    """

    regions: Regions
    logits: jax.Array
    boxes: jax.Array
    masks: jax.Array | None


class RCNN(Detector):
    """The base of R-CNNs: ``model(images)`` gives pyramid and proposals, ``loss`` and ``detect`` what follows.

    Args:
        backbone: a module whose ``features(images, key=key)`` gives maps of strides 4, 8, 16 and 32.
        widths: channels of these maps.
        pyramid: makes maps of these strides from a backbone that has one size.
        num_classes: K, without a background.
        width: channels of pyramid and convolutions.
        fc_width: channels of the box heads.
        anchors: three a cell.
        settings: numbers of boxes; None: the published ones.
        init_std: deviation of the initial values of the head of proposals.
        dtype: compute type of all these. Boxes, scores and losses are float32 or wider whatever it says.
        rngs: source of the initial values.

    Attributes:
        rounds: how each is trained.
        rules: how proposals are.
        settings: numbers of boxes, the published ones unless given.
        masked: how many rounds, from the first on, have a mask head.
        heads: what makes these.
        fixed_count: whether losses of proposals are divided by the anchors that ``settings`` ask for, not by those that
            there are.
        gradient_share: how much of the gradient of box heads reaches the pyramid.
        mean_of: what is averaged over rounds into scores.
        masks_end: whether masks end with the image, not with what it is padded to.
    """

    losses = Losses._fields
    rounds: Sequence[Round]
    rules = Rules()
    settings = Settings()
    masked = 1
    heads = Heads()
    fixed_count = False
    gradient_share = 1.0
    mean_of: Literal["logits", "probabilities"] = "logits"
    masks_end = False

    def __init__(
        self,
        backbone: Any,
        widths: Sequence[int],
        pyramid: Any,
        num_classes: int,
        *,
        width: int = 256,
        fc_width: int = 1024,
        anchors: Anchors = ANCHORS,
        settings: Settings | None = None,
        init_std: float = 0.01,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(backbone, pyramid)
        layer = {"dtype": dtype, "rngs": rngs}
        self.num_classes = num_classes
        self.anchors = anchors
        if settings is not None:
            self.settings = settings
        self.neck = self.neck_of(widths, width, **layer)
        self.rpn = self.heads.rpn(anchors.per_cell, width, width, init_std=init_std, **layer)
        self.box_heads = nnx.List(
            self.heads.box(num_classes, width, fc_width, size=BOX_SIZE, **layer) for _ in self.rounds
        )
        self.mask_heads = nnx.List(self.heads.mask(num_classes, width, width, **layer) for _ in range(self.masked))

    def neck_of(self, widths: Sequence[int], width: int, **layer: Any) -> Any:
        """Return what makes levels of ``width`` channels of maps of ``widths``; None where maps are levels."""
        return FPN(widths, width, levels=len(STRIDES), **layer)

    @property
    def class_layers(self) -> tuple[str, ...]:
        """The paths of the layers that tell classes, or have something for each."""
        of_boxes = [f"box_heads.{i}.{layer}" for i, head in enumerate(self.box_heads) for layer in head.class_layers]
        return (*of_boxes, *(f"mask_heads.{i}.logits" for i in range(len(self.mask_heads))))

    def outputs(self, maps: Sequence[jax.Array]) -> Features:
        """Return pyramid and proposals of the backbone's maps [(B, h, w, C), ...]."""
        levels = list(maps) if self.neck is None else self.neck(maps)
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
            objects: boxes (B, G, 4), labels and valid (B, G), masks (B, G, H, W), packed or not.
            padded: (B, 2) integers: height and width of every image, each padded to a multiple of 32 by itself. Anchors
                of cells beyond take no part. None: the whole of ``images``.
            sizes: (B, 2) height and width of every image before padding, to which proposals are limited; None: as
                ``padded``.
            key: draws the anchors and regions that losses are taken of, and in training mode the drop path.

        Raises:
            UserError: objects without masks; otherwise as a call.
        """
        drop, first, *rest = jax.random.split(key, 2 + len(self.rounds))
        padded = sizes_of(images, padded)
        features = self(images, key=drop)
        by = lambda sampler, key: lambda positive, negative: sampler(positive, negative, key)  # noqa: E731
        losses, _ = self.trained(
            features,
            objects,
            padded,
            padded if sizes is None else sizes,
            by(self.settings.anchors, first),
            [
                by(self.settings.regions, key) if of.sampled else Chosen
                for of, key in zip(self.rounds, rest, strict=True)
            ],
        )
        return losses

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
        found = self.proposals(features, sizes, self.settings.tested)
        return self.detections(features, found, sizes, scales, limit=limit)

    def proposals(self, features: Features, sizes: jax.Array, limits: Limits) -> Proposals:
        """Return the proposals of a batch of images of ``sizes`` (B, 2)."""
        return proposals(features.raw, sizes, self.anchors, limits, self.rules.coder)

    def trained(
        self,
        features: Features,
        objects: Objects,
        padded: jax.Array,
        sizes: jax.Array,
        choose_anchors: Choose,
        choose_regions: Sequence[Choose],
    ) -> tuple[Losses, list[Trained]]:
        """Return the losses of a batch, and what each round was trained with.

        Args:
            features: of the batch.
            objects: as for :meth:`loss`, and so the next two.
            padded: see there.
            sizes: see there.
            choose_anchors: takes some of the positive and negative anchors (B, N).
            choose_regions: of each round: takes some of the positive and negative candidates (B, G + P), or (B, S) of
                a round that is not sampled.

        Raises:
            UserError: objects without masks.
        """
        if objects.masks is None:
            raise UserError("objects have no masks, and this detector learns from them: give (B, G, H, W)")
        anchors = rpn.targets(features.raw, objects, padded, sizes, self.anchors, self.rules)
        count = self.settings.anchors.count * len(sizes) if self.fixed_count else None
        anchors = anchors.only(*choose_anchors(anchors.positive, anchors.negative), count)
        boxes, _, valid = self.proposals(features, sizes, self.settings.trained)
        added = jnp.zeros_like(valid)
        of_classes, of_boxes, of_masks, stages = [], [], [], []
        for number, (one, choose) in enumerate(zip(self.rounds, choose_regions, strict=True)):
            valid = valid & (~added if one.sampled else has_area(boxes))
            every = candidates(objects, boxes, valid, one.matcher, add=one.sampled)
            chosen = choose(every.index > 0, every.index == 0)
            of = regions(every, chosen, objects, self.settings.regions.count, self.num_classes)
            logits, deltas = self.of_boxes(number, features.levels, of.boxes, of.valid)
            wanted = jnp.take_along_axis(objects.boxes, of.number[..., None], 1).astype(of.boxes.dtype)
            count = of.valid.sum()
            of_classes.append(one.weight * mean_over(cross_entropy(logits, of.labels), of.valid, count))
            of_boxes.append(one.weight * box_loss(one, of, of_label(deltas, of.labels), wanted, count))
            masks = None
            if number < self.masked:
                loss, masks = self._mask_loss(number, features.levels, of, objects.masks, sizes)
                of_masks.append(one.weight * loss)
            stages.append(Trained(of, logits, wanted, masks))
            # What the next round begins with.
            boxes = refined(one.coder, of.boxes, of.labels, logits, deltas, sizes)
            valid, added = of.valid, of.added
        of_proposals = rpn.losses(features.raw, anchors, self.rules)
        return Losses(*of_proposals, *map(jnp.stack, (of_classes, of_boxes, of_masks))), stages

    def _mask_loss(
        self, number: int, levels: Sequence[jax.Array], of: Regions, masks: jax.Array, sizes: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return the loss of the masks of a round's positive regions, and what these masks should be."""
        first = slice(self.settings.regions.positives)
        positive = of.positive[:, first]
        logits = self.of_masks(number, levels, of.boxes[:, first], jnp.where(positive, of.labels[:, first], 0))
        size = logits.shape[-1]
        cut = jax.vmap(lambda masks, index, boxes, ends: mask_targets(masks, index, boxes, size, ends))
        wanted = cut(masks, of.number[:, first], of.boxes[:, first], sizes if self.masks_end else None)
        each = binary_cross_entropy(logits, wanted)
        return mean_over(each, positive[..., None, None], positive.sum() * size**2), wanted

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

        Scores are the mean of all rounds', boxes those of the last round, masks the mean of all mask heads'. Of the
        pairs of a proposal and a class with a score above ``score_threshold`` those are left without a better box of
        the same class that overlaps them by more than ``iou_threshold``.

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
        rounds = self.rounds_of(features, found, sizes)
        rois, _, deltas = rounds[-1]
        logits = [one[1] for one in rounds]
        if self.mean_of == "logits":
            scores = jax.nn.softmax(_mean(logits))
        else:
            scores = _mean([jax.nn.softmax(one) for one in logits])
        scores = jnp.where(found.valid[..., None], scores[..., :-1], 0)
        coder = self.rounds[-1].coder

        def of_image(boxes: jax.Array, deltas: jax.Array, scores: jax.Array, size: jax.Array) -> tuple:
            boxes = clip(coder.decode(boxes[:, None], deltas), size)
            boxes = jnp.broadcast_to(boxes, (*scores.shape, 4))
            best = multiclass_nms(boxes, scores, score_threshold, iou_threshold, limit=limit)
            return best.boxes, best.scores, best.labels, best.count

        boxes, scores, labels, count = jax.vmap(of_image)(rois, deltas, scores, sizes)
        masks = _mean([nnx.sigmoid(self.of_masks(i, features.levels, boxes, labels)) for i in range(self.masked)])
        if scales is not None:
            boxes = boxes / jnp.tile(scales, 2)[:, None].astype(boxes.dtype)
        there = jnp.arange(limit) < count[:, None]
        return Detections(boxes, scores, jnp.where(there, labels, -1), count, masks)

    def rounds_of(
        self, features: Features, found: Proposals, sizes: jax.Array
    ) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
        """Return what every round begins with and says: boxes (B, P, 4), logits (B, P, K + 1), deltas (B, P, D, 4)."""
        boxes, rounds = found.boxes, []
        for number, one in enumerate(self.rounds):
            logits, deltas = self.of_boxes(number, features.levels, boxes, found.valid)
            rounds.append((boxes, logits, deltas))
            unknown = jnp.full(boxes.shape[:2], self.num_classes)
            boxes = refined(one.coder, boxes, unknown, logits, deltas, sizes)
        return rounds

    def of_boxes(
        self, number: int, levels: Sequence[jax.Array], boxes: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return a round's logits (B, R, K + 1) and deltas (B, R, D, 4) of boxes (B, R, 4), float32 or wider.

        D is K, or 1 where one box serves all classes.
        """
        held = _regions(levels, boxes, BOX_SIZE)
        if self.gradient_share < 1:
            still = jax.lax.stop_gradient(held)
            held = still + self.gradient_share * (held - still)
        logits, deltas = self.box_heads[number](held, valid.ravel())
        return _wide(logits, boxes), _wide(deltas, boxes)

    def of_masks(self, number: int, levels: Sequence[jax.Array], boxes: jax.Array, labels: jax.Array) -> jax.Array:
        """Return a round's logits (B, R, M, M) of the masks of boxes (B, R, 4) of classes (B, R), float32 or wider."""
        maps = self.mask_heads[number](_regions(levels, boxes, MASK_SIZE))
        return _wide(of_class(maps, labels.ravel()), boxes)


def _regions(levels: Sequence[jax.Array], boxes: jax.Array, size: int) -> jax.Array:
    """Return what a pyramid holds in boxes (B, R, 4): (B * R, S, S, C). The coarsest level is for proposals alone."""
    held = extract(levels[:-1], boxes, STRIDES[:-1], size)
    return held.reshape(-1, *held.shape[2:])


def _wide(x: jax.Array, boxes: jax.Array) -> jax.Array:
    """Return (B * R, ...) as (B, R, ...), float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(*boxes.shape[:2], *x.shape[1:])


def _mean(arrays: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, arrays) / len(arrays)
