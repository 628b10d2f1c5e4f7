"""curves.png: how a run went."""

import os
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evmamba_jax.reports.drawing import COLOURS, GREY, draws_names, save
from evmamba_jax.reports.writer import METRICS, read_rows


@draws_names
def curves(workdir: str | os.PathLike, figure: str, title: str, parts: Sequence[str] = ()) -> None:
    """Draw curves.png from metrics.jsonl: training loss, a figure of the evaluations, learning rate, over the steps.

    Args:
        workdir: the work folder; a training line is one with ``lr``.
        figure: name of the evaluations' figure; with ``ema_`` before it, the moving average's.
        title: what the figure is.
        parts: names of parts of the loss, drawn beside it.
    """
    workdir = Path(workdir)
    rows = read_rows(workdir / METRICS)
    training = [row for row in rows if "lr" in row]

    drawing = Figure(figsize=(13, 4), dpi=120, layout="constrained")
    loss, scores, rate = drawing.subplots(1, 3)
    _plot(loss, "training loss", {name: _series(training, name) for name in ("loss", *parts)}, marker="")
    found = {"weights": _series(rows, figure), "moving average": _series(rows, f"ema_{figure}")}
    _plot(scores, title, {name: series for name, series in found.items() if series[0]}, marker="o")
    _plot(rate, "learning rate", {"lr": _series(training, "lr")}, marker="")
    rate.set_ylim(0, 1.08 * max(_series(training, "lr")[1], default=0) or 1)
    rate.yaxis.set_major_formatter("{x:g}")

    last = max(rows, key=lambda row: row["step"], default=None)
    for axes in (loss, scores, rate):
        axes.set_xlim(0, 1.02 * max(1, last["step"]) if last else 1)
        if last and last["epoch"] > 0:
            per_step = last["epoch"] / last["step"]
            epochs = axes.secondary_xaxis("top", functions=(lambda x, k=per_step: x * k, lambda x, k=per_step: x / k))
            epochs.set_xlabel("epoch", color=GREY)
            epochs.tick_params(colors=GREY)
            epochs.spines["top"].set_visible(False)
    save(drawing, workdir / "curves.png")


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
    for (name, (steps, values)), colour in zip(series.items(), cycle(COLOURS), strict=False):
        alone = "o" if len(steps) == 1 else marker  # a line through one point is invisible
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=alone, markersize=4, label=name)
        drawn += len(steps)
    if len(series) > 1:
        axes.legend(frameon=False, loc="best")
    if not drawn:
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color=GREY)
