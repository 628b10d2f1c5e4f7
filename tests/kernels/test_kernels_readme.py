"""The examples of ``pallas_kernels/README.md`` run as printed."""

import re
from pathlib import Path

import chex

README = Path(__file__).parents[2] / "pallas_kernels" / "README.md"


def test_the_examples_run():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(block, names)
    chex.assert_shape(names["y"], (2, 64, 32))
    chex.assert_shape(names["state"], (2, 32, 16))
    chex.assert_shape(names["out"], (2, 9, 7, 32))
