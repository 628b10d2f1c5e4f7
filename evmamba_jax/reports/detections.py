"""Boxes on images: the truth beside what was found."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from evmamba_jax.reports.drawing import BLUE, ORANGE, draws_names, save, short

DETECTIONS = "detections.png"
_COLUMNS = 4


class Boxes(NamedTuple):
    """Boxes (N, 4), x0 y0 x1 y1, their labels (N,), and their scores (N,) or None for the truth."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None


@draws_names
def draw_detections(
    path: Path, examples: Sequence[tuple[np.ndarray, Boxes, Boxes, str]], class_names: Sequence[str]
) -> None:
    """Draw each image twice: with the truth, and with what was found.

    Args:
        path: the picture, a .png file.
        examples: image uint8 (H, W, 3), truth, found, and a line about the image.
        class_names: one a label.
    """
    rows = -(-len(examples) // (_COLUMNS // 2))
    figure = Figure(figsize=(3.3 * _COLUMNS, 3.5 * max(rows, 1)), dpi=100, layout="constrained")
    grid = figure.subplots(max(rows, 1), _COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for (image, truth, found, line), pair in zip(examples, grid.reshape(-1, 2), strict=False):
        for axes, boxes, colour, title in zip(pair, (truth, found), (BLUE, ORANGE), ("truth", line), strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(title, loc="left", fontsize=9, color=colour)
            draw_boxes(axes, boxes, colour, class_names)
    save(figure, path)


def draw_boxes(axes: Axes, boxes: Boxes, colour: str, class_names: Sequence[str]) -> None:
    """Draw boxes with their names and, where they have one, scores."""
    scores = [None] * len(boxes.labels) if boxes.scores is None else boxes.scores
    for (x0, y0, x1, y1), label, score in zip(boxes.boxes, boxes.labels, scores, strict=True):
        axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.4))
        words = short(class_names[int(label)]) + ("" if score is None else f" {score:.0%}")
        box = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.8}
        axes.text(x0, y0, words, fontsize=7, color="white", va="bottom", bbox=box, clip_on=True)
