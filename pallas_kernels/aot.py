"""Compile for TPUs that are not there, and read a kernel's cycles from the compiler's schedule.

libtpu holds the whole TPU compiler and needs no TPU: JAX lowers for the devices of a described topology, and libtpu
compiles, refuses what does not fit, and on request writes down the schedule of every kernel. Nothing runs, so whatever
is read here is the compiler's estimate. What compiles, memory, spills and loads on the units are facts of the program;
times are not checked on hardware, and waiting for memory is not in them.

    aot.prepare("dump")                              # first: libtpu reads its options when it is loaded
    compiled = aot.compile_for("v5e", kernel, jax.ShapeDtypeStruct((784, 16, 128), "float32"))
    print(aot.schedule("dump", "name_of_the_pallas_call", "v5e"))
"""

import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
    """What Google publishes about a kind of TPU; all per chip unless said otherwise.

    Attributes:
        name: as in a topology's name.
        hbm_bytes: memory.
        available: bytes of it that the compiler lets a program have on one JAX device.
        hbm_bandwidth: bytes/s to and from it.
        bf16_flops: peak multiply-adds in bfloat16, counted as two operations each, 1/s.
        vmem_bytes: on-chip vector memory of one TensorCore.
        macs: bfloat16 multiply-adds a cycle of one TensorCore's matrix units.
        cores: TensorCores a chip.
        cores_per_device: TensorCores of one JAX device; v4 and v5p join two ("megacore").
        counts_cores: whether the number in a topology's name counts TensorCores instead of chips.
        ici_bandwidth: bytes/s of one chip to all its neighbours, both directions together.
        largest: chips of the largest slice.
    """

    name: str
    hbm_bytes: int
    available: int
    hbm_bandwidth: float
    bf16_flops: float
    vmem_bytes: int
    macs: int
    cores: int
    cores_per_device: int
    counts_cores: bool
    ici_bandwidth: float
    largest: int

    @property
    def clock(self) -> float:
        """Cycles a second, which are not published: the peak over what the matrix units do in a cycle."""
        return self.bf16_flops / (2 * self.macs * self.cores)

    @property
    def devices_per_chip(self) -> int:
        """JAX devices a chip."""
        return self.cores // self.cores_per_device


# cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and tpu7x: HBM, bandwidth, bf16 peak, TensorCores, ICI, pod size.
# VMEM: jax/_src/pallas/mosaic/tpu_info.py of jax 0.10.2. Multiply-adds a cycle: the compiler's own schedule of a
# product of two 4096x4096 matrices comes to 81 to 97 % of these figures. What the compiler leaves to a program: its
# refusals (libtpu 0.0.42 and 0.0.52).
GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation("v4", 32 * GIB, int(30.75 * GIB), 1200e9, 275e12, 16 * 2**20, 4 * 128**2, 2, 2, True, 300e9, 4096),
        Generation("v5e", 16 * GIB, int(15.75 * GIB), 819e9, 197e12, 128 * 2**20, 4 * 128**2, 1, 1, False, 400e9, 256),
        Generation("v5p", 95 * GIB, int(95.73 * GIB), 2765e9, 459e12, 64 * 2**20, 4 * 128**2, 2, 2, True, 1200e9, 8960),
        Generation("v6e", 32 * GIB, int(31.24 * GIB), 1638e9, 918e12, 128 * 2**20, 4 * 256**2, 1, 1, False, 800e9, 256),
        Generation(
            "tpu7x", 192 * GIB, int(94.74 * GIB), 7380e9, 2307e12, 64 * 2**20, 4 * 256**2, 2, 1, True, 1200e9, 9216
        ),
    )
}
_OTHER_NAMES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x"}

# Slices of the two-dimensional generations; up to 8 chips lie on one host.
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
# The small slices of the others; larger ones are made of cubes of 4x4x4 chips.
_CUBIC = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A described, absent TPU system.

    Attributes:
        name: as asked for.
        generation: its kind of chip.
        shape: chips along each axis of one slice.
        slices: slices joined by the data-centre network.
    """

    name: str
    generation: Generation
    shape: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Hosts of all slices."""
        return self.slices * (1 if self._is_one_host else math.prod(self.shape) // 4)

    @property
    def _is_one_host(self) -> bool:
        chips = math.prod(self.shape)
        return chips == 1 or (len(self.shape) == 2 and chips <= 8)  # larger slices have hosts of four chips

    @functools.cached_property
    def devices(self) -> tuple[Any, ...]:
        """JAX devices in their order, to build a mesh of. Raises ImportError where libtpu is not installed."""
        prepare()
        options: dict[str, Any] = {"num_slices": self.slices}
        if self._is_one_host:
            options["chips_per_host_bounds"] = (*self.shape, 1)[:3]
        if self.generation.name == "v4":
            options["chip_config_name"] = "megacore"
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{self.generation.name}:{'x'.join(map(str, self.shape))}", **options
        )
        return tuple(described.devices)


def prepare(dump_folder: str | os.PathLike[str] | None = None) -> None:
    """Set what libtpu reads when it is loaded, in this process; call it before anything else here.

    Args:
        dump_folder: where libtpu is to write the schedules that :func:`schedule` reads; one folder a process.

    Raises:
        ImportError: libtpu is not installed.
        RuntimeError: libtpu has been loaded already, with other options.
    """
    if _prepared:
        if dump_folder is not None and _prepared != [os.fspath(dump_folder)]:
            raise RuntimeError(
                f"aot.prepare({os.fspath(dump_folder)!r}) comes too late: libtpu has been set up in this process with "
                f"{_prepared[0]!r}; call it before anything is compiled"
            )
        return
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            'the TPU compiler is not installed: pip install "jax[tpu]" (in a clone: pip install -e ".[tpu]"); '
            "it needs no TPU, but Linux on x86-64"
        )
    for name, value in environment(dump_folder).items():
        if name == "LIBTPU_INIT_ARGS":
            value = f"{os.environ.get(name, '')} {value}".strip()
        elif name in os.environ:
            continue
        os.environ[name] = value
    _prepared.append(None if dump_folder is None else os.fspath(dump_folder))


_prepared: list[str | None] = []  # the dump folder of this process, once it is settled


def environment(dump_folder: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Return the environment variables of a process that compiles: what :func:`prepare` sets, for a child process."""
    variables = {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask which TPU this is
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any will do: the topology decides
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process aborts on a lock file
    }
    if dump_folder is not None:
        variables["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={os.fspath(dump_folder)} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false "
            f"--xla_jf_dump_llo_pass_label_regex=.*({_TIMELINE}|{_LOADS})"
        )
    return variables


def topology(name: str) -> Topology:
    """Describe a TPU system by the name Google gives it.

    Args:
        name: ``v5e-256`` (also ``v5litepod-256``), ``v6e-64``, ``v4-32``, ``v5p-128``, ``tpu7x-64``; the number counts
            chips of v5e and v6e, and TensorCores, two a chip, of the others. ``2xv5e-256`` is two slices. A name of a
            generation alone, ``v5e``, is one chip.

    Returns:
        The topology; libtpu is first needed by its ``devices``.

    Raises:
        ValueError: a name or size that does not exist.
    """
    match = re.fullmatch(r"(?:(\d+)x(?=v|t))?([a-z]+\d+[a-z]*)(?:-(\d+))?", name)
    family = match and _OTHER_NAMES.get(match[2], match[2])
    if not match or family not in GENERATIONS:
        raise ValueError(
            f"unknown topology {name!r}; there are v4-N, v5p-N and tpu7x-N (N TensorCores, two a chip), v5e-N and "
            "v6e-N (N chips), e.g. v5e-256, v4-32, and 2xv5e-256 for two slices"
        )
    generation = GENERATIONS[family]
    unit = generation.cores if generation.counts_cores else 1
    size = int(match[3] or unit)
    shapes: dict[int, tuple[int, ...]] = dict(_CUBIC if generation.counts_cores else _FLAT)
    if generation.counts_cores and size % (64 * unit) == 0 and 0 < size // unit <= generation.largest:
        shapes[size // unit] = tuple(4 * side for side in _cuboid(size // unit // 64))
    if size % unit or size // unit not in shapes or match[1] == "0":
        counted = "TensorCores, two a chip" if generation.counts_cores else "chips"
        sizes = ", ".join(str(unit * chips) for chips in sorted(shapes) if chips <= generation.largest)
        more = f", and multiples of {64 * unit} up to {unit * generation.largest}" if generation.counts_cores else ""
        raise ValueError(f"there is no topology {name!r}: {family}-N counts {counted}, and N is {sizes}{more}")
    return Topology(name, generation, shapes[size // unit], int(match[1] or 1))


def _cuboid(volume: int) -> tuple[int, int, int]:
    """Return the sides, ascending, of the most cube-like box of whole sides; Google's default shape of a slice."""
    sides = [
        (a, b, volume // (a * b))
        for a in range(1, math.isqrt(volume) + 1)
        for b in range(a, volume // a + 1)
        if volume % (a * b) == 0 and b <= volume // (a * b)
    ]
    return min(sides, key=sum)


def compile_for(
    generation: str,
    function: Callable[..., Any],
    *arguments: Any,
    compiler_options: Mapping[str, Any] | None = None,
    **jit_options: Any,
) -> jax.stages.Compiled:
    """Compile a function for one chip of a generation.

    Args:
        generation: a key of ``GENERATIONS``.
        function: what ``jax.jit`` takes, or its result.
        *arguments: pytrees of ``jax.ShapeDtypeStruct`` (arrays stand for their shapes).
        compiler_options: as in ``Lowered.compile``.
        **jit_options: as in ``jax.jit``, for instance ``donate_argnums``.

    Returns:
        The compiled function, with its ``memory_analysis()``, ``cost_analysis()`` and ``as_text()``; it cannot be run.

    Raises:
        ValueError: an unknown generation.
        ImportError: libtpu is not installed.
        jax.errors.JaxRuntimeError: the compiler's refusal, such as memory that does not suffice.
    """
    mesh = Mesh(np.array(topology(generation).devices[:1]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    # The ambient mesh tells Pallas which chip it lowers for; without it, it asks this machine's own devices.
    with jax.set_mesh(mesh):
        lowered = jax.jit(function, **jit_options).lower(*shapes)
        return lowered.compile(compiler_options=dict(compiler_options) if compiler_options else None)


# The two files of each kernel that are read: its instructions by region and row of the timeline after register
# allocation, and the number of instructions that each row issues to each unit.
_TIMELINE = "post-bundle-packing-post-ra"
_LOADS = "pre-delay_hlo-static-per-bundle-utilization"


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


def kernels(dump_folder: str | os.PathLike[str]) -> list[str]:
    """Return the names of everything scheduled in a dump folder; a call's number (``.1``) is part of its name."""
    found = (re.fullmatch(rf"\d+-(.+)-\d+-{_TIMELINE}\.txt", file) for file in os.listdir(dump_folder))
    return sorted({match[1] for match in found if match and not match[1].startswith(("<", "TLP"))})


def schedule(
    dump_folder: str | os.PathLike[str],
    kernel: str,
    generation: str,
    *,
    trips: Mapping[int, float] | None = None,
) -> Schedule:
    """Read the schedule of a kernel that was compiled after ``prepare(dump_folder)``.

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
    if generation not in GENERATIONS:
        raise ValueError(f"unknown generation {generation!r}; allowed: {', '.join(GENERATIONS)}")
    timeline = _newest(Path(dump_folder), kernel, _TIMELINE)
    stem = timeline.name.removesuffix(f"-{_TIMELINE}.txt").rpartition("-")[0]
    loads = next(
        (
            file
            for file in timeline.parent.iterdir()
            if re.fullmatch(rf"{re.escape(stem)}-\d+-{_LOADS}\.txt", file.name)
        ),
        None,
    )
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
            f"{timeline} is not written as by libtpu 0.0.42 to 0.0.52, which pallas_kernels.aot reads: {error}"
        ) from error


class _Unknown(Exception):
    """Something in a dump that the reader does not know."""


_LEAD = 8  # trips by which a pipeline's loop may exceed its grid; with double buffers it is 2


def _newest(folder: Path, kernel: str, label: str) -> Path:
    # TIME-NAME.NUMBER-PASS-label.txt; XLA numbers the calls of one name.
    pattern = re.compile(rf"(\d+)-{re.escape(kernel)}(\.\d+)?-\d+-{label}\.txt")
    found = [(int(match[1]), file) for file in folder.glob("*.txt") if (match := pattern.fullmatch(file.name))]
    if not found:
        there = ", ".join(kernels(folder)[:20]) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"no schedule of {kernel!r} in {folder} (there are: {there or 'none'}); was aot.prepare called with this "
            "folder before the first compilation?"
        )
    return max(found)[1]


@dataclasses.dataclass
class _Region:
    """A stretch of a timeline."""

    parent: "_Region | None"
    indent: int
    role: str  # pred_region, loop_body, ...
    start: int = 0
    end: int = 0
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
    if not regions or not regions[0].end:
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
