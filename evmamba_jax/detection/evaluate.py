"""Average precision of boxes and of masks, by COCO's own code.

pycocotools and not a faster copy: it is what all published figures were made with.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from evmamba_jax.errors import UserError

# The figures of COCOeval.stats, in its order.
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class Truth(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes: (G, 4), x0 y0 x1 y1 in pixels.
        labels: (G,) integers from 0.
        crowd: (G,) booleans: detections inside a crowd are neither right nor wrong.
        area: (G,) pixels that the object covers, by which it counts as small, medium or large.
        outlines: (G,) run lengths in COCO's text, or None; None where only boxes count.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    area: np.ndarray
    outlines: Sequence[dict[str, Any] | None] | None = None

    def scaled(self, scale: np.ndarray) -> "Truth":
        """Return the objects of the image with width and height times ``scale``; outlines stay."""
        return self._replace(boxes=self.boxes * np.tile(scale, 2), area=self.area * np.prod(scale))


class Found(NamedTuple):
    """The detections of an image, the surest first.

    Attributes:
        boxes: (D, 4), x0, y0, x1, y1 in pixels.
        scores: (D,) from 0 to 1.
        labels: (D,) integers from 0.
        outlines: (D,) run lengths in COCO's text; None of a detector that finds boxes alone.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    outlines: Sequence[dict[str, Any]] | None = None

    def above(self, score: float) -> "Found":
        """Return the detections with this score or more."""
        sure = self.scores >= score
        outlines = self.outlines
        if outlines is not None:
            outlines = [outline for outline, kept in zip(outlines, sure, strict=True) if kept]
        return Found(self.boxes[sure], self.scores[sure], self.labels[sure], outlines)

    def scaled(self, scale: np.ndarray) -> "Found":
        """Return the detections of the image with width and height times ``scale``; outlines stay."""
        return self._replace(boxes=self.boxes * np.tile(scale, 2))


class Precision(NamedTuple):
    """What an evaluation found.

    Attributes:
        figures: by the names of ``FIGURES``, per cent; without those that nothing stands for, such as AP of large
            objects where there are none.
        by_class: AP of each class (K,), per cent; NaN of a class without objects.
        curves: precision (T, R, K) at overlaps of .5 to .95 and recalls of 0 to 1, 0 to 1; NaN as before.
    """

    figures: dict[str, float]
    by_class: np.ndarray
    curves: np.ndarray


def average_precision(
    truths: Sequence[Truth], found: Sequence[Found], classes: int, of: Literal["boxes", "outlines"] = "boxes"
) -> Precision:
    """Return COCO's figures for images with their objects and detections.

    Args:
        truths: of each image.
        found: of each image.
        classes: K.
        of: whether boxes or masks are to overlap. Objects without an outline do not count among masks, and the size of
            a detection is that of its mask then.

    Raises:
        UserError: pycocotools is not installed.

    Source: pycocotools ``COCOeval``: means over overlaps of .5 to .95, 101 recalls, at most 100 detections an image.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise UserError("average precision needs pycocotools: pip install 'evmamba-jax[detection]'") from error

    with contextlib.redirect_stdout(io.StringIO()):
        coco: Any = COCO()
        coco.dataset = {
            # COCO's code asks for sizes, which only polygons need.
            "images": [{"id": i, "height": 0, "width": 0} for i in range(len(truths))],
            "categories": [{"id": k} for k in range(classes)],
            "annotations": [annotation for i, truth in enumerate(truths) for annotation in _annotations(i, truth, of)],
        }
        for number, annotation in enumerate(coco.dataset["annotations"], 1):
            annotation["id"] = number
        coco.createIndex()
        rows = [row for i, one in enumerate(found) for row in _results(i, one, of)]
        if not rows or not coco.dataset["annotations"]:
            nothing = {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
            by_class = np.where(_counted(coco.dataset["annotations"], classes), 0.0, np.nan)
            return Precision(nothing, by_class, np.broadcast_to(by_class, (10, 101, classes)))
        evaluation: Any = COCOeval(coco, coco.loadRes(rows), "bbox" if of == "boxes" else "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = zip(FIGURES, evaluation.stats, strict=True)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # overlaps, recalls, classes; all areas, 100 detections
    curves = np.where(precision > -1, precision, np.nan)
    figures = {name: 100 * float(value) for name, value in stats if value > -1}
    return Precision(figures, 100 * curves.mean((0, 1)), curves)


def _annotations(image: int, truth: Truth, of: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of an image as COCO's code takes them."""
    for number, (box, label, crowd, area) in enumerate(zip(*truth[:4], strict=True)):
        about = {"image_id": image, "category_id": int(label), "area": float(area), "iscrowd": int(crowd)}
        if of == "boxes":
            yield about | {"bbox": corner_and_size(box)}
        elif truth.outlines is not None and truth.outlines[number] is not None:
            yield about | {"segmentation": truth.outlines[number]}


def _results(image: int, found: Found, of: str) -> Iterator[dict[str, Any]]:
    """Yield the detections of an image as COCO's code takes them."""
    for number, (box, score, label) in enumerate(zip(*found[:3], strict=True)):
        about = {"image_id": image, "category_id": int(label), "score": float(score)}
        if of == "boxes":
            yield about | {"bbox": corner_and_size(box)}
        elif found.outlines is not None:
            yield about | {"segmentation": found.outlines[number]}


def _counted(annotations: Sequence[Mapping[str, Any]], classes: int) -> np.ndarray:
    """Return which classes have an object that is no crowd, booleans (K,)."""
    labels = [annotation["category_id"] for annotation in annotations if not annotation["iscrowd"]]
    return np.bincount(np.array(labels, int), minlength=classes) > 0


def corner_and_size(box: np.ndarray) -> list[float]:
    """Return x, y, width and height of a box (4,), x0 y0 x1 y1, pixels."""
    x0, y0, x1, y1 = map(float, box)
    return [x0, y0, x1 - x0, y1 - y0]


def result_rows(images: Sequence[int], found: Sequence[Found], source: Any) -> list[dict[str, Any]]:
    """Return detections in COCO's form, for any of its tools.

    Args:
        images: places in the split.
        found: in each of them.
        source: the split: its records have an ``image_id``, and it has ``category_ids``.
    """
    return [
        {"image_id": image_id, "category_id": source.category_ids[label], **row}
        for image_id, one in zip((source[i]["image_id"] for i in images), found, strict=True)
        for label, row in zip(one.labels, _rows(one), strict=True)
    ]


def named_rows(name: str, found: Found, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the detections of a picture that belongs to no data set.

    Args:
        name: of its file.
        found: in it.
        class_names: in label order.
    """
    return [
        {"file_name": name, "category_name": class_names[label], **row}
        for label, row in zip(found.labels, _rows(found), strict=True)
    ]


def _rows(found: Found) -> Iterator[dict[str, Any]]:
    """Yield box, score and, where there is one, outline of each detection as COCO's files have them."""
    for number, (box, score) in enumerate(zip(found.boxes, found.scores, strict=True)):
        row = {"bbox": [round(side, 3) for side in corner_and_size(box)], "score": float(score)}
        yield row if found.outlines is None else row | {"segmentation": found.outlines[number]}


def pairwise_overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the intersection over union of each box of ``a`` (N, 4) with each of ``b`` (M, 4): (N, M)."""
    a, b = a[:, None], b[None]
    both = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0).prod(-1)
    areas = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)
    return both / np.maximum(areas - both, 1e-9)
