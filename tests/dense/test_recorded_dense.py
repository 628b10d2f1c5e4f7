"""Recorded cases of every kind there is a model for; ``recorded.py`` compares the cases of any folder."""

import importlib
import runpy
from pathlib import Path

import jax
import pytest
from recorded_cases import worst_of

GOLDEN = Path(__file__).parents[1] / "golden" / "dense"
FEWEST = {"retinanet": 30, "detection_ops": 70}  # comparisons


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", FEWEST)
def test_recorded_cases_are_within_their_limits(kind, x64):
    with jax.enable_x64(x64):
        found = list(importlib.import_module(f"recorded_{kind}").compare(GOLDEN, x64))
    assert len(found) > FEWEST[kind]
    assert [one for one in found if not one.difference <= one.limit] == []


def test_what_has_no_model_is_named(tmp_path):
    script = runpy.run_path(str(Path(__file__).with_name("recorded.py")))
    left_out, kinds = script["left_out"], script["KINDS"]
    (tmp_path / "other.json").write_text("{}")
    assert list(worst_of(tmp_path, kinds)) == []
    assert left_out(tmp_path, set()) == ["other"]
    missing = left_out(GOLDEN, {"nms_0.5"})
    assert "photometric_hue" in missing
    assert "nms_0.5" not in missing
