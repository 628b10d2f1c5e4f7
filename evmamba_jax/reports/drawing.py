"""What several pictures share: colours, names of classes, images, bars, and the saving."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evmamba_jax.storage import written_whole

# Colours that the colour-blind tell apart; a cross or a tick says the same without them.
BLUE, ORANGE, GREY = "#0b66a8", "#c8501e", "#666666"
COLOURS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#8a6d00")  # of the curves in one picture


def show(axes: Axes, image: np.ndarray) -> None:
    """Show uint8 (H, W, C); one that grows keeps its pixels, one that shrinks is smoothed."""
    smoothing = "nearest" if max(image.shape[:2]) < 150 else "antialiased"
    image = image[..., 0] if image.shape[-1] == 1 else image
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation=smoothing)


def short(name: str, length: int = 13) -> str:
    """Return a name, or its first synonym, cut to a length."""
    name = name if len(name) <= length else name.split(", ")[0]
    return name if len(name) <= length else name[: length - 1] + "…"


def numbered(k: int | np.integer, class_names: Sequence[str], length: int) -> str:
    """Return a class's number and name: names alone may be the same, ImageNet's two cranes for instance."""
    name = short(class_names[int(k)], length)
    return name if name == str(k) else f"{k} {name}"


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
    axes.axis("off")


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
