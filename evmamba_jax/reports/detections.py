"""Boxes and masks on images: the truth beside what was found, or what was found alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from evmamba_jax.reports.drawing import BLUE, COLOURS, ORANGE, blank, draws_names, save, short, show

DETECTIONS = "detections.png"
_COLUMNS = 4
_PANEL = 7.0  # inches of the width of a picture by itself


class Boxes(NamedTuple):
    """Boxes (N, 4), x0 y0 x1 y1, their labels (N,), and their scores (N,) or None for the truth.

    Attributes:
        masks: (N, H, W) booleans, as large as the image, or None.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    masks: np.ndarray | None = None


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
        blank(axes)
    for (image, truth, found, line), pair in zip(examples, grid.reshape(-1, 2), strict=False):
        for axes, boxes, colour, title in zip(pair, (truth, found), (BLUE, ORANGE), ("truth", line), strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(title, loc="left", fontsize=9, color=colour)
            draw_masks(axes, boxes, COLOURS)
            draw_boxes(axes, boxes, colour, class_names)
    save(figure, path)


@draws_names
def draw_found_boxes(path: Path, examples: Sequence[tuple[np.ndarray, Boxes, str]], class_names: Sequence[str]) -> None:
    """Draw pictures with the boxes and masks found, in a colour for each class.

    Args:
        path: the picture, a .png file.
        examples: image uint8 (H, W, 3), what was found, and a title, for each.
        class_names: one a label.
    """
    columns = min(2, len(examples))
    rows = [examples[start : start + columns] for start in range(0, len(examples), columns)]
    heights = [
        max(np.clip(_PANEL * image.shape[0] / image.shape[1], 1.6, 8.0) for image, *_ in row) + 0.4 for row in rows
    ]
    figure = Figure(figsize=(_PANEL * columns, sum(heights)), dpi=100, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        blank(axes)
    for axes, (image, found, title) in zip(grid.flat, examples, strict=False):
        show(axes, image)
        axes.set_anchor("NW")
        axes.set_title(short(title, 60), loc="left", fontsize=9)
        assert found.scores is not None
        draw_masks(axes, found, [COLOURS[int(label) % len(COLOURS)] for label in found.labels])
        for label in np.unique(found.labels):
            own = found.labels == label
            colour = COLOURS[int(label) % len(COLOURS)]
            draw_boxes(axes, Boxes(found.boxes[own], found.labels[own], found.scores[own]), colour, class_names)
    save(figure, path)


def draw_masks(axes: Axes, boxes: Boxes, colours: Sequence[str]) -> None:
    """Draw masks, where there are some, half transparent over an image, in colours that come again and again.

    Where masks overlap, the first is seen, which is the surest.
    """
    if boxes.masks is None or not len(boxes.masks):
        return
    over = np.zeros((*boxes.masks.shape[1:], 4))
    for number in reversed(range(len(boxes.masks))):
        over[boxes.masks[number]] = to_rgba(colours[number % len(colours)], 0.5)
    axes.imshow(over, interpolation="nearest")


def draw_boxes(axes: Axes, boxes: Boxes, colour: str, class_names: Sequence[str]) -> None:
    """Draw boxes with their names and, where they have one, scores."""
    scores = [None] * len(boxes.labels) if boxes.scores is None else boxes.scores
    for (x0, y0, x1, y1), label, score in zip(boxes.boxes, boxes.labels, scores, strict=True):
        axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.4))
        words = short(class_names[int(label)]) + ("" if score is None else f" {score:.0%}")
        box = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.8}
        at_top = y0 < 0.04 * axes.get_ylim()[0]  # above the box the words would not be seen
        axes.text(x0, y0, words, fontsize=7, color="white", va="top" if at_top else "bottom", bbox=box, clip_on=True)
