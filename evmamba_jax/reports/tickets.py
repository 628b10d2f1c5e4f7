"""tickets.csv and tickets.png: the levels of iterative pruning, their controls, and the barriers between them."""

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from evmamba_jax.reports.drawing import BLUE, COLOURS, GREY, draws_names, save
from evmamba_jax.storage import written_whole

TICKETS, PICTURE = "tickets.csv", "tickets.png"
_NAMES = {"": "tickets", "random": "random masks", "reinit": "other initial values"}


class Ticket(NamedTuple):
    """A level that has ended.

    Attributes:
        level: its number, 0 for the dense one.
        control: empty for the ticket itself, else "random" or "reinit".
        density: share of the candidates that are left.
        figure: of its last evaluation, the one that chooses checkpoints.
        barrier: of the loss, on the line from the level before; NaN for the first and for controls.
    """

    level: int
    control: str
    density: float
    figure: float
    barrier: float = math.nan


def read_tickets(workdir: str | os.PathLike) -> list[Ticket]:
    """Return the rows of tickets.csv; none without it."""
    path = Path(workdir) / TICKETS
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    return [Ticket(int(level), control, *(float(value or "nan") for value in rest)) for level, control, *rest in rows]


def write_tickets(workdir: str | os.PathLike, tickets: Sequence[Ticket], figure: str) -> None:
    """Write tickets.csv, a line a level.

    Args:
        workdir: the work folder of all levels.
        tickets: those that have ended.
        figure: name of the figure's column.
    """
    with written_whole(Path(workdir) / TICKETS) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["level", "control", "density", figure, "barrier"])
        table.writerows([*ticket[:4], "" if math.isnan(ticket.barrier) else ticket.barrier] for ticket in tickets)


@draws_names
def draw_tickets(workdir: str | os.PathLike, tickets: Sequence[Ticket], title: str) -> None:
    """Draw tickets.png: the figure against density, beside the dense level and the controls; and the barriers.

    Args:
        workdir: the work folder of all levels.
        tickets: those that have ended, the dense level first.
        title: what the figure is.
    """
    drawing = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    figures, barriers = drawing.subplots(1, 2)
    dense = tickets[0]
    figures.axhline(dense.figure, color=GREY, linestyle="--", label="dense")
    for (control, name), colour in zip(_NAMES.items(), COLOURS, strict=False):
        own = [dense, *(t for t in tickets if t.level and t.control == control)]
        if len(own) > 1:
            places = [100 * t.density for t in own], [t.figure for t in own]
            figures.plot(*places, color=colour, marker="o", markersize=4, label=name)
    figures.set_title(title, loc="left", fontsize=12)
    figures.legend(frameon=False)
    measured = [t for t in tickets if not math.isnan(t.barrier)]
    barriers.plot(
        [100 * t.density for t in measured], [t.barrier for t in measured], color=BLUE, marker="o", markersize=4
    )
    barriers.axhline(0, color=GREY, linewidth=0.8)
    barriers.set_title("barrier of the loss, from the level before", loc="left", fontsize=12)
    shown = sorted({100 * t.density for t in tickets})
    for axes in (figures, barriers):
        axes.set_xscale("log")
        axes.set_xlim(1.08 * shown[-1], 0.92 * shown[0])  # fewer weights to the right
        axes.set_xticks(shown, [f"{density:.3g}" for density in shown], rotation=45 if len(shown) > 6 else 0)
        axes.minorticks_off()
        axes.set_xlabel("weights left (% of the candidates)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6")
        axes.tick_params(colors=GREY)
    save(drawing, Path(workdir) / PICTURE)
