"""What several pictures share: colours, names in any script, images, bars, and the saving."""

import functools
import itertools
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evmamba_jax.storage import written_whole

# Colours that the colour-blind tell apart; a cross or a tick says the same without them.
BLUE, ORANGE, GREY = "#0b66a8", "#c8501e", "#666666"
COLOURS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#8a6d00", "#56b4e9")  # of the curves in one picture


def blank(axes: Axes) -> None:
    """Take frame and ticks away; Matplotlib would place the numbers of ticks that nobody sees."""
    axes.axis("off")
    axes.set(xticks=[], yticks=[])


def show(axes: Axes, image: np.ndarray) -> None:
    """Show uint8 (H, W, C); one that grows keeps its pixels, one that shrinks is smoothed."""
    smoothing = "nearest" if max(image.shape[:2]) < 150 else "antialiased"
    image = image[..., 0] if image.shape[-1] == 1 else image
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation=smoothing)


# Matplotlib's own font, then those of scripts that it lacks, as Linux, macOS and Windows have them. A letter is drawn
# in the first that is installed and has it.
_FAMILIES = (
    "DejaVu Sans",
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    *("Droid Sans Fallback", "IPAGothic", "NanumGothic", "PingFang SC", "PingFang HK", "Hiragino Sans"),
    *("Apple SD Gothic Neo", "Microsoft YaHei", "SimHei", "Yu Gothic", "Meiryo", "Malgun Gothic"),
    *("Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil"),
    *("Noto Sans Thai", "Geeza Pro", "Segoe UI", "Nirmala UI", "Leelawadee UI", "Noto Emoji", "Segoe UI Symbol"),
    *("Symbola", "Arial Unicode MS", "Unifont"),
)

P = ParamSpec("P")
T = TypeVar("T")


@functools.cache
def _fonts() -> dict[str, frozenset[int]]:
    """Return which of the families are installed, and the code points that each can draw."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return {
        family: frozenset(font_manager.get_font(font_manager.findfont(family)).get_charmap())
        for family in _FAMILIES
        if family in installed
    }


def draws_names(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function draw text as it stands: no formula between dollar signs, letters of any installed font."""

    @functools.wraps(function)
    def drawing(*args: P.args, **kwargs: P.kwargs) -> T:
        as_it_stands = {"text.parse_math": False, "text.usetex": False, "font.family": [*_fonts()]}
        with matplotlib.rc_context(as_it_stands):
            return function(*args, **kwargs)

    return drawing


def drawable(text: str) -> str:
    """Return text that the fonts can draw, in one line.

    White space becomes a space, invisible marks go, and what no font has, control characters for instance, is written
    as its code point: ``U+5199``.
    """
    drawn = []
    for letter in unicodedata.normalize("NFC", text):
        kind = unicodedata.category(letter)
        if letter.isspace():
            drawn.append(" ")
        elif kind == "Cf" or "VARIATION SELECTOR" in unicodedata.name(letter, ""):
            continue
        elif kind[0] != "C" and any(ord(letter) in letters for letters in _fonts().values()):
            drawn.append(letter)
        else:
            drawn.append(f" U+{ord(letter):04X} ")
    return " ".join("".join(drawn).split())


def font_file(text: str) -> str:
    """Return the file of the first font that has all letters of a text, or most of them."""
    missing = {family: sum(ord(letter) not in letters for letter in text) for family, letters in _fonts().items()}
    return font_manager.findfont(min(missing, key=lambda family: missing[family]))


def short(name: str, length: int = 13) -> str:
    """Return a name as it can be drawn, or its first synonym, cut to a length; letters of full width count twice."""
    name = drawable(name)
    if _ends(name)[-1] > length:
        name = name.split(", ")[0]
    ends = _ends(name)
    return name if ends[-1] <= length else name[: sum(0 < end < length for end in ends)] + "…"


def _ends(text: str) -> list[int]:
    """Return where each letter ends, in columns; 0 comes first."""
    columns = (2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
    return list(itertools.accumulate(columns, initial=0))


def numbered(k: int | np.integer, class_names: Sequence[str], length: int) -> str:
    """Return a class's number and name: names alone may be the same, ImageNet's two cranes for instance."""
    name = short(class_names[int(k)], length)
    return name if name == str(k) else f"{k} {name}".rstrip()


def bars(
    axes: Axes,
    shares: Sequence[float] | np.ndarray,
    names: Sequence[str],
    notes: Sequence[str],
    colour: str,
    longest: float | None = None,
) -> None:
    """Draw horizontal bars from the top down, each under its name and with a note at its end.

    ``longest`` is the share that would reach the right border; the notes have half the width when not given.
    """
    places = np.arange(len(shares))
    axes.barh(places + 0.22, shares, height=0.4, color=colour)
    for place, share, name, note in zip(places, shares, names, notes, strict=True):
        axes.text(0, place - 0.02, name, fontsize=8.5, va="bottom")
        axes.text(share, place + 0.22, f" {share:.0%}  {note}", fontsize=8, va="center", color=GREY)
    axes.set_ylim(len(shares) - 0.3, -0.7)
    axes.set_xlim(0, longest or 1.9 * max(shares, default=1) or 1)
    blank(axes)


def drawn(name: str, draw: Callable[[], object]) -> bool:
    """Draw a picture and return whether that went well; where not, a line says why, and nothing is ended by it."""
    try:
        draw()
    except Exception as error:
        print(f"{name} is not drawn: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return False
    return True


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a .png file, which is never half a file."""
    with written_whole(path) as beside:
        figure.savefig(beside, format="png")
