"""The two pictures a run leaves in its work folder: curves.png and predictions.png."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evmamba_jax.training.reporting import METRICS, read_rows

# Two colours that the colour-blind tell apart; a cross or a tick says the same without them.
BLUE, ORANGE, GREY = "#0b66a8", "#c8501e", "#666666"
_COLUMNS = 8


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
        image = images[index]
        # An image that grows keeps its pixels, one that shrinks is smoothed.
        smoothing = "nearest" if max(image.shape[:2]) < 150 else "antialiased"
        image = image[..., 0] if image.shape[-1] == 1 else image
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation=smoothing)
        found = f"{_short(class_names[predicted[index]])} {probabilities[index]:.0%}"
        if wrong[index]:
            axes.set_title(f"✗ {found}\ntruth: {_short(class_names[labels[index]])}", fontsize=9, color=ORANGE)
        else:
            axes.set_title(f"✓ {found}", fontsize=9, color=BLUE)
    _save(figure, Path(workdir) / "predictions.png")


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


def _short(name: str) -> str:
    return name if len(name) <= 13 else name[:12] + "…"


def _save(figure: Figure, path: Path) -> None:
    beside = path.with_suffix(".tmp")
    figure.savefig(beside, format="png")
    beside.replace(path)
