"""Render the Markdown of ``results/`` from the JSON beside it, or check that it is so.

python benchmarks/render.py [--check]
"""

import argparse
import json
import sys
from pathlib import Path

from evmamba_jax.measuring.document import markdown, to_json

RESULTS = Path(__file__).parent / "results"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; say what differs")
    options = parser.parse_args()
    texts = {}
    for path in sorted(RESULTS.glob("*.json")):
        document = json.loads(path.read_text())
        texts |= {path: to_json(document), path.with_suffix(".md"): markdown(document)}
    present = {path: path.read_text() for suffix in ("json", "md") for path in RESULTS.glob(f"*.{suffix}")}
    different = sorted(path for path in texts.keys() | present.keys() if texts.get(path) != present.get(path))
    if options.check and different:
        names = ", ".join(path.name for path in different)
        sys.exit(f"{names} in {RESULTS}: not what the JSON says; python benchmarks/render.py writes it")
    for path in different:
        if path in texts:
            path.write_text(texts[path])


if __name__ == "__main__":
    main()
