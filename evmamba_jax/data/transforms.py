"""Host transforms: encoded bytes to square uint8 images, with the pixels of Pillow and the rules of torchvision."""

import io
import math

import numpy as np
import simplejpeg
from PIL import Image

from evmamba_jax.data.augment import color_jitter, draw_resampling, pixels_of, rand_augment
from evmamba_jax.data.config import DataConfig


class CorruptImageError(Exception):
    """The bytes of one record are not a readable image."""


def decode(data: bytes, channels: int) -> np.ndarray:
    """Decode an image file.

    JPEG goes through simplejpeg, which gives Pillow's pixels three times as fast; Pillow reads everything else and has
    the last word on JPEGs that simplejpeg refuses. EXIF rotation is ignored, as torchvision and timm do.

    Args:
        data: a JPEG, PNG or other file that Pillow reads; grey, palette, CMYK and alpha images are converted.
        channels: 3 for RGB, 1 for grey.

    Returns:
        uint8 (H, W, channels).

    Raises:
        CorruptImageError: the bytes cannot be decoded; the message says why.
    """
    if data[:2] == b"\xff\xd8":
        try:
            return simplejpeg.decode_jpeg(data, colorspace="RGB" if channels == 3 else "GRAY")
        except ValueError:
            pass  # simplejpeg also refuses files with mere warnings, which Pillow reads
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not an image file" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise CorruptImageError(reason) from error
    return pixels.reshape(*pixels.shape[:2], channels)


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


def train_image(data: bytes, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """Make a training image: decode, then :func:`train_view`.

    Args:
        data: an encoded image.
        config: reads in_channels, and what ``train_view`` reads.
        rng: the example's own generator; its draws alone decide the result.

    Returns:
        uint8 (image_size, image_size, in_channels).

    Raises:
        CorruptImageError: the bytes cannot be decoded.

    Source: timm's transforms_imagenet_train, up to the normalisation.
    """
    return train_view(decode(data, config.in_channels), config, rng)


def train_view(pixels: np.ndarray, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """Make a training image of a decoded one: RandomResizedCrop, random flip, then RandAugment or colour jitter.

    Args:
        pixels: uint8 (H, W, channels), one behind the other in memory.
        config: reads image_size, crop_scale, crop_ratio, interpolation, hflip, auto_augment, color_jitter, and mean,
            which becomes the colour of what RandAugment uncovers.
        rng: the example's own generator; its draws alone decide the result.

    Returns:
        uint8 (image_size, image_size, channels).
    """
    height, width = pixels.shape[:2]
    top, left, h, w = random_crop_box(rng, height, width, config.crop_scale, config.crop_ratio)
    resample = draw_resampling(config.interpolation, rng)
    image = _image(pixels, top, left, h, w).resize((config.image_size, config.image_size), resample)
    if rng.random() < config.hflip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
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
        config: reads in_channels, and what ``eval_crop`` reads.

    Returns:
        uint8 (image_size, image_size, in_channels).

    Raises:
        CorruptImageError: the bytes cannot be decoded.
    """
    return eval_crop(decode(data, config.in_channels), config)


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
    size = math.floor(config.image_size / config.crop_pct)
    height, width = pixels.shape[:2]
    if config.crop_mode == "squash":
        new = (size, size)
    else:
        short = min(height, width)
        new = (size * width // short, size * height // short)
    image = _image(pixels, 0, 0, height, width).resize(new, Image.Resampling[config.eval_interpolation.upper()])
    left, top = (round((side - config.image_size) / 2) for side in image.size)
    return pixels_of(image.crop((left, top, left + config.image_size, top + config.image_size)))


def _image(pixels: np.ndarray, top: int, left: int, height: int, width: int) -> Image.Image:
    """Make a Pillow image of a box of uint8 (H, W, C); Pillow picks it out of the rows itself, which saves a copy."""
    mode = "RGB" if pixels.shape[-1] == 3 else "L"
    stride, step = pixels.strides[:2]
    box = pixels.data.cast("B")[top * stride + left * step :]
    return Image.frombytes(mode, (width, height), box, "raw", mode, stride)
