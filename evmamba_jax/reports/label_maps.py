"""Label maps: beside the truth, or of pictures whose truth nobody knows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from evmamba_jax.reports.drawing import GREY, blank, draws_names, numbered, save, short, show

LABEL_MAPS = "label_maps.png"
_IGNORED = 255
_LEGEND = 24  # classes that a legend names
_PANEL, _SHARES = 4.0, 12  # inches of a panel's width; classes beside it


def colours(count: int) -> np.ndarray:
    """Return uint8 (256, 3): the colour of each label, the first black, and white for what is ignored."""
    found = np.zeros((256, 3))
    # Steps of the golden ratio: neighbours in the list differ, however many there are.
    hues = (np.arange(1, count) * 0.618034) % 1
    found[1:count] = colormaps["gist_rainbow"](hues)[:, :3]
    found[1:count:2] *= 0.75
    found[_IGNORED] = 1
    return np.round(255 * found).astype(np.uint8)


@draws_names
def draw_label_maps(
    path: Path, examples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], class_names: Sequence[str]
) -> None:
    """Draw images, the truth, what was found, and where the two differ.

    Args:
        path: the picture, a .png file.
        examples: image uint8 (H, W, 3), truth and answer uint8 (H, W), for each; 255 in the truth does not count.
        class_names: one a label.
    """
    palette = colours(len(class_names))
    columns = 2 if len(examples) > 1 else 1
    rows = -(-len(examples) // columns)
    figure = Figure(figsize=(7.2 * columns, 1.9 * rows + 0.9), dpi=100, layout="constrained")
    grid = figure.subplots(rows, 4 * columns, squeeze=False)
    for axes in grid.flat:
        blank(axes)
    for place, (image, truth, found) in enumerate(examples):
        row, column = place % rows, place // rows
        wrong = np.where((truth != found) & (truth != _IGNORED), 255, 0).astype(np.uint8)
        shown = image, palette[truth], palette[found], np.repeat(wrong[..., None], 3, -1)
        for axes, pixels, title in zip(
            grid[row, 4 * column :], shown, ("image", "truth", "found", "wrong"), strict=False
        ):
            axes.imshow(pixels, interpolation="nearest")
            axes.set_title(title if row == 0 else "", fontsize=10)
    seen = sorted(
        {int(k) for _, truth, found in examples for k in (*np.unique(truth), *np.unique(found)) if k != _IGNORED}
    )
    patches = [Patch(color=palette[k] / 255, label=short(class_names[k])) for k in seen[:_LEGEND]]
    figure.legend(handles=patches, loc="outside lower center", ncols=12, fontsize=9, frameon=False)
    save(figure, path)


@draws_names
def draw_found_maps(
    path: Path, examples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, str]], class_names: Sequence[str]
) -> None:
    """Draw pictures, each beside its label map over it and alone, and the classes with their shares of it.

    Args:
        path: the picture, a .png file.
        examples: image uint8 (H, W, 3), label map uint8 (H, W), shares (K,) of the classes, and a title, for each.
        class_names: K.
    """
    palette = colours(len(class_names))
    heights = [np.clip(_PANEL * image.shape[0] / image.shape[1], 1.6, 6.0) + 0.4 for image, *_ in examples]
    figure = Figure(figsize=(3 * _PANEL + 2.6, sum(heights)), dpi=100, layout="constrained")
    grid = figure.subplots(len(examples), 4, squeeze=False, width_ratios=[_PANEL] * 3 + [2.4], height_ratios=heights)
    for row, (image, found, shares, title) in zip(grid, examples, strict=True):
        coloured = palette[found]
        over = np.round(0.45 * image + 0.55 * coloured).astype(np.uint8)
        for axes, pixels in zip(row, (image, over, coloured), strict=False):
            show(axes, pixels)
        for axes in row:
            blank(axes)
            axes.set_anchor("NW")
        row[0].set_title(short(title, 48), loc="left", fontsize=9)
        largest = np.argsort(-shares, kind="stable")[: min(np.count_nonzero(shares), _SHARES)]
        patches = [
            Patch(facecolor=palette[k] / 255, edgecolor=GREY, label=f"{shares[k]:.1%}  {numbered(k, class_names, 20)}")
            for k in largest
        ]
        more = np.count_nonzero(shares) - len(largest)
        legend = row[3].legend(
            handles=patches, loc="upper left", fontsize=9, frameon=False, title=f"and {more} more" if more else None
        )
        legend.get_title().set_fontsize(9)
    save(figure, path)


def indexed(found: np.ndarray, classes: int) -> Image.Image:
    """Return a label map, uint8 (H, W), as an image of indices with the colours of the drawings as its palette."""
    image = Image.fromarray(found)
    image.putpalette(colours(classes).tobytes())
    return image
