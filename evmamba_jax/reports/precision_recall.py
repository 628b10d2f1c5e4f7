"""precision_recall.png, mask_precision_recall.png: how precise detections are, the more of the objects they find."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evmamba_jax.reports.drawing import BLUE, COLOURS, GREY, draws_names, save, short

PRECISION_RECALL, MASK_PRECISION_RECALL = "precision_recall.png", "mask_precision_recall.png"
_NAMED = len(COLOURS)  # classes with a line of their own colour and a name


@draws_names
def draw_precision_recall(path: Path, curves: np.ndarray, class_names: Sequence[str]) -> None:
    """Draw precision against recall.

    Args:
        path: the picture, a .png file.
        curves: (T, R, K) precision at T overlaps from .5 to .95, at recalls from 0 to 1, of each class; NaN of a class
            without objects.
        class_names: K names.
    """
    recall = np.linspace(0, 1, curves.shape[1])
    there = np.flatnonzero(~np.isnan(curves[0]).all(0))
    figure = Figure(figsize=(11, 4.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    thresholds = np.linspace(0.5, 0.95, len(curves))
    for threshold, curve in zip(thresholds, np.nanmean(curves[:, :, there], 2) if len(there) else (), strict=False):
        named = round(float(threshold), 2) in (0.5, 0.75, 0.9)
        shade = 0.25 + 0.75 * (0.95 - threshold) / 0.45
        label = f"overlap {threshold:.2f}, area {curve.mean():.0%}" if named else None
        left.plot(recall, curve, color=BLUE, alpha=shade, linewidth=2 if named else 1, label=label)
    left.set_title("mean over classes", loc="left", fontsize=12)
    areas = curves[0].mean(0)
    worst = sorted(there, key=lambda k: areas[k])
    for k in there:
        if k not in worst[:_NAMED]:
            right.plot(recall, curves[0, :, k], color=GREY, linewidth=0.8, alpha=0.6)
    for colour, k in zip(COLOURS, worst[:_NAMED], strict=False):
        label = f"{short(class_names[int(k)])}, area {areas[k]:.0%}"
        right.plot(recall, curves[0, :, k], color=colour, linewidth=1.8, label=label)
    right.set_title("each class at overlap 0.5, the worst named", loc="left", fontsize=12)
    for axes in (left, right):
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9, loc="lower left")
    left.set_ylabel("precision")
    save(figure, path)
