"""Recorded numbers of the experiments beside ours: ``python tests/experiments/recorded.py [DIR]``.

Prints a line a case, and at last how many are within their limits. ``JAX_ENABLE_X64=1`` compares in float64. The cases
of ``KIND.json`` and ``KIND.npz`` are those of the module ``recorded_KIND``, whose ``compare(folder, x64)`` yields
``Compared``.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from recorded_cases import Compared  # noqa: E402

SHARED = HERE.parents[2] / "shared" / "experiments"
KINDS = ("course_vim", "ops", "s5", "pruning")


def compared(folder: Path) -> Iterator[Compared]:
    """Yield the comparison of each case of a folder that is nearest to its limit, or furthest beyond."""
    for kind in KINDS:
        worst: dict[str, Compared] = {}
        if not (folder / f"{kind}.json").exists():
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
