"""Wrong pixels of label maps, against loops over all pairs of pixels."""

import numpy as np
import pytest

from evmamba_jax.analysis.wrong_pixels import pixel_errors
from evmamba_jax.errors import UserError


def region(truth: np.ndarray, start: tuple[int, int], known: dict[tuple[int, int], int]) -> int:
    """Return how many pixels of one class hang together with a pixel, along sides."""
    seen, waiting = {start}, [start]
    while waiting and start not in known:
        row, column = waiting.pop()
        for place in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            inside = 0 <= place[0] < truth.shape[0] and 0 <= place[1] < truth.shape[1]
            if inside and place not in seen and truth[place] == truth[start]:
                seen.add(place)
                waiting.append(place)
    known |= dict.fromkeys(seen - known.keys(), len(seen))
    return known[start]


def maps() -> tuple[np.ndarray, np.ndarray]:
    """Return a label map of blocks and single pixels with some that do not count, and a guess."""
    rng = np.random.default_rng(0)
    truth = np.zeros((40, 44), np.uint8)
    truth[4:20, 6:30] = 1
    truth[15:38, 25:40] = 2
    truth[30:32, 2:4] = 3
    truth[rng.random(truth.shape) < 0.005] = 255
    return truth, np.where(rng.random(truth.shape) < 0.2, rng.integers(0, 4, truth.shape), truth % 255).astype(np.uint8)


def test_counts_are_those_of_loops_over_pixels():
    truth, found = maps()
    errors = pixel_errors(truth, found, 5, distance=2.5)
    confusion = np.zeros((5, 5), int)
    border, regions, known = np.zeros((2, 2), int), np.zeros((3, 2), int), {}
    for row, column in np.ndindex(truth.shape):
        label = truth[row, column]
        if label == 255:
            continue
        wrong = found[row, column] != label
        confusion[label, found[row, column]] += 1
        near = any(
            truth[y, x] not in (label, 255) and (y - row) ** 2 + (x - column) ** 2 <= 2.5**2
            for y in range(max(row - 3, 0), min(row + 4, 40))
            for x in range(max(column - 3, 0), min(column + 4, 44))
        )
        area = region(truth, (row, column), known)
        for table, place in ((border, 0 if near else 1), (regions, 0 if area < 32**2 else 1 if area < 96**2 else 2)):
            table[place] += 1, wrong
    assert errors.confusion.tolist() == confusion.tolist()
    assert errors.border.tolist() == border.tolist()
    assert errors.regions.tolist() == regions.tolist()
    assert (regions[:2] > 0).all()  # both sizes are asked for
    both = errors + errors
    assert both.confusion.tolist() == (2 * confusion).tolist()
    first = errors.pairs()[0]
    wrong = np.where(np.eye(5, dtype=bool), 0, confusion)
    assert first.pixels == wrong.max() == wrong[first.label, first.found]
    assert first.share == pytest.approx(wrong.max() / confusion[first.label].sum())
    assert sum(pair.pixels for pair in errors.pairs()) == wrong.sum()


def test_one_class_has_no_border_and_mistakes_are_told():
    plain = np.zeros((100, 100), np.uint8)
    errors = pixel_errors(plain, plain, 2)
    assert errors.border.tolist() == [[0, 0], [10_000, 0]]
    assert errors.regions.tolist() == [[0, 0], [0, 0], [10_000, 0]]
    assert errors.pairs() == []
    with pytest.raises(UserError, match="of one size"):
        pixel_errors(plain, plain[:9], 2)
    with pytest.raises(UserError, match="a label is 2; there are 2 classes"):
        pixel_errors(plain, plain + 2, 2)
