"""Pictures: curves.png and predictions.png of a run, confusion.png of an evaluation, guesses about a user's images."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evmamba_jax.storage import written_whole
from evmamba_jax.training.reporting import METRICS, read_rows

# Two colours that the colour-blind tell apart; a cross or a tick says the same without them.
BLUE, ORANGE, GREY = "#0b66a8", "#c8501e", "#666666"
_COLUMNS = 8
CONFUSION = "confusion.png"
_WRITTEN_OUT = 30  # classes up to which every number of the matrix can be read
_LISTED = 25


def curves(workdir: str | os.PathLike) -> None:
    """Draw curves.png from metrics.jsonl: training loss, top-1 of raw and EMA weights, learning rate, over the steps.

    Args:
        workdir: the work folder; an evaluation is a line with ``top1`` or ``ema_top1`` (per cent), a training line one
            with ``lr``.
    """
    workdir = Path(workdir)
    rows = read_rows(workdir / METRICS)
    training = [row for row in rows if "lr" in row]

    figure = Figure(figsize=(13, 4), dpi=120, layout="constrained")
    loss, top1, rate = figure.subplots(1, 3)
    _plot(loss, "training loss", {"": _series(training, "loss")}, marker="")
    scores = {"weights": _series(rows, "top1"), "moving average": _series(rows, "ema_top1")}
    _plot(
        top1, "top-1 on the test images (%)", {name: series for name, series in scores.items() if series[0]}, marker="o"
    )
    _plot(rate, "learning rate", {"": _series(training, "lr")}, marker="")
    rate.set_ylim(0, 1.08 * max(_series(training, "lr")[1], default=0) or 1)
    rate.yaxis.set_major_formatter("{x:g}")

    last = max(rows, key=lambda row: row["step"], default=None)
    for axes in (loss, top1, rate):
        axes.set_xlim(0, 1.02 * max(1, last["step"]) if last else 1)
        if last and last["epoch"] > 0:
            per_step = last["epoch"] / last["step"]
            epochs = axes.secondary_xaxis("top", functions=(lambda x, k=per_step: x * k, lambda x, k=per_step: x / k))
            epochs.set_xlabel("epoch", color=GREY)
            epochs.tick_params(colors=GREY)
            epochs.spines["top"].set_visible(False)
    _save(figure, workdir / "curves.png")


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
        axes.axis("off")
    for axes, index in zip(grid.flat, order, strict=False):
        _show(axes, images[index])
        found = f"{_short(class_names[predicted[index]])} {probabilities[index]:.0%}"
        if wrong[index]:
            axes.set_title(f"✗ {found}\ntruth: {_short(class_names[labels[index]])}", fontsize=9, color=ORANGE)
        else:
            axes.set_title(f"✓ {found}", fontsize=9, color=BLUE)
    _save(figure, Path(workdir) / "predictions.png")


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
    title = f"{whose}\n{right:,} of {images:,} images right ({right / images:.1%})"
    if len(counts) <= _WRITTEN_OUT:
        figure = _whole_matrix(counts, class_names, title)
    else:
        figure = _mistakes(counts, class_names, title)
    _save(figure, Path(workdir) / CONFUSION)


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
    names = [_short(name, 18) for name in class_names]
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
    table.set_yticks(ticks, [_numbered(k, class_names, 20) for k in ticks], fontsize=8)
    table.set_xticks(ticks, [_numbered(k, class_names, 20) for k in ticks], fontsize=8, rotation=90)
    table.set_xlabel("taken for")
    table.set_ylabel("true class")
    figure.colorbar(drawn, ax=table, shrink=0.5, label="images", ticks=MaxNLocator(integer=True))

    order = np.lexsort((-mistakes.ravel(), -shares.ravel()))[: min(_LISTED, np.count_nonzero(shares))]
    rows, columns = np.unravel_index(order, shares.shape)
    pairs.set_title("most frequent mistakes: true class → taken for", loc="left", fontsize=12)
    _bars(
        pairs,
        [shares[row, column] for row, column in zip(rows, columns, strict=True)],
        [
            f"{_numbered(row, class_names, 30)} → {_numbered(column, class_names, 30)}"
            for row, column in zip(rows, columns, strict=True)
        ],
        [f"{mistakes[row, column]} of {images[row]}" for row, column in zip(rows, columns, strict=True)],
        ORANGE,
    )
    shown = np.flatnonzero(images)
    recalls = counts.diagonal()[shown] / images[shown]
    order = shown[np.lexsort((-images[shown], recalls))][:_LISTED]
    weak.set_title("weakest classes: share that was right; most taken for", loc="left", fontsize=12)
    _bars(
        weak,
        [counts[k, k] / images[k] for k in order],
        [_numbered(k, class_names, 34) for k in order],
        [f"{counts[k, k]} of {images[k]}; {_most_taken_for(mistakes[k], class_names)}" for k in order],
        BLUE,
    )
    return figure


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
        axes.axis("off")
    for index, (image, title, shares) in enumerate(zip(images, titles, probabilities, strict=True)):
        row, column = divmod(index, columns)
        seen, bars = grid[row, 2 * column : 2 * column + 2]
        _show(seen, image)
        seen.set_title(_short(title, 34), loc="left", fontsize=9)
        best = np.argsort(-shares, kind="stable")[:top]
        notes = [""] * len(best)
        _bars(bars, shares[best], [_numbered(k, class_names, 46) for k in best], notes, BLUE, longest=1.25)
    _save(figure, Path(path))


def _bars(
    axes: Axes,
    shares: Sequence[float] | np.ndarray,
    names: Sequence[str],
    notes: Sequence[str],
    colour: str,
    longest: float | None = None,
) -> None:
    """Draw horizontal bars from the top down, each under its name and with a note at its end.

    ``longest`` is the share that would reach the right border; the notes have half the width when not given.
    """
    places = np.arange(len(shares))
    axes.barh(places + 0.22, shares, height=0.4, color=colour)
    for place, share, name, note in zip(places, shares, names, notes, strict=True):
        axes.text(0, place - 0.02, name, fontsize=8.5, va="bottom")
        axes.text(share, place + 0.22, f" {share:.0%}  {note}", fontsize=8, va="center", color=GREY)
    axes.set_ylim(len(shares) - 0.3, -0.7)
    axes.set_xlim(0, longest or 1.9 * max(shares, default=1) or 1)
    axes.axis("off")


def _most_taken_for(mistakes: np.ndarray, class_names: Sequence[str]) -> str:
    most = int(mistakes.argmax())
    return f"{mistakes[most]} as {_numbered(most, class_names, 20)}" if mistakes[most] else ""


def _numbered(k: int | np.integer, class_names: Sequence[str], length: int) -> str:
    """Return a class's number and name: names alone may be the same, ImageNet's two cranes for instance."""
    name = _short(class_names[int(k)], length)
    return name if name == str(k) else f"{k} {name}"


def _series(rows: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Return steps and values of a figure, where it was logged and is finite."""
    points = [(row["step"], row[name]) for row in rows if np.isfinite(row.get(name, np.nan))]
    return [step for step, _ in points], [value for _, value in points]


def _plot(axes: Axes, title: str, series: dict[str, tuple[list[float], list[float]]], marker: str) -> None:
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    drawn = 0
    for (name, (steps, values)), colour in zip(series.items(), (BLUE, ORANGE), strict=False):
        alone = "o" if len(steps) == 1 else marker  # a line through one point is invisible
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=alone, markersize=4, label=name)
        drawn += len(steps)
    if len(series) > 1:
        axes.legend(frameon=False, loc="best")
    if not drawn:
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color=GREY)


def _show(axes: Axes, image: np.ndarray) -> None:
    """Show uint8 (H, W, C); one that grows keeps its pixels, one that shrinks is smoothed."""
    smoothing = "nearest" if max(image.shape[:2]) < 150 else "antialiased"
    image = image[..., 0] if image.shape[-1] == 1 else image
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation=smoothing)


def _short(name: str, length: int = 13) -> str:
    """Return a name, or its first synonym, cut to a length."""
    name = name if len(name) <= length else name.split(", ")[0]
    return name if len(name) <= length else name[: length - 1] + "…"


def _save(figure: Figure, path: Path) -> None:
    with written_whole(path) as beside:
        figure.savefig(beside, format="png")
