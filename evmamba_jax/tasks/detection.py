"""Object detection: a box, a class and perhaps a mask for every object; average precision as COCO counts it.

``config.model`` names the backbone, ``config.detector`` what stands on it; the classes come from the data.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np

from evmamba_jax.config import Config
from evmamba_jax.data.dense_config import DetectionData
from evmamba_jax.data.detectron2 import SquareImages
from evmamba_jax.data.mmdet import MULTIPLE, BoxedImages
from evmamba_jax.data.opencv import size_of
from evmamba_jax.data.outlines import resized, to_text
from evmamba_jax.data.readers import Example, Size
from evmamba_jax.detection import Objects, create_detector
from evmamba_jax.detection.create import DETECTORS
from evmamba_jax.detection.evaluate import (
    Found,
    Precision,
    Truth,
    average_precision,
    pairwise_overlaps,
    result_rows,
)
from evmamba_jax.detection.masks import PackedMasks, outlines
from evmamba_jax.errors import UserError
from evmamba_jax.ranges import chosen, free, ranged
from evmamba_jax.reports.detections import DETECTIONS, Boxes, draw_detections
from evmamba_jax.reports.per_class import PER_CLASS, per_cent, write_columns
from evmamba_jax.reports.precision_recall import MASK_PRECISION_RECALL, PRECISION_RECALL, draw_precision_recall
from evmamba_jax.storage import written_whole
from evmamba_jax.tasks.base import Batch, Collector, Figure, Moment
from evmamba_jax.tasks.composed import Composed
from evmamba_jax.tasks.registry import register

PICTURED = 12  # images in detections.png
RESULTS = "detections.json"
_SHOWN = 0.3  # score from which on a detection is drawn, and counts as a mistake there
# What the log calls the losses of detectors.
_PARTS = {
    "rpn_classes": "rpn_class_loss",
    "rpn_boxes": "rpn_box_loss",
    "classes": "class_loss",
    "boxes": "box_loss",
    "masks": "mask_loss",
}


@dataclasses.dataclass
class DetectorConfig:
    """What stands on the backbone; see :func:`evmamba_jax.detection.create_detector`."""

    name: str = chosen("retinanet", DETECTORS)
    width: int = ranged(256, least=1)
    # Side of the smallest square anchor of a level, in strides; None: the official one, 4 of retinanet, 8 of others.
    octave_base_scale: float | None = ranged(None, above=0)
    detections: int = ranged(100, least=1)  # of an image, at most
    init_std: float = ranged(0.01, above=0)
    # Of detectors with regions; None: the official number. Channels of the box heads; regions of an image that losses
    # are taken of, a quarter of them of objects; proposals of a level and of an image.
    fc_width: int | None = ranged(None, least=1)
    regions: int | None = ranged(None, least=4)
    proposals: int | None = ranged(None, least=1)


@dataclasses.dataclass
class DetectionConfig(Config):
    """A run that detects."""

    task: str = free("detection")
    # Of its own class, so that the command line knows its fields.
    data: DetectionData = dataclasses.field(default_factory=DetectionData)  # pyrefly: ignore[bad-override-mutable-attribute]
    detector: DetectorConfig = dataclasses.field(default_factory=DetectorConfig)


class Collected(Collector):
    """Objects and detections of all images; with pictures the images with the most mistakes.

    Args:
        pictures: whether to keep any.
        outlined: the split that is evaluated, where detections have masks: outlines come from its records.
    """

    def __init__(self, *, pictures: bool, outlined: Any = None):
        self.images: list[int] = []  # places in the split
        self.truths: list[Truth] = []
        self.found: list[Found] = []
        self.kept: list[tuple[int, int, np.ndarray, Truth, Found]] = []
        self._pictures, self._outlined = pictures, outlined
        self._precision: dict[str, Precision] = {}

    def add(self, rows: Mapping[str, np.ndarray], answers: Any, own: slice) -> None:
        """Note a batch."""
        first = len(self.truths)
        shown = dict(
            zip(range(len(answers["weight"]))[own], zip(rows["image"], rows["size"], strict=True), strict=True)
        )
        for i in np.flatnonzero(answers["weight"]):
            there, index = answers["valid"][i], int(answers["index"][i])
            truth = Truth(*(answers[name][i][there] for name in ("boxes", "labels", "crowd", "area")))
            size = None
            if self._outlined is not None:
                size = tuple(self._outlined.sizes[index].tolist())
                listed = self._outlined[index]["segmentations"]
                truth = truth._replace(outlines=[one if one is None else to_text(one, *size) for one in listed])
            found = _found(
                {name: None if array is None else array[i] for name, array in answers["found"].items()}, size
            )
            self.images.append(index)
            self.truths.append(truth)
            self.found.append(found)
            if self._pictures and i in shown:
                image, (height, width) = shown[i]
                scale = answers["scale"][i]
                picture = image[:height, :width], truth.scaled(scale), found.scaled(scale)
                self.kept.append((mistakes(truth, found), first + int(i), *picture))
        self.kept.sort(key=lambda one: (-one[0], one[1]))
        del self.kept[PICTURED:]

    def precision(self, classes: int, of: Literal["boxes", "outlines"] = "boxes") -> Precision:
        """Return COCO's figures of all images, of boxes or of masks; computed once."""
        if of not in self._precision:
            self._precision[of] = average_precision(self.truths, self.found, classes, of)
        return self._precision[of]


def _found(answers: Mapping[str, Any], size: Size | None) -> Found:
    """Return the detections of an image, as ``Detections`` has them; masks become outlines in pixels of ``size``."""
    boxes, scores, labels = (answers[name][: int(answers["count"])] for name in ("boxes", "scores", "labels"))
    if answers["masks"] is None or size is None:
        return Found(boxes, scores, labels)
    return Found(boxes, scores, labels, outlines(answers["masks"][: len(boxes)], boxes, *size))


def mistakes(truth: Truth, found: Found) -> int:
    """Return how many objects of an image are missed, and how many shown detections are none of them.

    A detection is right where an object of its class that no better one has taken overlaps it by half. Crowds are
    neither missed nor found.
    """
    objects = np.flatnonzero(~truth.crowd)
    free_ones, wrong = list(range(len(objects))), 0
    shown = found.scores >= _SHOWN  # in order of falling scores
    shares = pairwise_overlaps(found.boxes[shown], truth.boxes[objects])
    same = found.labels[shown][:, None] == truth.labels[objects]
    for overlaps in np.where(same, shares, 0.0):
        if free_ones and overlaps[free_ones].max() >= 0.5:
            del free_ones[int(np.argmax(overlaps[free_ones]))]
        else:
            wrong += 1
    return wrong + len(free_ones)


@register("detection")
class Detection(Composed):
    """A box and a class for every object, with some detectors a mask too."""

    chooses = Figure("AP", higher=True, title="AP on the test images (%)")
    needs, reads, part = DetectionConfig, DetectionData, "detector"
    example = "configs/digits_detection.py"
    kind, truth = "boxes", "boxes"

    def __init__(self, config: Config, class_names: Sequence[str]):
        super().__init__(config, class_names)
        self.parts = tuple(_PARTS[loss] for loss in self.model.losses)
        self.layers = self.model.class_layers
        self._evaluated: Any = None

    def create(self, **shared: Any) -> Any:
        """Return the detector."""
        own = ("octave_base_scale", "init_std", "fc_width", "regions", "proposals")
        return create_detector(**shared, **{name: getattr(self.about, name) for name in own})

    @classmethod
    def validate(cls, config: Config) -> None:
        """Check what all such tasks do, and the side of a square; the focal loss takes no weights."""
        super().validate(config)
        data = cast(DetectionData, config.data)
        if data.augment == "large_scale_jitter" and data.scale[0] != data.scale[1]:
            raise UserError(
                f"config.data.scale={tuple(data.scale)} with augment='large_scale_jitter': its two numbers must be the "
                "same, the side of a square, e.g. 1024,1024"
            )
        if config.loss.class_weights:
            raise UserError("config.loss.class_weights is for label maps and images of one class: leave it out")

    @classmethod
    def open_source(cls, config: Config, split: str, work: Path | None = None) -> Any:
        """Open a split: to train, of its images that show objects."""
        source, data = super().open_source(config, split, work), cast(DetectionData, config.data)
        most = source.most_objects
        if most > data.max_objects:
            raise UserError(
                f"config.data.max_objects is {data.max_objects}, and an image of {source.name}, split {source.split}, "
                f"has {most} objects: set it to {most} or more"
            )
        name = cast(DetectionConfig, config).detector.name
        if has_masks(name) and not source.has_outlines:
            others = ", ".join(other for other in DETECTORS if not has_masks(other))
            raise UserError(
                f"{source.name}, split {source.split}, has no outlines of objects, and {name} learns from them: prepare"
                f" it from a file with a segmentation of each, or set config.detector.name to one for boxes: {others}"
            )
        return source.with_objects() if split == data.train_split else source

    def reader(self) -> BoxedImages:
        """Return what prepares images, boxes and, where the detector learns from them, masks."""
        reader = SquareImages if self.data.augment == "large_scale_jitter" else BoxedImages
        return reader(self.data, has_masks(self.about.name))

    def see_evaluated(self, source: Any) -> None:
        """Note the split."""
        self._evaluated = source

    # Training.

    def inputs(self, key: jax.Array, batch: Batch) -> dict[str, Any]:
        """Return normalised images and objects."""
        masks = PackedMasks(batch["masks"]) if has_masks(self.about.name) else None
        objects = Objects(batch["boxes"], batch["labels"], batch["valid"], masks)
        own = -(-batch["size"] // MULTIPLE) * MULTIPLE
        return {"image": self.normalized(batch), "objects": objects, "padded": own, "size": batch["size"]}

    def loss(
        self, model: Any, inputs: dict[str, Any], key: jax.Array, moment: Moment
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss, and its parts: of all levels and rounds together."""
        losses = model.loss(inputs["image"], inputs["objects"], inputs["padded"], inputs["size"], key=key)
        return losses.total, {_PARTS[name]: loss.sum() for name, loss in losses._asdict().items()}

    # Evaluation.

    def evaluate(self, model: Any, batch: Batch, *, detailed: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return no sums, and the objects and detections of each image."""
        kept = ("boxes", "labels", "valid", "crowd", "area", "scale", "weight", "index")
        return {}, {name: batch[name] for name in kept} | {"found": self.answers(model, batch)}

    def answers(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """Return the detections of each image, in pixels of the picture: the fields of ``Detections`` by name."""
        limit = self.about.detections
        return model.detect(self.normalized(batch), batch["size"], batch["scale"], limit=limit)._asdict()

    def alone(self, reader: BoxedImages, pixels: np.ndarray) -> Example:
        """Return a picture without objects."""
        nothing = np.zeros(0)
        return reader.evaluate(
            (pixels, {"boxes": np.zeros((0, 4)), "labels": nothing, "crowd": nothing, "area": nothing})
        )

    def found(self, answers: Mapping[str, np.ndarray], size: Size) -> Found:
        """Return the detections of a picture, the surest first."""
        return _found(answers, size)

    def collector(self, *, pictures: bool) -> Collected:
        """Return what keeps all detections."""
        return Collected(pictures=pictures, outlined=self._evaluated if has_masks(self.about.name) else None)

    def metrics(self, sums: Mapping[str, Any], collector: Collector | None) -> dict[str, float]:
        """Return COCO's figures: ``AP``, ``AP50``, ``AP75`` and the others that something stands for, per cent.

        Where there are masks also ``mask_AP`` and so on, those of masks.
        """
        assert isinstance(collector, Collected)
        figures = dict(collector.precision(len(self.class_names)).figures)
        if has_masks(self.about.name):
            of_masks = collector.precision(len(self.class_names), "outlines").figures
            figures |= {f"mask_{name}": figure for name, figure in of_masks.items()}
        return figures

    # For the reader.

    def told(self, figures: Mapping[str, float]) -> str:
        """Return an evaluation's figures in words."""
        words = _told(figures, "")
        if "ema_AP" in figures:
            words += f"; moving average {_told(figures, 'ema_')}"
        return f"{words} ({figures['examples']:.0f} images)"

    def pictures(self, folder: Path, collector: Collector) -> None:
        """Draw detections.png, the images with the most mistakes first."""
        assert isinstance(collector, Collected)
        examples = []
        for wrong, _, image, truth, found in collector.kept:
            sure = found.above(_SHOWN)
            size, drawn = size_of(image), (truth.outlines, sure.outlines)
            masks = [None if own is None else resized(own, *size) for own in drawn]
            boxes = Boxes(sure.boxes, sure.labels, sure.scores, masks[1])
            line = f"found, {wrong} wrong or missed" if wrong else "found, all right"
            examples.append((image, Boxes(truth.boxes, truth.labels, masks=masks[0]), boxes, line))
        draw_detections(folder / DETECTIONS, examples, self.class_names)

    def tables(
        self, folder: Path, sums: Mapping[str, Any], collectors: Mapping[str, Any], best: str, whose: str, source: Any
    ) -> list[str]:
        """Write AP of each class, empty for one without objects; results in COCO's form; and draw precision."""
        classes = len(self.class_names)
        kinds: dict[str, Literal["boxes", "outlines"]] = {"": "boxes"}
        if has_masks(self.about.name):
            kinds["mask_"] = "outlines"
        columns = {
            f"{'' if variant == 'model' else f'{variant}_'}{prefix}AP": per_cent(
                collector.precision(classes, of).by_class
            )
            for variant, collector in collectors.items()
            for prefix, of in kinds.items()
        }
        write_columns(folder, self.class_names, columns)
        collected = collectors[best]
        rows = result_rows(collected.images, collected.found, source)
        with written_whole(folder / RESULTS) as file:
            file.write_text(json.dumps(rows))
        drawings = dict(zip((PRECISION_RECALL, MASK_PRECISION_RECALL), kinds.values(), strict=False))
        for name, of in drawings.items():
            draw_precision_recall(folder / name, collected.precision(classes, of).curves, self.class_names)
        return [PER_CLASS, RESULTS, *drawings]


def has_masks(detector: str) -> bool:
    """Return whether a detector, by its name, learns from masks and finds some."""
    return "masks" in DETECTORS[detector][0].losses


def _told(figures: Mapping[str, float], prefix: str) -> str:
    words = f"AP {figures[f'{prefix}AP']:.2f} %, AP50 {figures[f'{prefix}AP50']:.2f} %"
    if f"{prefix}mask_AP" in figures:
        words += f", of masks AP {figures[f'{prefix}mask_AP']:.2f} %, AP50 {figures[f'{prefix}mask_AP50']:.2f} %"
    return words
