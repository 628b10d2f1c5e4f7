"""Names of classes and files in any script and with any sign: drawn, written, and read again."""

import csv
import io

import numpy as np
import pytest
from matplotlib.figure import Figure

from evmamba_jax.reports import drawing
from evmamba_jax.reports.confusion import confusion
from evmamba_jax.reports.drawing import drawable, draws_names, short
from evmamba_jax.reports.per_class import Counts, write_per_class
from evmamba_jax.reports.predictions import guesses, predictions

NAMES = [
    "$x^2$ and $\\frac$",
    "a_b^c\\d%#&{}",
    "$",
    "two\nlines\r\n\tand more",
    "nul\0 bell\7 esc\33[31m",
    "写真 日本語 한국어",
    "قطة חתול बिल्ली",
    "❤️ 🐈\u200d⬛ 👩\u200d🚀",
    "x" * 5000,
    "写" * 5000,
    "\udce9\ud800",
    "\ue000\U0010ffff",
    "e\u0301 a\u20dd",
    "",
    "\u200b",
    " , ",
    "=1+1",
    '"quoted", with commas',
]


@pytest.fixture
def one_font(monkeypatch):
    """Let matplotlib's own font be the only one that is installed."""
    own = drawing._fonts()["DejaVu Sans"]
    monkeypatch.setattr(drawing, "_fonts", lambda: {"DejaVu Sans": own})


def test_all_pictures_take_all_names(tmp_path):
    """Warnings are errors, those of missing letters too."""
    count = len(NAMES)
    images = np.zeros((count, 4, 4, 1), np.uint8)
    order, shares = np.arange(count), np.eye(count)
    predictions(tmp_path, images, order, (order + 1) % count, shares.max(1), NAMES)
    guesses(tmp_path / "guesses.png", images, NAMES, shares, NAMES, 2)
    mistakes = np.roll(np.eye(2 * count, dtype=int), 1, 1)
    confusion(tmp_path, mistakes[:count, :count], NAMES, "$a_b$ of 写\n" + NAMES[4])
    confusion(tmp_path, mistakes, NAMES * 2, "")
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_no_formula_is_made_of_a_name():
    @draws_names
    def draw(name):
        figure = Figure()
        text = figure.suptitle(name)
        figure.savefig(io.BytesIO())
        return text

    text = draw("$x^2$")
    assert text.get_text() == "$x^2$"
    assert not text.get_parse_math()
    assert text.get_fontfamily()[0] == "DejaVu Sans"


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("lit à ciel é", "lit à ciel é"),
        ("e\u0301", "é"),
        ("写真", "U+5199 U+771F"),
        ("a写b", "a U+5199 b"),
        ("two\nlines\r\n\tmore ", "two lines more"),
        ("nul\0", "nul U+0000"),
        ("\udce9", "U+DCE9"),
        ("\u200b❤\ufe0f", "❤"),
        ("$x_1^2$ \\alpha", "$x_1^2$ \\alpha"),
    ],
)
def test_what_no_font_has_is_written_as_its_code_point(one_font, name, drawn):
    assert drawable(name) == drawn


def test_names_are_cut_by_the_room_they_take(monkeypatch):
    monkeypatch.setattr(drawing, "_fonts", lambda: {"any": frozenset(map(ord, "abcdefghi写真, "))})
    assert short("abcdefgh", 8) == "abcdefgh"
    assert short("abcdefghi", 8) == "abcdefg…"
    assert short("写真写真", 8) == "写真写真"
    assert short("写真写真写", 8) == "写真写…"
    assert short("abc, defghi", 8) == "abc"


def test_a_table_gives_the_names_back(tmp_path):
    count = len(NAMES)
    counts = Counts(np.roll(np.eye(count, dtype=int), 1, 1), np.zeros(count, int), np.zeros(count, int))
    write_per_class(tmp_path, {"model": counts}, NAMES)
    with (tmp_path / "per_class.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [name.encode("utf-8", "backslashreplace").decode() for name in NAMES]  # no lone surrogates in UTF-8
    assert [row["name"] for row in rows] == kept
    assert [row["taken_for_name"] for row in rows] == [*kept[1:], kept[0]]
