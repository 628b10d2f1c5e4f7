"""What pictures of stage maps share: which maps a model gives, and batches of images of one shape."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from evmamba_jax.errors import UserError


class Apart(NamedTuple):
    """A model as a traced function takes it: ``build(arrays)`` is the model in evaluation mode.

    A plain function has no arrays, and is what ``build`` returns.
    """

    build: Callable[[Any], Any]
    arrays: Any


def take_apart(model: Any) -> Apart:
    """Split a module from its arrays, so that a compiled program takes them as arguments; a function stays whole."""
    if not isinstance(model, nnx.Module):
        return Apart(lambda _: model, None)
    structure, arrays = nnx.split(model)

    def build(arrays: Any) -> Any:
        built = nnx.merge(structure, arrays)
        built.eval()
        return built

    return Apart(build, arrays)


def maps_of(model: Any, images: jax.Array) -> list[jax.Array]:
    """Return the maps (B, h, w, C) of images (B, H, W, C): of a model its ``features``, of a function what it returns.

    Raises:
        UserError: it gives no maps of these images; it fails.
    """
    function = getattr(model, "features", model)
    what = getattr(model, "__name__", type(model).__name__)
    if not callable(function):
        raise UserError(f"{what} gives no maps: take a model with features(images), or a function of images")
    try:
        found = function(images)
    except UserError:
        raise
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{what} fails on images of shape {images.shape}: {told[:300]}") from error
    maps = list(found) if isinstance(found, list | tuple) else [found]
    for x in maps:
        shape = getattr(x, "shape", None)
        if shape is None or len(shape) != 4 or shape[0] != len(images) or 0 in shape:
            got = type(x).__name__ if shape is None else f"shape {tuple(shape)}"
            raise UserError(
                f"{what} gives {got} for images of shape {images.shape}; "
                f"a map ({len(images)}, height, width, channels) of at least one pixel is needed"
            )
    return maps


def stage_number(stage: int, count: int) -> int:
    """Return which of ``count`` stages is meant, from 0; negative numbers count from the last.

    Raises:
        UserError: there is no such stage.
    """
    if not -count <= stage < count:
        raise UserError(f"there is no stage {stage}; allowed: 0 to {count - 1}, or -1 for the last")
    return stage % count


def batches(images: Iterable[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield batches (size, H, W, C), and how many images of each count; the last is filled with zeros.

    Args:
        images: (H, W, C) floats, all of one shape; an array (N, H, W, C) is an iterable of them.
        size: images in a batch, at least 1.

    Raises:
        UserError: images of another rank, type or shape than the first; no images; a size below 1.
    """
    if size < 1:
        raise UserError(f"batch_size is {size}; it must be 1 or more")
    left, shape = iter(images), None
    while batch := [np.asarray(image) for image in itertools.islice(left, size)]:
        for image in batch:
            shape = shape or image.shape
            if image.ndim != 3 or image.shape != shape or not np.issubdtype(image.dtype, np.floating):
                raise UserError(
                    "images must be normalised floats (height, width, channels), all of one shape; "
                    f"got {image.dtype} of shape {image.shape}" + (f" after {shape}" if image.shape != shape else "")
                )
        filling = [np.zeros_like(batch[0])] * (size - len(batch))
        yield np.stack(batch + filling), len(batch)
    if shape is None:
        raise UserError("there are no images: give at least one")
