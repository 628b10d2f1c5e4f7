"""Photographs with several stamps on each, and the box and mask of every stamp: objects without a network.

Stamps and photographs are those of :mod:`evmamba_jax.data.stamps`, and no stamp is in two splits. The scenes are
written as images and a file in COCO's form, and prepared as anybody's own are.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evmamba_jax.data.dense_prepare import prepare_boxes
from evmamba_jax.data.outlines import run_lengths
from evmamba_jax.data.stamps import CLASSES, Stamp, photographs, piece_of_photograph, stamps_of, turned

NAME = "stamp_scenes"
SIDE = 192  # of the pictures, pixels
LENGTHS = {"train": 3000, "validation": 200, "test": 200}
COUNTS = 2, 5  # of stamps on a picture, both included
LONGEST = 48.0, 115.0  # the longer side of a stamp, pixels
COVERED = 0.3  # of a stamp's pixels that the others may hide
_OPAQUE = 128  # alpha from which on a pixel is the stamp's
_TRIES = 30  # places for a stamp, after which it is left out


def prepare_stamp_scenes(data_dir: Path) -> Path:
    """Write the scenes and prepare them.

    Args:
        data_dir: where data sets are.

    Returns:
        The folder of the data set.

    Raises:
        UserError: the stamps are not installed; otherwise as ``prepare_boxes``.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = {split: write_split(Path(folder), split) for split in LENGTHS}
        return prepare_boxes(NAME, places, data_dir)


def write_split(folder: Path, split: str) -> tuple[Path, Path]:
    """Write a split's images and its file in COCO's form, and return where they are."""
    stamps, grounds = list(stamps_of(split)), photographs()
    classes, images = list(CLASSES), folder / split
    images.mkdir()
    rows: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    for index in range(LENGTHS[split]):
        rng = np.random.default_rng([index, list(LENGTHS).index(split)])
        picture, objects = scene(stamps, grounds, split, rng)
        file = f"{index:05}.jpg"
        picture.save(images / file, quality=92)
        rows["images"].append({"id": index, "file_name": file, "height": SIDE, "width": SIDE})
        for name, mask in objects:
            about = {"id": len(rows["annotations"]) + 1, "image_id": index, "category_id": classes.index(name)}
            rows["annotations"].append(about | of_mask(mask))
    categories = [{"id": label, "name": name} for label, name in enumerate(classes)]
    annotations = folder / f"{split}.json"
    annotations.write_text(json.dumps({**rows, "categories": categories}))
    return images, annotations


def scene(
    stamps: Sequence[Stamp], grounds: Sequence[Image.Image], split: str, rng: np.random.Generator
) -> tuple[Image.Image, list[tuple[str, np.ndarray]]]:
    """Return a picture, and the class and mask (H, W) of every stamp on it, the ones behind first."""
    picture = piece_of_photograph(grounds, split, SIDE, rng)
    objects: list[tuple[str, np.ndarray]] = []
    whole: list[int] = []  # pixels of each stamp that would be seen without those before it
    for _ in range(rng.integers(COUNTS[0], COUNTS[1] + 1)):
        stamp = stamps[int(rng.integers(len(stamps)))]
        shown = turned(stamp.image, LONGEST, rng)
        for _ in range(_TRIES):
            x, y = (int(rng.integers(SIDE - length + 1)) for length in shown.size)
            alpha = Image.new("L", picture.size)
            alpha.paste(shown.getchannel("A"), (x, y))
            own = np.asarray(alpha) >= _OPAQUE
            left = [mask & ~own for _, mask in objects]
            if all(mask.sum() >= (1 - COVERED) * full for mask, full in zip(left, whole, strict=True)):
                picture.paste(shown, (x, y), shown)
                objects = [(old, mask) for (old, _), mask in zip(objects, left, strict=True)] + [(stamp.name, own)]
                whole.append(int(own.sum()))
                break
    return picture, objects


def of_mask(mask: np.ndarray) -> dict[str, Any]:
    """Return what COCO's form says of a mask (H, W): box, area and run lengths."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = [int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
    return {"bbox": box, "area": int(mask.sum()), "iscrowd": 0, "segmentation": run_lengths(mask)}
