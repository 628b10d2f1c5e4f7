"""Recorded numbers of official detectors and segmenters beside ours: ``python tests/dense/recorded.py [DIR]``.

Prints a line a case, and at last how many are within their limits. ``JAX_ENABLE_X64=1`` compares in float64. The module
``recorded_KIND`` compares what is recorded in the files of that kind; its ``compare(folder, x64)`` yields
:class:`Compared`.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "dense"
KINDS = {"upernet": "upernet", "segmentation_ops": "ops"}  # with the file that has the kind's cases


class Compared(NamedTuple):
    """A comparison: of which case, of what, the largest difference over the rms, and what is allowed."""

    case: str
    what: str
    difference: float
    limit: float


def difference(ours: Any, wanted: np.ndarray, *, relative: bool = True) -> float:
    """Return the largest difference of two arrays over the rms of the second; infinite if the shapes differ."""
    ours = np.asarray(ours, np.float64)
    if ours.shape != wanted.shape:
        return np.inf
    largest = np.abs(ours - wanted).max(initial=0)
    rms = np.sqrt(np.square(wanted).mean()) if relative else 1
    return float(largest / rms if rms > 1e-12 else largest)  # zero in theory too


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


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SHARED
    cases = list(compared(folder))
    for case, what, difference, limit in cases:
        print(f"{'ok  ' if difference <= limit else 'WRONG'} {case}: {what} {difference:.1e}, limit {limit:.0e}")
    right = sum(one.difference <= one.limit for one in cases)
    print(f"{right} of {len(cases)} cases within limits")
    return int(right < len(cases))


if __name__ == "__main__":
    sys.exit(main())
