"""The example of ``pallas_kernels/README.md`` runs as printed."""

import re
from pathlib import Path

import chex

README = Path(__file__).parents[2] / "pallas_kernels" / "README.md"


def test_the_example_runs():
    names = {}
    exec(re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1), names)
    chex.assert_shape(names["y"], (2, 64, 32))
    chex.assert_shape(names["state"], (2, 32, 16))
    chex.assert_shape(names["out"], (2, 9, 7, 32))
