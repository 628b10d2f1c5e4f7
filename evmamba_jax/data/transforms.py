"""Host transforms: encoded bytes to square uint8 images, with the pixels of Pillow and the rules of torchvision."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from evmamba_jax.data.augment import color_jitter, draw_resampling, pixels_of, rand_augment
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.decoding import decode


def random_crop_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw the box of RandomResizedCrop.

    Ten tries of an area uniform in ``scale`` and a width / height log-uniform in ``ratio``; when none fits, the largest
    centred box whose aspect lies in ``ratio``.

    Args:
        rng: the example's own generator.
        height: of the image, pixels.
        width: of the image, pixels.
        scale: range of the box's area as a share of the image.
        ratio: range of the box's width / height.

    Returns:
        top, left, height and width of the box, pixels; always inside the image.

    Source: torchvision's RandomResizedCrop.get_params, which timm repeats.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    h, w = min(height, max(1, round(width / aspect))), min(width, max(1, round(height * aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


# An evaluation resizes the whole image, and then cuts out the middle. Of an image whose longer side is many times the
# shorter, it takes the part around the middle before it resizes: the same but for rounding, in bounded memory.
_EXTREME = 16


def read_pixels(data: bytes, config: DataConfig) -> np.ndarray:
    """Decode an image file as the configuration says.

    Args:
        data: an encoded image.
        config: reads in_channels, exif_orientation and max_pixels.

    Returns:
        uint8 (H, W, in_channels).

    Raises:
        CorruptImageError: the bytes cannot be decoded, or are too many pixels.
    """
    return decode(data, config.in_channels, upright=config.exif_orientation, max_pixels=config.max_pixels)


def train_image(data: bytes, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """Make a training image: decode, then :func:`train_view`.

    Args:
        data: an encoded image.
        config: reads what ``read_pixels`` and ``train_view`` read.
        rng: the example's own generator; its draws alone decide the result.

    Returns:
        uint8 (image_size, image_size, in_channels).

    Raises:
        CorruptImageError: the bytes cannot be decoded.

    Source: timm's transforms_imagenet_train, up to the normalisation.
    """
    return train_view(read_pixels(data, config), config, rng)


def train_view(pixels: np.ndarray, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """Make a training image of a decoded one: RandomResizedCrop, random flip, then RandAugment or colour jitter.

    With ``pad_crop`` the first is torchvision's RandomCrop with padding, of an image that is resized to ``image_size``
    where it has another size.

    Args:
        pixels: uint8 (H, W, channels), one behind the other in memory.
        config: reads image_size, crop_scale, crop_ratio, pad_crop, interpolation, hflip, auto_augment, color_jitter,
            and mean, which becomes the colour of what RandAugment uncovers.
        rng: the example's own generator; its draws alone decide the result.

    Returns:
        uint8 (image_size, image_size, channels).
    """
    (height, width), side, pad = pixels.shape[:2], config.image_size, config.pad_crop
    if pad:
        box = 0, 0, height, width
        down, right = (int(rng.integers(2 * pad + 1)) - pad for _ in range(2))
    else:
        box = random_crop_box(rng, height, width, config.crop_scale, config.crop_ratio)
        down = right = 0
    resample = draw_resampling(config.interpolation, rng)
    flipped = rng.random() < config.hflip

    def view(part: np.ndarray) -> Image.Image:
        image = _image(part, *box).resize((side, side), resample)
        if down or right:
            image = image.crop((right, down, right + side, down + side))  # zeros beyond the border
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image

    if pixels.shape[2] not in (1, 3):
        return _by_channel(pixels, lambda part: pixels_of(view(part)))
    image = view(pixels)
    if config.auto_augment:
        fill = tuple(min(255, round(255 * mean)) for mean in config.mean)
        augment = rand_augment(config.auto_augment)
        image = augment(image, rng, config.interpolation, fill if len(fill) > 1 else fill[0])
    elif config.color_jitter:
        image = color_jitter(image, rng, config.color_jitter)
    return pixels_of(image)


def eval_image(data: bytes, config: DataConfig) -> np.ndarray:
    """Make an evaluation image: decode, resize, crop the centre.

    Args:
        data: an encoded image.
        config: reads what ``read_pixels`` and ``eval_crop`` read.

    Returns:
        uint8 (image_size, image_size, in_channels).

    Raises:
        CorruptImageError: the bytes cannot be decoded.
    """
    return eval_crop(read_pixels(data, config), config)


def eval_crop(pixels: np.ndarray, config: DataConfig) -> np.ndarray:
    """Resize an image and crop its centre, as in an evaluation.

    The short side, or with crop_mode "squash" both sides, becomes floor(image_size / crop_pct).

    Args:
        pixels: uint8 (H, W, C).
        config: reads image_size, crop_pct, crop_mode and eval_interpolation.

    Returns:
        uint8 (image_size, image_size, C).

    Source: torchvision's Resize (long side truncated) and CenterCrop (offset rounded), as timm uses them.
    """
    if pixels.shape[2] not in (1, 3):
        return _by_channel(pixels, lambda part: eval_crop(part, config))
    side, size = config.image_size, math.floor(config.image_size / config.crop_pct)
    height, width = pixels.shape[:2]
    resample = Image.Resampling[config.eval_interpolation.upper()]
    if config.crop_mode == "squash":
        new = (size, size)
    else:
        short = min(height, width)
        new = (size * width // short, size * height // short)
    left, top = (round((long - side) / 2) for long in new)
    if max(new) > _EXTREME * size and max(new) > side:
        pixels, box = _around_middle(pixels, new, (left, top), side)
        return pixels_of(_image(pixels, 0, 0, *pixels.shape[:2]).resize((side, side), resample, box))
    image = _image(pixels, 0, 0, height, width).resize(new, resample)
    return pixels_of(image.crop((left, top, left + side, top + side)))


def _around_middle(
    pixels: np.ndarray, new: tuple[int, int], start: tuple[int, int], side: int
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Return the pixels that the middle of a resized image is made of, and the middle's box among them.

    Args:
        pixels: uint8 (H, W, C).
        new: width and height to resize to.
        start: left and top of the middle in the resized image.
        side: of the middle, there.
    """
    cut, edges = [], []
    for length, resized, first in zip((pixels.shape[1], pixels.shape[0]), new, start, strict=True):
        scale = length / resized
        low, high = max(0.0, first * scale), min(float(length), (first + side) * scale)
        margin = math.ceil(3 * max(scale, 1))  # bicubic weights reach 2 pixels, of the larger grid
        begin, end = max(0, math.floor(low) - margin), min(length, math.ceil(high) + margin)
        cut.append(slice(begin, end))
        edges.append((low - begin, high - begin))
    (x0, x1), (y0, y1) = edges
    return np.ascontiguousarray(pixels[cut[1], cut[0]]), (x0, y0, x1, y1)


def _by_channel(pixels: np.ndarray, view: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply a view of grey images to every channel of uint8 (H, W, C)."""
    channels = [view(np.ascontiguousarray(pixels[..., k : k + 1])) for k in range(pixels.shape[2])]
    return np.concatenate(channels, axis=-1)


def _image(pixels: np.ndarray, top: int, left: int, height: int, width: int) -> Image.Image:
    """Make a Pillow image of a box of uint8 (H, W, C); Pillow picks it out of the rows itself, which saves a copy."""
    mode = "RGB" if pixels.shape[-1] == 3 else "L"
    stride, step = pixels.strides[:2]
    box = pixels.data.cast("B")[top * stride + left * step :]
    return Image.frombytes(mode, (width, height), box, "raw", mode, stride)
