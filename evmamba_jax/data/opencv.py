"""Images of the dense tasks as OpenCV changes them, to the pixel: bilinear resizing and colours of uint8 images.

The official detectors and segmenters read, resize and distort their images with OpenCV, whose arithmetic on uint8 is
its own: fixed-point weights, tables for hue and saturation, and no antialiasing when an image is made smaller. Here it
is NumPy. Images are (H, W, 3) in the order blue, green, red, as OpenCV reads them.

Source: OpenCV 4 ``imgproc/src/{resize.cpp,color_hsv.simd.hpp}``; mmcv 2.1.0 ``image/{geometric,colorspace}.py``; mmseg
1.2.2 ``datasets/transforms/transforms.py`` (``PhotoMetricDistortion``).
"""

import functools
from typing import NamedTuple

import numpy as np

_ONE = 2**11  # the weight 1
_HUES = 180  # of uint8 images
# Pixels that OpenCV converts at once, with the registers of every x86 machine since 2013.
_LANES = 32


def keep_ratio_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """Return the largest (height, width) of the image's ratio within limits of its longer and its shorter side.

    Args:
        height: of the image.
        width: of the image.
        scale: the two limits, in either order.

    Source: mmcv's ``imrescale``.
    """
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return scaled_size(height, width, factor)


def scaled_size(height: int, width: int, factor: float) -> tuple[int, int]:
    """Return (height, width) times a factor, rounded as mmcv does."""
    return int(height * factor + 0.5), int(width * factor + 0.5)


def size_of(image: np.ndarray) -> tuple[int, int]:
    """Return height and width of an image (H, W, ...)."""
    return image.shape[0], image.shape[1]


class Window(NamedTuple):
    """A part of an image, pixels: rows from ``top`` to before ``bottom``, columns from ``left`` to before ``right``."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """The same as an index."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


def resize_bilinear(image: np.ndarray, height: int, width: int, window: Window | None = None) -> np.ndarray:
    """Resize an image (H, W, C) or (H, W) of uint8 to (height, width, ...), as OpenCV's ``INTER_LINEAR`` does.

    Args:
        image: of uint8.
        height: of the result.
        width: of the result.
        window: the part of the result that is wanted; only that is computed.
    """
    rows, columns = (window or Window(0, 0, height, width)).slices
    if image.shape[:2] == (height, width):
        return image[rows, columns].copy()
    top, bottom, upper, lower = (each[rows] for each in _places(image.shape[0], height, clamp=False))
    left, right, before, after = (each[columns] for each in _places(image.shape[1], width, clamp=True))
    height, width = len(top), len(left)
    # Rows that no output needs are left out; in a large reduction that is most of them.
    needed, row = np.unique(np.concatenate([top, bottom]), return_inverse=True)
    wide = image[needed].reshape(len(needed), -1)  # with the channels of a pixel side by side, as one axis
    channels = wide.shape[1] // image.shape[1]

    def taken(pixel: np.ndarray, weight: np.ndarray) -> np.ndarray:
        columns = pixel[:, None] * channels + np.arange(channels)
        return np.take(wide, columns.ravel(), 1) * np.repeat(weight, channels)

    def weighed(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
        values = np.take(across, rows, 0)
        values *= weight[:, None]
        values >>= 16
        return values

    across = taken(left, before)
    across += taken(right, after)
    across >>= 4
    resized = weighed(row[:height], upper)
    resized += weighed(row[height:], lower)
    resized += 2
    resized >>= 2
    return resized.astype(np.uint8).reshape(height, width, *image.shape[2:])


def _places(old: int, new: int, *, clamp: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return where each pixel of an axis comes from: two pixels, and their weights.

    Args:
        old: length of the axis.
        new: its length afterwards.
        clamp: beyond the border take the border with weight 1; otherwise it stands for both pixels, which rounds twice.
    """
    place = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    share = place - first.astype(np.float32)
    if clamp:
        share = np.where((first < 0) | (first >= old - 1), np.float32(0), share)
        first = np.clip(first, 0, old - 1)
    of_first, of_second = (np.rint(part * _ONE).astype(np.int32) for part in (np.float32(1) - share, share))
    return np.clip(first, 0, old - 1), np.clip(first + 1, 0, old - 1), of_first, of_second


def resize_nearest(labels: np.ndarray, height: int, width: int, window: Window | None = None) -> np.ndarray:
    """Resize labels or masks (H, W, ...) to (height, width, ...), or a window of it, as ``INTER_NEAREST`` does."""
    rows, columns = (
        np.minimum((np.arange(new)[part] * (1 / (new / old))).astype(np.int64), old - 1)
        for old, new, part in zip(
            labels.shape[:2], (height, width), (window or Window(0, 0, height, width)).slices, strict=True
        )
    )
    return labels[rows[:, None], columns]


def adjusted(channels: np.ndarray, *, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """Return uint8 values times a factor plus an offset, limited to 0 and 255, their fraction cut off."""
    values = channels.astype(np.float32) * factor + offset
    return np.clip(values, 0, 255).astype(np.uint8)


def adjust_brightness(image: np.ndarray, offset: float) -> np.ndarray:
    """Return an image with ``offset`` added, -32 to 32 in training."""
    return adjusted(image, offset=offset)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Return an image times ``factor``, 0.5 to 1.5 in training."""
    return adjusted(image, factor=factor)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Return an image (H, W, 3) with its saturation times ``factor``, 0.5 to 1.5 in training."""
    hsv = bgr_to_hsv(image)
    hsv[..., 1] = adjusted(hsv[..., 1], factor=factor)
    return hsv_to_bgr(hsv)


def adjust_hue(image: np.ndarray, offset: int) -> np.ndarray:
    """Return an image (H, W, 3) with ``offset`` added to its hue, half degrees, -18 to 17 in training."""
    hsv = bgr_to_hsv(image)
    hsv[..., 0] = (hsv[..., 0].astype(int) + offset) % _HUES
    return hsv_to_bgr(hsv)


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Return 255 / v and 30 / difference for 0 to 255, in units of 2**-12."""
    number = np.arange(1, 256)
    saturation, hue = (np.rint((top << 12) / (part * number)) for top, part in ((255, 1.0), (_HUES, 6.0)))
    return np.append(0, saturation).astype(np.int32), np.append(0, hue).astype(np.int32)


def bgr_to_hsv(image: np.ndarray) -> np.ndarray:
    """Return uint8 (H, W, 3) as hue in half degrees (0 to 179), saturation and value (0 to 255)."""
    saturation_of, hue_of = _tables()
    blue, green, red = (image[..., i].astype(np.int32) for i in range(3))
    value = np.maximum(np.maximum(blue, green), red)
    spread = value - np.minimum(np.minimum(blue, green), red)
    saturation = spread * saturation_of[value] + (1 << 11) >> 12
    sixths = np.where(
        value == red, green - blue, np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    )
    hue = sixths * hue_of[spread] + (1 << 11) >> 12
    hue += np.where(hue < 0, _HUES, 0)
    return np.stack([hue, saturation, value], -1).astype(np.uint8)


def hsv_to_bgr(hsv: np.ndarray) -> np.ndarray:
    """Return hue, saturation and value, uint8 (H, W, 3), as blue, green and red.

    OpenCV cuts fractions off where it takes pixels of a row together, and rounds the pixels that are left at its end.
    """
    hue, saturation, value = (hsv[..., i].astype(np.float32) for i in range(3))
    saturation, value = saturation * np.float32(1 / 255), value * np.float32(1 / 255)
    hue = hue * np.float32(6 / _HUES)
    sector = np.floor(hue)
    part = hue - sector
    # Its compiler rounds these two differences once, after the product: a fused multiply-add.
    falling, rising = (
        (1 - saturation.astype(np.float64) * share).astype(np.float32) for share in (part, np.float32(1) - part)
    )
    levels = np.stack([value, value * (np.float32(1) - saturation), value * falling, value * rising])
    which = np.array([[1, 3, 0], [1, 0, 2], [3, 0, 1], [0, 2, 1], [0, 1, 3], [2, 1, 0]])[sector.astype(int) % 6]
    bgr = np.take_along_axis(levels, which.transpose(2, 0, 1), 0).transpose(1, 2, 0) * np.float32(255)
    together = hsv.shape[1] // _LANES * _LANES
    bgr[:, together:] = np.rint(bgr[:, together:])
    return np.clip(bgr, 0, 255).astype(np.uint8)
