"""What regions hold, their levels and masks, and the losses of regions, against loops in plain Python."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evmamba_jax.data.outlines import to_mask
from evmamba_jax.detection.boxes import overlaps
from evmamba_jax.detection.losses import binary_cross_entropy, cross_entropy, giou, of_class, smooth_l1
from evmamba_jax.detection.masks import PackedMasks, mask_targets, outlines, paste
from evmamba_jax.detection.regions import _by_matrices, _by_windows, extract, levels_of, roi_align

BOXES = np.asarray(
    [
        [3.3, 5.1, 41.9, 30.2],
        [-20, -13, 31, 22],  # begins far outside
        [0, 0, 56, 28],  # bins of exactly 2 and 1 cells
        [8, 4, 36, 32],  # of exactly 1 cell
        [30, 20, 90, 70],  # ends beyond
        [200, 5, 240, 30],  # holds nothing
        [10, 7, 10, 30],  # no width
        [20, 20, 12, 14],  # the wrong way round
        [9.7, 9.7, 10.1, 10.2],  # within a cell
    ]
)


def one_sample(feature, y, x):
    """Return the weighted mean of the cells around a point; 0 more than a cell beyond the first or last middle."""
    height, width = feature.shape[:2]
    if y < -1 or y > height or x < -1 or x > width:
        return np.zeros(feature.shape[2])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    top = (1 - (x - x0)) * feature[y0, x0] + (x - x0) * feature[y0, x1]
    bottom = (1 - (x - x0)) * feature[y1, x0] + (x - x0) * feature[y1, x1]
    return (1 - (y - y0)) * top + (y - y0) * bottom


def loop_align(feature, box, stride, size, samples=0, aligned=True):
    """Return what a map holds in a box, sample by sample."""
    x0, y0, x1, y1 = box / stride - (0.5 if aligned else 0)
    height, width = y1 - y0, x1 - x0
    if not aligned:
        height, width = max(height, 1), max(width, 1)
    rows, columns = (samples or math.ceil(np.float32(side / size)) for side in (height, width))
    out = np.zeros((size, size, feature.shape[2]))
    for p in range(size):
        for q in range(size):
            for i in range(rows):
                for j in range(columns):
                    y = y0 + p * height / size + (i + 0.5) * height / size / rows
                    x = x0 + q * width / size + (j + 0.5) * width / size / columns
                    out[p, q] += one_sample(feature, y, x)
    return out / max(rows * columns, 1)


@pytest.mark.parametrize(
    ("size", "options"),
    [(7, {}), (7, {"aligned": False}), (4, {"samples": 2})],
    ids=["adaptive", "legacy", "two samples"],
)
@pytest.mark.parametrize("sides", [(13, 17), (17, 13)], ids=["wide", "tall"])
def test_regions_are_the_mean_of_their_samples(size, options, sides):
    feature = np.random.default_rng(0).normal(size=(*sides, 2))
    wanted = np.stack([loop_align(feature, box, 4, size, **options) for box in BOXES])
    with jax.enable_x64(True):
        found = jax.jit(lambda x, boxes: roi_align(x, boxes, 4, size, **options))(feature, BOXES)
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
    if not options:
        assert not np.asarray(found)[5:8].any()


def test_whole_bins_have_no_sample_too_many_in_float32():
    feature = np.random.default_rng(1).normal(size=(60, 60, 1)).astype(np.float32)
    sides = np.arange(7, 50, 7)
    boxes = np.asarray([[3, 3, 3 + side, 3 + side] for side in sides], np.float32)
    found = jax.jit(lambda x, boxes: roi_align(x, boxes, 1, 7))(feature, boxes)
    wanted = np.stack([loop_align(feature.astype(float), box, 1, 7) for box in boxes])
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_levels_by_hand_and_each_from_its_own_map():
    sides = np.asarray([1, 111, 112, 223, 224, 447, 448, 5000, 0], np.float32)
    boxes = jnp.asarray(np.stack([sides * 0 + 5, sides * 0 + 9, 5 + 2 * sides, 9 + sides / 2], 1))
    np.testing.assert_array_equal(levels_of(boxes, 4), [0, 0, 1, 1, 2, 2, 3, 3, 0])
    maps = [jnp.full((64 // 2**i, 80 // 2**i, 2), 1.0 + i) for i in range(4)]
    inside = jnp.asarray([[8, 8, 100, 90], [20, 20, 200, 180], [1, 1, 318, 250.0]])
    maps, inside = [x[None] for x in maps], inside[None]
    (found,) = jax.jit(lambda maps, boxes: extract(maps, boxes, (4, 8, 16, 32), 3))(maps, inside)
    wanted = np.asarray([1, 2, 3.0])[:, None, None, None]
    np.testing.assert_allclose(found, np.broadcast_to(wanted, (3, 3, 3, 2)), rtol=1e-6)


def test_windows_hold_what_whole_maps_hold_and_so_do_their_gradients():
    rng = np.random.default_rng(5)
    maps = [rng.normal(size=(2, 40 // 2**i, 56 // 2**i, 3)) for i in range(3)]
    boxes = np.stack([BOXES * scale for scale in (1, 5)])  # some reach over several windows, some over none
    boxes[0, 0], boxes[1, 1] = [-30, 40, 400, 60], [100.5, 3, 130, 170]  # long ones of fine maps
    of_held = rng.normal(size=(2, len(BOXES), 5, 5, 3))

    @functools.partial(jax.jit, static_argnums=0)
    def both(extracted, maps):
        held, pull = jax.vjp(lambda maps: extracted(maps, boxes, strides=(4, 8, 16), size=5), maps)
        return held, pull(of_held)[0]

    with jax.enable_x64(True):
        found, wanted = (both(extracted, maps) for extracted in (_by_windows, _by_matrices))
    chex.assert_trees_all_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert all(np.asarray(one).any() for one in found[1])  # every map is taken from


def test_gradients_go_to_the_maps_alone():
    feature = jnp.ones((6, 6, 1))

    def total(feature, boxes):
        return roi_align(feature, boxes, 1, 2).sum()

    of_map, of_boxes = jax.jit(jax.grad(total, argnums=(0, 1)))(feature, jnp.asarray([[1, 1, 5, 5.0]]))
    # Four bins, each the mean of four samples at the middles of cells.
    np.testing.assert_allclose(of_map[..., 0], np.pad(np.full((4, 4), 0.25), 1), atol=1e-6)
    np.testing.assert_array_equal(of_boxes, np.zeros((1, 4)))


def test_mask_targets_are_half_or_more_of_a_bin():
    masks = np.zeros((2, 8, 10), bool)
    masks[0, 2:6, 2:8] = True
    masks[1, :, 5:] = True
    boxes = np.asarray([[2, 2, 8, 6], [0, 0, 10, 8], [-9, 0, 90, 8]], np.float32)
    found = jax.jit(lambda *x: mask_targets(*x, 4))(masks, jnp.asarray([0, 1, 1]), boxes)
    chex.assert_shape(found, (3, 4, 4))
    assert np.asarray(found)[0].all()
    for row in (*np.asarray(found)[1], *np.asarray(found)[2]):  # the third is limited to what the second is
        np.testing.assert_array_equal(row, [False, False, True, True])


def test_packed_masks_have_the_targets_of_the_masks():
    rng = np.random.default_rng(4)
    masks = np.repeat(np.repeat(rng.random((2, 3, 8, 5)) < 0.5, 3, 2), 4, 3)  # patches, of two images
    packed, index = PackedMasks(jnp.asarray(np.packbits(masks, -2))), jnp.asarray([[0, 2, 1, 2]] * 2)
    corners = rng.uniform(-4, 10, (2, 4, 2))
    boxes = jnp.asarray(np.concatenate([corners, corners + rng.uniform(3, 20, (2, 4, 2))], -1), jnp.float32)
    run = jax.jit(jax.vmap(lambda masks, *x: mask_targets(masks, *x, 7)))
    assert packed.shape == masks.shape
    found = run(packed, index, boxes)
    np.testing.assert_array_equal(found, run(jnp.asarray(masks), index, boxes))
    assert 0.2 < np.asarray(found).mean() < 0.8


def test_an_outline_is_where_a_pasted_mask_has_half():
    rng = np.random.default_rng(3)
    masks = rng.uniform(size=(6, 5, 5)).astype(np.float32)
    masks[1], masks[5] = 1, 0
    boxes = [[2.2, 1.7, 9.1, 8.3], [-4, -3, 30, 40], [5, 2, 6, 3.5], [0, 0, 13, 11], [20, 3, 25, 9], [1, 1, 9, 9]]
    found = outlines(masks, np.asarray(boxes, np.float32), 11, 13)
    wanted = paste(masks, np.asarray(boxes, np.float32), 11, 13) >= 0.5
    assert [one["size"] for one in found] == [[11, 13]] * 6
    np.testing.assert_array_equal([to_mask(one, 11, 13) for one in found], wanted)
    assert wanted[[0, 1, 3]].any((1, 2)).all()  # otherwise there is nothing to compare


def test_masks_are_pasted_as_pixel_by_pixel():
    rng = np.random.default_rng(2)
    masks = rng.uniform(size=(4, 5, 5))
    boxes = np.asarray([[2.2, 1.7, 9.1, 8.3], [-4, -3, 30, 40], [5, 2, 6, 3.5], [3, 3, 3, 9.0]])
    found = paste(masks, boxes, 11, 13)
    for mask, (x0, y0, x1, y1), ours in zip(masks, boxes, found, strict=True):
        for y in range(11):
            for x in range(13):
                v = (y + 0.5 - y0) / (y1 - y0) * 5 - 0.5
                u = (x + 0.5 - x0) / (x1 - x0) * 5 - 0.5 if x1 > x0 else 2.0  # the middle of what has no width
                cells = [
                    (1 - abs(v - i)) * (1 - abs(u - j)) * mask[i, j]
                    for i in range(5)
                    for j in range(5)
                    if abs(v - i) < 1 and abs(u - j) < 1
                ]
                np.testing.assert_allclose(ours[y, x], sum(cells), atol=1e-12)


def test_losses_of_regions_by_hand():
    a, b = jnp.asarray([0, 0, 4, 2.0]), jnp.asarray([2, 0, 8, 2.0])
    np.testing.assert_allclose(giou(a, b), 1 - 4 / 16, rtol=1e-6)
    far = jnp.asarray([6, 0, 8, 2.0])
    np.testing.assert_allclose(giou(a, far), 1 + (16 - 12) / 16, rtol=1e-6)
    np.testing.assert_allclose(overlaps(a[None], jnp.stack([b, far]), "giou"), [[0.25, -0.25]], rtol=1e-6)
    np.testing.assert_allclose(smooth_l1(jnp.asarray([0.5, -3]), jnp.zeros(2), 2.0), [0.0625, 2.0])
    logits = jnp.asarray([[1.0, 2, 3], [0, 0, 0]])
    total = sum(math.exp(x) for x in (1, 2, 3))
    wanted = [math.log(total) - 1, math.log(3)]
    np.testing.assert_allclose(cross_entropy(logits, jnp.asarray([0, 2])), wanted, rtol=1e-6)
    wanted = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(2)), 1000]
    found = binary_cross_entropy(jnp.asarray([2.0, 2, 1000]), jnp.asarray([True, False, False]))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    maps = jnp.arange(12.0).reshape(2, 1, 2, 3)
    np.testing.assert_array_equal(of_class(maps, jnp.asarray([2, 0])), [[[2, 5]], [[6, 9]]])
