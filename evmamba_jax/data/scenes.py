"""Scenes of handwritten digits on textured ground, with every digit's mask known: dense prediction without a network.

Nothing is stored: a scene is a function of its split and index. The digits are scikit-learn's. No digit is in both
training and test scenes.
"""

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image

from evmamba_jax.data.outlines import run_lengths
from evmamba_jax.errors import UserError

CLASSES, GROUND = tuple(map(str, range(10))), "ground"
LENGTHS = {"train": 4000, "test": 200}
SIDE = 128
HEIGHTS = 16, 56  # of a digit, pixels, both included
USUAL = 46  # the most frequent height
_EDGE = 3  # pixels of height that a soft edge takes, at most
COUNTS = 3, 8  # of digits in a scene, both included
COVERED = 0.3  # of a digit's own pixels, that others may hide
SHADES, INK = (20, 110), (150, 255)  # range of each channel: ground, and digits written with chalk on it
_TRIES = 60  # places for a digit, after which it shrinks


class Scene(NamedTuple):
    """A picture and its digits, the ones behind first.

    Attributes:
        image: uint8 (H, W, 3).
        labels: int32 (N,), the digits.
        masks: bool (N, H, W), what is seen of each.
        whole: bool (N, H, W), what would be seen without those before it.
    """

    image: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    whole: np.ndarray

    @property
    def boxes(self) -> np.ndarray:
        """Around what is seen of each: float32 (N, 4), x0, y0, x1, y1 in pixels."""
        return np.array([_box(mask) for mask in self.masks], np.float32).reshape(-1, 4)

    @property
    def label_map(self) -> np.ndarray:
        """Class of every pixel: uint8 (H, W), 0 the ground, then the digits."""
        found = np.zeros(self.image.shape[:2], np.uint8)
        for label, mask in zip(self.labels, self.masks, strict=True):
            found[mask] = label + 1
        return found


class DigitScenes:
    """One split of the scenes; ``split[i]`` is the record of a scene.

    Args:
        split: "train" (4,000 scenes) or "test" (200).
        ground: whether the ground is a class, the first, as label maps need it.

    Raises:
        UserError: another split.
    """

    name = "digit_scenes/1.0.0"
    most_objects, has_outlines = COUNTS[1], True
    fingerprint = None

    def __init__(self, split: str, *, ground: bool = False):
        self.class_names = (GROUND, *CLASSES) if ground else CLASSES
        if split not in LENGTHS:
            raise UserError(f"split {split!r} of {self.name} is not there; its splits are {', '.join(LENGTHS)}")
        self.split, self.kind = split, "label_maps" if ground else "boxes"

    @property
    def sizes(self) -> np.ndarray:
        """Height and width of each image, int (N, 2)."""
        return np.full((len(self), 2), SIDE)

    def with_objects(self) -> "DigitScenes":
        """Return the images that show objects: all."""
        return self

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Of the classes, in files of results."""
        return tuple(range(len(self.class_names)))

    def __len__(self) -> int:
        return LENGTHS[self.split]

    def __getitem__(self, index: int) -> dict:
        """Return a scene, by an index from 0 to len - 1.

        Records have ``image``, ``id`` and ``image_id``; with the ground ``label_map``; without it ``boxes``,
        ``labels``, ``crowd`` (none is one), ``area`` (pixels that are seen) and ``segmentations`` (run lengths).
        """
        found = scene(self.split, index)
        record = {"image": found.image, "id": f"{self.split}[{index}]", "image_id": index}
        if self.kind == "label_maps":
            return record | {"label_map": found.label_map}
        area = found.masks.sum((1, 2)).astype(float)
        crowd = np.zeros(len(area), bool)
        outlines = [run_lengths(mask) for mask in found.masks]
        objects = {"boxes": found.boxes, "labels": found.labels, "crowd": crowd, "area": area}
        return record | objects | {"segmentations": outlines}


def scene(split: str, index: int) -> Scene:
    """Return a scene; the same each time."""
    rng = np.random.default_rng([index, list(LENGTHS).index(split)])
    scans, labels = _digits(split)
    ground = _texture(rng)
    whole, masks, inks, chosen = [], [], [], []
    for _ in range(rng.integers(COUNTS[0], COUNTS[1] + 1)):
        pick = int(rng.integers(len(scans)))
        ink = _placed(rng, scans[pick], masks, whole)
        if ink is None:
            continue
        own = ink >= 0.5
        masks = [mask & ~own for mask in masks] + [own]
        whole.append(own)
        inks.append(ink)
        chosen.append(labels[pick])
    image = ground
    for ink in inks:
        x0, y0, x1, y1 = _box(ink > 0)
        below = image[y0:y1, x0:x1]
        below += ink[y0:y1, x0:x1, None] * (rng.uniform(*INK, 3).astype(np.float32) - below)
    noisy = image + 4 * rng.standard_normal(image.shape, np.float32)
    return Scene(
        np.clip(np.round(noisy), 0, 255).astype(np.uint8), np.array(chosen, np.int32), np.array(masks), np.array(whole)
    )


@functools.cache
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return scans in 0 to 1 (N, 8, 8) and labels of a split: a fifth of each digit is kept for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    scans = np.asarray(pixels, np.float32).reshape(-1, 8, 8) / 16
    parts = train_test_split(np.arange(len(scans)), test_size=360, stratify=labels, random_state=0)
    own = parts[list(LENGTHS).index(split)]
    return scans[own], np.asarray(labels)[own]


def _placed(
    rng: np.random.Generator, scan: np.ndarray, masks: list[np.ndarray], whole: list[np.ndarray]
) -> np.ndarray | None:
    """Return the ink of a digit on the scene, 0 to 1 (H, W), where no other loses too much; None where none fits."""
    rows, columns = (np.flatnonzero(scan.max(axis) > 0.2) for axis in (1, 0))
    cut = scan[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height = int(rng.triangular(HEIGHTS[0] + _EDGE, USUAL, HEIGHTS[1] + 1))
    while height >= HEIGHTS[0] + _EDGE:
        width = max(6, round(height * cut.shape[1] / cut.shape[0] * rng.uniform(0.85, 1.2)))
        small = np.asarray(Image.fromarray(cut).resize((width, height), Image.Resampling.BICUBIC))
        ink = _sharpened(small)
        for _ in range(_TRIES):
            top, left = rng.integers(0, SIDE - height + 1), rng.integers(0, max(1, SIDE - width + 1))
            placed = np.zeros((SIDE, SIDE), np.float32)
            placed[top : top + height, left : left + width] = ink[:, : SIDE - left]
            own = placed >= 0.5
            if all(
                (mask & ~own).sum() >= (1 - COVERED) * all_of.sum() for mask, all_of in zip(masks, whole, strict=True)
            ):
                return placed
        height = round(0.8 * height)
    return None


def _sharpened(ink: np.ndarray) -> np.ndarray:
    """Return ink with edges of a pixel or two, whatever the enlargement."""
    return np.clip(0.5 + (ink - 0.42) * 4, 0, 1)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Return ground of a colour with coarse and fine changes, float32 (H, W, 3)."""
    colour = rng.uniform(*SHADES, 3)
    ground = np.broadcast_to(colour, (SIDE, SIDE, 3)).astype(np.float32)
    for cells, strength in ((4, 22), (16, 12), (64, 7)):
        changes = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        channels = [Image.fromarray(changes[..., k]).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for k in range(3)]
        ground = ground + np.stack([np.asarray(channel) for channel in channels], -1)
    return ground


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
