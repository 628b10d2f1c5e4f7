"""What recorded numbers and ours are compared by, in ``experiments/recorded.py`` and ``dense/recorded.py``."""

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np


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


def worst_of(folder: Path, kinds: Mapping[str, str]) -> Iterator[Compared]:
    """Yield the comparison of each case of a folder that is nearest to its limit, or furthest beyond.

    Args:
        folder: of recorded files.
        kinds: the kinds, whose modules ``recorded_KIND`` compare, with the pattern of the files that have their cases.
    """
    for kind, file in kinds.items():
        worst: dict[str, Compared] = {}
        if not any(folder.glob(f"{file}.json")):
            continue
        module = importlib.import_module(f"recorded_{kind}")
        for one in module.compare(folder, bool(jax.config.jax_enable_x64)):
            known = worst.get(one.case)
            if known is None or not one.difference / one.limit <= known.difference / known.limit:
                worst[one.case] = one
        yield from worst.values()
