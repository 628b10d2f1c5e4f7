"""The benchmarks' results are data: the Markdown beside it is what the data says."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_markdown_is_rendered_from_the_data():
    done = subprocess.run(
        [sys.executable, "benchmarks/render.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr


def test_scripts_find_the_configs():
    """Those that import them, started as they are printed, have imported ``lib`` before."""
    importing = re.compile(r"^from lib|^ *from configs", re.MULTILINE)
    users = [path for path in (ROOT / "benchmarks").glob("*.py") if "from configs" in path.read_text()]
    assert users
    for path in users:
        assert importing.findall(path.read_text())[0] == "from lib", path.name
    code = (
        "import sys; sys.path[0] = 'benchmarks'; import lib, importlib.util as u; u.find_spec('configs.digits').origin"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
