"""From a segmenter's logits to those of a whole image: at once, window by window, and over several scales.

All are pure functions of static sizes, for use under ``jax.jit``. A segmenter is any function from images
(B, H, W, C) to logits (B, h, w, K) of a coarser grid, such as a :class:`UperNet`.

Source: mmseg 1.2.2 ``models/segmentors/{encoder_decoder,base,seg_tta}.py``.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from evmamba_jax.errors import UserError
from evmamba_jax.heads.resize import bilinear

Segmenter = Callable[[jax.Array], jax.Array]


def whole(segmenter: Segmenter, images: jax.Array) -> jax.Array:
    """Return the logits (B, H, W, K) of images (B, H, W, C), resized to their size."""
    return bilinear(segmenter(images), *images.shape[1:3])


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where the windows along an axis begin; the last is moved back inside. One if the window is longer."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride + window, length) - window, 0) for i in range(count)]


def slide(segmenter: Segmenter, images: jax.Array, *, window: tuple[int, int], stride: tuple[int, int]) -> jax.Array:
    """Return the logits (B, H, W, K) of images (B, H, W, C): of every window by itself, the mean where they overlap.

    The windows go one after another through one program, so memory holds one at a time.

    Args:
        segmenter: from windows (B, h, w, C) to logits.
        images: of any size; a window is cut to it where it is larger.
        window: height and width, pixels.
        stride: between windows, pixels along both axes.

    Raises:
        UserError: a window or stride below one pixel, or a stride beyond the window, which would leave pixels out.
    """
    for side, step in zip(window, stride, strict=True):
        if not 1 <= step <= side:
            raise UserError(f"stride {stride} of windows {window}: each must be from 1 to the window's side")
    height, width = images.shape[1:3]
    size = min(window[0], height), min(window[1], width)
    tops, lefts = window_starts(height, window[0], stride[0]), window_starts(width, window[1], stride[1])
    starts = np.array([(top, left) for top in tops for left in lefts])
    count = np.zeros((height, width, 1))
    for top, left in starts:
        count[top : top + size[0], left : left + size[1]] += 1

    def logits_at(start: jax.Array) -> jax.Array:
        begin, lengths = (0, *start, 0), (images.shape[0], *size, images.shape[3])
        return whole(segmenter, jax.lax.dynamic_slice(images, begin, lengths))

    def step(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        logits, begin = logits_at(start), (0, *start, 0)
        logits += jax.lax.dynamic_slice(total, begin, logits.shape)
        return jax.lax.dynamic_update_slice(total, logits, begin), None

    made = jax.eval_shape(logits_at, starts[0])
    total = jnp.zeros((images.shape[0], height, width, made.shape[-1]), made.dtype)
    total, _ = jax.lax.scan(step, total, jnp.asarray(starts))
    return total / jnp.asarray(count, total.dtype)


def to_original(
    logits: jax.Array, size: tuple[int, int], *, unpadded: tuple[int, int] | None = None, flipped: bool = False
) -> jax.Array:
    """Return logits at the size of the original image: without padding, mirrored back, then resized.

    Args:
        logits: (B, H, W, K) at the size of the network's input.
        size: height and width of the original image.
        unpadded: height and width of the input without its padding, which lies on the right and below.
        flipped: the input was mirrored, left to right.

    Returns:
        (B, height, width, K).
    """
    height, width = unpadded or logits.shape[1:3]
    logits = logits[:, :height, :width]
    return bilinear(logits[:, :, ::-1] if flipped else logits, *size)


def multi_scale(
    logits_of: Segmenter, images: Sequence[jax.Array], size: tuple[int, int], *, flip: bool = True
) -> jax.Array:
    """Return the mean probabilities (B, height, width, K) over scales, and over the mirrored images too.

    Args:
        logits_of: from images (B, H, W, C) to logits (B, H, W, K) of their size, e.g. ``partial(whole, model)`` or
            ``partial(slide, model, window=..., stride=...)``.
        images: the same images at each scale, each resized from the original.
        size: height and width of the original images.
        flip: also take each mirrored, left to right.

    Raises:
        UserError: no images.
    """
    if not images:
        raise UserError("there are no images of any scale: give the same images at one scale or more")
    total, views = 0.0, 0
    for scaled in images:
        for flipped in (False, True)[: 1 + flip]:
            logits = logits_of(scaled[:, :, ::-1] if flipped else scaled)
            total += jax.nn.softmax(to_original(logits, size, flipped=flipped))
            views += 1
    return jnp.asarray(total / views)
