"""Resizing maps as ``torch.nn.functional.interpolate`` does with ``align_corners=False``.

``jax.image.resize`` differs: its cubic kernel has a = -0.5 where PyTorch has -0.75, it leaves out what lies beyond the
border where PyTorch repeats the border, and its nearest neighbour takes the middle of a cell where PyTorch rounds down.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def resize(x: jax.Array, height: int, width: int, method: Literal["nearest", "bilinear", "bicubic"]) -> jax.Array:
    """Resize a map (B, H, W, C) to (B, height, width, C); the weights of an output sum to 1, there is no antialias."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rows, columns = (_weights(old, new, method) for old, new in zip(x.shape[1:3], (height, width), strict=True))
    # Highest: an accelerator would else round the weights to bfloat16.
    y = jnp.einsum(
        "bhwc,Hh,Ww->bHWc",
        x.astype(wide),
        jnp.asarray(rows, wide),
        jnp.asarray(columns, wide),
        precision=lax.Precision.HIGHEST,
    )
    return y.astype(x.dtype)


def _weights(old: int, new: int, method: str) -> np.ndarray:
    """Return the matrix (new, old) that resizes one axis."""
    if method == "nearest":
        # PyTorch multiplies in float32 whatever the type of the map, which now and then falls short of a whole number.
        cell = np.floor(np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))).astype(int)
        return np.eye(old)[np.minimum(cell, old - 1)]
    place = (np.arange(new) + 0.5) * old / new - 0.5
    if method == "bilinear":
        place = np.maximum(place, 0)
    below = np.floor(place).astype(int)
    matrix = np.zeros((new, old))
    for offset in (0, 1) if method == "bilinear" else (-1, 0, 1, 2):
        neighbour = below + offset
        kernel = _linear if method == "bilinear" else _cubic
        np.add.at(matrix, (np.arange(new), np.clip(neighbour, 0, old - 1)), kernel(np.abs(place - neighbour)))
    return matrix


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - distance, 0)


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))
