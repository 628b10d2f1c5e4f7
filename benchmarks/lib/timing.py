"""Times of programs that take turns, and of steps that do not wait for one another."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from evmamba_jax.measuring.rounds import seconds_of, take_turns


def interleaved(programs: Mapping[Any, Callable[[], None]], runs: int) -> dict[Any, float]:
    """Return the median seconds of programs that return when they are done; rounds of all of them, ``runs`` times.

    Each timed run follows an untimed one of the same program, so that none pays for the caches and pages of another.
    """

    def second(run: Callable[[], None]) -> float:
        run()
        return seconds_of(run)

    sides = {key: functools.partial(second, run) for key, run in programs.items()}
    return {key: statistics.median(times) for key, times in take_turns(sides, runs).items()}


def groups(
    step: Callable[[], None], wait: Callable[[], None], *, warm_up: int, size: int, runs: int, reset=lambda: None
) -> list[float]:
    """Return the mean seconds of a step in each group of ``size``; steps of a group do not wait for one another."""
    for _ in range(warm_up):
        step()
    wait()
    reset()
    times = []
    for _ in range(max(1, runs // size)):
        began = time.perf_counter()
        for _ in range(size):
            step()
        wait()
        times.append((time.perf_counter() - began) / size)
    return times
