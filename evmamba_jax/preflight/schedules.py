"""Read a TPU kernel's cycles from the compiler's schedule, which ``aot.prepare(folder)`` has libtpu write down.

Nothing ran, so whatever is read here is the compiler's estimate. Memory, spills and loads on the units are facts of the
program; times are not checked on hardware, and waiting for memory is not in them.
"""

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from evmamba_jax.preflight.aot import GENERATIONS, LOADS, TIMELINE, Generation


@dataclasses.dataclass(frozen=True)
class Loop:
    """One loop of a kernel.

    Attributes:
        depth: 0 for the outermost.
        trips: how often its body runs each time it is entered; None where neither dump nor caller say.
        is_grid: whether it is the loop over the grid that Pallas makes.
        rows: rows of the timeline, one a cycle, stalls included, without those of inner loops.
        predicated: those of ``rows`` that a condition guards (``pl.when``); they are counted as run every time.
        cycles: of all runs of these rows; a loop of unknown trips counts as one.
        loads: share of each unit's slots that these rows fill, 0 to 1.
        spills, fills: registers written to and read from memory in one run of these rows.
    """

    depth: int
    trips: float | None
    is_grid: bool
    rows: int
    predicated: int
    cycles: float
    loads: dict[str, float]
    spills: int
    fills: int

    @property
    def busiest(self) -> tuple[str, float]:
        """The unit with the highest load, and its load."""
        return max(self.loads.items(), key=lambda item: item[1], default=("none", 0.0))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the compiler's schedule says about a kernel: estimates, all of them.

    Attributes:
        kernel: the ``name`` of its ``pallas_call``.
        generation: what it was compiled for.
        grid: steps along each axis; on v4 and v5p those of one of the two cores that share the work.
        rows: length of the timeline.
        cycles: static cycles of a call: every row as often as its loops run, without waiting for memory.
        vmem_bytes: on-chip vector memory, double buffers and spilled registers included.
        loops: from the first to the last, each outer loop before its inner ones.
    """

    kernel: str
    generation: Generation
    grid: tuple[int, ...]
    rows: int
    cycles: float
    vmem_bytes: int
    loops: tuple[Loop, ...]

    @property
    def seconds(self) -> float:
        """Estimated time of a call that never waits for memory."""
        return self.cycles / self.generation.clock

    @property
    def is_complete(self) -> bool:
        """Whether the trips of every loop are known."""
        return all(loop.trips is not None for loop in self.loops)

    def __str__(self) -> str:
        bound = "" if self.is_complete else "at least "
        lines = [
            f"{self.kernel} on {self.generation.name} (estimate): {bound}{self.cycles:,.0f} cycles, "
            f"{self.seconds * 1e3:.3f} ms at {self.generation.clock / 1e9:.2f} GHz; "
            f"VMEM {self.vmem_bytes / 2**20:.2f} MiB; grid {'x'.join(map(str, self.grid))}"
        ]
        for number, loop in enumerate(self.loops):
            unit, load = loop.busiest
            lines.append(
                f"  {'  ' * loop.depth}loop {number}{' (grid)' if loop.is_grid else ''}: "
                f"{'?' if loop.trips is None else format(loop.trips, 'g')} x {loop.rows} rows "
                f"({loop.predicated} predicated), {loop.cycles:,.0f} cycles; {unit} {load:.0%}; "
                f"spills {loop.spills}, fills {loop.fills}"
            )
        return "\n".join(lines)


def files(dump_folder: str | os.PathLike[str], *, of_last_program: bool = False) -> dict[str, tuple[Path, Path | None]]:
    """Return the two files, timeline and loads, of everything scheduled in a dump folder.

    A call's number (``.1``) is part of its name; of what was compiled several times under one name, the last counts.

    Args:
        dump_folder: the folder.
        of_last_program: leave out what belongs to programs that were compiled before the last one.
    """
    folder = Path(dump_folder)
    # TIME-NAME-PASS-label.txt; the first that a program writes is its control, "TLP", and "<...>".
    pattern = re.compile(rf"(\d+)-(.+)-\d+-({TIMELINE}|{LOADS})\.txt")
    found = [match for file in (os.listdir(folder) if folder.is_dir() else ()) if (match := pattern.fullmatch(file))]
    began = max((int(match[1]) for match in found if match[2] == "TLP"), default=0) if of_last_program else 0
    newest: dict[str, tuple[int, dict[str, Path]]] = {}
    for match in found:
        time, name = int(match[1]), match[2]
        if time < began or name.startswith(("<", "TLP")):
            continue
        if name not in newest or newest[name][0] < time:
            newest[name] = time, {}
        if newest[name][0] == time:
            newest[name][1][match[3]] = folder / match[0]
    return {name: (both[TIMELINE], both.get(LOADS)) for name, (_, both) in newest.items() if TIMELINE in both}


def read(
    dump_folder: str | os.PathLike[str],
    kernel: str,
    generation: str,
    *,
    trips: Mapping[int, float] | None = None,
) -> Schedule:
    """Read the schedule of a kernel that was compiled after ``aot.prepare(dump_folder)``.

    Args:
        dump_folder: the folder.
        kernel: the ``name`` of its ``pallas_call``; where it was compiled several times, the last one counts.
        generation: what it was compiled for.
        trips: trips of loops, by their number in ``Schedule.loops``: for a loop whose bound is not a constant (its
            trips are None without), or the mean of a loop that a condition guards, such as 0.25.

    Returns:
        The schedule.

    Raises:
        FileNotFoundError: there is no such kernel in the folder.
        ValueError: an unknown generation, trips of a loop that is not there, or a format this reader does not know.
    """
    known = files(dump_folder)
    # XLA numbers the calls of one name.
    found = [name for name in known if re.fullmatch(rf"{re.escape(kernel)}(\.\d+)?", name)]
    if not found:
        there = ", ".join(sorted(known)[:20]) if os.path.isdir(dump_folder) else "no such folder"
        raise FileNotFoundError(
            f"no schedule of {kernel!r} in {dump_folder} (there are: {there or 'none'}); was aot.prepare called with "
            "this folder before the first compilation?"
        )
    last = max(found, key=lambda name: int(known[name][0].name.partition("-")[0]))
    return read_files(kernel, known[last], generation, trips=trips)


def read_files(
    kernel: str, both: tuple[Path, Path | None], generation: str, *, trips: Mapping[int, float] | None = None
) -> Schedule:
    """Read a schedule from its two files, as :func:`files` names them; all else is as for :func:`read`."""
    if generation not in GENERATIONS:
        raise ValueError(f"unknown generation {generation!r}; allowed: {', '.join(GENERATIONS)}")
    timeline, loads = both
    try:
        if loads is None:
            raise _Unknown("the loads on its units are missing")
        return _schedule(
            kernel,
            GENERATIONS[generation],
            _read_timeline(timeline.read_text(errors="replace")),
            _read_loads(loads.read_text()),
            trips or {},
        )
    except _Unknown as error:
        raise ValueError(
            f"{timeline} is not written as by libtpu 0.0.42 to 0.0.52, which is what can be read: {error}"
        ) from error


def guarded(schedule: Schedule) -> dict[int, float]:
    """Return the trips of the loops that a scan kernel guards, by their number, for another reading.

    The kernels guard loops by the block of channels alone: the first block clears what all blocks add to, and the last
    one sums it. So a guarded loop runs in one of so many steps of the grid as its last axis has.
    """
    return {
        number: loop.trips / schedule.grid[-1]
        for number, loop in enumerate(schedule.loops)
        if loop.depth == 1 and loop.predicated == loop.rows and loop.trips is not None
    }


class _Unknown(Exception):
    """Something in a dump that the reader does not know."""


_LEAD = 8  # trips by which a pipeline's loop may exceed its grid; with double buffers it is 2


@dataclasses.dataclass
class _Region:
    """A stretch of a timeline."""

    parent: "_Region | None"
    indent: int
    role: str  # pred_region, loop_body, ...
    start: int = 0
    end: int = -1  # not known
    trips: float | None = None  # of a loop_body: its constant number of trips
    grid: tuple[int, ...] = ()  # of a loop_body: the grid that Pallas walks in it

    def within(self, other: "_Region") -> bool:
        return self is other or (self.parent is not None and self.parent.within(other))


def _read_timeline(text: str) -> tuple[list[_Region], tuple[int, ...], int]:
    """Return the regions in order, the outermost first; the kernel's grid; and its VMEM in bytes."""
    regions: list[_Region] = []
    stack: list[_Region] = []  # the regions that the present line lies in
    counted: list[tuple[_Region, int]] = []  # "loop: ..." lines: the region they lie in, and their trips
    grid: tuple[int, ...] = ()
    vmem = 0
    for line in text.splitlines():
        body = line.lstrip()
        indent = len(line) - len(body)
        if body.startswith(("$region", "loop: ", "// region range", "#allocation", "%")):
            while stack and stack[-1].indent >= indent:
                stack.pop()
        if body.startswith("$region"):
            role = body.rpartition(" // ")[2] if " // " in body else ""
            region = _Region(stack[-1] if stack else None, indent, role)
            if role == "loop_body" and counted and counted[-1][0] is region.parent:
                region.trips = counted.pop()[1]
            regions.append(region)
            stack.append(region)
        elif match := re.fullmatch(r"// region range: \[(\d+), (\d+)\)", body):
            stack[-1].start, stack[-1].end = int(match[1]), int(match[2])
        elif match := re.fullmatch(r"loop: start=(-?\d+), step=(-?\d+), limit=(-?\d+)", body):
            start, step, limit = map(int, match.groups())
            counted.append((stack[-1], max(0, -((start - limit) // step))))
        elif match := re.match(r"#allocation.* space=vmem, size = (\w+), offset = (\w+),", body):
            vmem = max(vmem, int(match[1], 16) + int(match[2], 16))
        elif match := re.fullmatch(r"iteration_bounds: \(([\d, ]+)\)", line):
            bounds = tuple(map(int, match[1].split(",")))
            grid = grid or bounds
            loop = next((region for region in reversed(stack) if region.role == "loop_body"), None)
            # Windows are fetched ahead of the body, so the loop makes a few more trips than the grid has steps.
            if loop and loop.trips is not None and 0 < loop.trips - math.prod(bounds) <= _LEAD:
                loop.grid = bounds
    if not regions or regions[0].end < 0:
        raise _Unknown("it lists no regions with their rows")
    return regions, grid, vmem


def _read_loads(text: str) -> tuple[list[str], list[int], np.ndarray]:
    """Return the units, the instructions a row that each takes, and how many each row (first axis) gives it."""
    lines = text.splitlines()
    heads = [number for number, line in enumerate(lines) if line.startswith("==")]
    if len(heads) != 2 or heads[1] != heads[0] + 3:
        raise _Unknown("the loads on its units have another heading")
    units = [unit.strip() for unit in lines[heads[0] + 1].split(",")]
    rows = [list(map(int, line.split())) for line in lines[heads[1] + 1 :] if line.strip()]
    if any(len(row) != len(units) for row in rows):
        raise _Unknown("the loads on its units have another number of columns than of units")
    return units, list(map(int, lines[heads[0] + 2].split())), np.array(rows)


def _loops(regions: list[_Region]) -> list[tuple[_Region, range]]:
    """Return every loop's body and the rows of one trip, up to the delay slots of the branch back."""
    loops = []
    for number, body in enumerate(regions):
        if body.role == "loop_body":
            back = (r for r in regions[number:] if r.role == "loop_header_branch" and r.parent is body.parent)
            branch = next(back, None)
            if branch is None:
                raise _Unknown("a loop has no branch back")
            loops.append((body, range(body.start, branch.end)))
    return loops


def _predicated(regions: list[_Region]) -> set[int]:
    """Return the rows in loops that a condition guards, but for that by which a pipeline skips its body at first."""
    rows: set[int] = set()
    for before, region in itertools.pairwise(regions):
        in_loop = any(region.within(body) for body in regions if body.role == "loop_body")
        if region.role == "pred_region" and in_loop and not (region.parent and region.parent.grid):
            rows.update(range(max(region.start, before.end), region.end))  # what comes before has the branch
    return rows


def _schedule(
    kernel: str,
    generation: Generation,
    timeline: tuple[list[_Region], tuple[int, ...], int],
    loads: tuple[list[str], list[int], np.ndarray],
    trips: Mapping[int, float],
) -> Schedule:
    """Weigh each row of the timeline with the trips of the loops around it."""
    regions, grid, vmem = timeline
    units, capacity, table = loads
    loops = _loops(regions)
    predicated = _predicated(regions)
    unknown = set(trips) - set(range(len(loops)))
    if unknown:
        raise ValueError(f"trips are given for loop {min(unknown)}, but {kernel} has {len(loops)} loops")

    total = regions[0].end
    inner = [set(rows) for _, rows in loops]
    for outer, (body, _) in enumerate(loops):
        for other, (child, rows) in enumerate(loops):
            if other != outer and child.within(body):
                inner[outer] -= set(rows)
    found = []
    cycles = float(total - len(set().union(*(rows for _, rows in loops)) if loops else set()))
    for number, (body, _) in enumerate(loops):
        around = [n for n, (other, _) in enumerate(loops) if other is not body and body.within(other)]
        counts = {
            n: trips.get(n, math.prod(loops[n][0].grid) if loops[n][0].grid else loops[n][0].trips)
            for n in (*around, number)
        }
        times = math.prod(1 if count is None else count for count in counts.values())
        own = sorted(row for row in inner[number] if row < len(table))
        used = dict(zip(units, table[own].sum(0).tolist() if own else [0] * len(units), strict=True))
        found.append(
            Loop(
                depth=len(around),
                trips=counts[number],
                is_grid=bool(body.grid),
                rows=len(inner[number]),
                predicated=len(inner[number] & predicated),
                cycles=times * len(inner[number]),
                loads={
                    unit: used[unit] / (slots * max(1, len(own)))
                    for unit, slots in zip(units, capacity, strict=True)
                    if ":" not in unit
                },
                spills=used.get("VSTORE:SPILL", 0),
                fills=used.get("VLOAD:FILL", 0),
            )
        )
        cycles += found[-1].cycles
    return Schedule(kernel, generation, grid or (1,), total, cycles, vmem, tuple(found))
