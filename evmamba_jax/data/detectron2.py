"""Images as Vim's detector sees them: resized by Pillow with antialiasing, as Detectron2 does, not by OpenCV without.

For evaluation the longer side becomes 1024 pixels (``shortest_edge_size`` with both limits 1024). For training an image
is mirrored or not, made to fit a square of 1024 pixels times a factor from 0.1 to 2, and cropped to 1024. Both are then
padded below and right to that square, with zeros once they are normalised.

Officially the masks that training asks for are drawn from the polygons of an object within each region, and an object's
box is that of its polygons, cut with the image. Here, as in the recorded numbers, both go by its bitmap (Detectron2's
``BitMasks``), which follows the image to the nearest pixel. A box that the crop does not cut is that of the data.

Source: hustvl/Vim ``det/detectron2/data/transforms`` and ``det/projects/ViTDet/configs/common/coco_loader_lsj.py`` at
dd0358a.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from PIL import Image

from evmamba_jax.data.mmdet import BoxedImages, Geometry, Nearest, Resize, canvas
from evmamba_jax.data.opencv import Window, size_of
from evmamba_jax.data.readers import Size

SIDE = 1024  # pixels of the square canvas
FACTORS = 0.1, 2.0  # of that side, to which an image for training is made to fit


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


def resize(
    image: np.ndarray, height: int, width: int, window: Window | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """Resize an image (H, W, 3) or (H, W) of uint8 to (height, width, ...): each pixel the mean of what it covers.

    The mean is weighted by a triangle, over two pixels of the result, or of the image where that is enlarged.

    Args:
        image: of uint8.
        height: of the result.
        width: of the result.
        window: the part of the result that is wanted.
        out: the upper left part of this array is to hold the result; by default a new one does.

    Returns:
        The result, where ``out`` is given a view of it.

    Source: ``ResizeTransform``.
    """
    if size_of(image) != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    part = image if window is None else image[window.slices]
    if out is None:
        return part
    resized = out[: len(part), : part.shape[1]]
    resized[:] = part
    return resized


def nearest_places(old: int, new: int) -> np.ndarray:
    """Return where each pixel of an axis comes from as Pillow resizes it to the nearest, integers.

    Pillow adds up the steps, which decides some pixels between two.

    Args:
        old: length of the axis.
        new: its length afterwards.

    Source: Pillow ``src/libImaging/Geometry.c``, ``ImagingScaleAffine``.
    """
    steps = np.full(new, old / new)
    steps[0] /= 2
    return np.minimum(np.cumsum(steps).astype(np.int64), old - 1)


@dataclasses.dataclass(frozen=True)
class SquareImages(BoxedImages):
    """Images with boxes and masks, as :class:`evmamba_jax.data.mmdet.BoxedImages` has them, on a square.

    The side of the square is that of ``config.scale``, to the next multiple of 32. Objects of whose mask the crop
    leaves no pixel are left out.
    """

    resize: ClassVar[Resize] = staticmethod(resize)
    nearest: ClassVar[Nearest] = staticmethod(nearest_places)

    def geometry(self, size: Size, rng: np.random.Generator) -> Geometry:
        """Draw how an image of a size is changed for training."""
        side = min(self.config.scale)
        mirrored = rng.random() < self.config.hflip
        before = fitted_size(*size, rng.uniform(*FACTORS), side)
        before = max(before[0], 1), max(before[1], 1)  # of a long strip
        window = crop_window(*before, rng.uniform(), side)
        return Geometry(
            "first" if mirrored else "", before, window, (window.bottom - window.top, window.right - window.left)
        )

    def by_masks(self, boxes: np.ndarray, masks: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
        """Return boxes around what is left of objects, and which of them have a pixel left, bool (G,)."""
        columns = np.asarray(masks.any(1))
        rows = np.unpackbits(np.bitwise_or.reduce(masks, 2), axis=1)
        height, width = geometry.size
        lowest, highest = (
            np.stack([end(columns), end(rows)] * 2, 1).astype(np.float32) for end in (_first, _behind_last)
        )
        tight = np.concatenate([np.maximum(boxes, lowest)[:, :2], np.minimum(boxes, highest)[:, 2:]], 1)
        cut = np.any(boxes[:, :2] <= 0, 1) | np.any(boxes[:, 2:] >= [width, height], 1)
        whole = geometry.before == geometry.size
        boxes = np.where(cut[:, None] & (not whole), tight, boxes)
        return boxes, columns.any(1) & np.all(boxes[:, 2:] > boxes[:, :2], 1)

    def eval_size(self, size: Size) -> Size:
        """Return height and width of the image, before it is padded."""
        side = min(self.config.scale)
        return shortest_edge_size(*size, side, side)

    def eval_shape(self, size: Size) -> Size:
        """Return height and width of the square."""
        return canvas(size, self.config.scale)


def _first(there: np.ndarray) -> np.ndarray:
    """Return the place of the first of each row (G, N) that is there."""
    return np.argmax(there, 1)


def _behind_last(there: np.ndarray) -> np.ndarray:
    """Return the place behind the last of each row (G, N) that is there."""
    return there.shape[1] - np.argmax(there[:, ::-1], 1)
