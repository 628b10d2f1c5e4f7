"""Masks of objects: what a region's mask is trained for, and how it gets into the picture.

Source: He et al., Mask R-CNN (arXiv:1703.06870), section 3.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision

from evmamba_jax.data.outlines import of_mask
from evmamba_jax.detection.boxes import clip
from evmamba_jax.detection.regions import weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMasks:
    """Masks, eight pixels of a column in a byte, as ``numpy.packbits(masks, -2)`` has them: an index unpacks one.

    Columns, so that on a TPU the eight lie in a tile, and a row keeps its length.

    Attributes:
        bits: (..., G, H / 8, W) uint8.
    """

    bits: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the masks."""
        *others, height, width = self.bits.shape
        return (*others, 8 * height, width)

    def __getitem__(self, number: jax.Array) -> jax.Array:
        """Return the masks of an index, uint8 (..., H, W), 0 and 1."""
        places = jnp.arange(7, -1, -1, dtype=jnp.uint8)[:, None]
        pixels = self.bits[number][..., None, :] >> places & 1
        return pixels.reshape(*pixels.shape[:-3], -1, pixels.shape[-1])


def shares(
    masks: jax.Array | PackedMasks, index: jax.Array, boxes: jax.Array, size: int, ends: jax.Array | None = None
) -> jax.Array:
    """Return how much of each bin of some boxes is of an object.

    Args:
        masks: (G, H, W) booleans or integers 0 and 1, of the objects of one image; or the same packed.
        index: (R,) the object of each box.
        boxes: (R, 4) in pixels of the masks, float32 or float64.
        size: S.
        ends: (2,) height and width of the image, beyond which a mask goes on as it ends there; None: of the masks.

    Returns:
        (R, S, S) from 0 to 1, of the type of ``boxes``.
    """
    x0, y0, x1, y1 = jnp.moveaxis(boxes, -1, 0)
    height, width = (None, None) if ends is None else ends
    rows = weights(y0, y1, masks.shape[1], size, end=height)
    columns = weights(x0, x1, masks.shape[2], size, end=width)

    def of_region(region: tuple[jax.Array, ...]) -> jax.Array:
        rows, columns, number = region
        # Half of a bin decides, so the products are as precise as the type is.
        held = jnp.dot(rows, masks[number].astype(rows.dtype), precision=Precision.HIGHEST)
        return jnp.dot(held, columns.T, precision=Precision.HIGHEST)

    return jax.lax.map(of_region, (rows, columns, index), batch_size=16)


def mask_targets(
    masks: jax.Array | PackedMasks, index: jax.Array, boxes: jax.Array, size: int, ends: jax.Array | None = None
) -> jax.Array:
    """Return the bins (R, S, S), booleans, of which an object has half or more; arguments as for :func:`shares`.

    mmdet's masks are padded with the images, and boxes are limited to them. Detectron2's end with the image, and no box
    is limited; with ``ends`` it is so.

    Source: mmdet 3.3.0 ``mmdet/structures/mask/mask_target.py``; hustvl/Vim ``det/detectron2/structures/masks.py`` at
    dd0358a, ``BitMasks``.
    """
    if ends is None:
        boxes = clip(boxes, jnp.asarray(masks.shape[1:]))
    return shares(masks, index, boxes, size, ends) >= 0.5


def paste(masks: np.ndarray, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return masks at the places of their boxes in a picture, on the host.

    A pixel has the value that lies under its middle, between the middles of the mask's cells; beyond them all is 0.

    Args:
        masks: (R, S, S), float32 or float64, from 0 to 1.
        boxes: (R, 4) in pixels of the picture.
        height: of the picture.
        width: of the picture.

    Returns:
        (R, height, width) of the type of ``masks``; what is at least the threshold belongs to the object.

    Source: mmdet 3.3.0 ``mmdet/models/roi_heads/mask_heads/fcn_mask_head.py``, ``_do_paste_mask``.
    """
    return _pasted(masks, boxes, np.arange(height), np.arange(width))


def outlines(masks: np.ndarray, boxes: np.ndarray, height: int, width: int) -> list[dict[str, Any]]:
    """Return the run lengths, in COCO's text, of masks that are pasted and of which half decides.

    A mask is pasted on the pixels around its box alone, as mmdet does it on a CPU: elsewhere all is 0.

    Args:
        masks: as for :func:`paste`, and so the next three.
        boxes: see there.
        height: see there.
        width: see there.

    Raises:
        UserError: pycocotools is not installed.
    """
    found = []
    for mask, box in zip(masks, boxes, strict=True):
        low, high = np.floor(box[:2]).astype(int) - 1, np.ceil(box[2:]).astype(int) + 1
        columns, rows = (
            np.arange(max(start, 0), min(stop, side))
            for start, stop, side in zip(low, high, (width, height), strict=True)
        )
        whole = np.zeros((height, width), np.uint8, "F")
        if len(rows) and len(columns):
            part = _pasted(mask[None], box[None], rows, columns)[0] >= 0.5
            whole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = part
        found.append(of_mask(whole))
    return found


def _pasted(masks: np.ndarray, boxes: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the pixels in some rows and columns of a picture on which masks are pasted."""
    x0, y0, x1, y1 = np.moveaxis(boxes.astype(masks.dtype), -1, 0)
    down, across = _under(y0, y1, rows, masks.shape[1]), _under(x0, x1, columns, masks.shape[2])
    return down @ masks @ across.transpose(0, 2, 1)


def _under(low: np.ndarray, high: np.ndarray, pixels: np.ndarray, cells: int) -> np.ndarray:
    """Return how much each cell of an axis counts for each of some pixels: (R, pixels, cells)."""
    middles = pixels.astype(low.dtype) + low.dtype.type(0.5)
    with np.errstate(divide="ignore", invalid="ignore"):
        places = (middles - low[:, None]) / (high - low)[:, None] * 2 - 1
    places[np.isinf(places)] = 0  # a box without a side
    at = ((places + 1) * cells - 1) / 2
    share = np.maximum(1 - np.abs(at[..., None] - np.arange(cells)), 0)
    return np.nan_to_num(share).astype(low.dtype)
