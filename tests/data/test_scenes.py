"""Scenes of digits: what is promised of them, counted pixel by pixel."""

import numpy as np
import pytest

from evmamba_jax.data import scenes
from evmamba_jax.data.scenes import DigitScenes, scene
from evmamba_jax.errors import UserError


@pytest.fixture(scope="module")
def found():
    return [scene(split, index) for split in ("train", "test") for index in range(0, 200, 10)]


def test_digits_are_as_many_as_large_and_as_visible_as_promised(found):
    assert {one.image.shape for one in found} == {(128, 128, 3)}
    counts = [len(one.labels) for one in found]
    assert min(counts) >= 3
    assert max(counts) <= 8
    for one in found:
        for mask, whole in zip(one.masks, one.whole, strict=True):
            assert not (mask & ~whole).any()
            assert mask.sum() >= 0.7 * whole.sum()
            height = np.ptp(np.flatnonzero(whole.any(1))) + 1
            assert 16 <= height <= 56
    covered = [mask.sum() < whole.sum() for one in found for mask, whole in zip(one.masks, one.whole, strict=True)]
    assert 0.1 < np.mean(covered) < 0.7
    assert {int(label) for one in found for label in one.labels} == set(range(10))


def test_what_is_in_front_hides_what_is_behind(found):
    for one in found:
        for k, (mask, whole) in enumerate(zip(one.masks, one.whole, strict=True)):
            before = np.zeros_like(mask)
            for later in one.whole[k + 1 :]:
                before |= later
            np.testing.assert_array_equal(mask, whole & ~before)


def test_boxes_and_label_map_by_a_loop(found):
    one = found[0]
    for (x0, y0, x1, y1), mask in zip(one.boxes, one.masks, strict=True):
        places = [(x, y) for y in range(128) for x in range(128) if mask[y, x]]
        assert (x0, y0) == (min(x for x, _ in places), min(y for _, y in places))
        assert (x1, y1) == (max(x for x, _ in places) + 1, max(y for _, y in places) + 1)
    for y in range(0, 128, 7):
        for x in range(128):
            of = [label + 1 for label, mask in zip(one.labels, one.masks, strict=True) if mask[y, x]]
            assert [one.label_map[y, x]] == (of or [0])


def test_a_scene_is_the_same_each_time_and_like_no_other():
    np.testing.assert_array_equal(scene("train", 5).image, scene("train", 5).image)
    assert (scene("train", 5).image != scene("test", 5).image).mean() > 0.9
    assert (scene("train", 5).image != scene("train", 6).image).mean() > 0.9


def test_digits_of_the_test_are_in_no_training_scene():
    train, test = ({scan.tobytes() for scan in scenes._digits(split)[0]} for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert not train & test


def test_records_hold_what_is_seen(found):
    boxes, maps = DigitScenes("test")[10], DigitScenes("test", ground=True)[10]
    one = found[21]
    np.testing.assert_array_equal(boxes["image"], one.image)
    np.testing.assert_array_equal(boxes["boxes"], one.boxes)
    assert boxes["area"].sum() == (one.label_map > 0).sum()
    np.testing.assert_array_equal(maps["label_map"], one.label_map)


def test_a_split_that_is_not_there():
    with pytest.raises(UserError, match="split 'val' of digit_scenes/1.0.0 is not there; its splits are train, test"):
        DigitScenes("val")
