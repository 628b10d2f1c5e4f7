"""The benchmarks' results are data: the Markdown beside it is what the data says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_markdown_is_rendered_from_the_data():
    done = subprocess.run(
        [sys.executable, "benchmarks/render.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
