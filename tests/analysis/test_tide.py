"""Kinds of detection errors and what they cost, against a slow classification of its own and TIDE's own figures."""

import numpy as np
import pytest

from evmamba_jax.analysis.tide import KINDS, detection_errors
from evmamba_jax.detection.evaluate import Found, Truth


def truth_of(*objects, crowd=()) -> Truth:
    """Return objects given as (label, x0, y0, x1, y1)."""
    table = np.array(objects, float).reshape(-1, 5)
    area = (table[:, 3] - table[:, 1]) * (table[:, 4] - table[:, 2])
    return Truth(table[:, 1:], table[:, 0].astype(int), np.isin(np.arange(len(table)), crowd), area)


def found_of(*detections) -> Found:
    """Return detections given as (score, label, x0, y0, x1, y1)."""
    table = np.array(detections, float).reshape(-1, 6)
    return Found(table[:, 2:], table[:, 0], table[:, 1].astype(int))


def overlap(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def test_a_hand_made_image_of_each_kind():
    truth = truth_of(
        (0, 0, 0, 40, 40),  # found twice
        (1, 100, 0, 140, 40),  # found with a poor box
        (2, 200, 0, 240, 40),  # taken for class 0
        (3, 300, 0, 420, 120),  # nobody comes near
        (4, 500, 0, 520, 20),  # another class overlaps it a little
        (0, 0, 200, 100, 300),  # a crowd
        crowd=(5,),
    )
    found = found_of(
        (0.9, 0, 0, 0, 40, 38),
        (0.8, 0, 1, 0, 40, 40),  # duplicate
        (0.7, 1, 100, 0, 140, 16),  # localisation, 0.4
        (0.6, 0, 200, 0, 240, 40),  # class
        (0.5, 2, 600, 0, 700, 100),  # background
        (0.45, 2, 500, 0, 520, 6),  # both, 0.3
        (0.4, 0, 10, 210, 40, 240),  # in the crowd of its class
        (0.3, 1, 10, 210, 40, 240),  # in a crowd of another class, of which nothing counts: background
    )
    errors = detection_errors([truth], [found])
    kinds = {(one.kind, one.detection, one.object) for one in errors.mistakes}
    assert kinds == {
        ("duplicate", 1, 0),
        ("localisation", 2, 1),
        ("class", 3, 2),
        ("background", 4, -1),
        ("both", 5, 4),
        ("background", 7, -1),
        ("missed", -1, 3),
        ("missed", -1, 4),
    }
    counts = errors.counts()
    assert {kind: counts[kind].tolist() for kind in KINDS} == {
        "localisation": [0, 1, 0],
        "class": [0, 1, 0],
        "duplicate": [0, 1, 0],
        "background": [1, 0, 1],  # the boxes themselves: 30 x 30 and 100 x 100
        "both": [1, 0, 0],
        "missed": [1, 0, 1],
    }
    assert {kind: int(count.sum()) for kind, count in errors.counts(0.55).items()} == {
        **dict.fromkeys(("localisation", "class", "duplicate"), 1),
        **{"background": 0, "both": 0, "missed": 2},
    }
    assert errors.objects.tolist() == [1, 3, 1]
    assert errors.hit.tolist() == [0, 1, 0]
    # One of five classes is found, its first detection is right: precision 1 up to a recall of 1 before the mistakes.
    assert errors.ap == pytest.approx(100 / 5)
    assert errors.gains["localisation"] == pytest.approx(100 / 5)


def scenes(count: int, seed: int, *, crowds: bool = True) -> tuple[list[Truth], list[Found]]:
    """Return random images with objects of four classes, and detections that are near them, or of nothing.

    Class 4 has no object. All numbers are whole or of two digits, and all scores differ.
    """
    rng = np.random.default_rng(seed)
    truths, found = [], []
    scores = rng.permutation(100_000)[: 40 * count] / 100_000
    for i in range(count):
        objects = []
        for _ in range(rng.integers(0, 6)):
            x, y, side = rng.integers(0, 150), rng.integers(0, 150), rng.integers(10, 110)
            objects.append((rng.integers(0, 4), x, y, x + side, y + rng.integers(10, 110)))
        truth = truth_of(*objects, crowd=[0] if crowds and len(objects) > 4 else ())
        detections = []
        for _ in range(rng.integers(0, 12)):
            if objects and rng.random() < 0.8:
                label, *box = objects[rng.integers(len(objects))]
                width, height = box[2] - box[0], box[3] - box[1]
                moved = np.array(box) + rng.normal(0, 0.15, 4) * [width, height, width, height]
                box = np.round([*moved[:2], *np.maximum(moved[2:], moved[:2] + 2)], 2)
                label = label if rng.random() < 0.7 else rng.integers(0, 5)
            else:
                x, y = rng.integers(0, 200, 2)
                label, box = rng.integers(0, 5), (x, y, x + 30, y + 25)
            detections.append((scores[40 * i + len(detections)], label, *box))
        truths.append(truth)
        found.append(found_of(*sorted(detections, key=lambda one: -one[0])))
    return truths, found


def slow(truth: Truth, found: Found) -> list[tuple[str, int]]:
    """Return the kind of every detection that is wrong, and of missed objects, by the definitions in words."""
    objects = [g for g in range(len(truth.labels)) if not truth.crowd[g]]
    owner: dict[int, int] = {}
    right, kinds, would_find = set(), [], set()
    for d in range(len(found.labels)):
        free = [g for g in objects if g not in owner and truth.labels[g] == found.labels[d]]
        best = max(free, key=lambda g: overlap(found.boxes[d], truth.boxes[g]), default=None)
        if best is not None and overlap(found.boxes[d], truth.boxes[best]) >= 0.5:
            owner[best] = d
            right.add(d)
    for d in range(len(found.labels)):
        if d in right:
            continue
        box, label = found.boxes[d], found.labels[d]
        area = (box[2] - box[0]) * (box[3] - box[1])
        crowds = [truth.boxes[g] for g in range(len(truth.labels)) if truth.crowd[g] and truth.labels[g] == label]
        inside = [
            max(min(box[2], c[2]) - max(box[0], c[0]), 0) * max(min(box[3], c[3]) - max(box[1], c[1]), 0)
            for c in crowds
        ]
        if any(common > area / 2 for common in inside):
            continue
        shares = {g: overlap(box, truth.boxes[g]) for g in objects}
        own = {g: share for g, share in shares.items() if truth.labels[g] == label}
        others = {g: share for g, share in shares.items() if truth.labels[g] != label}
        if own and 0.1 <= max(own.values()) <= 0.5:
            kinds.append(("localisation", d))
            would_find |= {max(own, key=lambda g: own[g])}
        elif others and max(others.values()) >= 0.5:
            kinds.append(("class", d))
            would_find |= {max(others, key=lambda g: others[g])}
        elif any(share >= 0.5 and g in owner for g, share in own.items()):
            kinds.append(("duplicate", d))
        elif max(shares.values(), default=0) <= 0.1:
            kinds.append(("background", d))
        else:
            kinds.append(("both", d))
    return kinds + [("missed", g) for g in objects if g not in owner and g not in would_find]


def test_kinds_are_those_of_a_slow_classification():
    truths, found = scenes(120, 0)
    errors = detection_errors(truths, found)
    seen = set()
    for image, (truth, one) in enumerate(zip(truths, found, strict=True)):
        own = [mistake for mistake in errors.mistakes if mistake.image == image]
        told = sorted((one.kind, one.object if one.kind == "missed" else one.detection) for one in own)
        assert told == sorted(slow(truth, one))
        seen |= {one.kind for one in own}
    assert seen == set(KINDS)


# What tidecv 1.0.1 says of ``scenes(120, 0, crowds=False)``: counts and dAP. It takes detections in crowds for errors,
# which its later source does not, so there are none.
TIDE = {
    "localisation": (60, 5.000022071590635),
    "class": (108, 5.312188700940286),
    "duplicate": (126, 2.1848168127809053),
    "background": (207, 6.049336690794398),
    "both": (23, 0.5865085001250918),
    "missed": (103, 8.736784522450112),
}
TIDE_OVERALL = {"false positives": 26.605032288604075, "false negatives": 14.170079879633615}


def test_counts_and_gains_are_those_of_tide_itself():
    errors = detection_errors(*scenes(120, 0, crowds=False))
    assert errors.ap == pytest.approx(18.345462760900876)
    counts = errors.counts()
    assert {kind: int(counts[kind].sum()) for kind in KINDS} == {kind: count for kind, (count, _) in TIDE.items()}
    gains = {kind: gain for kind, (_, gain) in TIDE.items()} | TIDE_OVERALL
    assert errors.gains == {kind: pytest.approx(gain) for kind, gain in gains.items()}


def test_an_image_without_objects_or_detections():
    nothing = found_of()
    errors = detection_errors([truth_of(), truth_of((0, 0, 0, 9, 9))], [found_of((0.5, 1, 0, 0, 9, 9)), nothing])
    assert [one.kind for one in errors.mistakes] == ["background", "missed"]
    assert errors.ap == 0
    assert detection_errors([truth_of()], [nothing]).ap == 0
