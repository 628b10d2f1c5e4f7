"""The least time of a training step on one device of a TPU generation.

Four limits are counted for every part of the step (``parts.py``), each for itself and at its best:

- **matrix unit**: multiply-adds of matrix products and convolutions at the published bfloat16 peak, gradients included.
- **memory**: the bytes that must move, at the share of the published bandwidth that ``clock.py`` counts on.
- **vector units**: four registers of 1024 elements a cycle. Two bfloat16 numbers in the place of one, which a v6e can
  compute with, are not counted on.
- **exponential unit**: one register a cycle.

What a step has to do is counted in ``work.py``. The scans are kernels apart: each takes the longest of its own limits
(:class:`ScanFloor`), its memory included, and kernels do not overlap with the rest. So a part takes its kernels' time
and the longest of the four times of its rest, and the step the sum of its parts.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from evmamba_jax.preflight.aot import Generation
from evmamba_jax.preflight.clock import bandwidth
from evmamba_jax.preflight.kernels import Scan
from evmamba_jax.preflight.parts import PARTS
from evmamba_jax.preflight.work import Work

REGISTER = 1024  # elements of 4 bytes
VECTOR_UNITS = 4  # operations a cycle

# Operations of a scan for each token and channel: so many for each state, and so many besides. Forward: the exponent,
# its scaling, decay, input, their sum, output, its sum; besides 6 for the time step's softplus. Backward, as the kernel
# has them: 5 of these again, and 14 on the way back, decays kept. Besides, 6 for the step size, 5 to unpack u twice and
# dy, and for dt u twice, 4 for the slope of softplus, and for the gradients 3 of the step size, 1 of its bias, 2 of u.
SCAN_VECTOR = {"forward": (7, 6), "backward": (5 + 14, 6 + 5 + 4 + 3 + 1 + 2)}
# Of the exponential unit: a power for each state; for softplus a power and a logarithm, for its slope a power.
SCAN_EXPONENTIAL = {"forward": (1, 2), "backward": (1, 3)}

LIMITS = ("matrix", "memory", "vector", "exponential")


def hbm_seconds(moved: float, generation: Generation) -> float:
    """Return how long a JAX device takes to move bytes from and to HBM."""
    return moved / bandwidth(generation)


def _vector_rate(generation: Generation) -> float:
    """Return the elements that one unit of a JAX device computes in a second."""
    return REGISTER * generation.cores_per_device * generation.clock


@dataclasses.dataclass(frozen=True)
class ScanFloor:
    """The least time of a pass of fused scans, in seconds, by each of three limits of one JAX device.

    Attributes:
        bytes: of HBM: x and y once, projections (float32) once; backward: x, dy and dx once, projections read and their
            gradients written.
        hbm: seconds for these.
        exponentials: seconds of the exponential unit.
        vector: seconds of the vector units; what a token costs besides its channels is not in it.
    """

    bytes: int
    hbm: float
    exponentials: float
    vector: float

    @classmethod
    def of(cls, scans: Sequence[Scan], generation: Generation, direction: str, *, itemsize: int = 2) -> "ScanFloor":
        """Return the floor of scans of images of ``itemsize`` bytes a number, ``forward`` or ``backward``."""

        def operations(counts: dict[str, tuple[int, int]]) -> int:
            for_each, besides = counts[direction]
            return sum(s.batch * s.visits * s.channels * (for_each * s.state + besides) for s in scans)

        images = sum(itemsize * s.batch * s.height * s.width * s.channels for s in scans)
        packed = sum(4 * s.batch * s.visits * (s.rank + 2 * s.state) for s in scans)
        moved = 2 * images + packed if direction == "forward" else 3 * images + 2 * packed
        rate = _vector_rate(generation)
        return cls(
            bytes=moved,
            hbm=hbm_seconds(moved, generation),
            exponentials=operations(SCAN_EXPONENTIAL) / rate,
            vector=operations(SCAN_VECTOR) / (VECTOR_UNITS * rate),
        )

    @property
    def binding(self) -> tuple[str, float]:
        """The limit that holds, and its time."""
        limits = {"HBM": self.hbm, "exponentials": self.exponentials, "vector": self.vector}
        return max(limits.items(), key=lambda limit: limit[1])


@dataclasses.dataclass(frozen=True)
class Floor:
    """The least time of a part of a step, in seconds.

    Attributes:
        kernels: of its scans.
        limits: of the rest, by the names of ``LIMITS``.
    """

    kernels: float
    limits: dict[str, float]

    @property
    def limit(self) -> str:
        """The longest of the limits."""
        return max(self.limits, key=self.limits.__getitem__)

    @property
    def seconds(self) -> float:
        """The kernels, and after them the longest of the limits."""
        return self.kernels + self.limits[self.limit]

    @property
    def set_by(self) -> str:
        """What takes most of it: ``kernels``, or the name of a limit."""
        return "kernels" if self.kernels > self.limits[self.limit] else self.limit


def floors(work: dict[str, Work], generation: Generation) -> dict[str, Floor]:
    """Return the floor of each part of a step, from what :func:`evmamba_jax.preflight.work.count` says of it."""
    return {part: _floor(one, generation) for part, one in work.items()}


def _floor(work: Work, generation: Generation) -> Floor:
    rate = _vector_rate(generation)
    kernels = sum(
        call.times * ScanFloor.of([call.scan], generation, call.direction, itemsize=call.itemsize).binding[1]
        for call in work.scans
    )
    seconds = (
        work.macs / (generation.macs * generation.cores_per_device * generation.clock),
        hbm_seconds(work.bytes, generation),
        work.vector / (VECTOR_UNITS * rate),
        work.exponential / rate,
    )
    return Floor(kernels, dict(zip(LIMITS, seconds, strict=True)))


class Compared(NamedTuple):
    """What a part of a step takes, in seconds, its floor, and what sets that; empty where there is no floor."""

    part: str
    seconds: float
    floor: float
    set_by: str

    @property
    def ratio(self) -> float | None:
        """The time over its floor."""
        return self.seconds / self.floor if self.floor else None


def compare(times: Iterable[Mapping[str, Any]], least: Mapping[str, Floor]) -> list[Compared]:
    """Return the time of each part of a step beside its floor, and at last the whole step's, "all".

    Args:
        times: of instructions, each with its ``part`` and ``seconds`` (:class:`evmamba_jax.preflight.clock.Timed`).
        least: the floors of the parts.
    """
    seconds: dict[str, float] = collections.defaultdict(float)
    for item in times:
        seconds[item["part"]] += item["seconds"]
    rows = []
    for part in PARTS:
        floor = least.get(part)
        if floor or part in seconds:
            taken = seconds[part]
            rows.append(Compared(part, taken, floor.seconds, floor.set_by) if floor else Compared(part, taken, 0.0, ""))
    set_by: dict[str, float] = dict.fromkeys(("kernels", *LIMITS), 0.0)
    for floor in least.values():
        set_by["kernels"] += floor.kernels
        set_by[floor.limit] += floor.limits[floor.limit]
    whole = sum(row.seconds for row in rows), sum(row.floor for row in rows)
    return [*rows, Compared("all", *whole, max(set_by, key=set_by.__getitem__))]
