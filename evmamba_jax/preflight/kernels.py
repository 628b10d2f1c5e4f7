"""A scan's TPU kernels through the TPU compiler: cycles, spills and memory by the compiler's own schedule.

No TPU is needed and nothing runs. Every time is an estimate (``schedules.py``).
"""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import Mesh

from evmamba_jax.counting.program import equations
from evmamba_jax.preflight import aot, schedules
from pallas_kernels import ATROUS, CROSS, Chain, Order, tpu

BATCH = 128  # images a chip in training


@dataclasses.dataclass(frozen=True)
class Scan:
    """One call of ``scan2d``: x (B, H, W, E) bfloat16, time steps of rank R, N states, all else float32."""

    batch: int
    height: int
    width: int
    channels: int
    rank: int
    state: int
    orders: tuple[Order | Chain, ...]

    @property
    def arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The six arrays of ``scan2d``, as shapes."""
        k, e, r, n = len(self.orders), self.channels, self.rank, self.state
        x = jax.ShapeDtypeStruct((self.batch, self.height, self.width, e), jnp.bfloat16)
        shapes = (k, e, r + 2 * n), (k, r, e), (k, e), (k, e, n), (k, e)
        return x, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    @property
    def visits(self) -> int:
        """Tokens of all orders together, of one image."""
        return sum(order.length(self.height, self.width) for order in self.orders)

    @classmethod
    def parse(cls, text: str) -> "Scan":
        """Return the scan that ``str`` writes so."""
        grid, *sizes, ways = re.fullmatch(r"(\S+) E(\d+) R(\d+) N(\d+) (.+)", text).groups()  # pyrefly: ignore
        named = {"cross": CROSS, "atrous": ATROUS}.get(ways)
        batch, height, width, channels, rank, state = map(int, (*grid.split("x"), *sizes))
        return cls(batch, height, width, channels, rank, state, named or tuple(map(_parse_ways, ways.split())))

    def __str__(self) -> str:
        names: dict[tuple[Order | Chain, ...], str] = {CROSS: "cross", ATROUS: "atrous"}
        orders = names.get(self.orders) or " ".join(map(_ways, self.orders))
        return f"{self.batch}x{self.height}x{self.width} E{self.channels} R{self.rank} N{self.state} {orders}"


def _ways(order: Order | Chain) -> str:
    """Return r for rows or c for columns, a capital for backwards, and what a sub-lattice is."""
    if isinstance(order, Chain):
        return ">".join(map(_ways, order.orders))
    letter = "c" if order.column_major else "r"
    lattice = "" if order.step == (1, 1) else "{}{}/{}{}".format(*order.origin, *order.step)
    return (letter.upper() if order.reverse else letter) + lattice


def _parse_ways(text: str) -> Order | Chain:
    """Return the order that ``_ways`` writes so."""
    if ">" in text:
        return Chain(tuple(_parse_ways(part) for part in text.split(">")))  # pyrefly: ignore
    letter, *digits = re.findall(r"\w", text)
    numbers = list(map(int, digits)) or [0, 0, 1, 1]
    return Order(tuple(numbers[:2]), tuple(numbers[2:]), letter in "cC", letter in "RC")  # pyrefly: ignore


# One of each family, small enough to be compiled for every generation at each change.
HANDFUL = (
    Scan(BATCH, 28, 28, 192, rank=6, state=16, orders=ATROUS),  # EfficientVMamba-T, stage 2
    Scan(BATCH, 14, 14, 384, rank=24, state=1, orders=CROSS),  # VMamba-T, stage 3
    Scan(BATCH, 1, 197, 384, rank=12, state=16, orders=(Order(),)),  # Vim-T
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the compiler made of one call of a kernel, or why there is none.

    Attributes:
        scan: what it is part of, as text.
        generation: the TPU.
        direction: "forward" or "backward"; the backward pass also calls the forward kernel, for states to begin with.
        name: of the ``pallas_call``; "portable" where the kernels cannot do the scan.
        problem: why there is no kernel, or why it does not compile; else empty.
        seconds: what tracing and compiling took here.
        cycles: static cycles.
        hbm_bytes: moved between the chip's memory and HBM, by the windows of the grid.
        vmem_bytes: on-chip memory.
        unit, load: the unit that limits the loop in which most cycles are spent, and the share of its slots in use.
        spills: registers that one turn of each innermost loop writes to memory, all those loops together.
        other_spills: the same for the rest.
    """

    scan: str
    generation: str
    direction: str
    name: str
    problem: str = ""
    seconds: float = 0.0
    cycles: float = 0.0
    hbm_bytes: int = 0
    vmem_bytes: int = 0
    unit: str = ""
    load: float = 0.0
    spills: int = 0
    other_spills: int = 0

    @property
    def key(self) -> str:
        """What no other kernel is called."""
        return f"{self.generation} {self.scan} {self.direction} {self.name}"


def compile_scan(scan: Scan, generation: str, dump_folder: str) -> Iterator[Kernel]:
    """Compile the kernels of a scan's two passes for one chip, after ``aot.prepare(dump_folder)``."""
    for kernel, call in trace(scan, generation):
        yield kernel if call is None else compile_kernel(kernel, call, dump_folder)


def trace(scan: Scan, generation: str) -> Iterator[tuple[Kernel, Any]]:
    """Yield every kernel that a scan's two passes call, with its ``pallas_call``; None where there is no kernel."""
    forward, backward = tpu.SCAN2D.passes(orders=scan.orders)
    arguments = scan.arguments
    with jax.set_mesh(Mesh(np.array(aot.topology(generation).devices[:1]), ("data",))):  # says which chip
        plan = tpu.SCAN2D.plan(*arguments, orders=scan.orders)
        if isinstance(plan, str):
            yield Kernel(str(scan), generation, "both", "portable", plan), None
            return
        programs = {
            "forward": jax.make_jaxpr(forward)(*arguments),
            "backward": jax.make_jaxpr(backward)(arguments, arguments[:1]),
        }
    for direction, program in programs.items():
        for call in equations(program.jaxpr):
            if call.primitive.name == "pallas_call":
                yield Kernel(str(scan), generation, direction, call.params["name"]), call


def compile_kernel(kernel: Kernel, call: Any, dump_folder: str) -> Kernel:
    """Compile one kernel by itself; return it with what the compiler made of it."""
    start = time.perf_counter()

    def alone(*arrays):
        with jax.named_scope(kernel.name):  # else XLA calls it after this function
            return call.primitive.bind(*arrays, **call.params)

    try:
        aot.compile_for(kernel.generation, alone, *(value.aval for value in call.invars))
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(kernel, problem=str(error).splitlines()[0])
    schedule = read_schedule(dump_folder, kernel.name, kernel.generation)
    innermost = [
        loop
        for loop, after in zip(schedule.loops, [*schedule.loops[1:], None], strict=True)
        if not loop.is_grid and (after is None or after.depth <= loop.depth)
    ]
    slowest = max(schedule.loops, key=lambda loop: loop.cycles)
    unit, load = slowest.busiest
    spills = sum(loop.spills for loop in innermost)
    return dataclasses.replace(
        kernel,
        seconds=time.perf_counter() - start,
        problem="" if schedule.is_complete else "a loop's trips are unknown",
        cycles=schedule.cycles,
        hbm_bytes=moved_bytes(call),
        vmem_bytes=schedule.vmem_bytes,
        unit=unit,
        load=load,
        spills=spills,
        other_spills=sum(loop.spills for loop in schedule.loops) - spills,
    )


def read_schedule(dump_folder: str, name: str, generation: str) -> schedules.Schedule:
    """Read a scan kernel's schedule, its guarded loops weighed by how often the guard lets them run."""
    schedule = schedules.read(dump_folder, name, generation)
    return schedules.read(dump_folder, name, generation, trips=schedules.guarded(schedule))


def moved_bytes(call: Any) -> int:
    """Return the bytes that the windows of a ``pallas_call`` bring in and out: a block whenever its index changes."""
    mapping = call.params["grid_mapping"]
    steps = np.indices(mapping.grid).reshape(len(mapping.grid), -1).astype(np.int32)
    total = 0
    for window in mapping.block_mappings:
        if window.block_aval.memory_space == pl.ANY:  # handed on, not brought in
            continue
        index_map = window.index_map_jaxpr
        places = jax.vmap(functools.partial(_evaluate, index_map.jaxpr, index_map.consts))(*steps)
        places = np.stack([np.broadcast_to(place, steps.shape[1]) for place in places])
        fetched = 1 + np.count_nonzero(np.any(places[:, 1:] != places[:, :-1], axis=0))
        size = math.prod(
            axis if isinstance(axis, int) else getattr(axis, "block_size", 1) for axis in window.block_shape
        )
        total += int(fetched) * size * window.array_aval.dtype.itemsize
    return total


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], *arguments: Any) -> list[Any]:
    """Run a small program here; JAX itself would run what it calls on the absent chip that it was traced for."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def value(x):
        return x.val if isinstance(x, Literal) else values[x]

    for equation in jaxpr.eqns:
        given = map(value, equation.invars)
        inner = equation.params.get("jaxpr")
        if isinstance(inner, ClosedJaxpr):
            results = _evaluate(inner.jaxpr, inner.consts, *given)
        else:
            results = equation.primitive.bind(*given, **equation.params)
        results = results if isinstance(results, list | tuple) else [results]
        values |= zip(equation.outvars, results, strict=True)
    return [value(x) for x in jaxpr.outvars]
