"""``benchmarks/cpu_models.py``: its rows and its mistakes; the sides are made up."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from evmamba_jax.errors import UserError

ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "benchmarks/cpu_models.py"))


class Side:
    """Costs these seconds in turn."""

    def __init__(self, *seconds, fails=None):
        self.left, self.fails, self.closed = list(seconds), fails, False

    def cost(self):
        if self.fails:
            raise UserError(self.fails)
        seconds = self.left.pop(0)
        return {"seconds": seconds, "bytes": seconds * 2**30}

    def close(self):
        self.closed = True


def test_rows_compare_neighbours_in_time():
    ours, theirs, broken = Side(9, 1, 2, 4), Side(9, 3, 8, 8), Side(fails="does not run")

    def absent():
        raise UserError("is not there")

    sides = {"ours": ours, "theirs": theirs, "broken": broken}
    made = SCRIPT["rows"]({name: lambda side=side: side for name, side in sides.items()} | {"absent": absent}, 3)
    assert made == [
        ["ours", 2, None, None, 4],  # the first step warms up, and is not counted
        ["theirs", 8, 3, [2.5, 3.5], 8],  # ratios 3, 4 and 2
        ["broken", "does not run"],
        ["absent", "is not there"],
    ]
    assert ours.closed
    assert theirs.closed
    assert broken.closed


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--official", "."], "--official needs --torch"),
        (["--torch", "nowhere/python"], "--torch: nowhere/python cannot be run: No such file or directory"),
        (["--torch", "python", "--official", "configs"], "--official configs is no clone of one of the five families"),
    ],
)
def test_mistakes_are_one_line(given, words):
    done = subprocess.run(
        [sys.executable, "benchmarks/cpu_models.py", *given], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
