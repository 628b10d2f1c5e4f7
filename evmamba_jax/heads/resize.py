"""Maps of other sizes: bilinear resizing and adaptive average pooling with the arithmetic of PyTorch.

Both weigh rows and columns separately, so both are a matrix product along each axis. The matrices are made on the host.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from evmamba_jax.layers.resize import resize


def bilinear(x: jax.Array, height: int, width: int, *, align_corners: bool = False) -> jax.Array:
    """Resize a map (B, H, W, C) to (B, height, width, C), up or down, without antialiasing.

    Args:
        x: the map; the result is of its type, computed in float32 or wider.
        height: of the result.
        width: of the result.
        align_corners: lay the middles of the corner pixels on each other, as older segmenters do. By default the
            borders of the maps lie on each other (half-pixel centres).

    Source: ``torch.nn.functional.interpolate``.
    """
    if x.shape[1:3] == (height, width):
        return x
    if not align_corners:
        return resize(x, height, width, "bilinear")
    return _apply(x, *(_corners(old, new) for old, new in zip(x.shape[1:3], (height, width), strict=True)))


def bilinear_part(
    x: jax.Array, size: jax.Array, wanted: jax.Array, canvas: tuple[int, int], top: jax.Array | int = 0
) -> jax.Array:
    """Resize a part of a map as :func:`bilinear` does, where only the program's shapes are known before it runs.

    Args:
        x: (H, W, C), of which the first ``size`` rows and columns count.
        size: (2,) integers.
        wanted: (2,) rows and columns that these become.
        canvas: rows and columns of the result; what lies beyond ``wanted`` does not matter.
        top: the row of the whole result with which this one begins.

    Returns:
        (H, W, C) with the H and W of ``canvas``, of the type of ``x``.
    """
    for axis in (0, 1):
        last, new = size[axis] - 1, jnp.arange(canvas[axis]) + (0 if axis else top)
        place = (new.astype(jnp.float32) + 0.5) * (size[axis] / wanted[axis]).astype(jnp.float32) - 0.5
        place = jnp.clip(place, 0, last)
        first = place.astype(jnp.int32)
        share = jnp.expand_dims(place - first, 1 - axis)[..., None].astype(x.dtype)
        before, after = (jnp.take(x, jnp.minimum(i, last), axis) for i in (first, first + 1))
        x = before * (1 - share) + after * share
    return x


def adaptive_average_pool(x: jax.Array, side: int) -> jax.Array:
    """Average a map (B, H, W, C) to (B, side, side, C).

    Row i of the result is the mean of the rows from floor(i H / side) to before ceil((i + 1) H / side), columns alike.
    The cells overlap where ``side`` does not divide the size, and repeat pixels where the map is smaller.

    Source: ``torch.nn.AdaptiveAvgPool2d``.
    """
    return _apply(x, *(_cells(old, side) for old in x.shape[1:3]))


def _apply(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """Weigh the rows and columns of a map by matrices (new, old)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    matrices = (jnp.asarray(matrix, wide) for matrix in (rows, columns))
    # Highest: an accelerator would else round the weights to bfloat16.
    y = jnp.einsum("bhwc,Hh,Ww->bHWc", x.astype(wide), *matrices, precision=lax.Precision.HIGHEST)
    return y.astype(x.dtype)


def _corners(old: int, new: int) -> np.ndarray:
    place = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0)
    return np.maximum(1 - np.abs(place[:, None] - np.arange(old)), 0)


def _cells(old: int, new: int) -> np.ndarray:
    start, stop = np.arange(new) * old // new, -(-np.arange(1, new + 1) * old // new)
    pixel = np.arange(old)
    inside = (pixel >= start[:, None]) & (pixel < stop[:, None])
    return inside / inside.sum(1, keepdims=True)
