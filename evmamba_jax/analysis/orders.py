"""A picture of scan orders: the walk of each over the pixels of a small image."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from evmamba_jax.errors import UserError
from pallas_kernels import Chain, Order

# From dark blue to orange: ordered in lightness too, and dark enough on white.
_TIME = ListedColormap(matplotlib.colormaps["plasma"](np.linspace(0, 0.82, 256)))
_INK = "#222222"
_VISITED = {"facecolor": "white", "edgecolor": "#b9bec6"}
_UNSEEN = {"facecolor": "#dfe3e8", "edgecolor": "#b9bec6"}
_PADDING = {"facecolor": "white", "edgecolor": "#a9afb8", "hatch": "////"}
_ACROSS = 4


def draw_orders(orders: Sequence[Order | Chain], height: int, width: int, path: str | os.PathLike) -> Figure:
    """Draw the walk of every order over a (height, width) grid, one panel an order.

    Arrows run from each token to the next and turn from blue to orange with time; a jump to a pixel that is no
    neighbour, on the image or on the order's lattice, is dotted. Pixels that no token visits are grey, padding is
    hatched. A walk of a chain that would cross an earlier one has another panel, and the colours run on.

    Args:
        orders: what ``scan2d`` and the models take, e.g. ``CROSS`` or ``(Order(),)``.
        height: rows of the grid; up to about 16 can be read.
        width: its columns.
        path: file to write; its suffix chooses the format (``.png``, ``.svg``, ``.pdf``).

    Returns:
        The figure, which a notebook shows.

    Raises:
        UserError: no orders, an entry that is neither Order nor Chain, a grid without pixels.
    """
    if not orders:
        raise UserError("orders is empty; give at least one Order or Chain to draw")
    for order in orders:
        if not isinstance(order, Order | Chain):
            raise UserError(f"orders must hold Order or Chain values, got {order!r}")
    if min(height, width) < 1:
        raise UserError(f"the grid is {height}x{width}; both sides must be at least 1")

    walks = [walk for order in orders for walk in _walks(order, height, width)]
    # Every panel leaves room for the largest padding, so that all pixels have one size.
    rows, columns = (max(walk.padded[axis] for walk in walks) for axis in (0, 1))
    across = min(_ACROSS, len(walks))
    down = -(-len(walks) // across)
    inches = 3.0 / max(rows, columns)  # a pixel
    figure = Figure(figsize=(across * (columns * inches + 0.3), down * (rows * inches + 0.35) + 0.4), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.04)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, walk in zip(panels, walks, strict=False):
        _draw_panel(axes, walk, (height, width), (rows, columns), 72 * inches)
        middle = (width / 2 + 0.1) / (columns + 0.2)  # of the image, without its padding
        axes.set_title(walk.title, x=middle, fontsize=8.5, color=_INK)
    _explain(figure, chained=not all(walk.is_last for walk in walks))
    figure.savefig(path, bbox_inches="tight", pad_inches=0.08)
    return figure


def draw_order(axes: Axes, order: Order | Chain, size: tuple[int, int], inches: float) -> None:
    """Draw the walk of one order over a grid of (rows, columns) into axes that are ``inches`` wide.

    Of a walk that crosses itself, the part before.
    """
    walk = _walks(order, *size)[0]
    _draw_panel(axes, walk, size, walk.padded, 72 * inches / max(walk.padded))


def describe(order: Order) -> str:
    """Return an order in words, e.g. "columns, backwards"."""
    lines = "columns" if order.column_major else "rows"
    lattice = "" if order.step == (1, 1) else f" from {order.origin}, step {order.step}"
    return lines + lattice + (", backwards" if order.reverse else "")


class _Walk(NamedTuple):
    """What one panel shows."""

    title: str
    tokens: np.ndarray  # (L, 2) row and column, those in the padding included
    near: np.ndarray  # (L - 1,) whether the next token is a neighbour
    time: np.ndarray  # (L,) between 0, the first token of the order, and 1, its last
    padded: tuple[int, int]  # rows and columns of the grid with its padding
    is_first: bool  # of the panels of a chain; a single order has one
    is_last: bool


def _walks(order: Order | Chain, height: int, width: int) -> list[_Walk]:
    parts = order.orders if isinstance(order, Chain) else (order,)
    places = [_places(part, height, width) for part in parts]
    time = np.linspace(0, 1, order.length(height, width))
    walks = []
    for first, end in _panels(parts, places):
        tokens = np.concatenate(places[first:end])
        steps = np.concatenate(
            [np.tile(part.step, (len(p), 1)) for part, p in zip(parts, places, strict=True)][first:end]
        )
        moves = np.abs(np.diff(tokens, axis=0))
        near = (moves.sum(1) == 1) | ((moves / steps[:-1]).sum(1) == 1)
        walks.append(
            _Walk(
                title=_title(order, parts, first, end),
                tokens=tokens,
                near=near,
                time=time[: len(tokens)],
                padded=(max(height, tokens[:, 0].max() + 1), max(width, tokens[:, 1].max() + 1)),
                is_first=first == 0,
                is_last=end == len(parts),
            )
        )
        time = time[len(tokens) :]
    return walks


def _places(order: Order, height: int, width: int) -> np.ndarray:
    """Return (row, column) of every token (L, 2), those in the padding included."""
    rows, columns = order.lattice(height, width)
    rows, columns = rows * order.step[0], columns * order.step[1]
    return np.stack(np.divmod(order.indices(rows, columns), columns), 1)  # on this grid nothing is padding


def _panels(parts: tuple[Order, ...], places: list[np.ndarray]) -> list[tuple[int, int]]:
    """Cut the walks into the longest stretches without a crossing; return first and end of each."""
    borders, crossed = [0], set()
    for i, (part, tokens) in enumerate(zip(parts, places, strict=True)):
        rows, columns = (np.unique(axis) for axis in tokens.T)
        if part.column_major:
            rows = np.arange(rows[0], rows[-1] + 1)
        else:
            columns = np.arange(columns[0], columns[-1] + 1)
        own = {(row, column) for row in rows.tolist() for column in columns.tolist()}
        if crossed & own:
            borders.append(i)
            crossed = set()
        crossed |= own
    return list(zip(borders, [*borders[1:], len(parts)], strict=True))


def _title(order: Order | Chain, parts: tuple[Order, ...], first: int, end: int) -> str:
    if isinstance(order, Order):
        return describe(order)
    if end - first == 1:
        return f"chain, {end} of {len(parts)}: {describe(parts[first])}"
    return f"chain of {len(parts)}" + ("" if end - first == len(parts) else f": {first + 1} to {end}")


def _draw_panel(axes: Axes, walk: _Walk, size: tuple[int, int], padded: tuple[int, int], pixel: float) -> None:
    """Draw a walk over a grid of this size, with room for its padding; ``pixel`` is the side of a pixel in points."""
    rows, columns = padded
    axes.set(xlim=(-0.6, columns - 0.4), ylim=(rows - 0.4, -0.6), aspect="equal")  # rows count downwards
    _draw_pixels(axes, walk, *size)
    _draw_walk(axes, walk, pixel)


def _draw_pixels(axes: Axes, walk: _Walk, height: int, width: int) -> None:
    visited = set(map(tuple, walk.tokens.tolist()))
    for row, column in np.ndindex(*walk.padded):
        inside = row < height and column < width
        if inside or (row, column) in visited:
            square = Rectangle((column - 0.5, row - 0.5), 1, 1, linewidth=0.7, zorder=1 if inside else 0)
            square.set(**(_VISITED if (row, column) in visited else _UNSEEN) if inside else _PADDING)
            axes.add_patch(square)
    axes.add_patch(Rectangle((-0.5, -0.5), width, height, fill=False, edgecolor=_INK, linewidth=1.2, zorder=2))


def _draw_walk(axes: Axes, walk: _Walk, pixel: float) -> None:
    """Draw arrows, jumps, start and end; ``pixel`` is the side of a pixel in points."""
    points, colours = walk.tokens[:, ::-1], _TIME(walk.time)  # x, y
    jumps = np.stack([points[:-1], points[1:]], 1)[~walk.near]
    axes.add_collection(
        LineCollection(list(jumps), colors=colours[:-1][~walk.near], linestyles="dotted", linewidths=0.9, zorder=2)
    )
    axes.quiver(
        *points[:-1][walk.near].T,
        *np.diff(points, axis=0)[walk.near].T,
        color=colours[:-1][walk.near],
        angles="xy",
        scale_units="xy",
        scale=1,
        units="inches",
        width=min(0.022, pixel / 1000),
        headwidth=4,
        headlength=5,
        headaxislength=4.5,
        zorder=3,
    )
    size = min(11, 0.4 * pixel)
    axes.plot(*points[0], **_mark("o", colours[0], size, filled=walk.is_first))
    axes.plot(*points[-1], **_mark("s", colours[-1], 0.85 * size, filled=walk.is_last))


def _mark(marker: str, colour: Any, size: float, *, filled: bool) -> dict[str, Any]:
    face, edge, width = (colour, "white", 1.0) if filled else ("white", colour, 1.6)
    return {
        "marker": marker,
        "markersize": size,
        "markerfacecolor": face,
        "markeredgecolor": edge,
        "markeredgewidth": width,
        "linestyle": "none",
        "zorder": 4,
    }


def _explain(figure: Figure, chained: bool) -> None:
    first, last = _TIME(0.0), _TIME(1.0)
    entries = {
        "start": Line2D([], [], **_mark("o", first, 9, filled=True)),
        "end": Line2D([], [], **_mark("s", last, 8, filled=True)),
        "runs on": Line2D([], [], **_mark("s", _TIME(0.5), 7, filled=False)),
        "jump": Line2D([], [], color=_INK, linestyle="dotted", linewidth=1),
        "not visited": Patch(**_UNSEEN),
        "padding": Patch(**_PADDING),
    }
    if not chained:
        del entries["runs on"]
    handles, labels = list(entries.values()), list(entries)
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
