"""Object detection: a box and a class for every object; average precision as COCO counts it.

``config.model`` names the backbone, ``config.detector`` what stands on it; the classes come from the data.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from evmamba_jax.config import Config
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.dense_config import DetectionData
from evmamba_jax.data.device import normalize
from evmamba_jax.data.readers import Example
from evmamba_jax.data.scenes import COUNTS, SIDE
from evmamba_jax.detection import Objects, create_detector
from evmamba_jax.detection.evaluate import Found, Precision, Truth, average_precision
from evmamba_jax.ranges import chosen, free, ranged
from evmamba_jax.reports.detections import DETECTIONS, Boxes, draw_detections
from evmamba_jax.reports.per_class import PER_CLASS, per_cent, write_columns
from evmamba_jax.tasks.base import Batch, Collector, Figure, Moment
from evmamba_jax.tasks.composed import Composed
from evmamba_jax.tasks.registry import register

PICTURED = 12  # images in detections.png
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
    data: DetectionData = dataclasses.field(default_factory=DetectionData)
    detector: DetectorConfig = dataclasses.field(default_factory=DetectorConfig)


@dataclasses.dataclass(frozen=True)
class SceneBoxes:
    """Scenes as ``image`` uint8 (H, W, 3), ``boxes`` float32 (G, 4), ``labels`` int32 (G,) and ``valid`` bool (G,).

    Attributes:
        config: of the data.
    """

    config: DataConfig

    def decode(self, record: Any) -> Any:
        """Return the scene."""
        return record["scene"]

    def train(self, decoded: Any, rng: np.random.Generator) -> Example:
        """Return it as it is: a digit mirrored or cut is none."""
        del rng
        return self.evaluate(decoded)

    def evaluate(self, decoded: Any) -> Example:
        """Return picture and objects, these padded."""
        padding = COUNTS[1] - len(decoded.labels)
        padded = lambda array: np.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))  # noqa: E731
        valid = np.arange(COUNTS[1]) < len(decoded.labels)
        return {
            "image": decoded.image,
            "boxes": padded(decoded.boxes),
            "labels": padded(decoded.labels),
            "valid": valid,
        }

    def blank(self, *, training: bool) -> Example:
        """Return a black image without objects."""
        most = COUNTS[1]
        return {
            "image": np.zeros((SIDE, SIDE, 3), np.uint8),
            "boxes": np.zeros((most, 4), np.float32),
            "labels": np.zeros(most, np.int32),
            "valid": np.zeros(most, bool),
        }


class Collected(Collector):
    """Objects and detections of all images; with pictures the images with the most mistakes.

    Args:
        pictures: whether to keep any.
    """

    def __init__(self, *, pictures: bool):
        self.truths: list[Truth] = []
        self.found: list[Found] = []
        self.kept: list[tuple[int, int, np.ndarray, Truth, Found]] = []
        self._pictures = pictures
        self._precision: Precision | None = None

    def add(self, rows: Mapping[str, np.ndarray], answers: Any, own: slice) -> None:
        """Note a batch."""
        first = len(self.truths)
        images = dict(zip(range(len(answers["weight"]))[own], rows["image"], strict=True))
        for i in np.flatnonzero(answers["weight"]):
            there, count = answers["valid"][i], answers["count"][i]
            truth = Truth(answers["boxes"][i][there], answers["labels"][i][there])
            parts = (answers["found"][name][i][:count] for name in ("boxes", "scores", "labels"))
            self.truths.append(truth)
            self.found.append(Found(*parts))
            if self._pictures and i in images:
                wrong = mistakes(truth, self.found[-1])
                self.kept.append((wrong, first + int(i), images[i], truth, self.found[-1]))
        self.kept.sort(key=lambda one: (-one[0], one[1]))
        del self.kept[PICTURED:]

    def precision(self, classes: int) -> Precision:
        """Return COCO's figures of all images; computed once."""
        if self._precision is None:
            self._precision = average_precision(self.truths, self.found, classes)
        return self._precision


def mistakes(truth: Truth, found: Found) -> int:
    """Return how many objects of an image are missed, and how many shown detections are none of them.

    A detection is right where an object of its class that no better one has taken overlaps it by half.
    """
    free_ones, wrong = list(range(len(truth.labels))), 0
    for box, score, label in zip(*found, strict=True):  # in order of falling scores
        if score < _SHOWN:
            continue
        shares = [_overlap(box, truth.boxes[g]) if truth.labels[g] == label else 0.0 for g in free_ones]
        if shares and max(shares) >= 0.5:
            del free_ones[int(np.argmax(shares))]
        else:
            wrong += 1
    return wrong + len(free_ones)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    both = float(sides.prod())
    return both / float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both)


@register("detection")
class Detection(Composed):
    """A box and a class for every object."""

    chooses = Figure("AP", higher=True, title="AP on the test images (%)")
    parts = ("class_loss", "box_loss")
    needs, part, example = DetectionConfig, "detector", "configs/digits_detection.py"
    truth = "boxes"

    def create(self, **shared: Any) -> Any:
        """Return the detector."""
        return create_detector(**shared, octave_base_scale=self.about.octave_base_scale)

    def reader(self) -> SceneBoxes:
        """Return what takes scenes apart."""
        return SceneBoxes(self.config.data)

    # Training.

    def inputs(self, key: jax.Array, batch: Batch) -> dict[str, Any]:
        """Return normalised images and objects."""
        data = self.config.data
        objects = Objects(batch["boxes"], batch["labels"], batch["valid"])
        return {"image": normalize(batch["image"], data.mean, data.std), "objects": objects}

    def loss(
        self, model: Any, inputs: dict[str, Any], key: jax.Array, moment: Moment
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss, and its two parts."""
        losses = model.loss(inputs["image"], inputs["objects"], key=key)
        return losses.total, {"class_loss": losses.classes.sum(), "box_loss": losses.boxes.sum()}

    # Evaluation.

    def evaluate(self, model: Any, batch: Batch, *, detailed: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return no sums, and the objects and detections of each image."""
        data = self.config.data
        found = model.detect(normalize(batch["image"], data.mean, data.std), limit=self.about.detections)
        answers = {name: batch[name] for name in ("boxes", "labels", "valid", "weight")}
        return {}, answers | {"found": found._asdict(), "count": found.count}

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
        self, folder: Path, sums: Mapping[str, Any], collectors: Mapping[str, Any], best: str, whose: str
    ) -> list[str]:
        """Write per_class.csv: AP of each class; empty for one without objects."""
        classes = len(self.class_names)
        names = {variant: "AP" if variant == "model" else f"{variant}_AP" for variant in collectors}
        columns = {names[v]: per_cent(collector.precision(classes).by_class) for v, collector in collectors.items()}
        write_columns(folder, self.class_names, columns)
        return [PER_CLASS]
