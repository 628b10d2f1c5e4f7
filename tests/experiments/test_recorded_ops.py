"""The layers of the experiments against recorded numbers: some small cases of what ``recorded.py`` compares."""

import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden" / "experiments"


@pytest.fixture(scope="module", params=["recorded_ops", "recorded_s5"])
def kind(request):
    """Return a module of this folder; to it, ``recorded`` is the one beside it, not that of the official weights."""
    others = sys.modules.pop("recorded", None)
    sys.path.insert(0, str(HERE))
    try:
        return importlib.import_module(request.param)
    finally:
        sys.path.remove(str(HERE))
        sys.modules.pop("recorded", None)
        if others is not None:
            sys.modules["recorded"] = others


@pytest.mark.parametrize("x64", [False, True])
def test_within_limits(kind, x64):
    with jax.enable_x64(x64):
        found = list(kind.compare(GOLDEN, x64))
    assert len(found) > 30
    assert [one for one in found if not one.difference <= one.limit] == []


def test_differences_are_relative_except_where_nothing_is_expected(kind):
    wanted, ours = np.asarray([3.0, -4.0]), np.asarray([3.0, -3.9])
    assert kind.difference(ours, wanted) == pytest.approx(0.1 / 12.5**0.5)
    assert kind.difference(ours, wanted, relative=False) == pytest.approx(0.1)
    assert kind.difference(np.full(2, 1e-3), np.zeros(2)) == 1e-3
    assert kind.difference(wanted[:1], wanted) == np.inf
    assert not kind.difference(np.full(2, np.nan), wanted) <= 1
