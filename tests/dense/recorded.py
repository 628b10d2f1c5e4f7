"""Recorded numbers of official detectors and segmenters beside ours: ``python tests/dense/recorded.py [DIR]``.

Prints a line a case, then what there is no model for yet, and at last how many cases are within their limits.
``JAX_ENABLE_X64=1`` compares in float64, labels, indices and matches too. The module ``recorded_KIND`` compares what is
recorded in the files of that kind; its ``compare(folder, x64)`` yields :class:`Compared`.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "dense"
# With the file that has the kind's cases.
KINDS = {"retinanet": "retinanet", "upernet": "upernet", "detection_ops": "ops", "segmentation_ops": "ops"}


class Compared(NamedTuple):
    """A comparison: of which case, of what, the largest difference over the rms, and what is allowed."""

    case: str
    what: str
    difference: float
    limit: float


def difference(ours: Any, wanted: np.ndarray, *, relative: bool = True, rms: float | None = None) -> float:
    """Return the largest difference of two arrays over the rms of the second; infinite if the shapes differ.

    Args:
        ours: an array.
        wanted: the recorded one.
        relative: False returns the difference itself.
        rms: of the array that ``wanted`` is a part of; None for its own.
    """
    ours = np.asarray(ours, np.float64)
    if ours.shape != wanted.shape:
        return np.inf
    largest = np.abs(ours - wanted).max(initial=0)
    if rms is None:
        rms = np.sqrt(np.square(wanted).mean()) if relative and wanted.size else 1
    return float(largest / rms if rms > 1e-12 else largest)  # zero in theory too


def discrete(case: str, what: str, ours: Any, wanted: np.ndarray) -> Compared:
    """Return the comparison of two arrays of integers or booleans: how many entries differ, of which none may."""
    ours = np.asarray(ours)
    differing = float((ours != wanted).sum()) if ours.shape == wanted.shape else np.inf
    return Compared(case, what, differing, 0.5)


def compared(folder: Path) -> Iterator[Compared]:
    """Yield the comparison of each case of a folder that is nearest to its limit, or furthest beyond."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    for kind, file in KINDS.items():
        worst: dict[str, Compared] = {}
        if not (folder / f"{file}.json").exists():
            continue
        module = importlib.import_module(f"recorded_{kind}")
        for one in module.compare(folder, bool(jax.config.jax_enable_x64)):
            known = worst.get(one.case)
            if known is None or not one.difference / one.limit <= known.difference / known.limit:
                worst[one.case] = one
        yield from worst.values()


def left_out(folder: Path, cases: set[str]) -> list[str]:
    """Return the files of a folder, and the cases of ``ops``, of which nothing is among the compared ``cases``."""
    files = sorted(path.stem for path in folder.glob("*.json"))
    missing = [file for file in files if file not in KINDS.values()]
    if "ops" in files:
        missing += [case for case in json.loads((folder / "ops.json").read_text())["cases"] if case not in cases]
    return missing


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SHARED
    cases = list(compared(folder))
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
