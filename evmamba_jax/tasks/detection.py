"""Object detection: a box and a class for every object; average precision as COCO counts it.

``config.model`` names the backbone, ``config.detector`` what stands on it; the classes come from the data.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from evmamba_jax.config import Config
from evmamba_jax.data.dense_config import DetectionData
from evmamba_jax.data.mmdet import MULTIPLE, BoxedImages
from evmamba_jax.data.readers import Example, Size
from evmamba_jax.detection import Objects, create_detector
from evmamba_jax.detection.evaluate import (
    Found,
    Precision,
    Truth,
    average_precision,
    pairwise_overlaps,
    result_rows,
)
from evmamba_jax.errors import UserError
from evmamba_jax.ranges import chosen, free, ranged
from evmamba_jax.reports.detections import DETECTIONS, Boxes, draw_detections
from evmamba_jax.reports.per_class import PER_CLASS, per_cent, write_columns
from evmamba_jax.reports.precision_recall import PRECISION_RECALL, draw_precision_recall
from evmamba_jax.storage import written_whole
from evmamba_jax.tasks.base import Batch, Collector, Figure, Moment
from evmamba_jax.tasks.composed import Composed
from evmamba_jax.tasks.registry import register

PICTURED = 12  # images in detections.png
RESULTS = "detections.json"
_SHOWN = 0.3  # score from which on a detection is drawn, and counts as a mistake there


@dataclasses.dataclass
class DetectorConfig:
    """What stands on the backbone; see :func:`evmamba_jax.detection.create_detector`."""

    name: str = chosen("retinanet", ("retinanet",))
    width: int = ranged(256, least=1)
    octave_base_scale: float = ranged(4.0, above=0)  # side of the smallest square anchor of a level, in strides
    detections: int = ranged(100, least=1)  # of an image, at most


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
    """

    def __init__(self, *, pictures: bool):
        self.images: list[int] = []  # places in the split
        self.truths: list[Truth] = []
        self.found: list[Found] = []
        self.kept: list[tuple[int, int, np.ndarray, Truth, Found]] = []
        self._pictures = pictures
        self._precision: Precision | None = None

    def add(self, rows: Mapping[str, np.ndarray], answers: Any, own: slice) -> None:
        """Note a batch."""
        first = len(self.truths)
        shown = dict(
            zip(range(len(answers["weight"]))[own], zip(rows["image"], rows["size"], strict=True), strict=True)
        )
        for i in np.flatnonzero(answers["weight"]):
            there, count = answers["valid"][i], answers["found"]["count"][i]
            truth = Truth(*(answers[name][i][there] for name in ("boxes", "labels", "crowd", "area")))
            found = Found(*(answers["found"][name][i][:count] for name in ("boxes", "scores", "labels")))
            self.images.append(int(answers["index"][i]))
            self.truths.append(truth)
            self.found.append(found)
            if self._pictures and i in shown:
                image, (height, width) = shown[i]
                scale = answers["scale"][i]
                picture = image[:height, :width], truth.scaled(scale), found.scaled(scale)
                self.kept.append((mistakes(truth, found), first + int(i), *picture))
        self.kept.sort(key=lambda one: (-one[0], one[1]))
        del self.kept[PICTURED:]

    def precision(self, classes: int) -> Precision:
        """Return COCO's figures of all images; computed once."""
        if self._precision is None:
            self._precision = average_precision(self.truths, self.found, classes)
        return self._precision


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
    """A box and a class for every object."""

    chooses = Figure("AP", higher=True, title="AP on the test images (%)")
    parts = ("class_loss", "box_loss")
    needs, reads, part = DetectionConfig, DetectionData, "detector"
    example = "configs/digits_detection.py"
    kind, truth = "boxes", "boxes"
    layers = ("head.cls",)

    def create(self, **shared: Any) -> Any:
        """Return the detector."""
        return create_detector(**shared, octave_base_scale=self.about.octave_base_scale)

    @classmethod
    def validate(cls, config: Config) -> None:
        """Check what all such tasks do; the focal loss takes no weights."""
        super().validate(config)
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
        return source.with_objects() if split == data.train_split else source

    def reader(self) -> BoxedImages:
        """Return what prepares images and boxes."""
        return BoxedImages(self.data)

    # Training.

    def inputs(self, key: jax.Array, batch: Batch) -> dict[str, Any]:
        """Return normalised images and objects."""
        objects = Objects(batch["boxes"], batch["labels"], batch["valid"])
        own = -(-batch["size"] // MULTIPLE) * MULTIPLE
        return {"image": self.normalized(batch), "objects": objects, "padded": own}

    def loss(
        self, model: Any, inputs: dict[str, Any], key: jax.Array, moment: Moment
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss, and its two parts."""
        losses = model.loss(inputs["image"], inputs["objects"], inputs["padded"], key=key)
        return losses.total, {"class_loss": losses.classes.sum(), "box_loss": losses.boxes.sum()}

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
        return Found(*(answers[name][: int(answers["count"])] for name in Found._fields))

    def collector(self, *, pictures: bool) -> Collected:
        """Return what keeps all detections."""
        return Collected(pictures=pictures)

    def metrics(self, sums: Mapping[str, Any], collector: Collector | None) -> dict[str, float]:
        """Return COCO's figures: ``AP``, ``AP50``, ``AP75`` and the others that something stands for, per cent."""
        assert isinstance(collector, Collected)
        return dict(collector.precision(len(self.class_names)).figures)

    # For the reader.

    def told(self, figures: Mapping[str, float]) -> str:
        """Return an evaluation's figures in words."""
        words = f"AP {figures['AP']:.2f} %, AP50 {figures['AP50']:.2f} %"
        if "ema_AP" in figures:
            words += f"; moving average AP {figures['ema_AP']:.2f} %, AP50 {figures['ema_AP50']:.2f} %"
        return f"{words} ({figures['examples']:.0f} images)"

    def pictures(self, folder: Path, collector: Collector) -> None:
        """Draw detections.png, the images with the most mistakes first."""
        assert isinstance(collector, Collected)
        examples = []
        for wrong, _, image, truth, found in collector.kept:
            shown = found.scores >= _SHOWN
            boxes = Boxes(found.boxes[shown], found.labels[shown], found.scores[shown])
            line = f"found, {wrong} wrong or missed" if wrong else "found, all right"
            examples.append((image, Boxes(truth.boxes, truth.labels), boxes, line))
        draw_detections(folder / DETECTIONS, examples, self.class_names)

    def tables(
        self, folder: Path, sums: Mapping[str, Any], collectors: Mapping[str, Any], best: str, whose: str, source: Any
    ) -> list[str]:
        """Write AP of each class, empty for one without objects; results in COCO's form; and draw precision."""
        classes = len(self.class_names)
        names = {variant: "AP" if variant == "model" else f"{variant}_AP" for variant in collectors}
        columns = {names[v]: per_cent(collector.precision(classes).by_class) for v, collector in collectors.items()}
        write_columns(folder, self.class_names, columns)
        collected = collectors[best]
        rows = result_rows(collected.images, collected.found, source)
        with written_whole(folder / RESULTS) as file:
            file.write_text(json.dumps(rows))
        draw_precision_recall(folder / PRECISION_RECALL, collected.precision(classes).curves, self.class_names)
        return [PER_CLASS, RESULTS, PRECISION_RECALL]
