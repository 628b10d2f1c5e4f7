"""Features of regions: what the maps hold in a box, at one size for all boxes.

A sample is a weighted mean of two rows and two columns, and the samples of a box are a grid. So what a box holds is
``rows @ map @ columns.T`` with two small matrices, for any number of samples: products, where others gather. An
accelerator takes the whole map, a CPU the part of it that a box reaches over.

Source: He et al., Mask R-CNN (arXiv:1703.06870), section 3; mmcv 2.1.0 ``mmcv/ops/csrc/pytorch/cpu/roi_align.cpp``.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FINEST = 56  # pixels of side up to twice of which a region is taken from the finest map
CHUNK = 64  # regions at a time: each takes S lines of the finest map in between
WINDOW = 8  # cells of a side that a CPU takes at a time


def weights(
    low: jax.Array,
    high: jax.Array,
    cells: int,
    size: int,
    *,
    samples: int = 0,
    aligned: bool = True,
    end: jax.Array | None = None,
) -> jax.Array:
    """Return how much each cell of an axis counts for each bin of some boxes.

    A bin is the mean of its samples, which lie at equal steps. One further than a cell beyond the middle of the first
    cell, or a cell beyond that of the last, counts as 0; others beyond them repeat the first or last cell.

    Args:
        low: (R,) where boxes begin, in cells, float32 or float64.
        high: (R,) where they end. A box that does not end behind its begin holds nothing.
        cells: N of the axis.
        size: S, bins of a box.
        samples: of a bin; 0 takes as many as it has cells, rounded up.
        aligned: cells are squares whose middles are at a half; False takes them for points at whole numbers, and boxes
            are at least one cell long.
        end: () or (R,) how many cells of the axis are there, the others being padding; None: all.

    Returns:
        (R, S, N) of the type of ``low``. It has no gradient by the boxes.
    """
    low, high = jax.lax.stop_gradient((low, high))
    dtype = low.dtype
    if aligned:
        low, high = low - 0.5, high - 0.5
    length = high - low if aligned else jnp.maximum(high - low, 1)
    step = length / size
    count = jnp.full(length.shape, samples, jnp.int32) if samples else _samples(length, size)
    begin = low[:, None] + jnp.arange(size, dtype=dtype) * step[:, None]
    places = jnp.arange(cells, dtype=dtype)
    end = jnp.asarray(cells if end is None else end, dtype)[..., None]

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        at = begin + ((i + 0.5) * step / jnp.maximum(count, 1).astype(dtype))[:, None]
        counts = (at >= -1) & (at <= end) & (i < count)[:, None]
        at = jnp.clip(at, 0, end - 1)
        share = jnp.maximum(1 - jnp.abs(at[..., None] - places), 0)
        return total + jnp.where(counts[..., None], share, 0)

    total = jax.lax.fori_loop(0, count.max(initial=0), add, jnp.zeros((*begin.shape, cells), dtype))
    return total / jnp.maximum(count, 1).astype(dtype)[:, None, None]


def _samples(length: jax.Array, size: int) -> jax.Array:
    """Return the cells of a bin, rounded up in float32 whatever the type, as the official code does it."""
    cells = (length / size).astype(jnp.float32)
    # A division may miss a whole number by a bit, where the official one does not.
    whole = jnp.round(cells)
    exact = whole.astype(length.dtype) * size == length
    return jnp.where(exact, whole, jnp.ceil(cells)).astype(jnp.int32)


def roi_align(
    features: jax.Array, boxes: jax.Array, stride: float, size: int, *, samples: int = 0, aligned: bool = True
) -> jax.Array:
    """Return what a map holds in boxes.

    Args:
        features: (H, W, C), which gives the compute type.
        boxes: (R, 4) in pixels, float32 or float64. They may reach beyond the map.
        stride: pixels of a cell.
        size: S.
        samples: as for :func:`weights`.
        aligned: see there.

    Returns:
        (R, S, S, C), differentiable by the features.
    """
    both = _rows_and_columns(features.shape, boxes, stride, size, samples=samples, aligned=aligned)
    return jax.lax.map(lambda both: _held(both, features), both, batch_size=CHUNK)


def levels_of(boxes: jax.Array, levels: int) -> jax.Array:
    """Return for each box (..., 4) the map that it is taken from, 0 the finest of ``levels``: (...) int32."""
    sides = boxes[..., 2:] - boxes[..., :2]
    side = jnp.sqrt(sides[..., 0] * sides[..., 1]) / FINEST + 1e-6
    # floor(log2(side)), without a logarithm that may miss a whole number.
    return (side[..., None] >= 2.0 ** jnp.arange(1, levels)).sum(-1, dtype=jnp.int32)


def extract(maps: Sequence[jax.Array], boxes: jax.Array, strides: Sequence[int], size: int) -> jax.Array:
    """Return what a pyramid holds in boxes: in small ones from fine maps, in large ones from coarse maps.

    Args:
        maps: [(B, H, W, C), ...] from fine to coarse, of one type.
        boxes: (B, R, 4) in pixels, float32 or float64.
        strides: pixels of a cell, for each map.
        size: S.

    Returns:
        (B, R, S, S, C), differentiable by the maps.

    Source: Lin et al., Feature Pyramid Networks (arXiv:1612.03144), section 4.2; mmdet 3.3.0
    ``mmdet/models/roi_heads/roi_extractors/single_level_roi_extractor.py``.
    """
    options = {"strides": tuple(strides), "size": size}
    choices = {"cpu": _by_windows, "default": _by_matrices}
    choices = {platform: functools.partial(choice, **options) for platform, choice in choices.items()}
    return jax.lax.platform_dependent(list(maps), boxes, **choices)


def _by_matrices(maps: Sequence[jax.Array], boxes: jax.Array, *, strides: Sequence[int], size: int) -> jax.Array:
    """Do what :func:`extract` does, with whole maps: many products, but large ones."""

    def of_image(maps: Sequence[jax.Array], boxes: jax.Array) -> jax.Array:
        level = levels_of(boxes, len(maps))
        # A box of another level is taken for an empty one, which holds nothing.
        of_levels = [
            _rows_and_columns(features.shape, jnp.where((level == i)[:, None], boxes, 0), stride, size)
            for i, (features, stride) in enumerate(zip(maps, strides, strict=True))
        ]

        def of_region(of_levels: list) -> jax.Array:
            held = [_held(both, features) for both, features in zip(of_levels, maps, strict=True)]
            return functools.reduce(jnp.add, held)

        return jax.lax.map(of_region, of_levels, batch_size=CHUNK)

    return jax.vmap(of_image)(maps, boxes)


class _Places(NamedTuple):
    """Where N boxes lie, along rows and columns.

    Attributes:
        shares: of rows and of columns (N, S, cells), how much each cell of a box's own map counts for each bin.
        first: (N, 2) the first cell that counts.
        corner: (N, 2) where that cell is in the atlas.
        windows: (N, 2) how many of them a box reaches over; 0 of one that holds nothing.
    """

    shares: Sequence[jax.Array]
    first: jax.Array
    corner: jax.Array
    windows: jax.Array


def _by_windows(maps: Sequence[jax.Array], boxes: jax.Array, *, strides: Sequence[int], size: int) -> jax.Array:
    """Do what :func:`extract` does, with those windows of a box's own map that it reaches over: few products.

    All maps lie in one atlas below each other, with a margin, so that each window is a slice of it.
    """
    batch, count = boxes.shape[:2]
    level = levels_of(boxes, len(maps)).ravel()
    sides = [jnp.asarray([x.shape[axis] for x in maps])[level] for axis in (1, 2)]
    most = [max(x.shape[axis] for x in maps) + WINDOW for axis in (1, 2)]
    scaled = boxes.reshape(-1, 4) / jnp.asarray(strides, boxes.dtype)[level][:, None]
    shares = tuple(weights(scaled[:, 1 - i], scaled[:, 3 - i], most[i], size, end=sides[i]) for i in range(2))
    counts = [(share != 0).any(1) for share in shares]
    first = jnp.stack([each.argmax(1) for each in counts], 1)
    last = jnp.stack([each.shape[1] - 1 - each[:, ::-1].argmax(1) for each in counts], 1)
    there = jnp.stack([each.any(1) for each in counts], 1)
    windows = jnp.where(there, (last - first) // WINDOW + 1, 0)

    right = lambda x: most[1] - x.shape[2]  # noqa: E731
    padded = [jnp.pad(x, ((0, 0), (0, WINDOW), (0, right(x)), (0, 0))) for x in maps]
    atlas = jnp.concatenate(padded, 1)
    tops = np.cumsum([0, *(x.shape[1] for x in padded)])
    top = jnp.repeat(jnp.arange(batch) * int(tops[-1]), count) + jnp.asarray(tops[:-1])[level]
    corner = first + jnp.stack([top, jnp.zeros_like(top)], 1)
    atlas = atlas.reshape(-1, *atlas.shape[2:])
    shares = tuple(share.astype(atlas.dtype) for share in shares)
    held = _from_atlas(atlas, _Places(shares, first, corner, windows))
    return held.reshape(batch, count, *held.shape[1:])


def _window(one: _Places, number: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Return of a window of a box where it is in the atlas, and the shares (S, WINDOW) of its rows and columns."""
    step = WINDOW * jnp.stack([number // one.windows[1], number % one.windows[1]])
    shares = [
        jax.lax.dynamic_slice_in_dim(share, start, WINDOW, 1)
        for share, start in zip(one.shares, one.first + step, strict=True)
    ]
    return one.corner + step, shares


@jax.custom_vjp
def _from_atlas(atlas: jax.Array, places: _Places) -> jax.Array:
    """Return what an atlas (rows, columns, C) holds in boxes: (N, S, S, C). It has a loop of unknown length."""
    channels, wide = atlas.shape[2], jnp.promote_types(atlas.dtype, jnp.float32)

    def of_region(one: _Places) -> jax.Array:
        def add(number: jax.Array, total: jax.Array) -> jax.Array:
            (y, x), (rows, columns) = _window(one, number)
            cells = jax.lax.dynamic_slice(atlas, (y, x, 0), (WINDOW, WINDOW, channels))
            of_rows = jnp.matmul(columns, cells).reshape(WINDOW, -1)
            return total + jnp.matmul(rows, of_rows, preferred_element_type=wide).reshape(total.shape)

        size = len(one.shares[0])
        total = jax.lax.fori_loop(0, one.windows.prod(), add, jnp.zeros((size, size, channels), wide))
        return total.astype(atlas.dtype)

    return jax.lax.map(of_region, places)


def _forward(atlas: jax.Array, places: _Places) -> tuple[jax.Array, tuple]:
    return _from_atlas(atlas, places), (atlas, places)


def _backward(kept: tuple, of_held: jax.Array) -> tuple[jax.Array, None]:
    atlas, places = kept
    channels, wide = atlas.shape[2], jnp.promote_types(atlas.dtype, jnp.float32)

    def of_region(total: jax.Array, both: tuple[_Places, jax.Array]) -> tuple[jax.Array, None]:
        one, of_held = both

        def add(number: jax.Array, total: jax.Array) -> jax.Array:
            (y, x), (rows, columns) = _window(one, number)
            of_rows = jnp.matmul(columns.T, of_held)
            of_cells = jnp.matmul(rows.T, of_rows.reshape(len(rows), -1), preferred_element_type=wide)
            of_cells = of_cells.reshape(WINDOW, WINDOW, channels)
            before = jax.lax.dynamic_slice(total, (y, x, 0), of_cells.shape)
            return jax.lax.dynamic_update_slice(total, before + of_cells, (y, x, 0))

        return jax.lax.fori_loop(0, one.windows.prod(), add, total), None

    of_atlas, _ = jax.lax.scan(of_region, jnp.zeros(atlas.shape, wide), (places, of_held))
    return of_atlas.astype(atlas.dtype), None


_from_atlas.defvjp(_forward, _backward)


def _rows_and_columns(
    shape: Sequence[int], boxes: jax.Array, stride: float, size: int, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """Return the weights (R, S, H) of a map's rows and (R, S, W) of its columns."""
    x0, y0, x1, y1 = jnp.moveaxis(boxes / stride, -1, 0)
    return weights(y0, y1, shape[0], size, **options), weights(x0, x1, shape[1], size, **options)


def _held(both: Sequence[jax.Array], features: jax.Array) -> jax.Array:
    """Return what a map (H, W, C) holds by weights (S, H) and (S, W): (S, S, C)."""
    rows, columns = (array.astype(features.dtype) for array in both)
    if features.shape[1] > features.shape[0]:  # the longer axis first: less is left in between
        return jnp.einsum("ph,hqc->pqc", rows, jnp.einsum("qw,hwc->hqc", columns, features))
    return jnp.einsum("pwc,qw->pqc", jnp.einsum("ph,hwc->pwc", rows, features), columns)
