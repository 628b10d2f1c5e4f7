"""The golden data itself: the rule that makes its weights, and that a wrong result would be seen."""

import numpy as np
import pytest
from official_outputs import FOLDER, assert_near, facts, rms
from official_weights import digest, image, weights

MODELS = sorted(path.stem for path in FOLDER.glob("*.json") if not path.stem.startswith("op_"))


@pytest.mark.parametrize("name", MODELS)
def test_the_rule_gives_the_recorded_weights_and_images(name):
    doc = facts(name)
    assert digest(weights(doc["state_dict"])) == doc["weights_sha256"]
    x = image(doc["input"]["shape"], doc["input"]["seed"])
    assert digest({"x": x.transpose(0, 3, 1, 2)}) == doc["input"]["sha256"]


def test_a_result_that_is_wrong_would_be_seen():
    golden = np.linspace(1, 2, 5)
    assert_near(golden + 1e-4 * rms(golden), golden, 5e-4)
    with pytest.raises(AssertionError, match="more than"):
        assert_near(golden + 1e-3 * rms(golden), golden, 5e-4)
