"""Images as Detectron2 prepares them, against means over triangles and numbers by hand."""

import numpy as np
import pytest

from evmamba_jax.data.detectron2 import crop_window, fitted_size, resize, shortest_edge_size
from evmamba_jax.data.opencv import Window, resize_bilinear


def triangles(old, new):
    """Return how much each old pixel counts for each new one, (new, old)."""
    step = old / new
    width = max(step, 1)
    middles = (np.arange(new) + 0.5) * step
    share = np.maximum(1 - np.abs(np.arange(old) + 0.5 - middles[:, None]) / width, 0)
    return share / share.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(10, 17), (75, 40), (31, 90)], ids=["smaller", "larger", "both"])
def test_images_are_means_over_triangles(size):
    image = np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)
    wanted = np.einsum("hy,yxc,wx->hwc", triangles(40, size[0]), image.astype(float), triangles(61, size[1]))
    found = resize(image, *size)
    assert found.dtype == np.uint8
    assert np.abs(found - wanted).max() <= 1  # rounded after either axis
    np.testing.assert_array_equal(resize(image[..., 0], *size), found[..., 0])


def test_small_images_are_smooth_where_opencvs_are_not():
    image = np.zeros((64, 64, 3), np.uint8)
    image[::2, ::2] = 255
    assert resize(image, 8, 8).std() < 5 < resize_bilinear(image[:, 1:], 9, 9).std()


def test_sizes_by_hand():
    assert shortest_edge_size(480, 640, 800, 1333) == (800, 1067)
    assert shortest_edge_size(640, 480, 800, 1333) == (1067, 800)
    assert shortest_edge_size(300, 900, 800, 1333) == (444, 1333)
    assert shortest_edge_size(500, 500, 800, 1333) == (800, 800)
    assert shortest_edge_size(427, 640, 1024, 1024) == (683, 1024)
    assert fitted_size(480, 640, 1.0) == (768, 1024)
    assert fitted_size(640, 480, 0.1) == (102, 77)
    assert fitted_size(333, 500, 2.0) == (1364, 2048)


def test_windows_lie_within_the_image():
    assert crop_window(768, 1024, 0.7) == Window(0, 0, 768, 1024)
    assert crop_window(1364, 2048, 0.0) == Window(0, 0, 1024, 1024)
    assert crop_window(1364, 2048, 1.0) == Window(340, 1024, 1364, 2048)
    assert crop_window(100, 2000, 0.5) == Window(0, 488, 100, 1512)
