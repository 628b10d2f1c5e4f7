"""Times of programs that take turns, so that whatever else the machine does meets all alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

Key = TypeVar("Key")


class Spread(NamedTuple):
    """What many measurements of one thing say.

    Attributes:
        median: of all.
        low: the first quartile.
        high: the third quartile.
    """

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles, each on the straight line between the two nearest of the values, sorted."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def take_turns(sides: Mapping[Key, Callable[[], float]], rounds: int) -> dict[Key, list[float]]:
    """Let every side measure once a round.

    Args:
        sides: each returns the seconds that it measured.
        rounds: how often all of them do so, one after the other.

    Returns:
        The seconds of each side, in the order of the rounds.
    """
    times: dict[Key, list[float]] = {key: [] for key in sides}
    for _ in range(rounds):
        for key, measure in sides.items():
            times[key].append(measure())
    return times


def seconds_of(run: Callable[[], None]) -> float:
    """Return the seconds that a program takes, which returns when it is done."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def steps_for(seconds: float, one: float, rounds: int, least: int = 3) -> tuple[int, int]:
    """Divide a time among rounds of several steps.

    Args:
        seconds: for all rounds.
        one: seconds of a step.
        rounds: how many there are where steps are short.
        least: how many there are at least, however long a step takes.

    Returns:
        Rounds, and steps a round.
    """
    rounds = max(least, min(rounds, int(seconds / one)))
    return rounds, max(1, round(seconds / rounds / one))


def waited(measure: Callable[[int], float], seconds: float, most: int = 200) -> Spread:
    """Return the seconds of single steps, each waited for: as many as fit a time, at least five.

    Args:
        measure: makes so many steps, and returns the mean seconds of one.
        seconds: for all of them.
        most: more steps are not made: a quartile of more says no more.
    """
    steps, _ = steps_for(seconds, warmed_up(measure), most, least=5)
    return spread([measure(1) for _ in range(steps)])


def warmed_up(measure: Callable[[int], float]) -> float:
    """Make a step, whatever it takes, and return the seconds of a second one; ``measure`` as for :func:`waited`."""
    measure(1)
    return measure(1)
