"""Images beside what a classifier takes them for: predictions.png of a run, guesses about a user's images."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evmamba_jax.reports.drawing import BLUE, ORANGE, bars, blank, draws_names, numbered, save, short, show

_COLUMNS = 8


@draws_names
def predictions(
    workdir: str | os.PathLike,
    images: np.ndarray,
    labels: np.ndarray,
    predicted: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
) -> None:
    """Draw predictions.png: test images with truth and prediction, the wrong ones first, the surest of them first.

    Args:
        workdir: the work folder.
        images: (n, H, W, C) uint8, C 1 or 3; all are drawn.
        labels: (n,) integers, the true classes.
        predicted: (n,) integers, the classes found most probable.
        probabilities: (n,) of these, in 0..1.
        class_names: one a class.
    """
    wrong = predicted != labels
    # Of the wrong ones the surest lead, of the right ones the least sure: the telling cases of each.
    order = np.lexsort((np.where(wrong, -probabilities, probabilities), ~wrong))
    rows = max(1, -(-len(order) // _COLUMNS))
    figure = Figure(figsize=(1.75 * _COLUMNS, 2.15 * rows + 0.6), dpi=100, layout="constrained")
    figure.suptitle(f"{len(order)} test images: {wrong.sum()} wrong (✗), {(~wrong).sum()} right (✓)", fontsize=14)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axes in grid.flat:
        blank(axes)
    for axes, index in zip(grid.flat, order, strict=False):
        show(axes, images[index])
        found = f"{short(class_names[predicted[index]])} {probabilities[index]:.0%}"
        if wrong[index]:
            axes.set_title(f"✗ {found}\ntruth: {short(class_names[labels[index]])}", fontsize=9, color=ORANGE)
        else:
            axes.set_title(f"✓ {found}", fontsize=9, color=BLUE)
    save(figure, Path(workdir) / "predictions.png")


@draws_names
def guesses(
    path: str | os.PathLike,
    images: np.ndarray,
    titles: Sequence[str],
    probabilities: np.ndarray,
    class_names: Sequence[str],
    top: int,
) -> None:
    """Draw images, each beside bars of its most probable classes.

    Args:
        path: the picture, a .png file.
        images: (n, H, W, C) uint8, C 1 or 3; all are drawn.
        titles: one an image.
        probabilities: (n, K).
        class_names: K.
        top: how many classes.
    """
    columns = min(2, len(images))
    rows = -(-len(images) // columns)
    height = max(2.3, 0.6 + 0.36 * top)
    figure = Figure(figsize=(6.6 * columns, height * rows), dpi=110, layout="constrained")
    grid = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[0.55, 1] * columns)
    for axes in grid.flat:
        blank(axes)
    for index, (image, title, shares) in enumerate(zip(images, titles, probabilities, strict=True)):
        row, column = divmod(index, columns)
        seen, beside = grid[row, 2 * column : 2 * column + 2]
        show(seen, image)
        seen.set_title(short(title, 34), loc="left", fontsize=9)
        best = np.argsort(-shares, kind="stable")[:top]
        notes = [""] * len(best)
        bars(beside, shares[best], [numbered(k, class_names, 46) for k in best], notes, BLUE, longest=1.25)
    save(figure, Path(path))
