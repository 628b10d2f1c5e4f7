"""Cascade Mask R-CNN on given maps, as recorded in ``cascade``: every stage, loss, gradient, detection and mask."""

from collections.abc import Iterator
from pathlib import Path

from recorded_cases import Compared
from recorded_maskrcnn import compare_rcnn

from evmamba_jax.detection.mask_rcnn import CascadeMaskRCNN

PLACES = ("keep_all_bn_eval", "keep_all", "sampled")


def compare(folder: Path, x64: bool) -> Iterator[Compared]:
    """Yield every difference from what is recorded in a folder."""
    yield from compare_rcnn(folder, "cascade", CascadeMaskRCNN, PLACES, x64)
