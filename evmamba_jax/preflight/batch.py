"""The largest batch that fits, from as few compilations as possible."""

from collections.abc import Callable

_TRIES = 8  # a straight line through two results usually needs four or five


def largest_batch(
    needed: Callable[[int], float], *, start: int, granule: int, available: float
) -> tuple[int, int | None, dict[int, float]]:
    """Search for the largest batch of a device whose step fits its memory.

    Memory grows about linearly with the batch, so each guess is read off the line through the two nearest results.

    Args:
        needed: compiles for a batch and returns the bytes it needs; ``inf`` where the compiler refuses without saying.
        start: the batch to begin with.
        granule: the search goes in multiples of this.
        available: bytes of a device.

    Returns:
        The largest batch found to fit (0: none), the smallest found not to (None: none), and all results.
    """
    results: dict[int, float] = {}
    fits, fails = 0, None
    guess = max(1, start // granule)
    for _ in range(_TRIES):
        results[guess * granule] = need = needed(guess * granule)
        if need <= available:
            fits = max(fits, guess)
        else:
            fails = guess if fails is None else min(fails, guess)
        if fails is not None and fails - fits <= 1:
            break
        guess = _guess(results, granule, available)
        if fails is None:
            guess = min(max(guess, fits + 1), 8 * fits)  # no leap too far on too little
        elif not fits < guess < fails:
            # A line that just misses means a neighbour of what is known; one far off does not hold: take the middle.
            nearest = min(max(guess, fits + 1), fails - 1)
            guess = nearest if abs(nearest - guess) <= 1 else (fits + fails) // 2
    return fits * granule, None if fails is None else fails * granule, results


def _guess(results: dict[int, float], granule: int, available: float) -> int:
    """Return the number of granules at which a line through known results meets the available memory."""
    known = sorted((batch, need) for batch, need in results.items() if need != float("inf"))
    if len(known) >= 2:
        known.sort(key=lambda point: abs(point[1] - available))
        (b0, n0), (b1, n1) = known[:2]
        if n1 != n0 and (n1 - n0) / (b1 - b0) > 0:
            return int((b0 + (available - n0) * (b1 - b0) / (n1 - n0)) // granule)
    if known:
        batch, need = known[0]
        return int(batch * available / need // granule)
    return min(results) // granule // 2
