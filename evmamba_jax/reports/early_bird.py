"""early_bird.png: how far the masks that a run drew lie apart."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evmamba_jax.reports.drawing import BLUE, GREY, ORANGE, draws_names, save

BIRDS = "early_bird.png"


@draws_names
def draw_birds(workdir: str | os.PathLike, steps: Sequence[int], masks: np.ndarray, limit: float) -> None:
    """Draw the distances of all masks as a matrix, and from each to the next.

    Args:
        workdir: the work folder.
        steps: before which the masks were drawn (N,).
        masks: bool (N, entries).
        limit: what the last distances have to be below for a ticket.

    Source: the figures of You et al., Drawing early-bird tickets (arXiv:1909.11957).
    """
    apart = (masks[:, None] != masks[None]).mean(-1)
    drawing = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    matrix, series = drawing.subplots(1, 2)
    shown = matrix.imshow(apart, cmap="viridis", vmin=0)
    drawing.colorbar(shown, ax=matrix, label="share of entries that differ")
    matrix.set_title("distance from mask to mask", loc="left", fontsize=12)
    matrix.set_xlabel("mask")
    matrix.set_ylabel("mask")
    series.plot(steps[1:], np.diagonal(apart, 1), color=BLUE, marker="o", markersize=4, label="to the mask before")
    series.axhline(limit, color=ORANGE, linestyle="--", label="limit")
    series.set_title("distance from each mask to the one before", loc="left", fontsize=12)
    series.set_xlabel("step")
    series.set_ylim(bottom=0)
    series.legend(frameon=False)
    series.spines[["top", "right"]].set_visible(False)
    series.tick_params(colors=GREY)
    save(drawing, Path(workdir) / BIRDS)
