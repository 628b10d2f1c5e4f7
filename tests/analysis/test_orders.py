"""The picture of scan orders: what is drawn is what the walks are."""

import itertools

import matplotlib.pyplot
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle
from matplotlib.quiver import Quiver
from PIL import Image

from evmamba_jax.analysis.orders import draw_orders
from evmamba_jax.errors import UserError
from pallas_kernels import ATROUS, CROSS, Chain, Order


def panels(figure):
    return [axes for axes in figure.axes if axes.get_title()]


def arrows(axes):
    """Return the arrows as ((row, column), (row, column)), in the order of time."""
    (quiver,) = (artist for artist in axes.collections if isinstance(artist, Quiver))
    starts = quiver.XY[:, ::-1]
    ends = starts + np.stack([quiver.V, quiver.U], 1)
    return [(tuple(map(int, a)), tuple(map(int, b))) for a, b in zip(starts, ends, strict=True)]


def jumps(axes):
    (lines,) = (artist for artist in axes.collections if isinstance(artist, LineCollection))
    return [tuple(tuple(map(int, point[::-1])) for point in line) for line in lines.get_segments()]


def squares(axes, **wanted):
    """Return the (row, column) of the pixels drawn with a hatch, or without one in a colour."""
    found = set()
    for patch in axes.patches:
        if isinstance(patch, Rectangle) and patch.get_fill() and patch.get_width() == 1:
            if "hatched" in wanted:
                matches = bool(patch.get_hatch()) == wanted["hatched"]
            else:
                matches = (patch.get_facecolor()[:3] == (1, 1, 1)) == wanted["white"]
            if matches:
                found.add((int(patch.get_y() + 0.5), int(patch.get_x() + 0.5)))
    return found


def test_a_walk_by_rows_and_one_by_columns_backwards(tmp_path):
    rows, columns = panels(draw_orders((CROSS[0], CROSS[3]), 2, 3, tmp_path / "orders.png"))
    assert rows.get_title() == "rows"
    assert arrows(rows) == [((0, 0), (0, 1)), ((0, 1), (0, 2)), ((1, 0), (1, 1)), ((1, 1), (1, 2))]
    assert jumps(rows) == [((0, 2), (1, 0))]
    assert columns.get_title() == "columns, backwards"
    assert arrows(columns) == [((1, 2), (0, 2)), ((1, 1), (0, 1)), ((1, 0), (0, 0))]
    start, end = columns.lines
    assert (start.get_marker(), *start.get_xydata().ravel()) == ("o", 2, 1)
    assert (end.get_marker(), *end.get_xydata().ravel()) == ("s", 0, 0)


def test_padding_and_unvisited_pixels_are_shown(tmp_path):
    # On a 2x3 grid the odd columns run over the right edge: pixels (0, 1) and padding (0, 3).
    (odd,) = panels(draw_orders((ATROUS[2],), 2, 3, tmp_path / "orders.png"))
    assert odd.get_title() == "rows from (0, 1), step (2, 2)"
    assert arrows(odd) == [((0, 1), (0, 3))]
    assert squares(odd, hatched=True) == {(0, 3)}
    assert squares(odd, white=False) == {(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)}


def test_a_chain_has_a_panel_a_walk_and_its_colours_run_on(tmp_path):
    chain = Chain((Order(), Order(column_major=True, reverse=True)))
    alone, first, second = panels(draw_orders((Order(), chain), 2, 2, tmp_path / "orders.png"))
    assert first.get_title() == "chain, 1 of 2: rows"
    assert second.get_title() == "chain, 2 of 2: columns, backwards"
    colours = [tuple(axes.lines[i].get_markeredgecolor()) for axes, i in ((first, 1), (second, 0))]
    ends = [tuple(line.get_markerfacecolor()) for line in alone.lines]
    assert tuple(first.lines[0].get_markerfacecolor()) == ends[0]
    assert tuple(second.lines[1].get_markerfacecolor()) == ends[1]
    assert colours[0] != colours[1]  # the middle of the time, one step apart
    assert not {*colours} & {*ends}
    assert first.lines[1].get_markerfacecolor() == second.lines[0].get_markerfacecolor() == "white"


def test_walks_of_a_chain_that_do_not_cross_share_a_panel(tmp_path):
    snake = Chain(tuple(Order(origin=(row, 0), step=(3, 1), reverse=row == 1) for row in range(3)))
    (axes,) = panels(draw_orders((snake,), 3, 2, tmp_path / "orders.png"))
    assert axes.get_title() == "chain of 3"
    path = [(0, 0), (0, 1), (1, 1), (1, 0), (2, 0), (2, 1)]
    assert arrows(axes) == list(itertools.pairwise(path))
    assert jumps(axes) == []
    # The second walk lies between the pixels of the first; the third crosses neither.
    combs = Chain((Order(step=(2, 2)), Order(origin=(0, 1), step=(2, 2)), Order(origin=(1, 0), step=(2, 1))))
    titles = [axes.get_title() for axes in panels(draw_orders((combs,), 4, 4, tmp_path / "orders.png"))]
    assert titles == ["chain, 1 of 3: rows from (0, 0), step (2, 2)", "chain of 3: 2 to 3"]


def test_the_file_is_a_picture_and_pyplot_is_left_alone(tmp_path):
    before = matplotlib.get_backend(), matplotlib.pyplot.get_fignums()
    figure = draw_orders(ATROUS + CROSS, 5, 4, tmp_path / "orders.png")
    assert len(panels(figure)) == 8
    pixels = np.asarray(Image.open(tmp_path / "orders.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 400
    blank = (pixels == 255).all(-1)
    assert 0.2 < blank.mean() < 0.95
    assert blank[[0, -1]].all()  # nothing is cut off
    assert blank[:, [0, -1]].all()
    assert (matplotlib.get_backend(), matplotlib.pyplot.get_fignums()) == before
    draw_orders((Order(),), 1, 1, tmp_path / "one.svg")
    assert (tmp_path / "one.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("orders", "grid", "message"),
    [
        ((), (2, 2), "orders is empty; give at least one Order or Chain to draw"),
        (("rows",), (2, 2), "orders must hold Order or Chain values, got 'rows'"),
        ((Order(),), (0, 2), "the grid is 0x2; both sides must be at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(orders, grid, message, tmp_path):
    with pytest.raises(UserError) as caught:
        draw_orders(orders, *grid, tmp_path / "orders.png")
    assert str(caught.value) == message
