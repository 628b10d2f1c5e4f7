"""Recorded numbers of the experiments beside ours: ``python tests/experiments/recorded.py [DIR]``.

Prints a line a case, and at last how many are within their limits. ``JAX_ENABLE_X64=1`` compares in float64. A kind of
case is a module of this folder with ``compare(folder, x64)``, which yields :class:`Compared`.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "experiments"
KINDS = ("recorded_course_vim", "recorded_ops", "recorded_s5", "recorded_pruning")


class Compared(NamedTuple):
    """A comparison: of which case, of what, the largest difference over the rms, and what is allowed."""

    case: str
    what: str
    difference: float
    limit: float


def compared(folder: Path) -> Iterator[Compared]:
    """Yield the comparison of each case of a folder that is nearest to its limit, or furthest beyond."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    for kind in KINDS:
        worst: dict[str, Compared] = {}
        for one in importlib.import_module(kind).compare(folder, bool(jax.config.jax_enable_x64)):
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
