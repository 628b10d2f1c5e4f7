"""Outlines and masks, against loops over pixels."""

import sys

import numpy as np
import pytest

from evmamba_jax.data import outlines
from evmamba_jax.data.scenes import DigitScenes, scene
from evmamba_jax.errors import UserError


def test_run_lengths_go_down_the_columns():
    mask = np.zeros((3, 4), bool)
    mask[1:, 1] = mask[0, 2] = True
    assert outlines.run_lengths(mask) == {"size": [3, 4], "counts": [4, 3, 5]}
    mask[0, 0] = True
    assert outlines.run_lengths(mask) == {"size": [3, 4], "counts": [0, 1, 3, 3, 5]}
    assert outlines.run_lengths(np.zeros((2, 2), bool)) == {"size": [2, 2], "counts": [4]}


def test_a_mask_comes_back_from_every_form():
    rng = np.random.default_rng(0)
    for mask in (rng.random((7, 5)) < 0.5, np.zeros((7, 5), bool), np.ones((7, 5), bool)):
        runs, text = outlines.run_lengths(mask), outlines.of_mask(mask)
        assert outlines.to_text(runs, 7, 5) == outlines.to_text(text, 7, 5) == text
        for outline in (runs, text):
            np.testing.assert_array_equal(outlines.to_mask(outline, 7, 5), mask)
        x, y, w, h = outlines.box_of(text)
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        wanted = [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1] if mask.any() else [0] * 4
        assert [x, y, w, h] == wanted


def test_an_object_is_the_union_of_its_polygons():
    polygons = [[1.0, 1, 5, 1, 5, 4, 1, 4], [4.0, 2, 8, 2, 8, 6, 4, 6]]
    inside = lambda x, y: (1 <= x < 5 and 1 <= y < 4) or (4 <= x < 8 and 2 <= y < 6)  # noqa: E731
    wanted = [[inside(x, y) for x in range(10)] for y in range(8)]
    np.testing.assert_array_equal(outlines.to_mask(polygons, 8, 10), wanted)


def test_scenes_have_the_outline_of_what_is_seen():
    record, masks = DigitScenes("test")[3], scene("test", 3).masks
    for outline, mask, area in zip(record["segmentations"], masks, record["area"], strict=True):
        np.testing.assert_array_equal(outlines.to_mask(outline, 128, 128), mask)
        assert sum(outline["counts"][1::2]) == area


def test_a_missing_library_gets_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(UserError, match=r"need pycocotools: pip install 'evmamba-jax\[detection\]'"):
        outlines.to_mask([[0.0, 0, 4, 0, 4, 4]], 5, 5)
