"""Pictures of maps over photographs: a line for each pixel, a column for each walk, the walks themselves above."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from evmamba_jax.analysis.orders import draw_order
from evmamba_jax.reports.drawing import BLUE, GREY, ORANGE, blank, drawable, draws_names, save
from pallas_kernels import Chain, Order

_SIDE = 1.7  # inches of a photograph
_STEP = _SIDE + 0.12  # from a photograph to the next
_LINE = _SIDE + 0.28  # from a line to the next
_SKETCH = 0.95  # of a walk
_GRID = 6  # pixels of a side of the grid that walks are drawn over
_FINEST = 16  # pixels of a side of the largest map whose chains are drawn
# From nothing in the middle, whose photograph shows through, to orange above and blue below.
_COLOURS = LinearSegmentedColormap.from_list("signed", [BLUE, "white", ORANGE])


class Panel(NamedTuple):
    """A map over a photograph.

    Attributes:
        title: what it shows.
        values: (rows, columns); those of no pixel of the photograph are cut off already.
        order: drawn above it; None for no walk.
        marked: (row, column) that is framed; None frames none.
    """

    title: str
    values: np.ndarray
    order: Order | Chain | None
    marked: tuple[int, int] | None


class Line(NamedTuple):
    """The maps of one photograph and one pixel.

    Attributes:
        label: the photograph and the pixel, in words.
        image: uint8 (H, W, C), the photograph as the model sees it.
        marked: (row, column) of the map, framed in the photograph; None frames none.
        panels: of one size.
    """

    label: str
    image: np.ndarray
    marked: tuple[int, int] | None
    panels: Sequence[Panel]


class Sheet(NamedTuple):
    """The lines of one layer, which all have the same walks; an empty title is not drawn."""

    title: str
    lines: list[Line]


@draws_names
def draw_sheets(sheets: Sequence[Sheet], words: str, path: Path) -> None:
    """Draw maps, one sheet below the other.

    Colour and opacity grow with the root of a value's size over the largest in its line: the strongest pixels would
    else be all that is seen. The scale at the right of each line says which values these are.

    Args:
        sheets: each with at least one line.
        words: what the values are; written below, if not empty.
        path: a .png file.
    """
    columns = max(len(sheet.lines[0].panels) for sheet in sheets) + 1
    wide = columns * _STEP + 1.0
    told = textwrap.wrap(drawable(words), int(13 * wide))
    high = sum(_head(sheet) + _LINE * len(sheet.lines) for sheet in sheets) + 0.15 + 0.15 * len(told)
    figure = Figure(figsize=(wide, high), dpi=100)
    top = high
    for sheet in sheets:
        if sheet.title:
            figure.text(0.1 / wide, (top - 0.23) / high, drawable(sheet.title), fontsize=11, va="center")
        top -= _head(sheet)
        _draw_walks(figure, sheet.lines[0].panels, top, wide, high)
        for line in sheet.lines:
            top -= _LINE
            _draw_line(figure, line, top + 0.26, wide, high)
    figure.text(0.1 / wide, (top - 0.05) / high, "\n".join(told), fontsize=8.5, color=GREY, va="top")
    save(figure, path)


def _head(sheet: Sheet) -> float:
    """Return the height of title and walks of a sheet."""
    sketched = any(_grid(panel) for panel in sheet.lines[0].panels)
    return 0.4 + _SKETCH * sketched + (0.4 if sheet.title else 0)


def _draw_walks(figure: Figure, panels: Sequence[Panel], bottom: float, wide: float, high: float) -> None:
    """Draw what stands above the maps: the walks and their titles."""
    for k, panel in enumerate(panels, 1):
        left = 0.1 + k * _STEP
        middle = (left + _SIDE / 2) / wide
        figure.text(middle, (bottom + 0.15) / high, _in_two(panel.title), fontsize=8.5, ha="center", va="center")
        grid = _grid(panel)
        if panel.order is not None and grid is not None:
            box = (left + (_SIDE - _SKETCH) / 2, bottom + 0.33, _SKETCH, _SKETCH)
            axes = figure.add_axes(_share(box, wide, high))
            draw_order(axes, panel.order, grid, _SKETCH)
            blank(axes)


def _grid(panel: Panel) -> tuple[int, int] | None:
    """Return the grid over which the walk of a panel is drawn; None for no walk, or a grid too fine to see.

    One order looks the same on a small grid, but a chain is made for the size of its map.
    """
    if panel.order is None:
        return None
    if isinstance(panel.order, Order):
        return _GRID, _GRID
    rows, columns = panel.values.shape
    return (rows, columns) if max(rows, columns) <= _FINEST else None


def _draw_line(figure: Figure, line: Line, bottom: float, wide: float, high: float) -> None:
    largest = max((np.abs(panel.values).max() for panel in line.panels), default=0) or 1.0
    signed = any(panel.values.min() < 0 for panel in line.panels)
    for k, panel in enumerate([None, *line.panels]):
        axes = figure.add_axes(_share((0.1 + k * _STEP, bottom, _SIDE, _SIDE), wide, high))
        _draw_photograph(axes, line.image, faded=panel is not None)
        if panel is not None:
            shown = np.sign(panel.values) * np.sqrt(np.abs(panel.values) / largest)
            pixels = _COLOURS((shown + 1) / 2)
            pixels[..., 3] = 0.95 * np.abs(shown)
            axes.imshow(pixels, extent=(0, 1, 1, 0), interpolation="nearest", aspect="auto")
        marked = line.marked if panel is None else panel.marked
        if marked is not None:
            rows, columns = line.panels[0].values.shape
            row, column = marked
            for colour, width in (("white", 2.6), ("black", 1.2)):
                frame = Rectangle((column / columns, row / rows), 1 / columns, 1 / rows, fill=False, clip_on=False)
                frame.set(edgecolor=colour, linewidth=width, zorder=3)
                axes.add_patch(frame)
        axes.set(xlim=(0, 1), ylim=(1, 0))
        blank(axes)
    figure.text(0.1 / wide, (bottom - 0.11) / high, drawable(line.label), fontsize=8.5, color=GREY, va="center")
    bar = figure.add_axes(_share((0.1 + (len(line.panels) + 1) * _STEP, bottom, 0.1, _SIDE), wide, high))
    scale = figure.colorbar(ScalarMappable(Normalize(-1, 1), _COLOURS), cax=bar)
    ticks = [-1, -0.5, 0, 0.5, 1] if signed else [0, 0.25, 0.5, 0.75, 1]
    scale.set_ticks(ticks, labels=[f"{tick * abs(tick) * largest:.2g}" for tick in ticks])
    bar.tick_params(labelsize=7.5)
    bar.set_ylim(-1 if signed else 0, 1)


def _draw_photograph(axes: Axes, image: np.ndarray, *, faded: bool) -> None:
    smoothing = "nearest" if max(image.shape[:2]) < 150 else "antialiased"
    if faded:
        grey = image.mean(-1) / 255
        shown = np.repeat((0.35 + 0.65 * grey)[..., None], 3, -1)
    else:
        shown = np.repeat(image, 3, -1) if image.shape[-1] == 1 else image[..., :3]
    axes.imshow(shown, extent=(0, 1, 1, 0), interpolation=smoothing, aspect="auto")


def _share(box: tuple[float, float, float, float], wide: float, high: float) -> tuple[float, float, float, float]:
    """Return left, bottom, width and height as shares of a figure, from inches."""
    left, bottom, width, height = box
    return left / wide, bottom / high, width / wide, height / high


def _in_two(title: str) -> str:
    """Return a long title in two lines."""
    if len(title) < 26 or "\n" in title:
        return title
    end = next((title.index(mark) + len(mark) for mark in (": ", "), ", ", ") if mark in title), len(title))
    return f"{title[:end].rstrip()}\n{title[end:]}"
