"""Recorded numbers of the experiments beside ours: ``python tests/experiments/recorded.py [DIR]``.

Prints a line a case, and at last how many are within their limits. ``JAX_ENABLE_X64=1`` compares in float64. The cases
of ``KIND.json`` and ``KIND.npz`` are those of the module ``recorded_KIND``, whose ``compare(folder, x64)`` yields
``Compared``.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from recorded_cases import worst_of  # noqa: E402

SHARED = HERE.parents[2] / "shared" / "experiments"
KINDS = ("course_vim", "ops", "s5", "pruning")


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SHARED
    cases = list(worst_of(folder, {kind: kind for kind in KINDS}))
    for case, what, difference, limit in cases:
        print(f"{'ok  ' if difference <= limit else 'WRONG'} {case}: {what} {difference:.1e}, limit {limit:.0e}")
    right = sum(one.difference <= one.limit for one in cases)
    print(f"{right} of {len(cases)} cases within limits")
    return int(right < len(cases))


if __name__ == "__main__":
    sys.exit(main())
