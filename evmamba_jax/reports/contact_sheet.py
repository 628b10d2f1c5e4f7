"""A contact sheet: all images of a prediction, small, in the order of the classes that were found in them."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evmamba_jax.reports.drawing import font_file, short
from evmamba_jax.storage import written_whole

SIDE = 96  # pixels of a thumbnail
_LINE, _GAP, _COLUMNS = 30, 6, 12


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Return an image, uint8 (H, W, C), as uint8 (96, 96, 3)."""
    shown = image[..., 0] if image.shape[-1] in (1, 2) else image[..., :3]
    picture = Image.fromarray(np.ascontiguousarray(shown)).convert("RGB")
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def contact_sheet(
    path: str | os.PathLike[str], thumbnails: Sequence[tuple[np.ndarray, int, float]], class_names: Sequence[str]
) -> None:
    """Draw a contact sheet; each class begins a row, its surest images first.

    Args:
        path: the picture, a .png file.
        thumbnails: images as :func:`thumbnail` makes them, the class found in each, and its probability.
        class_names: one a class.

    Raises:
        UserError: the folder is full or not writable.
    """
    by_class: dict[int, list[tuple[np.ndarray, float]]] = {}
    for image, found, probability in sorted(thumbnails, key=lambda entry: (entry[1], -entry[2])):
        by_class.setdefault(found, []).append((image, probability))
    rows = sum(-(-len(images) // _COLUMNS) for images in by_class.values())
    cell = SIDE + _GAP
    height = rows * (cell + _LINE // 2) + len(by_class) * _LINE + _GAP
    sheet = Image.new("RGB", (_COLUMNS * cell + _GAP, height), "white")
    draw, y = ImageDraw.Draw(sheet), _GAP
    small = ImageFont.truetype(font_file("%"), 10)
    for found, images in by_class.items():
        title = f"{short(class_names[found], 60)} ({len(images)})"
        draw.text((_GAP, y), title, fill="black", font=ImageFont.truetype(font_file(title), 14))
        y += _LINE - _GAP
        for number, (image, probability) in enumerate(images):
            column = number % _COLUMNS
            if number and column == 0:
                y += cell + _LINE // 2
            sheet.paste(Image.fromarray(image), (_GAP + column * cell, y))
            draw.text((_GAP + column * cell, y + SIDE), f"{probability:.0%}", fill="black", font=small)
        y += cell + _LINE // 2 + _GAP
    with written_whole(Path(path)) as beside:
        sheet.save(beside, "PNG")
