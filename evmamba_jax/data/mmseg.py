"""Images with label maps as mmsegmentation prepares them, to the pixel.

Source: mmseg 1.2.2 ``datasets/transforms/transforms.py`` and ``loading.py``, ``models/data_preprocessor.py``, in the
order of ``configs/_base_/datasets/ade20k.py``; mmcv 2.1.0 ``transforms/processing.py``.
"""

import dataclasses
import io
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from evmamba_jax.data import opencv
from evmamba_jax.data.decoding import CorruptImageError, decode
from evmamba_jax.data.dense_config import DenseData, SegmentationData
from evmamba_jax.data.label_maps import IGNORED
from evmamba_jax.data.opencv import Window, size_of
from evmamba_jax.data.readers import Example, Shape, Size

_REDRAWN = 10  # times that a crop is drawn anew
_GRAIN = 128  # pixels: sides of label maps, and of bucketed images, are padded to multiples


@dataclasses.dataclass(frozen=True)
class LabelMaps:
    """Records of ``image`` and ``label_map``, encoded or as arrays.

    Examples for training have ``image`` uint8 (S, S, 3), ``label_map`` uint8 (S, S) and ``size`` int32 (2,), the height
    and width without padding. Examples for evaluation have ``image`` resized, ``label_map`` as it is stored, padded
    with 255, ``size`` of the image and ``original`` int32 (2,) of the label map; and for each of ``test_scales`` the
    image at that scale, ``image_0`` and so on, with ``size_0``.

    Attributes:
        config: of the data.
    """

    config: SegmentationData

    def decode(self, record: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return image (H, W, 3) and label map (H, W), uint8."""
        return pixels_of(record, self.config), label_map_of(record["label_map"])

    def train(self, decoded: Any, rng: np.random.Generator) -> Example:
        """Return a crop at a random scale, perhaps mirrored, with other colours."""
        config, (image, labels) = self.config, decoded
        height, width = random_size(size_of(image), config.scale, config.scale_range, rng)
        window = choose_crop(labels, (height, width), config.image_size, config.most_of_a_class, rng)
        image = opencv.resize_bilinear(image, height, width, window)
        labels = opencv.resize_nearest(labels, height, width, window)
        if rng.random() < config.hflip:
            image, labels = opencv.mirrored(image), labels[:, ::-1]
        if config.photometric:
            image = photometric(image, rng)
        side = config.image_size
        return {
            "image": padded(image, (side, side)),
            "label_map": padded(labels, (side, side), IGNORED),
            "size": np.array(size_of(image), np.int32),
        }

    def evaluate(self, decoded: Any) -> Example:
        """Return the image at the scale of the test, and the label map as it is."""
        image, labels = decoded
        scaled = [opencv.resize_bilinear(image, *size) for size in self._scaled(size_of(image))]
        return _evaluated([self.view(image), *scaled], labels, self.eval_shape(size_of(labels)))

    def view(self, image: np.ndarray) -> np.ndarray:
        """Return an image (H, W, 3) at the scale of the test, its ratio kept."""
        return opencv.resize_bilinear(image, *opencv.keep_ratio_size(*size_of(image), self.config.scale))

    def _scaled(self, size: Size) -> list[Size]:
        """Return the sizes of an image at each of ``test_scales``."""
        return [opencv.scaled_size(*size, factor) for factor in self.config.test_scales]

    def eval_shape(self, size: Size) -> Shape:
        """Return height and width of label map, image, and image at each of ``test_scales``, as batches have them."""
        views = [opencv.keep_ratio_size(*size, self.config.scale), *self._scaled(size)]
        if self.config.eval_padding == "buckets":
            views = [up_to(view, _GRAIN) for view in views]
        return (*up_to(size, _GRAIN), *itertools.chain(*views))

    def blank(self, *, training: bool, shape: Shape | None = None) -> Example:
        """Return a black image of ignored pixels."""
        side = self.config.image_size
        if training or shape is None:
            shape = (side,) * (4 if training else 4 + 2 * len(self.config.test_scales))
        views = [np.zeros((height, width, 3), np.uint8) for height, width in zip(shape[2::2], shape[3::2], strict=True)]
        labels = np.full(shape[:2], IGNORED, np.uint8)
        if training:
            return {"image": views[0], "label_map": labels, "size": np.array(shape[2:], np.int32)}
        return _evaluated(views, labels, shape)


def _evaluated(views: Sequence[np.ndarray], labels: np.ndarray, shape: Shape) -> Example:
    """Return an example for evaluation, padded to a shape."""
    example: Example = {"label_map": padded(labels, shape[:2], IGNORED), "original": np.array(labels.shape, np.int32)}
    for i, view in enumerate(views):
        name = f"_{i - 1}" if i else ""
        example[f"image{name}"] = padded(view, shape[2 + 2 * i : 4 + 2 * i])
        example[f"size{name}"] = np.array(size_of(view), np.int32)
    return example


def pixels_of(record: Any, config: DenseData) -> np.ndarray:
    """Return the pixels (H, W, 3), uint8, of a record's image, turned as its label map or boxes are."""
    image = record["image"]
    if isinstance(image, np.ndarray):
        return image
    return decode(image, config.in_channels, upright=record["upright"], max_pixels=config.max_pixels)


def label_map_of(data: bytes | np.ndarray) -> np.ndarray:
    """Return the labels (H, W), uint8, of a record's label map: an image with one channel of bytes."""
    if isinstance(data, np.ndarray):
        return data
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise CorruptImageError(f"its label map cannot be read: {error}") from error


def random_size(size: Size, scale: Size, factors: tuple[float, float], rng: np.random.Generator) -> Size:
    """Return the size of an image at limits of its sides that are drawn: ``scale`` times a factor."""
    factor = rng.uniform(*factors)
    return opencv.keep_ratio_size(*size, (int(scale[0] * factor), int(scale[1] * factor)))


def choose_crop(labels: np.ndarray, size: Size, side: int, most: float, rng: np.random.Generator) -> Window:
    """Return a square crop of an image that is resized.

    It is drawn anew, ten times at most, while there is one class only, or one class has the share ``most`` of the
    counted pixels or more; the last one is taken whatever it shows.

    Args:
        labels: (H, W), not resized.
        size: of the resized image.
        side: of the crop; the image's where that is smaller.
        most: see above.
        rng: draws the place.
    """

    def draw() -> Window:
        top, left = (int(rng.integers(max(length - side, 0) + 1)) for length in size)
        return Window(top, left, min(top + side, size[0]), min(left + side, size[1]))

    window = draw()
    for _ in range(_REDRAWN):
        crop = Image.fromarray(opencv.resize_nearest(labels, *size, window))
        pixels = np.array(crop.histogram()[:IGNORED])  # twice as fast as NumPy's
        if np.count_nonzero(pixels) > 1 and pixels.max() < most * pixels.sum():
            break
        window = draw()
    return window


def photometric(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return an image (H, W, 3), red first, with other brightness, contrast, saturation and hue, each half the time."""
    contrast_last = rng.random() < 0.5

    def contrast(image: np.ndarray) -> np.ndarray:
        return opencv.adjust_contrast(image, rng.uniform(0.5, 1.5)) if rng.random() < 0.5 else image

    if rng.random() < 0.5:
        image = opencv.adjust_brightness(image, rng.uniform(-32, 32))
    if not contrast_last:
        image = contrast(image)
    if rng.random() < 0.5:
        image = opencv.adjust_saturation(image, rng.uniform(0.5, 1.5), red_first=True)
    if rng.random() < 0.5:
        image = opencv.adjust_hue(image, int(rng.integers(-18, 18)), red_first=True)
    if contrast_last:
        image = contrast(image)
    return image


def padded(array: np.ndarray, size: Shape, value: int = 0) -> np.ndarray:
    """Return an array (H, W, ...) with ``value`` on the right and below up to a size; itself where it has that."""
    if size_of(array) == tuple(size):
        return np.ascontiguousarray(array)
    filled = np.full((*size, *array.shape[2:]), value, array.dtype)
    filled[: array.shape[0], : array.shape[1]] = array
    return filled


def up_to(size: Size, multiple: int) -> Size:
    """Return a size with both sides as the next multiples."""
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width
