"""Anchors: the boxes around every pixel of every level that a detector starts from."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype


@dataclasses.dataclass(frozen=True)
class Anchors:
    """Boxes of some scales and ratios, centred at the upper left corner of every cell.

    Order within a level: row, column, ratio, scale.

    Attributes:
        strides: pixels of the image to a cell, for each level.
        ratios: heights over widths.
        scales: sides of the square ones, in strides.

    Source: Ren et al., Faster R-CNN (arXiv:1506.01497), section 3.1; mmdet 3.3.0
    ``mmdet/models/task_modules/prior_generators/anchor_generator.py``.
    """

    strides: Sequence[int]
    ratios: Sequence[float] = (0.5, 1.0, 2.0)
    scales: Sequence[float] = (8.0,)

    @property
    def per_cell(self) -> int:
        """Anchors of a cell, A."""
        return len(self.ratios) * len(self.scales)

    def base(self, level: int, dtype: Dtype) -> np.ndarray:
        """Return the anchors (A, 4) of the first cell of a level."""
        # In the type that is asked for from the first step on, as the official code does it.
        stride, roots = np.asarray(self.strides[level], dtype), np.sqrt(np.asarray(self.ratios, dtype))
        scales = np.asarray(self.scales, dtype)
        widths = (stride * (1 / roots)[:, None] * scales).ravel()
        heights = (stride * roots[:, None] * scales).ravel()
        half = np.asarray(0.5, dtype)
        return np.stack([-half * widths, -half * heights, half * widths, half * heights], -1)

    def boxes(self, sizes: Sequence[tuple[int, int]], dtype: Dtype = jnp.float32) -> list[jax.Array]:
        """Return the anchors [(h * w * A, 4), ...] of levels of these (rows, columns), float32 or float64."""
        levels = []
        for level, ((rows, columns), stride) in enumerate(zip(sizes, self.strides, strict=True)):
            y, x = jnp.meshgrid(*(jnp.arange(n, dtype=dtype) * stride for n in (rows, columns)), indexing="ij")
            shift = jnp.stack([x, y, x, y], -1)[:, :, None]
            levels.append((shift + self.base(level, dtype)).reshape(-1, 4))
        return levels

    def inside(self, sizes: Sequence[tuple[int, int]], image: jax.Array) -> list[jax.Array]:
        """Return which anchors [(h * w * A,), ...] belong to cells that begin within an image of this (2,) size.

        Args:
            sizes: (rows, columns) of the levels.
            image: height and width, integers: of an image within a padded batch.
        """
        levels = []
        for (rows, columns), stride in zip(sizes, self.strides, strict=True):
            cells = (image + stride - 1) // stride
            within = (jnp.arange(rows) < cells[0])[:, None] & (jnp.arange(columns) < cells[1])
            levels.append(jnp.repeat(within.ravel(), self.per_cell))
        return levels


class Detectron2Anchors(Anchors):
    """The same boxes as Detectron2 rounds them; the last bit often decides which of them are an object's best.

    Source: hustvl/Vim ``det/detectron2/modeling/anchor_generator.py`` at dd0358a.
    """

    def base(self, level: int, dtype: Dtype) -> np.ndarray:
        """Return the anchors (A, 4) of the first cell of a level."""
        sides = self.strides[level] * np.asarray(self.scales, float)
        widths = np.sqrt(sides[:, None] ** 2 / np.asarray(self.ratios, float)).ravel()
        heights = np.tile(self.ratios, len(sides)) * widths
        return np.stack([-widths / 2, -heights / 2, widths / 2, heights / 2], -1).astype(dtype)
