"""sparsity.csv and sparsity.png: what a run has pruned, and what that cost."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from evmamba_jax.pruning.masks import Row
from evmamba_jax.reports.drawing import BLUE, GREY, ORANGE, draws_names, save
from evmamba_jax.reports.writer import METRICS, read_rows
from evmamba_jax.storage import written_whole

SPARSITY, PICTURE = "sparsity.csv", "sparsity.png"


def write_sparsity(workdir: str | os.PathLike, rows: Sequence[Row]) -> None:
    """Write sparsity.csv: a line for each pruned array, then the candidates together, then all parameters."""
    with written_whole(Path(workdir) / SPARSITY) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(Row._fields)
        table.writerows((*row[:-1], f"{row.sparsity:.6f}") for row in rows)


@draws_names
def draw_sparsity(
    workdir: str | os.PathLike, rows: Sequence[Row], figure: str, title: str, dense: str | os.PathLike = ""
) -> None:
    """Draw sparsity.png: sparsity over time, by array, and a figure of the evaluations against sparsity.

    Args:
        workdir: the work folder, whose metrics.jsonl says the first and the last.
        rows: of sparsity.csv.
        figure: name of the evaluations' figure.
        title: what the figure is.
        dense: the work folder of a run without pruning, drawn beside; empty for none.
    """
    logged = read_rows(Path(workdir) / METRICS)
    drawing = Figure(figsize=(14, 4), dpi=120, layout="constrained")
    time, arrays, cost = drawing.subplots(1, 3)
    points = [(row["epoch"], 100 * row["sparsity"]) for row in logged if "sparsity" in row]
    time.step(*zip(*points, strict=True), where="post", color=BLUE) if points else None
    time.set_title("zeros among the candidates (%)", loc="left", fontsize=12)
    time.set_xlabel("epoch")

    own = rows[:-2]
    arrays.bar(range(len(own)), [100 * row.sparsity for row in own], color=BLUE, width=0.9)
    arrays.set_title("zeros by array (%)", loc="left", fontsize=12)
    if len(own) <= 12:
        arrays.set_xticks(range(len(own)), [row.path for row in own], rotation=90, fontsize=7)
    else:
        arrays.set_xlabel(f"{len(own)} arrays, as in {SPARSITY}")

    cost.plot(*_against(logged, figure), color=BLUE, marker="o", markersize=4, label="this run")
    if dense:
        others = [row[figure] for row in read_rows(Path(dense) / METRICS) if figure in row]
        cost.axhline(others[-1], color=ORANGE, linestyle="--", label="dense run, at its end") if others else None
        cost.legend(frameon=False)
    cost.set_title(title, loc="left", fontsize=12)
    cost.set_xlabel("zeros among the candidates at the time (%)")
    for axes in (time, arrays, cost):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.tick_params(colors=GREY)
    time.set_ylim(0, 100)
    arrays.set_ylim(0, 100)
    save(drawing, Path(workdir) / PICTURE)


def _against(logged: Sequence[dict[str, float]], figure: str) -> tuple[list[float], list[float]]:
    """Return sparsity in per cent and the figure of every evaluation, in order of time."""
    sparsity, points = 0.0, []
    for row in sorted(logged, key=lambda row: row["step"]):
        sparsity = row.get("sparsity", sparsity)
        if figure in row:
            points.append((100 * sparsity, row[figure]))
    return [x for x, _ in points], [y for _, y in points]
