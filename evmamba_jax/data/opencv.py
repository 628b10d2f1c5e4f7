"""Images of the dense tasks as OpenCV changes them, to the pixel: bilinear resizing and colours of uint8 images.

The official detectors and segmenters read, resize and distort their images with OpenCV, whose arithmetic on uint8 is
its own: fixed-point weights, tables for hue and saturation, and no antialiasing when an image is made smaller. Here it
is NumPy; where OpenCV is installed (``pip install 'evmamba-jax[opencv]'``), OpenCV itself resizes, a few times as fast.
Not so colours: OpenCV 4.14 rounds some otherwise than 4.10, 4.11 and 5.0. Images are (H, W, 3) in the order blue,
green, red, as OpenCV reads them.

Source: OpenCV 4 ``imgproc/src/{resize.cpp,color_hsv.simd.hpp}``; mmcv 2.1.0 ``image/{geometric,colorspace}.py``; mmseg
1.2.2 ``datasets/transforms/transforms.py`` (``PhotoMetricDistortion``).
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

try:
    import cv2
except ImportError:
    cv2 = None
else:
    cv2.setNumThreads(0)  # images are prepared in several threads as it is

_ONE = 2**11  # the weight 1
_HUES = 180  # of uint8 images
# What is done at once, so that numbers stay in a processor's caches: rows of a result, and pixels that change colour.
_ROWS, _PIXELS = 32, 2**15
# Numbers that NumPy takes at once where a row meets a column. With its usual 8192 it copies shorter rows first.
_BUFFER = 1024
# How np.take treats places outside. There are none, and this is its fastest way.
_ANY = "wrap"
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


def resize_bilinear(
    image: np.ndarray, height: int, width: int, window: Window | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """Resize an image (H, W, C) or (H, W) of uint8 to (height, width, ...), as OpenCV's ``INTER_LINEAR`` does.

    Args:
        image: of uint8.
        height: of the result.
        width: of the result.
        window: the part of the result that is wanted; only that is computed.
        out: the upper left part of this contiguous array is to hold the result; by default a new one does.

    Returns:
        The result, where ``out`` is given a view of it.
    """
    rows, columns = (window or Window(0, 0, height, width)).slices
    if cv2 is not None:
        if window is None and out is not None:
            resized = out[:height, :width]
            return cv2.resize(np.ascontiguousarray(image), (width, height), resized, interpolation=cv2.INTER_LINEAR)
        whole = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_LINEAR)
        part = whole.reshape(height, width, *image.shape[2:])[rows, columns]
        if out is None:
            return part
        resized = out[: len(part), : part.shape[1]]
        resized[:] = part
        return resized
    top, bottom, upper, lower = _places(image.shape[0], height, rows, clamp=False)
    left, _, _, after = _places(image.shape[1], width, columns, clamp=True)
    shape = len(top), len(left)
    if out is None:
        out = np.empty((*shape, *image.shape[2:]), np.uint8)
    resized = out[: shape[0], : shape[1]]
    if image.shape[:2] == (height, width):
        resized[:] = image[rows, columns]
        return resized
    # Rows that no output needs are left out; in a large reduction that is most of them. So are columns beside a window.
    wanted = np.zeros(len(image), bool)
    wanted[top] = wanted[bottom] = True
    needed, row = np.flatnonzero(wanted), np.cumsum(wanted) - 1
    top, bottom = row[top], row[bottom]
    begin, end = left[0], min(left[-1] + 2, image.shape[1])
    channels = math.prod(image.shape[2:])
    across = _Across(left - begin, after, end - begin, channels)
    # OpenCV cuts 16 bits off each product, adds 2 to their sum and cuts off 2 more. Here the weights are 2**6 times
    # larger: products fill 32 bits, and of their sum the highest 8 are the result.
    upper, lower = (each[:, None].astype(np.uint32) << 6 for each in (upper, lower))
    totals, others = np.empty((2, _ROWS, shape[1] * channels), np.uint32)
    flat = out.reshape(len(out), -1)[:, : shape[1] * channels]
    with np.errstate():  # which ends what is set within
        np.setbufsize(_BUFFER)
        for start in range(0, shape[0], _ROWS):
            part = slice(start, min(start + _ROWS, shape[0]))
            first = top[start]
            wide = across(image[needed[first : bottom[part.stop - 1] + 1], begin:end])
            total, other = (each[: part.stop - start] for each in (totals, others))
            np.take(wide, top[part] - first, 0, out=total, mode=_ANY)
            total *= upper[part]
            total &= np.uint32(0xFFC00000)
            np.take(wide, bottom[part] - first, 0, out=other, mode=_ANY)
            other *= lower[part]
            total += other
            total += np.uint32(2 << 22)
            total >>= 24
            flat[part] = total
    return resized


class _Across:
    """Resizes rows; the memory that this takes is kept from call to call.

    Args:
        left: for each pixel of a result the one before it; the next stands behind it.
        after: the next one's weight; the other's is the rest of 1.
        width: of the rows, pixels.
        channels: of a pixel.
    """

    def __init__(self, left: np.ndarray, after: np.ndarray, width: int, channels: int):
        self.entries = (left[:, None] * channels + np.arange(channels)).ravel()
        self.after = np.repeat(after, channels)
        self.width, self.channels = width * channels, channels
        self.pixels = np.zeros(2 * _ROWS * self.width + channels, np.int32)  # the last has a next one, too
        self.both = np.empty(2 * _ROWS * self.width, np.int32)
        self.taken, self.sums = np.empty((2, 2 * _ROWS, len(self.entries)), np.int32)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return rows (H, W, ...) of uint8 as (H, W * C) of uint32, in units of 2**-7, overwritten by the next call."""
        size = rows.size
        pixels, both = self.pixels[:size], self.both[:size]
        taken, sums = self.taken[: len(rows)], self.sums[: len(rows)]
        # One number for both, so that one look-up gets them: a pixel in its low half, the step to the next above.
        pixels[:] = rows.reshape(-1)
        np.subtract(self.pixels[self.channels :][:size], pixels, out=both)
        both <<= 16
        pixels <<= 7
        both |= pixels
        np.take(both.reshape(-1, self.width), self.entries, 1, out=taken, mode=_ANY)
        np.right_shift(taken, 16, out=sums)
        sums *= self.after
        sums >>= 4
        taken &= 0xFFFF
        sums += taken
        return sums.view(np.uint32)


def _places(old: int, new: int, part: slice, *, clamp: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return where each pixel of an axis comes from: two pixels, and their weights.

    Args:
        old: length of the axis.
        new: its length afterwards.
        part: the pixels that are asked for.
        clamp: beyond the border take the border with weight 1; otherwise it stands for both pixels, which rounds twice.
    """
    place = ((np.arange(part.start, part.stop) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    share = place - first.astype(np.float32)
    if clamp:
        share = np.where((first < 0) | (first >= old - 1), np.float32(0), share)
        first = np.clip(first, 0, old - 1)
    of_first, of_second = (np.rint(part * _ONE).astype(np.int32) for part in (np.float32(1) - share, share))
    return np.clip(first, 0, old - 1), np.clip(first + 1, 0, old - 1), of_first, of_second


def resize_nearest(labels: np.ndarray, height: int, width: int, window: Window | None = None) -> np.ndarray:
    """Resize labels or masks (H, W, ...) to (height, width, ...), or a window of it, as ``INTER_NEAREST`` does."""
    parts = (window or Window(0, 0, height, width)).slices
    rows, columns = map(nearest_places, labels.shape[:2], (height, width), parts)
    return np.take(np.take(labels, rows, 0), columns, 1)


def nearest_places(old: int, new: int, part: slice = slice(None)) -> np.ndarray:
    """Return where each pixel of a part of an axis comes from as ``INTER_NEAREST`` resizes it, integers.

    Args:
        old: length of the axis.
        new: its length afterwards.
        part: the pixels that are asked for.
    """
    return np.minimum((np.arange(new)[part] * (1 / (new / old))).astype(np.int64), old - 1)


def mirrored(image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return an image (H, W, C) with left and right exchanged, in ``out``, which may be the image, or a new array."""
    if cv2 is not None:
        turned = cv2.flip(image if out is image else np.ascontiguousarray(image), 1, out)
        return turned.reshape(image.shape)
    turned = np.empty_like(image) if out is None else out
    for channel in range(image.shape[2]):  # many times as fast as all at once
        turned[..., channel] = image[:, ::-1, channel]
    return turned


def adjusted(channels: np.ndarray, *, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """Return uint8 values times a factor plus an offset, limited to 0 and 255, their fraction cut off."""
    values = np.arange(256, dtype=np.float32) * factor + offset
    table = np.clip(values, 0, 255).astype(np.uint8).tobytes()
    return np.frombuffer(bytearray(channels.tobytes().translate(table)), np.uint8).reshape(channels.shape)


def adjust_brightness(image: np.ndarray, offset: float) -> np.ndarray:
    """Return an image with ``offset`` added, -32 to 32 in training."""
    return adjusted(image, offset=offset)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Return an image times ``factor``, 0.5 to 1.5 in training."""
    return adjusted(image, factor=factor)


def adjust_saturation(image: np.ndarray, factor: float, *, red_first: bool = False) -> np.ndarray:
    """Return an image (H, W, 3) with its saturation times ``factor``, 0.5 to 1.5 in training."""
    return _recoloured(image, 1, adjusted(np.arange(256, dtype=np.uint8), factor=factor), red_first)


def adjust_hue(image: np.ndarray, offset: int, *, red_first: bool = False) -> np.ndarray:
    """Return an image (H, W, 3) with ``offset`` added to its hue, half degrees, -18 to 17 in training."""
    return _recoloured(image, 0, ((np.arange(256) + offset) % _HUES).astype(np.uint8), red_first)


def _recoloured(image: np.ndarray, channel: int, table: np.ndarray, red_first: bool) -> np.ndarray:
    """Return an image with its hue (channel 0) or saturation (1) looked up in a table, uint8 (256,)."""
    levels = np.take(_levels(), table, channel + 1)
    recoloured = np.empty(image.shape, np.uint8)
    order = slice(None, None, -1 if red_first else 1)
    for part in _parts(image):
        hsv = _to_hsv(*np.moveaxis(image[part][..., order], -1, 0))
        _fill_bgr(recoloured[part][..., order], *hsv, levels)
    return recoloured


def _parts(image: np.ndarray) -> Iterator[slice]:
    """Yield the rows of an image, some at a time."""
    rows = max(1, _PIXELS // max(1, image.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(image), rows))


def bgr_to_hsv(image: np.ndarray) -> np.ndarray:
    """Return uint8 (H, W, 3) as hue in half degrees (0 to 179), saturation and value (0 to 255)."""
    return np.stack(_to_hsv(*np.moveaxis(image, -1, 0)), -1)


def hsv_to_bgr(hsv: np.ndarray) -> np.ndarray:
    """Return hue, saturation and value, uint8 (H, W, 3), as blue, green and red."""
    bgr = np.empty(hsv.shape, np.uint8)
    hue, saturation, value = np.moveaxis(hsv, -1, 0)
    _fill_bgr(bgr, hue, saturation, value, _levels())
    return bgr


def _looked_up(table: np.ndarray, places: np.ndarray) -> np.ndarray:
    return np.take(table, places, out=np.empty(places.shape, table.dtype), mode=_ANY)


@functools.cache
def _of_spread() -> np.ndarray:
    """Return 30 / spread in units of 2**-12, and in the lowest 8 bits the saturation, by value and spread: int32."""
    number = np.arange(1, 256)
    rounded = (np.rint((top << 12) / (part * number)) for top, part in ((255, 1.0), (_HUES, 6.0)))
    of_value, of_spread = (np.append(0, each).astype(np.int32) for each in rounded)
    saturation = np.arange(256) * of_value[:, None] + (1 << 11) >> 12
    return (of_spread << 8 | saturation).ravel()


def _to_hsv(blue: np.ndarray, green: np.ndarray, red: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return hue, saturation and value of channels, uint8."""
    blue, green, red = (np.ascontiguousarray(each) for each in (blue, green, red))
    value = np.maximum(np.maximum(blue, green), red)
    spread = value - np.minimum(np.minimum(blue, green), red)
    # Masks, which select without branches.
    most_red, most_green = (np.negative((value == each).astype(np.uint16)) for each in (red, green))
    # NumPy widens uint8 to uint16 many times as fast as to anything else; differences are negative in int16.
    blue, green, red, high, spread = (each.astype(np.uint16) for each in (blue, green, red, value, spread))
    both = _looked_up(_of_spread(), high << 8 | spread)
    saturation = both.astype(np.uint8)
    sixths = red - green + (spread << 2)
    sixths ^= (sixths ^ blue - red + (spread << 1)) & most_green
    sixths ^= (sixths ^ green - blue) & most_red
    hue = both >> 8
    hue *= sixths.view(np.int16)
    hue += 1 << 11
    hue >>= 12
    hue += hue >> 31 & _HUES
    return hue.astype(np.uint8), saturation, value


@functools.cache
def _levels() -> np.ndarray:
    """Return blue, green and red by hue and saturation, as parts of the value: float32 (3, 256, 256)."""
    hue = np.arange(256, dtype=np.float32)[:, None] * np.float32(6 / _HUES)
    saturation = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    sector = np.floor(hue)
    part = hue - sector
    # OpenCV's compiler rounds these two differences once, after the product: a fused multiply-add.
    falling, rising = (
        (1 - saturation.astype(np.float64) * share).astype(np.float32) for share in (part, np.float32(1) - part)
    )
    least = np.broadcast_to(np.float32(1) - saturation, falling.shape)
    levels = np.stack([np.ones_like(falling), least, falling, rising])
    which = np.array([[1, 3, 0], [1, 0, 2], [3, 0, 1], [0, 2, 1], [0, 1, 3], [2, 1, 0]])[sector.astype(int) % 6]
    return np.take_along_axis(levels, which.transpose(2, 0, 1), 0)


def _fill_bgr(bgr: np.ndarray, hue: np.ndarray, saturation: np.ndarray, value: np.ndarray, levels: np.ndarray) -> None:
    """Write an image (H, W, 3) from its hue, saturation and value, uint8 (H, W), as :func:`_levels` has their colours.

    OpenCV cuts fractions off where it takes pixels of a row together, and rounds the pixels that are left at its end.
    """
    colour = (hue.astype(np.uint16) << 8 | saturation).astype(np.intp)
    value = value * np.float32(1 / 255)
    together = value.shape[1] // _LANES * _LANES
    for channel in range(3):
        level = _looked_up(levels[channel].ravel(), colour)
        level *= value
        level *= np.float32(255)
        np.rint(level[:, together:], out=level[:, together:])
        bgr[..., channel] = level.astype(np.uint8)
