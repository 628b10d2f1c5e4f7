"""How sparsity grows with time."""

import math
from collections.abc import Callable

from evmamba_jax.errors import UserError

Schedule = Callable[[float], float]


def cosine(initial: float, final: float, begin: float, end: float) -> Schedule:
    """Return a schedule that goes from ``initial`` to ``final`` by half a cosine, slow at both ends.

    Args:
        initial: share of zeros before ``begin``.
        final: share of zeros from ``end`` on.
        begin: a time in any unit.
        end: a later time in the same unit.

    Returns:
        A function of the time, in float64.

    Raises:
        UserError: shares that are none or fall, times that do not rise.

    Source: the dynamic pruning of the course project that ``docs/experiments.md`` names.
    """
    return _between(initial, final, begin, end, lambda p: (1 - math.cos(math.pi * p)) / 2)


def cubic(initial: float, final: float, begin: float, end: float) -> Schedule:
    """Return a schedule that is fast at first and slow at last; arguments and errors as for :func:`cosine`.

    Source: Zhu and Gupta, To prune, or not to prune (arXiv:1710.01878).
    """
    return _between(initial, final, begin, end, lambda p: 1 - (1 - p) ** 3)


def _between(initial: float, final: float, begin: float, end: float, way: Callable[[float], float]) -> Schedule:
    if not 0 <= initial <= final <= 1:
        raise UserError(f"initial={initial:g} and final={final:g} must be shares from 0 to 1, the first not above")
    if not begin < end:
        raise UserError(f"begin={begin:g} must be before end={end:g}")

    def sparsity(t: float) -> float:
        if t < begin:
            return initial
        if t >= end:
            return final
        return initial + (final - initial) * way((t - begin) / (end - begin))

    return sparsity


SCHEDULES: dict[str, Callable[[float, float, float, float], Schedule]] = {"cosine": cosine, "cubic": cubic}
