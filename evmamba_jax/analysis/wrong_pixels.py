"""Which pixels a segmenter gets wrong: of which classes, how near to a border, in regions of which size."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from evmamba_jax.analysis.tide import SIZES, size_of
from evmamba_jax.errors import UserError
from evmamba_jax.segmentation.losses import IGNORED

NEAR = 3  # pixels from a border


@dataclasses.dataclass(frozen=True)
class PixelErrors:
    """Pixels of label maps, K classes; those whose label is 255 in the truth do not count.

    Attributes:
        confusion: int64 (K, K), pixels by true class and the class that they are taken for.
        border: int64 (2, 2), pixels near a border and inside (rows): all, and those that are wrong (columns).
        regions: int64 (3, 2), pixels in small, medium and large regions (rows): all, and wrong ones (columns). A region
            is a connected part of one true class, and small below 32 x 32 pixels, large from 96 x 96 on.
        distance: how near to a border pixels count as near it, in pixels.
    """

    confusion: np.ndarray
    border: np.ndarray
    regions: np.ndarray
    distance: float

    def __add__(self, other: "PixelErrors") -> "PixelErrors":
        """Return the pixels of both."""
        sums = [getattr(self, name) + getattr(other, name) for name in ("confusion", "border", "regions")]
        return PixelErrors(*sums, distance=self.distance)

    def pairs(self) -> list["Confused"]:
        """Return the pairs of classes of which one is taken for the other, the most pixels first."""
        wrong = np.where(np.eye(len(self.confusion), dtype=bool), 0, self.confusion)
        total = self.confusion.sum(1)
        order = np.argsort(-wrong, axis=None, kind="stable")[: np.count_nonzero(wrong)]
        cells = zip(*np.unravel_index(order, wrong.shape), strict=True)
        return [Confused(int(k), int(j), int(wrong[k, j]), float(wrong[k, j] / total[k])) for k, j in cells]


class Confused(NamedTuple):
    """Pixels of one class that are taken for another: classes, their number, their share of the class's pixels."""

    label: int
    found: int
    pixels: int
    share: float


def pixel_errors(truth: np.ndarray, found: np.ndarray, classes: int, *, distance: float = NEAR) -> PixelErrors:
    """Count the wrong pixels of one label map.

    Args:
        truth: uint8 (H, W), labels; 255 does not count.
        found: uint8 (H, W).
        classes: K.
        distance: a pixel is near a border where the middle of a pixel of another class is not further away, pixels.

    Raises:
        UserError: maps of different sizes, or labels that are none of the classes.
    """
    counted = truth != IGNORED
    if truth.shape != found.shape:
        raise UserError(f"the label map is {truth.shape} and what was found {found.shape}: they must be of one size")
    highest = max(truth.max(initial=0, where=counted), found.max(initial=0, where=counted))
    if highest >= classes:
        raise UserError(f"a label is {highest}; there are {classes} classes, 0 to {classes - 1}")
    labels, wrong = truth[counted].astype(np.int64), (truth != found)[counted]
    confusion = np.bincount(labels * classes + found[counted], minlength=classes**2).reshape(classes, classes)
    near = _near_borders(truth, distance)[counted]
    border = np.array([_all_and_wrong(near, wrong), _all_and_wrong(~near, wrong)])
    sizes = _region_sizes(truth)[counted]
    regions = np.array([_all_and_wrong(sizes == size, wrong) for size in range(len(SIZES))])
    return PixelErrors(confusion, border, regions, distance)


def _all_and_wrong(pixels: np.ndarray, wrong: np.ndarray) -> tuple[int, int]:
    return int(pixels.sum()), int((pixels & wrong).sum())


def _near_borders(truth: np.ndarray, distance: float) -> np.ndarray:
    """Return which pixels (H, W) have a pixel of another class, one that counts, within a distance."""
    near = np.zeros(truth.shape, bool)
    for label in np.setdiff1d(truth, [IGNORED]):
        others = (truth != label) & (truth != IGNORED)
        if others.any():
            apart: Any = ndimage.distance_transform_edt(~others)
            near |= (truth == label) & (apart <= distance)
    return near


def _region_sizes(truth: np.ndarray) -> np.ndarray:
    """Return of each pixel (H, W) the size of its region, an index into ``SIZES``; regions join along sides."""
    found = np.zeros(truth.shape, np.int64)
    for label in np.setdiff1d(truth, [IGNORED]):
        parts, count = ndimage.label(truth == label)
        areas = np.bincount(parts.ravel(), minlength=count + 1)
        sizes = np.array([0, *map(size_of, areas[1:])])
        found += sizes[parts]
    return found
