"""Why detections are wrong: TIDE's six kinds of errors, and the AP that each of them costs.

Source: Bolya et al., TIDE: A General Toolbox for Identifying Object Detection Errors (arXiv:2008.08115), sections 2 and
3; dbolya/tide ``tidecv/quantify.py`` and ``tidecv/ap.py``, version 1.0.1.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from evmamba_jax.detection.evaluate import Found, Truth, pairwise_overlaps

# In the order in which a wrong detection is asked for them; an object is missed where none of them would have found it.
KINDS = {
    "localisation": "the right class, overlap with the object from 0.1 to 0.5",
    "class": "another class, overlap with the object of 0.5 or more",
    "duplicate": "the right class and place, but a surer detection has the object",
    "background": "no overlap of more than 0.1 with any object",
    "both": "another class, overlap with the object from 0.1 to 0.5",
    "missed": "an object that no detection would find if its class or place were mended",
}
SIZES = ("small", "medium", "large")
_AREAS = (32**2, 96**2)  # pixels; COCO's: a medium object has as many as the first or more


class Mistake(NamedTuple):
    """A wrong detection, or an object that is missed.

    Attributes:
        kind: one of :data:`KINDS`.
        image: place of its image.
        detection: place among the image's detections; -1 of a missed object.
        object: place among the image's objects of the one that it is about; -1 of a background error.
        score: of the detection; 0 of a missed object.
        size: by the area of the object, of the box where there is none: an index into :data:`SIZES`.
    """

    kind: str
    image: int
    detection: int
    object: int
    score: float
    size: int


class DetectionErrors(NamedTuple):
    """The errors of a detector.

    Attributes:
        mistakes: all of them, image by image.
        ap: average precision at an overlap of 0.5, per cent. A class without objects that is found counts as 0.
        gains: AP that is gained where the errors of one kind alone are mended, percentage points, by kind; and by
            "false positives" and "false negatives" what is gained without the ones or the others.
        objects: int (3,), objects that are no crowds, by size.
        hit: int (3,), those of them that are found.
    """

    mistakes: list[Mistake]
    ap: float
    gains: dict[str, float]
    objects: np.ndarray
    hit: np.ndarray

    def counts(self, least: float = 0.0) -> dict[str, np.ndarray]:
        """Return how many errors there are of each kind by size, int (3,); of detections with a score or more."""
        table = {kind: np.zeros(len(SIZES), int) for kind in KINDS}
        for one in self.mistakes:
            if one.detection < 0 or one.score >= least:
                table[one.kind][one.size] += 1
        return table


class _Point(NamedTuple):
    """A detection as average precision sees it, and what becomes of it where its kind is mended."""

    label: int
    score: float
    right: bool
    kind: str = ""  # of an error
    mended: int = -1  # the class for which it is right then; -1 where it goes


def detection_errors(
    truths: Sequence[Truth], found: Sequence[Found], *, overlap: float = 0.5, background: float = 0.1, limit: int = 100
) -> DetectionErrors:
    """Return the errors of a detector, by kind.

    Args:
        truths: of each image.
        found: of each image.
        overlap: from which on a detection of the right class is right.
        background: up to which a detection is of no object.
        limit: detections of an image that count, the surest.
    """
    points: list[_Point] = []
    mistakes: list[Mistake] = []
    positives: dict[int, int] = {}
    missed: list[int] = []  # labels of objects
    unfound: list[int] = []  # labels of all objects without a right detection
    objects, hit = np.zeros(len(SIZES), int), np.zeros(len(SIZES), int)
    for image, (truth, one) in enumerate(zip(truths, found, strict=True)):
        judged = _judged(truth, one, overlap, background, limit)
        points += judged.points
        mistakes += [one._replace(image=image) for one in judged.mistakes]
        for number in np.flatnonzero(~truth.crowd):
            label, size = int(truth.labels[number]), size_of(truth.area[number])
            positives[label] = positives.get(label, 0) + 1
            objects[size] += 1
            hit[size] += number in judged.found
            if number not in judged.found:
                unfound.append(label)
            if number in judged.missed:
                missed.append(label)
    ap = _mean_ap(points, positives)
    gains = {}
    for kind in KINDS:
        mended = (_mended(point) if point.kind == kind else point for point in points)
        left = _without(positives, missed) if kind == "missed" else positives
        gains[kind] = max(_mean_ap([point for point in mended if point is not None], left) - ap, 0.0)
    surest = [point._replace(score=float(point.right)) for point in points]
    gains["false positives"] = _mean_ap(surest, positives) - ap
    gains["false negatives"] = _mean_ap(points, _without(positives, unfound)) - ap
    return DetectionErrors(mistakes, ap, gains, objects, hit)


def size_of(area: float) -> int:
    """Return the size of an object or a box of so many pixels, an index into :data:`SIZES`."""
    return int(np.searchsorted(_AREAS, area, side="right"))


class _Judged(NamedTuple):
    """What is said of one image."""

    points: list[_Point]
    mistakes: list[Mistake]  # of image 0
    found: set[int]  # places of objects
    missed: set[int]


def _judged(truth: Truth, found: Found, overlap: float, background: float, limit: int) -> _Judged:
    order = np.argsort(-found.scores, kind="stable")[:limit]
    numbers = np.flatnonzero(~truth.crowd)
    boxes, labels = found.boxes[order].astype(np.float64), found.labels[order]
    shares = pairwise_overlaps(boxes, truth.boxes[numbers].astype(np.float64))  # (D, G)
    same = labels[:, None] == truth.labels[numbers]
    own, other = shares * same, shares * ~same
    taken_by = _matched(own, overlap)  # (G,), -1 of an object that is free
    right = np.isin(np.arange(len(order)), taken_by)
    ignored = ~right & _in_crowds(boxes, labels, truth, overlap)

    points, mistakes, wanted = [], [], set()
    for d in np.flatnonzero(~ignored).tolist():
        label, score = int(labels[d]), float(found.scores[order[d]])
        if right[d]:
            points.append(_Point(label, score, True))
            continue
        kind, g = _kind(own[d], other[d], taken_by, overlap, background)
        about, mended = -1 if g < 0 else int(numbers[g]), -1
        if kind in ("localisation", "class") and taken_by[g] < 0 and g not in wanted:
            mended = int(truth.labels[about])  # the surest of those that would find it
            wanted.add(g)
        points.append(_Point(label, score, False, kind, mended))
        area = (boxes[d, 2:] - boxes[d, :2]).prod() if about < 0 else truth.area[about]
        mistakes.append(Mistake(kind, 0, int(order[d]), about, score, size_of(area)))
    free = [g for g in np.flatnonzero(taken_by < 0).tolist() if g not in wanted]
    mistakes += [Mistake("missed", 0, -1, int(numbers[g]), 0.0, size_of(truth.area[numbers[g]])) for g in free]
    return _Judged(points, mistakes, set(numbers[taken_by >= 0].tolist()), set(numbers[free].tolist()))


def _matched(own: np.ndarray, overlap: float) -> np.ndarray:
    """Return which detection has each object (G,): each, the surest first, takes the free one it overlaps most."""
    taken_by = np.full(own.shape[1], -1)
    for d, row in enumerate(own if own.shape[1] else ()):
        shares = np.where(taken_by < 0, row, 0)
        g = int(shares.argmax())
        if shares[g] >= overlap:
            taken_by[g] = d
    return taken_by


def _in_crowds(boxes: np.ndarray, labels: np.ndarray, truth: Truth, overlap: float) -> np.ndarray:
    """Return which detections (D,) lie by more than ``overlap`` of their area in a crowd of their class."""
    inside = np.zeros(len(boxes), bool)
    for crowd in np.flatnonzero(truth.crowd):
        low, high = np.maximum(boxes[:, :2], truth.boxes[crowd, :2]), np.minimum(boxes[:, 2:], truth.boxes[crowd, 2:])
        common = np.maximum(high - low, 0).prod(1)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        inside |= (common > overlap * area) & (labels == truth.labels[crowd])
    return inside


def _kind(
    own: np.ndarray, other: np.ndarray, taken_by: np.ndarray, overlap: float, background: float
) -> tuple[str, int]:
    """Return why a detection is wrong, and the object that it is about or -1.

    Args:
        own: (G,) overlaps with objects of its class, 0 for the others.
        other: (G,) the same of objects of other classes.
        taken_by: (G,) which detection has each object; -1 where none.
        overlap: as for :func:`detection_errors`.
        background: see there.
    """
    if not len(own):
        return "background", -1
    if background <= own.max() <= overlap:
        return "localisation", int(own.argmax())
    if other.max() >= overlap:
        return "class", int(other.argmax())
    used = np.where(taken_by >= 0, own, 0)
    if used.max() >= overlap:
        return "duplicate", int(used.argmax())
    shares = np.maximum(own, other)
    if shares.max() <= background:
        return "background", -1
    return "both", int(shares.argmax())


def _mended(point: _Point) -> _Point | None:
    return None if point.mended < 0 else _Point(point.mended, point.score, True)


def _without(positives: dict[int, int], labels: Iterable[int]) -> dict[int, int]:
    left = dict(positives)
    for label in labels:
        left[label] -= 1
    return left


def _mean_ap(points: Sequence[_Point], positives: dict[int, int]) -> float:
    """Return the mean AP of the classes that have an object or a detection, per cent; 0 where there is none."""
    by_class: dict[int, list[_Point]] = {label: [] for label, count in positives.items() if count}
    for point in points:
        by_class.setdefault(point.label, []).append(point)
    found = [_ap(own, positives.get(label, 0)) for label, own in by_class.items()]
    return 100 * float(np.mean(found)) if found else 0.0


def _ap(points: Sequence[_Point], positives: int) -> float:
    """Return the mean of the precisions at recalls of 0, 0.01, ..., 1, as COCO takes them."""
    if not positives or not points:
        return 0.0
    order = np.argsort([-point.score for point in points], kind="stable")
    right = np.array([point.right for point in points])[order].cumsum()
    precision = np.maximum.accumulate((right / np.arange(1, len(points) + 1))[::-1])[::-1]
    places = np.searchsorted(right / positives, np.arange(101) / 100, side="left")
    return float(np.append(precision, 0.0)[places].mean())
