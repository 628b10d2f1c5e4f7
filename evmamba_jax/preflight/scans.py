"""Every scan of every registered model, and its TPU kernels through the TPU compiler.

``benchmarks/tpu_scan.py`` prints what is found here, and ``tests/kernels/test_tpu_compile.py`` holds it to budgets.

No TPU is needed and nothing runs: models and kernels are traced with shapes alone, and cycles, spills and memory are
those of the compiler's schedule (``evmamba_jax/preflight/schedules.py``). Every time is an estimate.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import pallas as pl
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import Mesh

from evmamba_jax import list_models
from evmamba_jax.analysis.program import equations
from evmamba_jax.models.cards import CARDS
from evmamba_jax.models.registry import abstract_model
from evmamba_jax.preflight import aot, schedules
from pallas_kernels import ATROUS, CROSS, Chain, Order, tpu

BATCH = 128  # images a chip in training
DETECTOR = (800, 1280)  # pixels of one image a chip


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


def model_scans(*, detector: bool) -> dict[Scan, list[str]]:
    """Return every scan of every registered model in bfloat16, each with the models that have it.

    ``BATCH`` images at once of the input size of a model's card, or, as the backbone of a detector, one image of
    ``DETECTOR`` pixels. Nothing is computed.
    """
    found: dict[Scan, list[str]] = {}
    for name in list_models():
        structure, weights = nnx.split(abstract_model(name, dtype=jnp.bfloat16))
        weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights)

        def features(weights: nnx.State, images: jax.Array, structure=structure) -> Any:
            model = nnx.merge(structure, weights)
            model.eval()
            return model.features(images)

        shape = (1, *DETECTOR, 3) if detector else (BATCH, *CARDS[name].input_size, 3)
        images = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for equation in equations(jax.make_jaxpr(features)(weights, images).jaxpr):
            if equation.primitive.name == "scan2d_forward":
                models = found.setdefault(_scan(equation), [])
                models += [name] if name not in models else []
    return found


def _scan(equation: Any) -> Scan:
    x, _, dt_weight, _, A, _ = (value.aval for value in equation.invars)
    if x.dtype != jnp.bfloat16:
        raise ValueError(f"a model in bfloat16 scans {x.dtype}{x.shape}")
    _, options = equation.params["how"]
    return Scan(*x.shape, rank=dt_weight.shape[1], state=A.shape[2], orders=dict(options)["orders"])


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
    x = scan.arguments[0]
    with jax.set_mesh(Mesh(np.array(aot.topology(generation).devices[:1]), ("data",))):  # says which chip
        plan = tpu.SCAN2D.plan(*scan.arguments, orders=scan.orders)
        if isinstance(plan, str):
            yield Kernel(str(scan), generation, "both", "portable", plan)
            return
    forward, backward = tpu.SCAN2D.passes(orders=scan.orders)
    for direction, function, arguments in (
        ("forward", forward, scan.arguments),
        ("backward", backward, (scan.arguments, (x,))),
    ):
        yield from compile_kernels(str(scan), generation, direction, function, arguments, dump_folder)


def compile_kernels(
    scan: str, generation: str, direction: str, program, arguments, dump_folder: str
) -> Iterator[Kernel]:
    """Compile every kernel that a program calls, each by itself."""
    start = time.perf_counter()
    with jax.set_mesh(Mesh(np.array(aot.topology(generation).devices[:1]), ("data",))):
        jaxpr = jax.make_jaxpr(program)(*arguments).jaxpr
    for call in equations(jaxpr):
        if call.primitive.name == "pallas_call":
            kernel = _compile(Kernel(scan, generation, direction, call.params["name"]), call, dump_folder)
            now = time.perf_counter()
            yield dataclasses.replace(kernel, seconds=now - start)
            start = now


def _compile(kernel: Kernel, call: Any, dump_folder: str) -> Kernel:
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
    """Read a scan kernel's schedule, its guarded loops weighed by how often the guard lets them run.

    The kernels guard loops by the block of channels alone: the first block clears what all blocks add to, and the last
    one sums it. So a guarded loop runs in one of so many steps of the grid as its last axis has.
    """
    schedule = schedules.read(dump_folder, name, generation)
    guarded = {
        number: loop.trips / schedule.grid[-1]
        for number, loop in enumerate(schedule.loops)
        if loop.depth == 1 and loop.predicated == loop.rows and loop.trips is not None
    }
    return schedules.read(dump_folder, name, generation, trips=guarded)


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
