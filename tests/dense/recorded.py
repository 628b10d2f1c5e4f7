"""Recorded numbers of official detectors and segmenters beside ours: ``python tests/dense/recorded.py [DIR]``.

Prints a line a case, then what there is no model for yet, and at last how many cases are within their limits.
``JAX_ENABLE_X64=1`` compares in float64, labels, indices and matches too. The module ``recorded_KIND`` compares what is
recorded in the files of that kind; its ``compare(folder, x64)`` yields ``Compared``.
"""

import fnmatch
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from recorded_cases import worst_of  # noqa: E402

SHARED = HERE.parents[2] / "shared" / "dense"
# With the files that have the kind's cases.
KINDS = {
    "retinanet": "retinanet",
    "maskrcnn": "maskrcnn",
    "cascade": "cascade",
    "vimdet": "vimdet",
    "whole": "whole_*",
    "upernet": "upernet",
    "detection_ops": "ops",
    "segmentation_ops": "ops",
}


def left_out(folder: Path, cases: set[str]) -> list[str]:
    """Return the files of a folder, and the cases of ``ops``, of which nothing is among the compared ``cases``."""
    files = sorted(path.stem for path in folder.glob("*.json"))
    missing = [file for file in files if not any(fnmatch.fnmatch(file, kind) for kind in KINDS.values())]
    if "ops" in files:
        missing += [case for case in json.loads((folder / "ops.json").read_text())["cases"] if case not in cases]
    return missing


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SHARED
    cases = list(worst_of(folder, KINDS))
    for case, what, difference, limit in cases:
        print(f"{'ok  ' if difference <= limit else 'WRONG'} {case}: {what} {difference:.1e}, limit {limit:.0e}")
    missing = left_out(folder, {one.case for one in cases})
    for case in missing:
        print(f"left out: {case}")
    right = sum(one.difference <= one.limit for one in cases)
    print(f"{right} of {len(cases)} cases within limits, {len(missing)} left out")
    return int(right < len(cases))


if __name__ == "__main__":
    sys.exit(main())
