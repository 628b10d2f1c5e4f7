"""The course project's model computes what its notebooks do."""

import importlib
import sys
from pathlib import Path

import jax
import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "experiments"


@pytest.fixture(scope="module")
def kind():
    """Return the module of the comparisons, whose neighbour ``recorded`` is not the one that tests/weights imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        patch.delitem(sys.modules, "recorded", raising=False)
        yield importlib.import_module("recorded_course_vim")


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
def test_recorded_cases_are_within_their_limits(kind, x64):
    with jax.enable_x64(x64):
        every = list(kind.compare(GOLDEN, x64))
    assert {one.case for one in every} == {"se_tiny", "mobilenet_tiny", "DynamicPruning_vim.pt", "SE_vim.pt"}
    assert [one for one in every if not one.difference <= one.limit] == []
    assert len(every) > 200  # a gradient of every parameter
