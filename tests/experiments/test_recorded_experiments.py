"""Some small recorded cases of every kind; ``recorded.py`` compares the cases of any folder."""

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest
from recorded_cases import difference

GOLDEN = Path(__file__).parents[1] / "golden" / "experiments"
FEWEST = {"course_vim": 200, "ops": 30, "s5": 30, "pruning": 250}  # comparisons


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", FEWEST)
def test_recorded_cases_are_within_their_limits(kind, x64):
    with jax.enable_x64(x64):
        found = list(importlib.import_module(f"recorded_{kind}").compare(GOLDEN, x64))
    assert len(found) > FEWEST[kind]
    assert [one for one in found if not one.difference <= one.limit] == []


def test_differences_are_relative_except_where_nothing_is_expected():
    wanted, ours = np.asarray([3.0, -4.0]), np.asarray([3.0, -3.9])
    assert difference(ours, wanted) == pytest.approx(0.1 / 12.5**0.5)
    assert difference(ours, wanted, relative=False) == pytest.approx(0.1)
    assert difference(np.full(2, 1e-3), np.zeros(2)) == 1e-3
    assert difference(wanted[:1], wanted) == np.inf
    assert not difference(np.full(2, np.nan), wanted) <= 1
