"""confusion.png: which classes are taken for which."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evmamba_jax.reports.drawing import BLUE, ORANGE, bars, drawable, draws_names, numbered, save, short

CONFUSION = "confusion.png"
_WRITTEN_OUT = 30  # classes up to which every number of the matrix can be read
_LISTED = 25


@draws_names
def confusion(workdir: str | os.PathLike, counts: np.ndarray, class_names: Sequence[str], whose: str) -> None:
    """Draw confusion.png: which classes are taken for which.

    Up to 30 classes the whole matrix, every number in it. Of more, which nobody could read, the most frequent
    mistakes and the weakest classes by name, beside the matrix of mistakes as a map, which shows groups of classes.

    Args:
        workdir: the work folder.
        counts: (K, K) images by true class and the class it was taken for.
        class_names: one a class.
        whose: what was evaluated, for the title.
    """
    right, images = counts.trace(), counts.sum()
    title = f"{drawable(whose)}\n{right:,} of {images:,} images right ({right / images:.1%})"
    if len(counts) <= _WRITTEN_OUT:
        figure = _whole_matrix(counts, class_names, title)
    else:
        figure = _mistakes(counts, class_names, title)
    save(figure, Path(workdir) / CONFUSION)


def _whole_matrix(counts: np.ndarray, class_names: Sequence[str], title: str) -> Figure:
    side = len(counts)
    images = counts.sum(1)
    shares = counts / np.maximum(images, 1)[:, None]
    right = np.eye(side, dtype=bool)
    figure = Figure(figsize=(max(6.5, 3.2 + 0.55 * side), max(4, 2.4 + 0.5 * side)), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    axes = figure.subplots()
    for cells, colour, top in ((right, BLUE, 1.0), (~right, ORANGE, max(0.1, shares[~right].max(initial=0)))):
        ramp = LinearSegmentedColormap.from_list("", ["white", colour])
        axes.imshow(np.ma.masked_where(~cells, shares), cmap=ramp, vmin=0, vmax=top, aspect="auto")
        for row, column in zip(*np.nonzero(cells & (counts > 0)), strict=True):
            shade = "white" if shares[row, column] > 0.7 * top else "black"
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=9, color=shade)
    names = [short(name, 18) for name in class_names]
    recalls = [f"{shares[k, k]:.0%}" if images[k] else "no images" for k in range(side)]
    long = max(map(len, names)) > 4
    axes.set_xticks(range(side), names, rotation=60 if long else 0, ha="right" if long else "center")
    axes.set_yticks(range(side), [f"{name} ({recall})" for name, recall in zip(names, recalls, strict=True)])
    axes.set_xlabel("taken for")
    axes.set_ylabel("true class (share that was right)")
    axes.tick_params(which="both", length=0, labelsize=9)
    for axis in (axes.xaxis, axes.yaxis):  # lines between the cells lead the eye
        axis.set_ticks(np.arange(side + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#e6e6e6", linewidth=0.6)
    axes.spines[:].set_visible(False)
    return figure


def _mistakes(counts: np.ndarray, class_names: Sequence[str], title: str) -> Figure:
    side = len(counts)
    images = counts.sum(1)
    mistakes = np.where(np.eye(side, dtype=bool), 0, counts)
    shares = mistakes / np.maximum(images, 1)[:, None]
    figure = Figure(figsize=(22, 9.5), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=14, x=0.01, ha="left")
    table, pairs, weak = figure.subplots(1, 3, width_ratios=[1.2, 0.55, 0.55])

    # A dot of a few pixels for a block of classes: a thousandth of the width could not be seen.
    block = -(-side // 200)
    starts = np.arange(0, side, block)
    blocks = np.add.reduceat(np.add.reduceat(mistakes, starts, 0), starts, 1)
    ramp = LinearSegmentedColormap.from_list("", ["white", "#f4b183", ORANGE, "#4a1405"])
    drawn = table.imshow(
        blocks,
        cmap=ramp,
        norm=PowerNorm(0.5, 0, max(1, blocks.max())),
        interpolation="nearest",
        extent=(-0.5, len(starts) * block - 0.5, len(starts) * block - 0.5, -0.5),
    )
    each = f"a dot: {block} x {block} classes" if block > 1 else "a dot: a class"
    table.set_title(f"all mistakes; {each}, in the order of the labels", loc="left", fontsize=12)
    ticks = np.arange(0, side, 10 * max(1, -(-side // 200)))
    table.set_yticks(ticks, [numbered(k, class_names, 20) for k in ticks], fontsize=8)
    table.set_xticks(ticks, [numbered(k, class_names, 20) for k in ticks], fontsize=8, rotation=90)
    table.set_xlabel("taken for")
    table.set_ylabel("true class")
    figure.colorbar(drawn, ax=table, shrink=0.5, label="images", ticks=MaxNLocator(integer=True))

    order = np.lexsort((-mistakes.ravel(), -shares.ravel()))[: min(_LISTED, np.count_nonzero(shares))]
    rows, columns = np.unravel_index(order, shares.shape)
    pairs.set_title("most frequent mistakes: true class → taken for", loc="left", fontsize=12)
    bars(
        pairs,
        [shares[row, column] for row, column in zip(rows, columns, strict=True)],
        [
            f"{numbered(row, class_names, 30)} → {numbered(column, class_names, 30)}"
            for row, column in zip(rows, columns, strict=True)
        ],
        [f"{mistakes[row, column]} of {images[row]}" for row, column in zip(rows, columns, strict=True)],
        ORANGE,
    )
    shown = np.flatnonzero(images)
    recalls = counts.diagonal()[shown] / images[shown]
    order = shown[np.lexsort((-images[shown], recalls))][:_LISTED]
    weak.set_title("weakest classes: share that was right; most taken for", loc="left", fontsize=12)
    bars(
        weak,
        [counts[k, k] / images[k] for k in order],
        [numbered(k, class_names, 34) for k in order],
        [f"{counts[k, k]} of {images[k]}; {_most_taken_for(mistakes[k], class_names)}" for k in order],
        BLUE,
    )
    return figure


def _most_taken_for(mistakes: np.ndarray, class_names: Sequence[str]) -> str:
    most = int(mistakes.argmax())
    return f"{mistakes[most]} as {numbered(most, class_names, 20)}" if mistakes[most] else ""
