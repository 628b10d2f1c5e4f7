"""Recorded cases of every kind there is a model for; ``recorded.py`` compares the cases of any folder."""

import importlib
import runpy
from pathlib import Path

import jax
import pytest
from recorded_cases import worst_of

GOLDEN = Path(__file__).parents[1] / "golden" / "dense"
FEWEST = {"retinanet": 30, "maskrcnn": 100, "detection_ops": 70}  # comparisons
IN_FLOAT64 = ("maskrcnn",)  # alone; float32 compares less of the same, and takes as long


@pytest.mark.parametrize(
    ("kind", "x64"),
    [(kind, x64) for kind in FEWEST for x64 in (False, True) if x64 or kind not in IN_FLOAT64],
    ids=lambda value: {True: "float64", False: "float32"}.get(value, value),
)
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
