"""Images with label maps and boxes: whole pipelines against slow ones, and batches of one shape."""

import dataclasses

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_masks

from evmamba_jax.data import mmdet, mmseg, opencv, outlines
from evmamba_jax.data.dense_config import DetectionData, SegmentationData
from evmamba_jax.data.loader import eval_batches, train_batches
from evmamba_jax.data.opencv import Window

SIZES = [(60, 80), (80, 60), (64, 96), (96, 64), (50, 50), (90, 40), (70, 75)] * 3


class Pictures:
    """Made-up images with objects and label maps, of several sizes."""

    name, split, fingerprint = "pictures/1.0.0", "train", None

    def __init__(self, sizes=SIZES, corrupt=()):
        self.sizes, self.corrupt = np.array(sizes), corrupt

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        height, width = self.sizes[index]
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        image[0, 0] = index
        labels = np.kron(rng.integers(0, 4, (5, 5)), np.ones((20, 20))).astype(np.uint8)[:height, :width]
        corner = rng.uniform(0, 20, (3, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(4, 20, (3, 2))], 1)
        objects = {"boxes": boxes, "labels": np.arange(3), "crowd": np.array([False, False, True]), "area": boxes[:, 2]}
        lines = [[[x0, y0, x1, y0, x1, y1]] for x0, y0, x1, y1 in boxes.tolist()]  # a triangle each
        objects["segmentations"] = [lines[0] + [[1.5, 1, 9, 1, 9, 7.5, 1, 8]], outlines.run_lengths(labels > 1), None]
        record = {"id": str(index), "image": image, "label_map": labels, "upright": True, **objects}
        return record | ({"image": b"nothing"} if index in self.corrupt else {})


@pytest.fixture(autouse=True, params=["NumPy", "OpenCV"])
def library(request, monkeypatch):
    """Prepare images with NumPy, and with OpenCV itself."""
    if request.param == "NumPy":
        monkeypatch.setattr(opencv, "cv2", None)


def segmentation(**fields):
    return LabelMapsOf(SegmentationData(image_size=48, scale=(160, 40), num_threads=2, **fields))


def detection(*, masks=False, **fields):
    return mmdet.BoxedImages(DetectionData(scale=(96, 64), max_objects=4, num_threads=2, **fields), masks)


def segments(**fields):
    return detection(masks=True, **fields)


LabelMapsOf = mmseg.LabelMaps


def test_a_window_of_a_resized_image_is_that_part_of_the_whole():
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    window = Window(5, 11, 41, 60)
    for resize, pixels in ((opencv.resize_bilinear, image), (opencv.resize_nearest, image[..., 0])):
        whole = resize(pixels, 61, 77)
        np.testing.assert_array_equal(resize(pixels, 61, 77, window), whole[5:41, 11:60])


def test_an_image_is_resized_into_the_corner_of_a_larger_one():
    image = np.random.default_rng(0).integers(0, 256, (70, 53, 3), np.uint8)
    for size in ((90, 61), (40, 30), (70, 53), (71, 300)):  # larger, smaller, the same, more rows than at once
        canvas = np.full((96, 320, 3), 7, np.uint8)
        resized = opencv.resize_bilinear(image, *size, out=canvas)
        np.testing.assert_array_equal(resized, opencv.resize_bilinear(image, *size))
        np.testing.assert_array_equal(canvas[: size[0], : size[1]], resized)
        assert (canvas[size[0] :] == 7).all()
        assert (canvas[:, size[1] :] == 7).all()


def test_colours_change_alike_in_either_order_and_in_any_number_of_rows():
    image = np.random.default_rng(0).integers(0, 256, (700, 100, 3), np.uint8)  # more pixels than are changed at once
    for adjust, value in ((opencv.adjust_saturation, 1.3), (opencv.adjust_hue, -7)):
        changed = adjust(image, value)
        np.testing.assert_array_equal(adjust(image[..., ::-1], value, red_first=True), changed[..., ::-1])
        np.testing.assert_array_equal(adjust(image[690:], value), changed[690:])
    np.testing.assert_array_equal(opencv.mirrored(image), image[:, ::-1])


def test_a_crop_for_segmentation_is_what_mmseg_would_cut_out():
    """The whole image resized, then cut, mirrored and coloured, with the same draws."""
    reader, record = segmentation(hflip=1.0), Pictures()[2]
    image, labels = reader.decode(record)
    for seed in range(5):
        found = reader.train((image, labels), np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        factor = rng.uniform(0.5, 2.0)
        long, short = int(160 * factor), int(40 * factor)
        ratio = min(long / 96, short / 64)
        height, width = int(64 * ratio + 0.5), int(96 * ratio + 0.5)
        all_labels = opencv.resize_nearest(labels, height, width)
        for _ in range(11):
            top, left = int(rng.integers(max(height - 48, 0) + 1)), int(rng.integers(max(width - 48, 0) + 1))
            cut = all_labels[top : top + 48, left : left + 48]
            shares = np.unique(cut, return_counts=True)[1]
            if len(shares) > 1 and shares.max() / shares.sum() < 0.75:
                break
        rng.random()  # the flip, which is certain
        pixels = opencv.resize_bilinear(image, height, width)[top : top + 48, left : left + 48][:, ::-1]
        pixels = mmseg.photometric(pixels, rng)
        h, w = pixels.shape[:2]
        assert found["size"].tolist() == [h, w]
        np.testing.assert_array_equal(found["image"][:h, :w], pixels)
        np.testing.assert_array_equal(found["label_map"][:h, :w], cut[:, ::-1])
        assert not found["image"][h:].any()
        assert (found["label_map"][h:] == 255).all()
        assert (found["label_map"][:, w:] == 255).all()


def test_a_crop_full_of_one_class_is_drawn_anew():
    labels = np.zeros((100, 400), np.uint8)
    labels[:, 200:] = 1
    labels[:, :190] = 255  # not counted
    windows = [mmseg.choose_crop(labels, (100, 400), 40, 0.75, np.random.default_rng(seed)) for seed in range(60)]
    right = [np.bincount(labels[w.slices].ravel(), minlength=256)[:2] for w in windows]
    mixed = [counts.min() > 0 and counts.max() < 0.75 * counts.sum() for counts in right]
    # A place is mixed with probability 23 / 361 or so: once in 16 draws, but in half of the rows of eleven.
    assert 0.3 < np.mean(mixed) < 0.8


def test_boxes_follow_the_pixels_of_a_multi_scale_crop():
    """An object painted into the image lies where its box says, whatever was drawn."""
    reader = mmdet.BoxedImages(DetectionData(augment="multi_scale", max_objects=4))
    image = np.zeros((300, 420, 3), np.uint8)
    box = np.array([[150.0, 90.0, 260.0, 210.0]])
    image[90:210, 150:260] = 255
    record = {"boxes": box, "labels": np.array([7]), "crowd": np.array([False])}
    seen, flips, crops = 0, set(), set()
    for seed in range(25):
        geometry = reader.geometry((300, 420), np.random.default_rng(seed))
        flips.add(geometry.flip)
        crops.add(geometry.window is None)
        found = reader.train((image, record), np.random.default_rng(seed))
        height, width = found["size"]
        assert found["image"].shape[:2] == reader.train_shape((300, 420), np.random.default_rng(seed))
        assert max(height, width) <= 1333
        assert min(height, width) <= 800
        bright = np.argwhere(found["image"][..., 0] > 127)
        if found["valid"][0]:
            seen += 1
            x0, y0, x1, y1 = found["boxes"][0]
            np.testing.assert_allclose([y0, x0], bright.min(0), atol=2.5)
            np.testing.assert_allclose([y1, x1], bright.max(0) + 1, atol=2.5)
            assert found["labels"][0] == 7
        assert found["valid"].sum() <= 1
    assert seen > 15
    assert flips == {"", "first"}
    assert crops == {True, False}


def drawn(outline, size):
    """Return the mask of polygons or run lengths, drawn by pycocotools alone, uint8."""
    if isinstance(outline, dict):
        return coco_masks.decode(coco_masks.frPyObjects(outline, *size))
    return np.max([coco_masks.decode(coco_masks.frPyObjects([polygon], *size))[..., 0] for polygon in outline], 0)


@pytest.mark.parametrize(("augment", "scale"), [("one_scale", (96, 64)), ("multi_scale", (1333, 800))])
def test_masks_are_changed_as_mmdet_changes_bitmaps(augment, scale):
    """Drawn whole, then mirrored, resized and cut one after the other by OpenCV, and padded at last."""
    reader = mmdet.BoxedImages(DetectionData(augment=augment, scale=scale, max_objects=4), masks=True)
    kinds = set()
    for seed in range(8 if augment == "multi_scale" else 4):
        record = Pictures()[seed % 4]
        if seed == 2:
            record["crowd"][0] = True
        size = record["image"].shape[:2]
        found = reader.train(reader.decode(record), np.random.default_rng(seed))
        flip, before, window, final = reader.geometry(size, np.random.default_rng(seed))
        kinds.add((flip, window is None))
        _, _, seen = mmdet.change(
            record["image"], record["boxes"].astype(np.float32), mmdet.Geometry(flip, before, window, final)
        )
        of = [number for number in (0, 1) if seen[number] and not record["crowd"][number]]  # the last has no outline
        masks = np.unpackbits(found["masks"], axis=1)
        assert masks.shape == (4, *found["image"].shape[:2])
        for number, mask in zip(of, masks, strict=False):
            wanted = drawn(record["segmentations"][number], size)
            if flip == "first":
                wanted = cv2.flip(wanted, 1)
            if window is not None:
                wanted = cv2.resize(wanted, before[::-1], interpolation=cv2.INTER_NEAREST)[window.slices]
            wanted = cv2.resize(wanted, final[::-1], interpolation=cv2.INTER_NEAREST)
            if flip == "last":
                wanted = cv2.flip(wanted, 1)
            np.testing.assert_array_equal(mask[: final[0], : final[1]], wanted)
            assert mask.sum() == wanted.sum()  # nothing in the padding
        assert not masks[len(of) :].any()
        assert found["valid"].tolist() == [number < len(of) for number in range(4)]
        assert found["labels"][: len(of)].tolist() == of
    assert len(kinds) > 1


def test_an_object_without_an_outline_is_left_out_only_where_masks_are_asked_for():
    record = Pictures()[0]
    record["segmentations"][0] = None
    for reader, labels in ((detection(), [0, 1]), (segments(), [1])):
        found = reader.train(reader.decode(record), np.random.default_rng(0))
        assert found["labels"][found["valid"]].tolist() == labels
        assert ("masks" in found) == reader.masks
        blank = reader.blank(training=True, shape=found["image"].shape[:2])
        assert {name: array.shape for name, array in blank.items()} == {name: a.shape for name, a in found.items()}


def test_the_one_scale_is_mirrored_after_it_is_resized():
    """As mmdet's order is, which rounds other pixels than the reverse."""
    reader, record = detection(hflip=1.0), Pictures()[0]  # 60 x 80
    found = reader.train(reader.decode(record), np.random.default_rng(0))
    resized = opencv.resize_bilinear(record["image"], 64, 85)
    np.testing.assert_array_equal(found["image"][:64, :85], resized[:, ::-1])
    x0, y0, x1, y1 = (record["boxes"][0] * [85 / 80, 64 / 60, 85 / 80, 64 / 60]).tolist()
    np.testing.assert_allclose(found["boxes"][0], [85 - x1, y0, 85 - x0, y1], rtol=1e-5)


def test_evaluation_keeps_all_objects_as_they_are_stored():
    record = Pictures()[1]  # 80 x 60
    found = detection().evaluate(detection().decode(record))
    assert found["image"].shape == (96, 64, 3)  # 85 x 64, each to the next multiple of 32
    assert found["size"].tolist() == [85, 64]
    np.testing.assert_allclose(found["scale"], [64 / 60, 85 / 80], rtol=1e-6)
    np.testing.assert_allclose(found["boxes"][:3], record["boxes"], rtol=1e-6)
    assert found["valid"].tolist() == [True, True, True, False]
    assert found["crowd"].tolist() == [False, False, True, False]


@pytest.mark.parametrize("padding", ["exact", "buckets"])
@pytest.mark.parametrize("make", [segmentation, detection])
def test_an_evaluation_sees_every_image_once_in_batches_of_one_shape(make, padding):
    reader, source, seen = make(eval_padding=padding), Pictures(), []
    whole = {}
    for process in range(2):
        with eval_batches(
            reader.config, source, global_batch=4, process_index=process, process_count=2, reader=reader
        ) as batches:
            for number, batch in enumerate(batches):
                shapes = {name: array.shape[1:] for name, array in batch.items()}
                assert whole.setdefault(number, shapes) == shapes  # the same on both
                for index, image, weight in zip(batch["index"], batch["image"], batch["weight"], strict=True):
                    assert weight == (index >= 0)
                    if weight:
                        seen.append(int(index))
                        assert image.shape[:2] == reader.eval_shape(tuple(SIZES[index]))[-2:]
    assert sorted(seen) == list(range(len(SIZES)))
    few = make is segmentation and padding == "buckets"  # to multiples of 128, which none of these passes
    assert (len({str(shapes) for shapes in whole.values()}) == 1) == few


def batches_of(reader, steps, *, count=1, start=0, source=None, **fields):
    """Return the first rows of the steps' batches, all processes together."""
    config = dataclasses.replace(reader.config, **fields)
    parts = []
    for process in range(count):
        with train_batches(
            config,
            source or Pictures(),
            seed=3,
            global_batch=4,
            start_step=start,
            process_index=process,
            process_count=count,
            reader=reader,
        ) as batches:
            parts.append([next(batches) for _ in range(steps)])
    return [
        {name: np.concatenate([part[step][name] for part in parts]) for name in parts[0][step]} for step in range(steps)
    ]


def test_training_batches_have_one_shape_and_an_epoch_shows_each_image_about_once():
    reader = detection(hflip=0.0)
    batches = batches_of(reader, 15)
    shapes = [batch["image"].shape[1:3] for batch in batches]
    assert set(shapes) == {(64, 96), (96, 64)}
    for epoch in range(3):
        of_epoch = batches[5 * epoch : 5 * epoch + 5]
        seen = [int(image[0, 0, 0]) for batch in of_epoch for image in batch["image"]]
        assert len(set(seen)) >= 17  # of 20 places for 21 images


@pytest.mark.parametrize("make", [segmentation, detection, segments])
def test_training_batches_are_the_same_on_any_number_of_hosts_and_from_any_step(make):
    reader = make()
    alone = batches_of(reader, 8)
    for others in (batches_of(reader, 8, count=2), batches_of(reader, 8, count=4)):
        for ours, theirs in zip(alone, others, strict=True):
            for name, array in ours.items():
                np.testing.assert_array_equal(array, theirs[name])
    for ours, theirs in zip(alone[6:], batches_of(reader, 2, start=6), strict=True):
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])


def test_a_damaged_image_is_replaced_by_one_of_its_shape():
    reader = detection(on_corrupt="skip", hflip=0.0)
    batches = batches_of(reader, 5, source=Pictures(corrupt=(0, 4, 8)))
    assert sum(int(batch["corrupt"].sum()) for batch in batches) >= 2
    assert {len(batch["image"]) for batch in batches} == {4}
