"""Random augmentation of one image on the host: RandAugment with timm's operations or EfficientVMamba's, colour jitter.

An operation takes and returns a Pillow image, and its pixels are Pillow's. What moves pixels or looks at neighbours is
Pillow's own C code; what depends on a pixel's value alone is a table of 256 entries, made here and looked up by Pillow,
because Pillow and timm spend longer on making the same tables, entry by entry, than on the pixels.
"""

import dataclasses
import functools
import math
import re
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageFilter

from evmamba_jax.errors import UserError


class Geometry(NamedTuple):
    """How an operation that moves pixels reads between them and paints what it uncovers.

    Attributes:
        resample: BILINEAR or BICUBIC.
        fill: a value for each channel, 0 to 255; a plain number for grey images; None: black.
    """

    resample: Image.Resampling
    fill: int | tuple[int, ...] | None = None


class Operation(NamedTuple):
    """One entry of a set of operations.

    Attributes:
        apply: takes the image, the argument and the geometry, which most do not use; returns an image of the same size.
        argument: of the signed magnitude.
        signed: whether a coin decides on the sign of the magnitude.
    """

    apply: Callable[[Image.Image, float, Geometry], Image.Image]
    argument: Callable[[float], float] = float
    signed: bool = False


def pixels_of(image: Image.Image) -> np.ndarray:
    """Return uint8 (H, W, C), not to be written to; ``np.asarray`` lets Pillow make the same bytes twice."""
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, -1)


# --- A pixel's value --------------------------------------------------------------------------------------------------

_VALUES = bytes(range(256))
_INVERTED = _VALUES[::-1]
_RAMP = Image.frombytes("L", (256, 1), _VALUES)


def _look_up(image: Image.Image, table: bytes) -> Image.Image:
    return image.point(table if len(table) > 256 else table * len(image.getbands()))


def _tables(image: Image.Image, table: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """Make a table a channel from its histogram."""
    histograms = np.asarray(image.histogram()).reshape(-1, 256)
    return b"".join(table(histogram).clip(0, 255).astype(np.uint8).tobytes() for histogram in histograms)


def autocontrast(image: Image.Image, *_) -> Image.Image:
    """Stretch each channel to 0 to 255."""

    def table(histogram: np.ndarray) -> np.ndarray:
        present = np.flatnonzero(histogram)
        low, high = present[0], present[-1]
        if low == high:
            return np.arange(256)
        scale = 255.0 / (high - low)
        return np.arange(256) * scale + -low * scale

    return _look_up(image, _tables(image, table))


def equalize(image: Image.Image, *_) -> Image.Image:
    """Spread each channel's values evenly."""

    def table(histogram: np.ndarray) -> np.ndarray:
        present = np.flatnonzero(histogram)
        step = (histogram.sum() - histogram[present[-1]]) // 255
        if len(present) == 1 or step == 0:
            return np.arange(256)
        return (step // 2 + histogram.cumsum() - histogram) // step

    return _look_up(image, _tables(image, table))


def invert(image: Image.Image, *_) -> Image.Image:
    """Turn v into 255 - v."""
    return _look_up(image, _INVERTED)


def solarize(image: Image.Image, threshold: float, *_) -> Image.Image:
    """Invert values of ``threshold`` and more."""
    start = max(0, int(threshold))
    return _look_up(image, _VALUES[:start] + _INVERTED[start:])


def solarize_add(image: Image.Image, amount: float, *_) -> Image.Image:
    """Add to values below 128."""
    return _look_up(image, bytes(min(255, max(0, v + int(amount))) for v in range(128)) + _VALUES[128:])


def posterize(image: Image.Image, bits: float, *_) -> Image.Image:
    """Keep the highest ``bits`` of every value; 0 bits give black, which Pillow 13 and later refuse to make."""
    mask = 0xFF00 >> min(8, max(0, int(bits)))
    return _look_up(image, bytes(v & mask for v in range(256)))


def brightness(image: Image.Image, factor: float, *_) -> Image.Image:
    """Blend with black: factor 0 is black, 1 the image, 2 twice as bright."""
    return _from_constant(image, 0, factor)


def contrast(image: Image.Image, factor: float, *_) -> Image.Image:
    """Blend with the mean of the image's luma, the same grey everywhere."""
    histogram = np.asarray(image.convert("L").histogram())
    return _from_constant(image, int(histogram @ np.arange(256) / histogram.sum() + 0.5), factor)


def _from_constant(image: Image.Image, value: int, factor: float) -> Image.Image:
    """Blend with one value: Pillow blends all 256 values instead of all pixels, which makes a table."""
    return _look_up(image, Image.blend(Image.new("L", (256, 1), value), _RAMP, factor).tobytes())


def color(image: Image.Image, factor: float, *_) -> Image.Image:
    """Blend with the image in grey."""
    return Image.blend(image.convert("L").convert(image.mode), image, factor)


# --- A pixel's neighbours ---------------------------------------------------------------------------------------------


def sharpness(image: Image.Image, factor: float, *_) -> Image.Image:
    """Blend with the image smoothed by a 3x3 filter, whose middle weighs 5/13 and the rest 1/13; the rim stays.

    Pillow's ImageFilter.SMOOTH adds up the same nine products in floating point. Sums of bytes are exact in integers,
    and a thirteenth of one is never near a half, so that rounding cannot differ; this takes less than half the time.
    """
    pixels = np.asarray(image).astype(np.int16)
    middle = pixels[1:-1, 1:-1]
    lines = pixels[:-2] + pixels[1:-1]
    lines += pixels[2:]
    total = lines[:, :-2] + lines[:, 1:-1]
    total += lines[:, 2:]
    total += 4 * middle
    middle[:] = total * np.float32(1 / 13) + np.float32(0.5)
    return Image.blend(Image.fromarray(pixels.astype(np.uint8)), image, factor)


def blur(image: Image.Image, radius: float, *_) -> Image.Image:
    """Blur with a Gaussian; Pillow squares the radius, so its sign has no meaning."""
    return image.filter(ImageFilter.GaussianBlur(abs(radius)))


# --- A pixel's place --------------------------------------------------------------------------------------------------


def _affine(image: Image.Image, matrix: tuple[float, ...], geometry: Geometry) -> Image.Image:
    resample, fill = geometry
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=fill)


def shear_x(image: Image.Image, factor: float, geometry: Geometry) -> Image.Image:
    """Shift each row by ``factor`` of its height in the image."""
    return _shift_rows(image, factor, 0.0, geometry)


def shear_y(image: Image.Image, factor: float, geometry: Geometry) -> Image.Image:
    """Shift each column by ``factor`` of its place in the image."""
    return _transposed(_shift_rows(_transposed(image), factor, 0.0, geometry))


def translate_x(image: Image.Image, share: float, geometry: Geometry) -> Image.Image:
    """Shift to the left by a share of the width."""
    return _shift_rows(image, 0.0, share * image.width, geometry)


def translate_y(image: Image.Image, share: float, geometry: Geometry) -> Image.Image:
    """Shift upwards by a share of the height."""
    return _transposed(_shift_rows(_transposed(image), 0.0, share * image.height, geometry))


def _transposed(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.TRANSPOSE)


def _shift_rows(image: Image.Image, slope: float, shift: float, geometry: Geometry) -> Image.Image:
    """Shift each row to the left by ``shift`` pixels and ``slope`` more for each row above it.

    These are the pixels of Pillow's affine transform, which spends five cubics on each: four along the rows and one
    across them, which changes nothing as no pixel leaves its row. Here it is the one cubic that matters, in the same
    double precision and order of operations, for two to four times the speed. Rows lie end to end, so that NumPy goes
    through all of them in one sweep; behind each come three columns more, the last neighbours of its pixels.
    """
    if geometry.resample != Image.Resampling.BICUBIC:
        return _affine(image, (1, slope, shift, 0, 1, 0), geometry)
    width, height = image.size
    rows = np.arange(height)[:, None]
    shifts = slope * (rows + 0.5) + shift
    # The columns that any row still covers, and one to spare on both sides.
    start, stop = max(0, math.floor(-shifts.max()) - 1), min(width, math.ceil(width - shifts.min()) + 1)
    if start >= stop:
        return _affine(image, (1, slope, shift, 0, 1, 0), geometry)
    doubles, shorts, bands = _scratch(height, width, len(image.getbands()))
    columns = np.arange(start, stop + 3)
    size = height * len(columns)

    # Where each pixel comes from: d of the way from the pixel at `whole` to the next one.
    d, whole = doubles[:, :size].reshape(2, height, -1)
    np.add(columns + 0.5, slope * (rows + 0.5), out=d)
    d += shift
    inside = ((d >= 0) & (d < width))[:, :-3]
    d -= 0.5
    offset = np.floor(d[:, :1]) - start
    np.add(columns, offset, out=whole)
    d -= whole
    if d.min() < 0 or d.max() >= 1:  # rounding took a row's pixels to both sides of a whole number
        return _affine(image, (1, slope, shift, 0, 1, 0), geometry)

    # The image with its edges drawn out by two columns; what rows borrow from each other is not painted.
    bands[:, 1:-1, 2:-2] = pixels_of(image).transpose(2, 0, 1)
    bands[:, 1:-1, :2] = bands[:, 1:-1, 2:3]
    bands[:, 1:-1, -2:] = bands[:, 1:-1, -3:-2]
    windows = sliding_window_view(bands.reshape(len(bands), -1), len(columns), axis=1)
    before = (start + offset[:, 0]).clip(-width - 1, width + 1).astype(np.intp) + 1 + (rows[:, 0] + 1) * (width + 4)

    size -= 3
    d, v = doubles[:, :size]
    p2, p3, p4 = shorts[:, :size]
    fill = geometry.fill if isinstance(geometry.fill, tuple) else (geometry.fill or 0,) * len(bands)
    results = []
    for window, paint in zip(windows, fill, strict=True):
        near = window[before].ravel()
        v1, v2, v3, v4 = (near[i : i + size] for i in range(4))
        # v2 + d (p2 + d (p3 + d p4)), where p2 = v3 - v1, p3 = 2 (v1 - v2) + v3 - v4, p4 = v2 - v1 + v4 - v3.
        np.subtract(v2, v1, out=p4)
        np.multiply(p4, -2, out=p3)
        p3 += v3
        p3 -= v4
        p4 += v4
        p4 -= v3
        np.subtract(v3, v1, out=p2)
        np.multiply(d, p4, out=v)
        v += p3
        v *= d
        v += p2
        v *= d
        v += v2
        np.copyto(v1, v, casting="unsafe")
        values = near.clip(0, 255, out=near).reshape(height, -1)[:, :-3]
        result = np.full((height, width), paint, np.uint8)
        np.copyto(result[:, start:stop], values, where=inside, casting="unsafe")
        results.append(Image.frombuffer("L", image.size, result, "raw", "L", 0, 1))
    return Image.merge(image.mode, results)


class _Scratch(threading.local):
    """Memory that a thread keeps for images of one size: asking the system anew each time takes as long as the work."""

    size: tuple[int, int, int] = (0, 0, 0)

    def __call__(self, height: int, width: int, bands: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return two rows of doubles and three of short integers, and the bands with two pixels around."""
        if self.size != (height, width, bands):
            self.size = (height, width, bands)
            self.arrays = (
                np.empty((2, height * (width + 3))),
                np.empty((3, height * (width + 3)), np.int16),
                np.zeros((bands, height + 2, width + 4), np.int16),
            )
        return self.arrays


_scratch = _Scratch()


def rotate(image: Image.Image, degrees: float, geometry: Geometry) -> Image.Image:
    """Rotate counter-clockwise around the centre."""
    return image.rotate(degrees, resample=geometry.resample, fillcolor=geometry.fill)


# EfficientVMamba's four. They read between pixels by the bicubic rule and uncover black, whatever the recipe says.


def distort(image: Image.Image, amount: float, *_) -> Image.Image:
    """Cut the image into tiles, one for every ten of ``amount`` in each direction, and move their inner corners.

    The inner corners move by ``amount`` pixels in both directions. Below 20 there is one tile and no inner corner: the
    image stays as it is, but for the rounding of coordinates in sizes like 49.
    """
    tiles = max(1, int(0.1 * amount))
    edges = [[i * (side // tiles) for i in range(tiles)] + [side] for side in image.size]
    if tiles == 1 and all(1.0 / side * side == 1.0 for side in image.size):
        return image

    def source(column: int, row: int) -> tuple[float, float]:
        shift = amount if 0 < column < tiles and 0 < row < tiles else 0
        return edges[0][column] + shift, edges[1][row] + shift

    mesh = []
    for row in range(tiles):
        for column in range(tiles):
            box = (edges[0][column], edges[1][row], edges[0][column + 1], edges[1][row + 1])
            corners = [(column, row), (column, row + 1), (column + 1, row + 1), (column + 1, row)]
            mesh.append((box, [number for corner in corners for number in source(*corner)]))
    return image.transform(image.size, Image.Transform.MESH, mesh, resample=Image.Resampling.BICUBIC)


def zoom(image: Image.Image, factor: float, *_) -> Image.Image:
    """Resize by ``factor``, below 1, and put the result into the middle of a black image."""
    width, height = image.size
    size = max(1, round(width * factor)), max(1, round(height * factor))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    small = image.resize(size, Image.Resampling.BICUBIC)
    return small.crop((left, top, left + width, top + height))


def skew(image: Image.Image, amount: float, *_) -> Image.Image:
    """Push each corner of a square image along one of its sides, by ``amount`` of the side, all the same way round.

    A square goes over into a square, so this turns and scales. The official code writes it as a general perspective and
    solves for it in single precision; its result is off by less than a thousandth of a pixel.
    """
    half, side = image.width / 2, image.width
    corner, pushed = complex(-half, -half), complex(-half - math.ceil(side * amount), -half)  # from the centre
    turn = corner / pushed
    a, b = turn.real, turn.imag
    matrix = (a, -b, half - a * half + b * half, b, a, half - b * half - a * half)
    return _affine(image, matrix, Geometry(Image.Resampling.BICUBIC, None))


# --- Sets of operations -----------------------------------------------------------------------------------------------

# The argument at magnitude m, 0 to 10. Brackets stand where timm has them: another order rounds differently.
_ALWAYS = {
    "AutoContrast": Operation(autocontrast),
    "Equalize": Operation(equalize),
    "Invert": Operation(invert),
    "Rotate": Operation(rotate, lambda m: (m / 10) * 30, signed=True),
    "SolarizeAdd": Operation(solarize_add, lambda m: int((m / 10) * 110)),
    "ShearX": Operation(shear_x, lambda m: (m / 10) * 0.3, signed=True),
    "ShearY": Operation(shear_y, lambda m: (m / 10) * 0.3, signed=True),
    "TranslateXRel": Operation(translate_x, lambda m: (m / 10) * 0.45, signed=True),
    "TranslateYRel": Operation(translate_y, lambda m: (m / 10) * 0.45, signed=True),
}
_PLAIN = {
    "Posterize": Operation(posterize, lambda m: int((m / 10) * 4)),
    "Solarize": Operation(solarize, lambda m: int((m / 10) * 256)),
    "Color": Operation(color, lambda m: (m / 10) * 1.8 + 0.1),
    "Contrast": Operation(contrast, lambda m: (m / 10) * 1.8 + 0.1),
    "Brightness": Operation(brightness, lambda m: (m / 10) * 1.8 + 0.1),
    "Sharpness": Operation(sharpness, lambda m: (m / 10) * 1.8 + 0.1),
}
# Where a plain operation does less, or something else, as the magnitude grows, the increasing one always does more.
_INCREASING = {
    "PosterizeIncreasing": Operation(posterize, lambda m: 4 - int((m / 10) * 4)),
    "SolarizeIncreasing": Operation(solarize, lambda m: 256 - int((m / 10) * 256)),
    "ColorIncreasing": Operation(color, lambda m: max(0.1, 1.0 + (m / 10) * 0.9), signed=True),
    "ContrastIncreasing": Operation(contrast, lambda m: max(0.1, 1.0 + (m / 10) * 0.9), signed=True),
    "BrightnessIncreasing": Operation(brightness, lambda m: max(0.1, 1.0 + (m / 10) * 0.9), signed=True),
    "SharpnessIncreasing": Operation(sharpness, lambda m: max(0.1, 1.0 + (m / 10) * 0.9), signed=True),
}
_EFFICIENTVMAMBA = {
    "Distort": Operation(distort, lambda m: int((m / 10) * 10 + 10)),
    "Zoom": Operation(zoom, lambda m: (m / 10) * 0.4),
    "Blur": Operation(blur, lambda m: (m / 10) * 0.5),
    "Skew": Operation(skew, lambda m: (m / 10) * 0.3, signed=True),
}

TIMM = _ALWAYS | _PLAIN
TIMM_INCREASING = _ALWAYS | _INCREASING
EFFICIENTVMAMBA = _EFFICIENTVMAMBA | _ALWAYS | _PLAIN


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Some operations drawn from a set, each of them applied to one image or passed over.

    Attributes:
        operations: the set; drawn from with replacement.
        magnitude: mean of the normal distribution from which each application draws its own.
        magnitude_std: its standard deviation; 0: always the mean.
        limits: what the magnitude is then clipped to.
        num_layers: operations an image.
        probability: that a drawn operation is applied.

    Source: timm.data.RandAugment; and, with their operations and without limits, lib/dataset/augment_ops.py of
    EfficientVMamba (TerryPei/EfficientVMamba, classification).
    """

    operations: tuple[Operation, ...]
    magnitude: float
    magnitude_std: float = 0.0
    limits: tuple[float, float] = (0.0, 10.0)
    num_layers: int = 2
    probability: float = 0.5

    def __call__(
        self,
        image: Image.Image,
        rng: np.random.Generator,
        interpolation: str = "bicubic",
        fill: int | tuple[int, ...] | None = None,
    ) -> Image.Image:
        """Augment one image.

        Args:
            image: square, mode RGB or L.
            rng: the example's own generator; its draws alone decide the result.
            interpolation: of operations that move pixels, as :func:`draw_resampling` takes it.
            fill: what they paint where they uncover; a value for each channel.

        Returns:
            An image of the same size and mode.
        """
        for index in rng.integers(len(self.operations), size=self.num_layers):
            if rng.random() >= self.probability:
                continue
            apply, argument, signed = self.operations[index]
            magnitude = rng.normal(self.magnitude, self.magnitude_std) if self.magnitude_std else self.magnitude
            magnitude = min(max(magnitude, self.limits[0]), self.limits[1])
            if signed and rng.random() < 0.5:
                magnitude = -magnitude
            image = apply(image, argument(magnitude), Geometry(draw_resampling(interpolation, rng), fill))
        return image


def draw_resampling(interpolation: str, rng: np.random.Generator) -> Image.Resampling:
    """Return Pillow's name of an interpolation.

    Args:
        interpolation: "bilinear", "bicubic" or "random", one of the two.
        rng: drawn from for "random" only.
    """
    if interpolation == "random":
        interpolation = "bilinear" if rng.random() < 0.5 else "bicubic"
    return Image.Resampling[interpolation.upper()]


@functools.lru_cache(maxsize=8)
def rand_augment(text: str) -> RandAugment:
    """Read timm's way of writing RandAugment down.

    Args:
        text: ``rand`` (timm's 15 operations) or ``evmamba`` (EfficientVMamba's 19), then, each after a dash and in any
            order: ``m9``, the magnitude (10 if left out); ``mstd0.5``, its standard deviation (0); ``n2``, the
            operations an image (2); ``inc1``, the increasing versions of timm's operations (0).

    Returns:
        What ``rand-m9-mstd0.5-inc1`` and the like mean.

    Raises:
        UserError: anything else, named.
    """
    name, *sections = text.split("-")
    if name not in ("rand", "evmamba"):
        raise UserError(f"data.auto_augment={text!r} is not known: it must begin with 'rand' or 'evmamba'")
    allowed = {"m": r"\d+", "mstd": r"\d+(\.\d+)?", "n": r"[1-9]\d*"} | ({"inc": "[01]"} if name == "rand" else {})
    values: dict[str, str] = {}
    for section in sections:
        key = section.rstrip("0123456789.")
        if key not in allowed or key in values or not re.fullmatch(allowed[key], section[len(key) :]):
            raise UserError(
                f"data.auto_augment={text!r} is not known: the part {section!r} is not one of "
                f"{', '.join(allowed)} with a number, each once, as in {name}-m9-mstd0.5" + "-inc1" * (name == "rand")
            )
        values[key] = section[len(key) :]
    if name == "evmamba":
        operations, limits = EFFICIENTVMAMBA, (-math.inf, math.inf)
    else:
        operations, limits = TIMM_INCREASING if values.get("inc") == "1" else TIMM, (0.0, 10.0)
    return RandAugment(
        operations=tuple(operations.values()),
        magnitude=float(values.get("m", 10)),
        magnitude_std=float(values.get("mstd", 0)),
        limits=limits,
        num_layers=int(values.get("n", 2)),
    )


def color_jitter(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Change brightness, contrast and saturation, in random order.

    Args:
        image: mode RGB or L, which has no saturation.
        rng: the example's own generator.
        strength: each factor is uniform in 1 - strength to 1 + strength, never below 0.

    Returns:
        An image of the same size and mode.

    Source: torchvision's ColorJitter with three equal numbers, as timm has it.
    """
    changes = (brightness, contrast, color)
    for index in rng.permutation(3):
        image = changes[index](image, rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return image
