"""Images with boxes as mmdetection prepares them, to the pixel.

Source: mmdet 3.3.0 ``datasets/transforms/transforms.py``, ``datasets/coco.py`` and ``configs/_base_/datasets``;
``configs/swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py``.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np

from evmamba_jax.data import opencv
from evmamba_jax.data.dense_config import DetectionData
from evmamba_jax.data.mmseg import pixels_of, up_to
from evmamba_jax.data.opencv import Window, size_of
from evmamba_jax.data.readers import Example, Shape, Size

MULTIPLE = 32  # of the sides of images, once they are padded
# mmdet's 3x: the short side in pixels, before a crop and after; and the least and the most side of a crop.
SHORT, SHORT_BEFORE, CROP = tuple(range(480, 801, 32)), (400, 500, 600), (384, 600)


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

    Attributes:
        config: of the data.
    """

    config: DetectionData

    def decode(self, record: Any) -> tuple[np.ndarray, Any]:
        """Return the image (H, W, 3), uint8, and the record."""
        return pixels_of(record, self.config), record

    def geometry(self, size: Size, rng: np.random.Generator) -> Geometry:
        """Draw how an image of a size is changed for training."""
        config = self.config
        mirrored = rng.random() < config.hflip
        if not config.multi_scale:
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
        """Return the image resized, perhaps cropped and mirrored, and what of its objects is seen."""
        image, record = decoded
        geometry = self.geometry(size_of(image), rng)
        counted = ~record["crowd"]
        shown = _black(canvas(geometry.size, self.config.scale))
        _, boxes, seen = change(image, record["boxes"][counted].astype(np.float32), geometry, shown)
        labels = record["labels"][counted][seen]
        return {"image": shown, "size": np.array(geometry.size, np.int32)} | self._objects(boxes[seen], labels)

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
        return opencv.resize_bilinear(image, *opencv.keep_ratio_size(*size_of(image), self.config.scale), out=out)

    def eval_shape(self, size: Size) -> Size:
        """Return height and width of the padded image."""
        resized = opencv.keep_ratio_size(*size, self.config.scale)
        return up_to(resized, MULTIPLE) if self.config.eval_padding == "exact" else canvas(resized, self.config.scale)

    def blank(self, *, training: bool, shape: Shape | None = None) -> Example:
        """Return a black image without objects."""
        long, short = max(self.config.scale), min(self.config.scale)
        height, width = shape or canvas((short, long), self.config.scale)
        none = np.zeros((0, 4)), np.zeros(0)
        example: Example = {"image": _black((height, width)), "size": np.array([height, width], np.int32)}
        if training:
            return example | self._objects(*none)
        return example | self._objects(*none, crowd=none[1], area=none[1]) | {"scale": np.ones(2, np.float32)}

    def _objects(self, boxes: np.ndarray, labels: np.ndarray, **more: np.ndarray) -> Example:
        most = self.config.max_objects
        types = {"boxes": np.float32, "labels": np.int32, "valid": bool, "crowd": bool, "area": np.float32}
        filled: Example = {}
        for name, values in {"boxes": boxes, "labels": labels, "valid": np.ones(len(labels)), **more}.items():
            array = np.zeros((most, *values.shape[1:]), types[name])
            array[: len(values)] = values
            filled[name] = array
        return filled


def _black(size: Size) -> np.ndarray:
    return np.zeros((*size, 3), np.uint8)


def canvas(size: Size, scale: Size) -> Size:
    """Return the size, multiples of 32, to which images within limits of their sides are padded: one of two."""
    short, long = up_to((min(scale), max(scale)), MULTIPLE)
    return (short, long) if size[1] >= size[0] else (long, short)


def change(
    image: np.ndarray, boxes: np.ndarray, geometry: Geometry, out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return image, boxes, and which of these are seen, bool (G,), after a change.

    Args:
        image: (H, W, 3) uint8.
        boxes: (G, 4) float32, x0 y0 x1 y1 in its pixels.
        geometry: the change.
        out: the upper left part of this contiguous array is to hold the image; by default a new one does.
    """
    flip, before, window, size = geometry
    if flip == "first":
        image, boxes = opencv.mirrored(image), mirrored_boxes(boxes, image.shape[1])
    seen = np.ones(len(boxes), bool)
    if before is not None and window is not None:
        boxes = resized_boxes(boxes, size_of(image), before) - np.array([window.left, window.top] * 2, np.float32)
        image = opencv.resize_bilinear(image, *before, window)
        boxes = limited(boxes, size_of(image))
        seen = np.all(boxes[:, 2:] > boxes[:, :2], 1)
    boxes = resized_boxes(boxes, size_of(image), size)
    image = opencv.resize_bilinear(image, *size, out=out)
    if flip == "last":
        image, boxes = opencv.mirrored(image, out=image), mirrored_boxes(boxes, size[1])
    return image, boxes, seen


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
