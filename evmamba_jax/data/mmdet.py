"""Images with boxes and masks as mmdetection prepares them, to the pixel.

Source: mmdet 3.3.0 ``datasets/transforms/transforms.py``, ``datasets/coco.py``, ``structures/mask/structures.py``
(``BitmapMasks``) and ``configs/_base_/datasets``; ``configs/swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py``.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from evmamba_jax.data import opencv, outlines
from evmamba_jax.data.dense_config import DetectionData
from evmamba_jax.data.mmseg import pixels_of, up_to
from evmamba_jax.data.opencv import Window, nearest_places, size_of
from evmamba_jax.data.outlines import Outline
from evmamba_jax.data.readers import Example, Shape, Size

MULTIPLE = 32  # of the sides of images, once they are padded
# mmdet's 3x: the short side in pixels, before a crop and after; and the least and the most side of a crop.
SHORT, SHORT_BEFORE, CROP = tuple(range(480, 801, 32)), (400, 500, 600), (384, 600)


Resize = Callable[..., np.ndarray]  # as opencv.resize_bilinear
Nearest = Callable[[int, int], np.ndarray]  # which old pixel each new one of a mask is, by the two lengths


class Geometry(NamedTuple):
    """How an image is changed: resized, cropped, and resized again, and mirrored before or after.

    Attributes:
        flip: mirror it, left to right: "first", "last", or "" for not. The order decides how pixels are rounded.
        before: its size before the crop; None without one.
        window: the crop.
        size: at last.
    """

    flip: Literal["", "first", "last"]
    before: Size | None
    window: Window | None
    size: Size


@dataclasses.dataclass(frozen=True)
class BoxedImages:
    """Records of an encoded ``image`` and its objects, as :mod:`evmamba_jax.data.dense` has them.

    Examples have ``image`` uint8 (H, W, 3), padded with zeros; ``size`` int32 (2,), height and width without padding;
    ``boxes`` float32 (G, 4) in pixels, ``labels`` int32 (G,) and ``valid`` bool (G,). For training, boxes are those of
    the image as it is shown, without crowds. For evaluation, those of the image as it is stored, with ``crowd`` bool
    (G,), ``area`` float32 (G,) and ``scale`` float32 (2,), by which width and height were resized.

    With masks, examples for training also have ``masks`` uint8 (G, H / 8, W) of the image as it is shown, eight pixels
    of a column in a byte, as ``numpy.packbits(masks, 1)`` has them: 13.4 MB of 100 objects in 800 x 1344 pixels.
    Objects without an outline are then left out, which mmdet ignores.

    Attributes:
        config: of the data.
        masks: whether there are any.
        resize: what resizes images.
        nearest: what tells the pixels of resized masks.
    """

    config: DetectionData
    masks: bool = False
    resize: ClassVar[Resize] = staticmethod(opencv.resize_bilinear)
    nearest: ClassVar[Nearest] = staticmethod(nearest_places)

    def decode(self, record: Any) -> tuple[np.ndarray, Any]:
        """Return the image (H, W, 3), uint8, and the record."""
        return pixels_of(record, self.config), record

    def geometry(self, size: Size, rng: np.random.Generator) -> Geometry:
        """Draw how an image of a size is changed for training."""
        config = self.config
        mirrored = rng.random() < config.hflip
        if config.augment == "one_scale":
            return Geometry("last" if mirrored else "", None, None, opencv.keep_ratio_size(*size, config.scale))
        longest, before, window = max(config.scale), None, None
        if rng.random() < 0.5:
            before = size = opencv.keep_ratio_size(*size, (longest, int(rng.choice(SHORT_BEFORE))))
            height, width = (int(rng.integers(min(side, CROP[0]), min(side, CROP[1]) + 1)) for side in size)
            top, left = (
                int(rng.integers(max(side - cut, 0) + 1)) for side, cut in zip(size, (height, width), strict=True)
            )
            window = Window(top, left, top + height, left + width)
            size = height, width
        size = opencv.keep_ratio_size(*size, (longest, int(rng.choice(SHORT))))
        return Geometry("first" if mirrored else "", before, window, size)

    def train(self, decoded: Any, rng: np.random.Generator) -> Example:
        """Return the image resized, perhaps cropped and mirrored, and what of its objects is seen.

        Raises:
            UserError: there are to be masks, and pycocotools is not installed.
        """
        image, record = decoded
        geometry = self.geometry(size_of(image), rng)
        counted = ~record["crowd"]
        if self.masks:
            counted &= np.array([outline is not None for outline in record["segmentations"]], bool)
        shown = _black(canvas(geometry.size, self.config.scale))
        numbers = np.flatnonzero(counted)
        _, boxes, seen = change(image, record["boxes"][numbers].astype(np.float32), geometry, shown, self.resize)
        numbers, boxes, more = numbers[seen], boxes[seen], {}
        if self.masks:
            own = [record["segmentations"][number] for number in numbers]
            masks = packed_masks(
                own, places(size_of(image), geometry, type(self).nearest), size_of(image), size_of(shown)
            )
            boxes, left = self.by_masks(boxes, masks, geometry)
            numbers, boxes = numbers[left], boxes[left]
            more["masks"] = _filled(masks[left], self.config.max_objects)
        example = {"image": shown, "size": np.array(geometry.size, np.int32)}
        return example | self._objects(boxes, record["labels"][numbers]) | more

    def by_masks(self, boxes: np.ndarray, masks: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
        """Return the boxes of objects by their masks, and which of them are kept, bool (G,).

        Args:
            boxes: (G, 4) after the change.
            masks: as :func:`packed_masks` has them.
            geometry: the change.
        """
        return boxes, np.ones(len(boxes), bool)

    def train_shape(self, size: Size, rng: np.random.Generator) -> Shape:
        """Return height and width of the padded image."""
        return canvas(self.geometry(size, rng).size, self.config.scale)

    def evaluate(self, decoded: Any) -> Example:
        """Return the image resized, and all its objects."""
        image, record = decoded
        shown = _black(self.eval_shape(size_of(image)))
        height, width = size_of(self.view(image, shown))
        scale = np.array([width / image.shape[1], height / image.shape[0]], np.float32)
        return (
            {"image": shown, "size": np.array([height, width], np.int32)}
            | self._objects(record["boxes"], record["labels"], crowd=record["crowd"], area=record["area"])
            | {"scale": scale}
        )

    def view(self, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return an image (H, W, 3) at the scale of the test, its ratio kept, perhaps in the corner of ``out``."""
        return self.resize(image, *self.eval_size(size_of(image)), out=out)

    def eval_size(self, size: Size) -> Size:
        """Return height and width of the image, before it is padded."""
        return opencv.keep_ratio_size(*size, self.config.scale)

    def eval_shape(self, size: Size) -> Size:
        """Return height and width of the padded image."""
        resized = self.eval_size(size)
        return up_to(resized, MULTIPLE) if self.config.eval_padding == "exact" else canvas(resized, self.config.scale)

    def blank(self, *, training: bool, shape: Shape | None = None) -> Example:
        """Return a black image without objects."""
        long, short = max(self.config.scale), min(self.config.scale)
        height, width = shape or canvas((short, long), self.config.scale)
        none = np.zeros((0, 4)), np.zeros(0)
        example: Example = {"image": _black((height, width)), "size": np.array([height, width], np.int32)}
        if training:
            masks = {"masks": np.zeros((self.config.max_objects, height // 8, width), np.uint8)} if self.masks else {}
            return example | self._objects(*none) | masks
        return example | self._objects(*none, crowd=none[1], area=none[1]) | {"scale": np.ones(2, np.float32)}

    def _objects(self, boxes: np.ndarray, labels: np.ndarray, **more: np.ndarray) -> Example:
        types = {"boxes": np.float32, "labels": np.int32, "valid": bool, "crowd": bool, "area": np.float32}
        objects = {"boxes": boxes, "labels": labels, "valid": np.ones(len(labels)), **more}
        return {name: _filled(array.astype(types[name]), self.config.max_objects) for name, array in objects.items()}


def _filled(values: np.ndarray, most: int) -> np.ndarray:
    """Return values with zeros behind them, ``most`` in all."""
    filled = np.zeros((most, *values.shape[1:]), values.dtype)
    filled[: len(values)] = values
    return filled


def _black(size: Size) -> np.ndarray:
    return np.zeros((*size, 3), np.uint8)


def canvas(size: Size, scale: Size) -> Size:
    """Return the size, multiples of 32, to which images within limits of their sides are padded: one of two."""
    short, long = up_to((min(scale), max(scale)), MULTIPLE)
    return (short, long) if size[1] >= size[0] else (long, short)


def change(
    image: np.ndarray,
    boxes: np.ndarray,
    geometry: Geometry,
    out: np.ndarray | None = None,
    resize: Resize = opencv.resize_bilinear,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return image, boxes, and which of these are seen, bool (G,), after a change.

    Args:
        image: (H, W, 3) uint8.
        boxes: (G, 4) float32, x0 y0 x1 y1 in its pixels.
        geometry: the change.
        out: the upper left part of this contiguous array is to hold the image; by default a new one does.
        resize: what resizes it.
    """
    flip, before, window, size = geometry
    if flip == "first":
        image, boxes = opencv.mirrored(image), mirrored_boxes(boxes, image.shape[1])
    seen = np.ones(len(boxes), bool)
    if before is not None and window is not None:
        boxes = resized_boxes(boxes, size_of(image), before) - np.array([window.left, window.top] * 2, np.float32)
        image = resize(image, *before, window)
        boxes = limited(boxes, size_of(image))
        seen = np.all(boxes[:, 2:] > boxes[:, :2], 1)
    boxes = resized_boxes(boxes, size_of(image), size)
    image = resize(image, *size, out=out)
    if flip == "last":
        image, boxes = opencv.mirrored(image, out=image), mirrored_boxes(boxes, size[1])
    return image, boxes, seen


def packed_masks(own: Sequence[Outline], origin: tuple[np.ndarray, np.ndarray], old: Size, new: Size) -> np.ndarray:
    """Return the masks of outlines after a change of their image, uint8 (G, H / 8, W), eight pixels in a byte.

    Masks are resized to the nearest pixel, and so each pixel is one of the image as it is stored.

    Args:
        own: of the objects.
        origin: the rows and the columns that are shown, as :func:`places` has them.
        old: height and width of their image as it is stored.
        new: height and width of the padded image; the height is a multiple of 8.
    """
    rows, columns = origin
    packed = np.zeros((len(own), new[0] // 8, new[1]), np.uint8)
    for bits, outline in zip(packed, own, strict=True):
        text = outlines.to_text(outline, *old)
        x, y, w, h = outlines.box_of(text)
        # Only the rows and columns in which the object is.
        down = np.flatnonzero((rows >= y) & (rows < y + h))
        across = np.flatnonzero((columns >= x) & (columns < x + w))
        if not len(down) or not len(across):
            continue
        mask = outlines.to_mask(text, *old).T  # whose columns lie in one piece
        top, bottom = down[0] // 8, down[-1] // 8 + 1
        pixels = np.zeros((8 * (bottom - top), len(across)), np.uint8)
        pixels[down - 8 * top] = np.take(np.take(mask, columns[across], 0), rows[down], 1).T
        bits[top:bottom, across] = np.packbits(pixels, 0)
    return packed


def places(size: Size, geometry: Geometry, nearest: Nearest = nearest_places) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and the column of an image of a size from which each one of a changed mask comes, integers."""
    flip, before, window, final = geometry
    rows, columns = map(np.arange, size)
    if flip == "first":
        columns = columns[::-1]
    if before is not None and window is not None:
        down, right = (nearest(*lengths)[part] for *lengths, part in zip(size, before, window.slices, strict=True))
        rows, columns = rows[down], columns[right]
    rows, columns = (of[nearest(len(of), new)] for of, new in zip((rows, columns), final, strict=True))
    return rows, columns[::-1] if flip == "last" else columns


def mirrored_boxes(boxes: np.ndarray, width: int) -> np.ndarray:
    """Return boxes (G, 4) of an image of a width that is mirrored, left to right."""
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)


def resized_boxes(boxes: np.ndarray, old: Size, new: Size) -> np.ndarray:
    """Return boxes (G, 4) of an image that is resized, limited to it."""
    factors = np.array([new[1] / old[1], new[0] / old[0]] * 2, np.float32)
    return limited(boxes * factors, new)


def limited(boxes: np.ndarray, size: Size) -> np.ndarray:
    """Return boxes (G, 4) without what lies outside an image."""
    return np.clip(boxes, 0, np.array([size[1], size[0]] * 2, np.float32))
