"""Images as Detectron2 prepares them, against means over triangles and numbers by hand."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from evmamba_jax.data import outlines
from evmamba_jax.data.dense_config import DetectionData
from evmamba_jax.data.detectron2 import (
    SquareImages,
    crop_window,
    fitted_size,
    nearest_places,
    resize,
    shortest_edge_size,
)
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


def test_the_nearest_pixels_are_pillows():
    for old, new in [(97, 31), (31, 97), (7, 1024), (640, 512), (333, 999), (480, 77), (3, 1), (640, 640)]:
        line = Image.fromarray(np.arange(old, dtype=np.int32)[None])
        wanted = np.asarray(line.resize((new, 1), Image.Resampling.NEAREST))[0]
        np.testing.assert_array_equal(nearest_places(old, new), wanted)


def squares(*, masks=True, **fields):
    return SquareImages(DetectionData(augment="large_scale_jitter", scale=(64, 64), max_objects=5, **fields), masks)


def picture(size=(60, 90)):
    """Return a record of an image with objects: a ring, a disc, a crowd, and a corner that few crops show."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: size[0], : size[1]]
    far = np.hypot(y - 30, x - 45)
    masks = [(far < 29) & (far > 20), np.hypot(y - 12, x - 70) < 8, far < 5, (y < 5) & (x < 5)]
    ends = [[(axis.min(), axis.max() + 1) for axis in np.nonzero(mask)[::-1]] for mask in masks]
    boxes = np.array([[x0 + 0.25, y0 + 0.25, x1 - 0.25, y1 - 0.25] for (x0, x1), (y0, y1) in ends])
    return {
        "id": "0",
        "image": rng.integers(0, 256, (*size, 3), np.uint8),
        "boxes": boxes,
        "labels": np.array([3, 1, 2, 7]),
        "crowd": np.array([False, False, True, False]),
        "area": np.array([m.sum() for m in masks], float),
        "segmentations": [outlines.run_lengths(m) for m in masks],
        "upright": True,
    }, masks


def test_training_is_mirrored_resized_and_cropped_by_pillow():
    """Image and masks one after the other in Pillow; boxes of objects that are cut are those of their masks."""
    reader, (record, drawn), kinds = squares(), picture(), set()
    for seed in range(40):
        found = reader.train(reader.decode(record), np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        mirrored, factor, place = rng.random() < 0.5, rng.uniform(0.1, 2.0), rng.uniform()
        width, height = round(64 * factor), round(60 * (64 * factor / 90))
        top, left = (round(max(length - 64, 0) * place) for length in (height, width))

        def changed(array, filter, steps=(mirrored, (width, height), (left, top))):
            turned, size, (x, y) = steps
            picture = ImageOps.mirror(Image.fromarray(array)) if turned else Image.fromarray(array)
            return np.asarray(picture.resize(size, filter))[y : y + 64, x : x + 64]

        pixels = changed(record["image"], Image.Resampling.BILINEAR)
        h, w = found["size"]
        assert (h, w) == pixels.shape[:2] == (min(height, 64), min(width, 64))
        assert found["image"].shape == (64, 64, 3) == (*reader.train_shape((60, 90), np.random.default_rng(seed)), 3)
        np.testing.assert_array_equal(found["image"][:h, :w], pixels)
        assert not found["image"][h:].any()
        assert not found["image"][:, w:].any()
        number, own = 0, np.unpackbits(found["masks"], axis=1)
        for place in (0, 1, 3):
            mask = changed(drawn[place].astype(np.uint8), Image.Resampling.NEAREST)
            x0, y0, x1, y1 = record["boxes"][place]
            if mirrored:
                x0, x1 = 90 - x1, 90 - x0
            x0, x1, y0, y1 = (
                x0 * width / 90 - left,
                x1 * width / 90 - left,
                y0 * height / 60 - top,
                y1 * height / 60 - top,
            )
            cut = x0 < 0 or y0 < 0 or x1 > w or y1 > h
            if not mask.any():
                continue
            assert found["labels"][number] == record["labels"][place]
            np.testing.assert_array_equal(own[number, :h, :w], mask)
            assert own[number].sum() == mask.sum()
            down, across = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if cut:
                wanted = [max(x0, across[0]), max(y0, down[0]), min(x1, across[-1] + 1), min(y1, down[-1] + 1)]
            else:
                wanted = [x0, y0, x1, y1]
            np.testing.assert_allclose(found["boxes"][number], wanted, atol=1e-4)
            kinds.add((bool(mirrored), cut, width > 64))
            number += 1
        assert found["valid"].tolist() == [k < number for k in range(5)]
    assert kinds == {(m, c, True) for m in (False, True) for c in (False, True)} | {
        (False, False, False),
        (True, False, False),
    }


def test_evaluation_fits_the_image_in_the_square():
    reader, (record, _) = squares(masks=False), picture()
    found = reader.evaluate(reader.decode(record))
    assert found["image"].shape == (64, 64, 3) == (*reader.eval_shape((60, 90)), 3)
    assert found["size"].tolist() == [43, 64]
    np.testing.assert_array_equal(found["image"][:43], Image.fromarray(record["image"]).resize((64, 43), 2))
    assert not found["image"][43:].any()
    np.testing.assert_allclose(found["scale"], [64 / 90, 43 / 60])
    np.testing.assert_allclose(found["boxes"][:4], record["boxes"])
    blank = reader.blank(training=False)
    assert {name: array.shape for name, array in blank.items()} == {name: a.shape for name, a in found.items()}
    trained = reader.train(reader.decode(record), np.random.default_rng(1))
    assert trained["image"].shape == reader.blank(training=True)["image"].shape
    assert "masks" not in trained
