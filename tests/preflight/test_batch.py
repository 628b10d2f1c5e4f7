"""The search for the largest batch, with a compiler that answers at once."""

import math

import pytest

from evmamba_jax.preflight.batch import largest_batch

GIB = 2**30


@pytest.mark.parametrize("fixed", [0.05, 3.0])
@pytest.mark.parametrize("start", [8, 100, 2048])
def test_memory_that_grows_linearly(fixed, start):
    def needed(batch):
        asked.append(batch)
        return (fixed + 0.037 * batch) * GIB

    asked: list[int] = []
    fits, fails, results = largest_batch(needed, start=start, granule=8, available=15.75 * GIB)
    truth = 8 * math.floor((15.75 - fixed) / 0.037 / 8)
    assert (fits, fails) == (truth, truth + 8)
    assert len(asked) == len(set(asked)) == len(results) <= 6
    assert all(batch % 8 == 0 for batch in asked)


def test_steps_and_refusals_without_a_figure():
    """Memory in jumps, and a compiler that does not say how much it lacked."""

    def needed(batch):
        return math.inf if batch > 200 else (1 + 0.05 * 16 * math.ceil(batch / 16)) * GIB

    fits, fails, _ = largest_batch(needed, start=512, granule=8, available=15.75 * GIB)
    assert fits <= 200 < fails + 8
    assert fails - fits <= 32
    assert needed(fits) <= 15.75 * GIB


def test_nothing_fits():
    fits, fails, results = largest_batch(lambda batch: 20 * GIB, start=64, granule=8, available=15.75 * GIB)
    assert (fits, fails) == (0, 8)
    assert len(results) <= 8


def test_everything_fits():
    fits, fails, results = largest_batch(lambda batch: 1 * GIB, start=8, granule=8, available=15.75 * GIB)
    assert fails is None
    assert fits == max(results)
