"""Images as Vim's detector sees them: resized by Pillow with antialiasing, as Detectron2 does, not by OpenCV without.

For evaluation the longer side becomes 1024 pixels (``shortest_edge_size`` with both limits 1024). For training an image
is mirrored or not, made to fit a square of 1024 pixels times a factor from 0.1 to 2, and cropped to 1024. Both are then
padded below and right to that square, with zeros once they are normalised.

Officially the masks that training asks for are drawn from the polygons of an object within each region. Here, as in the
recorded numbers, they are cut out of its bitmap (Detectron2's ``BitMasks``).

Source: hustvl/Vim ``det/detectron2/data/transforms`` and ``det/projects/ViTDet/configs/common/coco_loader_lsj.py`` at
dd0358a.
"""

import numpy as np
from PIL import Image

from evmamba_jax.data.opencv import Window

SIDE = 1024  # pixels of the square canvas


def shortest_edge_size(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """Return the (height, width) of the image's ratio whose shorter side is ``short``, the longer at most ``longest``.

    Source: ``ResizeShortestEdge.get_output_shape``.
    """
    factor = short / min(height, width)
    new = (short, factor * width) if height < width else (factor * height, short)
    if max(new) > longest:
        factor = longest / max(new)
        new = new[0] * factor, new[1] * factor
    return int(new[0] + 0.5), int(new[1] + 0.5)


def fitted_size(height: int, width: int, factor: float, side: int = SIDE) -> tuple[int, int]:
    """Return the largest (height, width) of the image's ratio within a square of ``side`` times ``factor`` pixels.

    Source: ``ResizeScale``.
    """
    wanted = side * factor
    factor = min(wanted / height, wanted / width)
    return round(height * factor), round(width * factor)


def crop_window(height: int, width: int, place: float, side: int = SIDE) -> Window:
    """Return the part of an image that a square of ``side`` pixels shows; smaller images are shown whole.

    Args:
        height: of the image.
        width: of the image.
        place: where the square is, from 0 (above and left) to 1 (below and right), the same along both axes.
        side: of the square.

    Source: ``FixedSizeCrop``.
    """
    top, left = (round(max(length - side, 0) * place) for length in (height, width))
    return Window(top, left, min(top + side, height), min(left + side, width))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an image (H, W, 3) or (H, W) of uint8 to (height, width, ...): each pixel the mean of what it covers.

    The mean is weighted by a triangle, over two pixels of the result, or of the image where that is enlarged.

    Source: ``ResizeTransform``.
    """
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
