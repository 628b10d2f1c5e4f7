"""Outlines of objects: polygons and run lengths, as COCO's files have them, and masks.

Run lengths go down the columns, from left to right, and begin with the pixels before the object; ``size`` is height
and width. They are a list of numbers, or COCO's text for one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evmamba_jax.data.opencv import resize_nearest
from evmamba_jax.errors import UserError

Outline = list[list[float]] | dict[str, Any]


def to_mask(outline: Outline, height: int, width: int) -> np.ndarray:
    """Return the mask of an outline in an image, uint8 (height, width), 0 and 1.

    Args:
        outline: polygons, x and y by turns in pixels, whose union the object is; or run lengths.
        height: of the image, pixels.
        width: of the image, pixels.

    Raises:
        UserError: pycocotools is not installed.

    Source: mmdet 3.3.0 ``datasets/transforms/loading.py``, ``_poly2mask``.
    """
    return _coco().decode(to_text(outline, height, width))


def to_text(outline: Outline, height: int, width: int) -> dict[str, Any]:
    """Return an outline as run lengths in COCO's text; arguments and errors as for :func:`to_mask`."""
    coco = _coco()
    if isinstance(outline, dict):
        runs = coco.frPyObjects(outline, height, width) if isinstance(outline["counts"], list) else outline
    else:
        runs = coco.merge(coco.frPyObjects(outline, height, width))
    return _in_text(runs)


def of_mask(mask: np.ndarray) -> dict[str, Any]:
    """Return the run lengths of a mask (H, W), booleans or uint8, in COCO's text; errors as for :func:`to_mask`."""
    return _in_text(_coco().encode(np.asfortranarray(mask, np.uint8)))


def resized(outlines: Sequence[dict[str, Any] | None], height: int, width: int) -> np.ndarray:
    """Return the masks of outlines where their image is shown in another size, booleans (N, height, width).

    Args:
        outlines: run lengths in COCO's text; None for a mask without pixels.
        height: as the image is shown, pixels.
        width: the same.

    Raises:
        UserError: as for :func:`to_mask`.
    """
    masks = np.zeros((len(outlines), height, width), bool)
    for mask, outline in zip(masks, outlines, strict=True):
        if outline is not None:
            mask[:] = resize_nearest(to_mask(outline, *outline["size"]), height, width)
    return masks


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Return the run lengths of a mask, booleans (H, W), as a list of numbers, which takes no library."""
    pixels = np.diff(mask.ravel("F").astype(np.int8), prepend=0)
    borders = [0, *np.flatnonzero(pixels).tolist(), mask.size]
    return {"size": [*mask.shape], "counts": np.diff(borders).tolist()}


def box_of(outline: dict[str, Any]) -> Sequence[float]:
    """Return x, y, width and height, pixels, of what run lengths in COCO's text hold; errors as for :func:`to_mask`."""
    return _coco().toBbox(outline).tolist()


def _in_text(runs: dict[str, Any]) -> dict[str, Any]:
    counts = runs["counts"]
    return {"size": [*runs["size"]], "counts": counts.decode() if isinstance(counts, bytes) else counts}


def _coco() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError("outlines of objects need pycocotools: pip install 'evmamba-jax[detection]'") from error
    return mask
