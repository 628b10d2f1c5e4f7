"""The picture of a table of speed: throughput against the images' size, and accuracy against throughput."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from evmamba_jax.models.registry import VARIANTS, input_size
from evmamba_jax.reports.drawing import BLUE, COLOURS, GREY, ORANGE, draws_names, save

Row = Mapping[str, Any]
Series = dict[str, list[tuple[float, float]]]
_PEERS_SIZE = 224  # pixels, to which their published accuracies belong


def by_size(rows: Sequence[Row], mode: str) -> Series:
    """Return (pixels of a side, images/s) by model and type, each at the batch that was measured at most sizes.

    Of batches at as many sizes it is the largest; of a peer measured several times, the median.
    """
    found: dict[tuple[str, str], dict[int, dict[int, list[float]]]] = {}
    for row in rows:
        if row["mode"] == mode and row["images/s"] is not None:
            batches = found.setdefault((row["model"], row["type"]), {})
            batches.setdefault(row["images a step"], {}).setdefault(row["px"], []).append(row["images/s"])
    types = {row["type"] for row in rows}
    series: Series = {}
    for (model, dtype), batches in found.items():
        batch = max(batches, key=lambda batch: (len(batches[batch]), batch))
        label = f"{_short(model)}{f', {dtype}' if len(types) > 1 else ''}, batch {batch}"
        series[label] = [(side, float(np.median(speeds))) for side, speeds in sorted(batches[batch].items())]
    return series


def by_accuracy(rows: Sequence[Row], mode: str) -> dict[str, tuple[float, float, bool]]:
    """Return largest images/s, published top-1 in per cent, and whether it is ours, by model.

    Only rows of the size count that the accuracy was published for.
    """
    points: dict[str, tuple[float, float, bool]] = {}
    for row in rows:
        model, speed, top1 = row["model"], row["images/s"], row["published top-1, %"]
        is_ours = model in VARIANTS
        if row["mode"] != mode or speed is None or top1 is None:
            continue
        if row["px"] == (input_size(model)[0] if is_ours else _PEERS_SIZE):
            name = _short(model)
            points[name] = (max(speed, points.get(name, (0.0,))[0]), top1, is_ours)
    return points


@draws_names
def draw_speed(rows: Sequence[Row], path: Path) -> None:
    """Draw throughput.png.

    Args:
        rows: of the table, by the names of its columns.
        path: the file.
    """
    modes = [mode for mode in ("inference", "training") if any(row["mode"] == mode for row in rows)]
    sized = [(mode, by_size(rows, mode)) for mode in modes]
    several = len({side for _, series in sized for line in series.values() for side, _ in line}) > 1
    accuracy = by_accuracy(rows, modes[0]) if modes else {}
    panels = [*(sized if several or not accuracy else ()), *([accuracy] if accuracy else ())]
    figure = Figure(figsize=(6.2 * max(1, len(panels)), 4.9), dpi=110, layout="constrained")
    for axes, panel in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False):
        if isinstance(panel, tuple):
            _draw_sizes(axes, *panel)
        else:
            _draw_accuracy(axes, panel, modes[0])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", which="major")
        axes.set_axisbelow(True)
        axes.tick_params(colors=GREY)
    save(figure, path)


def _draw_sizes(axes: Axes, mode: str, series: Series) -> None:
    axes.set_title(f"{mode}: images/s by size", loc="left", fontsize=12)
    axes.set(xscale="log", yscale="log", xlabel="side of the images (pixels)", ylabel="images/s")
    sides = sorted({side for line in series.values() for side, _ in line})
    looks = zip(itertools.cycle("osD^vP"), itertools.cycle(COLOURS), strict=False)
    for (label, line), (marker, colour) in zip(series.items(), looks, strict=False):
        style = "-" if label.split(",")[0] in VARIANTS else (0, (6, 1.5))
        axes.plot(*zip(*line, strict=True), color=colour, marker=marker, linestyle=style, linewidth=1.6, label=label)
    if len(sides) > 1:
        top = max(speed for line in series.values() for side, speed in line if side == sides[0])
        grid = np.geomspace(sides[0], sides[-1], 50)
        guides = {"linear in the pixels": (2, "-."), "quadratic": (4, ":")}
        for words, (power, style) in guides.items():
            slope = 1.6 * top * (grid / sides[0]) ** -power
            axes.plot(grid, slope, color=GREY, linestyle=style, linewidth=1.1, label=words)
    axes.xaxis.set_major_locator(FixedLocator(sides))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=8.5)


def _draw_accuracy(axes: Axes, points: Mapping[str, tuple[float, float, bool]], mode: str) -> None:
    axes.set_title(f"published top-1 by images/s ({mode})", loc="left", fontsize=12)
    axes.set(xscale="log", xlabel="images/s, the fastest batch", ylabel="published top-1 on ImageNet-1K (%)")
    for ours, colour, marker, label in ((True, BLUE, "o", "here"), (False, ORANGE, "s", "peers")):
        own = {name: (x, y) for name, (x, y, is_ours) in points.items() if is_ours == ours}
        if own:
            axes.plot(*zip(*own.values(), strict=True), color=colour, marker=marker, linestyle="none", label=label)
        for name, place in own.items():
            axes.annotate(name, place, (0, 7), textcoords="offset points", fontsize=8.5, color=colour, ha="center")
    axes.margins(x=0.2, y=0.15)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(which="minor", colors=GREY, labelsize=8)
    axes.legend(frameon=False, fontsize=8.5)


def _short(model: str) -> str:
    """Return the name of a model without the library, and without what all of timm's Swins have in common."""
    return model.rpartition(":")[2].removesuffix("_224").replace("_patch4_window7", "").replace("_patch16", "")
