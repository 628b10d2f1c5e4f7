"""From pictures to a model's input, as the model's card asks for them."""

import dataclasses
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.decoding import CorruptImageError, image_pixels, to_bytes
from evmamba_jax.data.transforms import eval_crop, read_pixels
from evmamba_jax.errors import UserError
from evmamba_jax.models import model_card
from evmamba_jax.models.registry import ModelCard


def preprocess(pictures: Any, model: str | ModelCard | DataConfig, *, image_size: int | None = None) -> np.ndarray:
    """Return a model's input: decoded, resized, cropped and normalised as the evaluation of its card does it.

    Args:
        pictures: a picture or a list of them. A picture is the path of an image file, its bytes, a PIL image, or an
            array (H, W) or (H, W, C) of uint8 or uint16.
        model: its name or its card; or the settings of a run.
        image_size: side of the result, pixels; not given, the card's.

    Returns:
        float32 (B, image_size, image_size, C); of one picture, B is 1.

    Raises:
        UserError: an unknown model, or a picture that is missing, damaged or of another form.
    """
    config = model if isinstance(model, DataConfig) else of_card(model_card(model) if isinstance(model, str) else model)
    if image_size is not None:
        config = dataclasses.replace(config, image_size=image_size)
    config.validate()
    several = pictures if isinstance(pictures, list | tuple) else [pictures]
    if not several:
        raise UserError("there are no pictures: give at least one")
    views = np.stack([view(picture, config) for picture in several]).astype(np.float32)
    return (views / 255 - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)


def view(picture: Any, config: DataConfig) -> np.ndarray:
    """Return a picture as the model sees it; arguments and errors as for :func:`preprocess`.

    Returns:
        uint8 (image_size, image_size, C).
    """
    return eval_crop(pixels(picture, config), config)


def pixels(picture: Any, config: DataConfig) -> np.ndarray:
    """Return the pixels of a picture, uint8 (H, W, C); arguments and errors as for :func:`preprocess`."""
    try:
        if isinstance(picture, str | PathLike | bytes):
            return read_pixels(picture if isinstance(picture, bytes) else Path(picture).read_bytes(), config)
        if hasattr(picture, "getbands"):
            limits = {"upright": config.exif_orientation, "max_pixels": config.max_pixels}
            return image_pixels(picture, config.in_channels, **limits)
        return _of_array(picture, config)
    except (CorruptImageError, OSError) as error:
        raise UserError(f"{named(picture)} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def named(picture: Any) -> str:
    """Return what a message calls a picture."""
    return repr(str(picture)) if isinstance(picture, str | PathLike) else f"a picture of type {type(picture).__name__}"


def _of_array(picture: Any, config: DataConfig) -> np.ndarray:
    array = np.asarray(picture)
    if array.dtype not in (np.uint8, np.uint16):
        raise CorruptImageError(f"an array of {array.dtype}; uint8 or uint16 is needed, 0 is black")
    if array.dtype == np.uint16:
        array = to_bytes(array, 65535)
    channels = config.in_channels
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim == 3 and array.shape[2] == 1 and channels == 3:
        array = np.repeat(array, 3, axis=2)
    if array.ndim != 3 or array.shape[2] != channels or not array.size:
        raise CorruptImageError(f"an array of shape {np.shape(picture)}; (height, width, {channels}) is needed")
    return np.ascontiguousarray(array)


def of_card(card: ModelCard) -> DataConfig:
    """Return the settings that a model's card asks for."""
    return DataConfig(
        image_size=card.input_size[0],
        crop_pct=card.crop,
        crop_mode=card.crop_mode,
        eval_interpolation=card.interpolation,
        mean=card.mean,
        std=card.std,
    )


def of_run(data: dict[str, Any]) -> DataConfig:
    """Return the settings of a run, from the ``data`` of its configuration; older ones lack some."""
    fields: Sequence[str] = (
        *("image_size", "in_channels", "exif_orientation", "max_pixels"),
        *("crop_pct", "crop_mode", "eval_interpolation", "mean", "std"),
    )
    return DataConfig(**{field: data[field] for field in fields if field in data})
