"""Calls of the kernels: how large the blocks are, where each array's block lies, and what fits the chip's memory."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import shape_like, vary_alike
from pallas_kernels.tpu import kernels
from pallas_kernels.tpu.geometry import Launch, Walk
from pallas_kernels.tpu.kernels import TILE, Block

LANES = 128
FLOAT32 = jnp.dtype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a launch works on.

    Attributes:
        rows, columns: of a sub-lattice.
        step: (rows, columns) of the sub-lattices.
        channels: E, a multiple of 8.
        images: B; at most 128, or a multiple of it.
        state: N.
        rank: R; 0 where the time steps come from outside.
        slots: parameter sets of a sub-lattice.
        softplus: whether the time steps go through it.
        dtype: of x and dy.
        result: of y and dx.
        steps: of time steps that come from outside, and of their gradient.
        natural: whether these are still to be brought into units of ln 2.
    """

    rows: int
    columns: int
    step: tuple[int, int]
    channels: int
    images: int
    state: int
    rank: int
    slots: int
    softplus: bool
    dtype: Any
    result: Any
    steps: Any = FLOAT32
    natural: bool = False

    @property
    def slab(self) -> int:
        """Rows of packed that the projection of the time step reads."""
        return _up(self.rank, TILE)

    @property
    def set_rows(self) -> int:
        """Rows of packed for one parameter set."""
        return _up(self.rank + 2 * self.state, TILE)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        block: what the kernel does on a block.
        shape: of the whole.
        origins: the sub-lattices.
        first: number of the first of the parameter sets; the block's walks count from it.
        sets: how many the call uses.
        reverse: the walk begins at the last chunk.
        single: arrays that have one buffer instead of two, where memory is short: first those that are the same for all
            channels, whose next tile of images is then fetched once this one is done; then the results, which are then
            written back while nothing is computed.
    """

    block: Block
    shape: Shape
    origins: tuple[tuple[int, int], ...]
    first: int
    sets: int
    reverse: bool
    single: tuple[str, ...] = ()

    @property
    def cuts_lines(self) -> bool:
        """Whether chunks are parts of rows or of columns that do not follow one another in memory."""
        return not self.block.flat and self.block.rows < self.shape.rows and self.block.columns < self.shape.columns

    def place(self, chunk):
        """Return where the block of a chunk lies, counted in blocks; their numbers follow the walk, or its reverse."""
        if self.block.flat:
            return chunk, 0
        down, right = self.shape.rows // self.block.rows, self.shape.columns // self.block.columns
        if 1 in (down, right):  # whole lines, as nearly always: nothing for the scalar unit to divide
            return (0, chunk) if down == 1 else (chunk, 0)
        column_major, _ = self.block.walks[0].orders[0]
        return (chunk % down, chunk // down) if column_major else (chunk // right, chunk % right)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Tiles of images, sub-lattices, chunks, blocks of channels."""
        return -(-self.shape.images // LANES), len(self.origins), self.block.chunks, self.block.blocks


@dataclasses.dataclass(frozen=True)
class Target:
    """What matters of the machine that runs a kernel.

    Attributes:
        vmem: bytes of its VMEM.
        two_stores: whether it can store two registers a cycle.
        interpret: None for a TPU; otherwise what ``pallas_call`` takes to run a kernel without one.
    """

    vmem: int
    two_stores: bool
    interpret: Any = None

    @property
    def room(self) -> int:
        """Bytes of VMEM for blocks and scratch: the compiler needs some for values that do not stay in registers."""
        return self.vmem - max(self.vmem // 10, min(self.vmem // 5, 3 * 2**20))


def plan(launch: Launch, shape: Shape, target: Target, *, gradient: bool) -> tuple[Call, ...] | None:
    """Divide a launch into calls whose blocks fit the target; None if that cannot be done.

    Where there are several, each does some of the walks, and their results must be added up.
    """

    def fitting(walks: tuple[Walk, ...], first: int) -> Call | None:
        _, reverse = walks[0].orders[0]
        blocks = list(_blocks(walks, shape, target, gradient=gradient))
        calls = [
            Call(block, shape, launch.origins, first, len(walks), reverse, single)
            for single in (SHARED[:0], SHARED, (*SHARED, *RESULTS))
            for block in blocks
        ]
        for call in sorted(calls, key=lambda call: call.cuts_lines):  # more chunks cost more than waiting for memory
            if memory(call, gradient=gradient) <= target.room:
                return call
        return None

    for count in reversed(_divisors(len(launch.walks))):  # of calls
        size = len(launch.walks) // count
        parts = []
        for first in range(0, len(launch.walks), size):
            walks = launch.walks[first : first + size]
            parts.append(fitting(tuple(dataclasses.replace(w, slot=w.slot - first) for w in walks), first))
        if all(parts):
            return tuple(part for part in parts if part)
    return None


def _blocks(walks: tuple[Walk, ...], shape: Shape, target: Target, *, gradient: bool) -> Iterator[Block]:
    """Yield the blocks that could do these walks, the most promising first."""
    sizes = [c for c in _divisors(shape.channels) if c % TILE == 0]
    wanted = 32 if shape.state <= 4 else 16
    sizes = [c for c in sizes if c <= wanted] or sizes[-1:]
    alone = len(walks) == 1 and len(walks[0].orders) == 1
    column_major = alone and walks[0].orders[0][0] and min(shape.rows, shape.columns) > 1
    cuts = list(_cuts(shape, column_major=column_major)) if alone else [(1, shape.rows, shape.columns)]
    # Summing dB and dC over the channels token by token is cheap where one sum serves many channels and few states.
    # There decays are kept where that costs neither chunks nor channels; with many states it takes two stores a cycle.
    keep = target.two_stores
    ways = []
    if gradient and shape.state <= 2:
        ways = [(True, cuts[0], channels, kept) for channels in sizes for kept in (True, False)]
    if not gradient or len(walks) == 1:
        ways += [(False, cut, channels, keep) for cut in cuts for channels in sizes]
    for at_once, (chunks, rows, columns), channels, keep_decays in ways:
        tiles = channels // TILE
        flying = tiles if at_once else max(n for n in _divisors(tiles) if n * shape.state <= max(8, shape.state))
        together = max(1, min(LANES // max(shape.slab, TILE), LANES // channels if gradient else 16, 16))
        turns = {
            "at_a_time": max(8, (1792 if gradient else 3584) // channels),  # more take longer to compile
            "unroll": 14 if shape.state >= 8 else max(8, 56 // flying),
            "unroll_again": 8 if shape.state >= 8 else max(8, 56 // flying),
            "unroll_back": 3 if shape.state >= 8 else max(2, 16 // flying),
        }
        if target.interpret:  # by XLA for a CPU, which takes long to compile long turns and gains nothing by them
            turns = {"at_a_time": 4, "unroll": 3, "unroll_again": 3, "unroll_back": 2}
            together = min(together, 3)
        yield Block(
            walks=walks,
            rows=rows,
            columns=columns,
            flat=shape.step == (1, 1) and not (column_major and chunks > 1),
            channels=channels,
            lanes=min(shape.images, LANES),
            state=shape.state,
            rank=shape.rank,
            natural=shape.natural,
            slab=shape.slab,
            set_rows=shape.set_rows,
            softplus=shape.softplus,
            together=together,
            **turns,
            tiles=flying,
            chunks=chunks,
            blocks=shape.channels // channels,
            at_once=at_once,
            keep_decays=keep_decays,
            exact=shape.dtype == FLOAT32,
        )


def _cuts(shape: Shape, *, column_major: bool) -> Iterator[tuple[int, int, int]]:
    """Yield how the sub-lattice of one walk can be cut: so many chunks of (rows, columns), the fewest first."""
    yield 1, shape.rows, shape.columns
    if shape.step == (1, 1) and not column_major:  # tokens that follow one another do so in memory
        tokens = shape.rows * shape.columns
        yield from ((tokens // n, 1, n) for n in _divisors(tokens)[1:])
        return
    lines, length = (shape.columns, shape.rows) if column_major else (shape.rows, shape.columns)
    whole = [(n, length) for n in _divisors(lines)[1:]]
    for across, along in (*whole, *((1, n) for n in _divisors(length)[1:])):
        rows, columns = (along, across) if column_major else (across, along)
        yield lines // across * (length // along), rows, columns


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array in the accelerator's memory, and the block of it that a step of the grid sees."""

    shape: tuple[int, ...]
    dtype: Any
    block: tuple[int | None, ...]
    index: Callable
    buffers: int = 2  # one is fetched or written back while another is computed with

    @property
    def bytes(self) -> int:
        """What its blocks take of VMEM."""
        return self.buffers * _bytes([n for n in self.block if n is not None], self.dtype)

    @property
    def spec(self) -> pl.BlockSpec:
        """The block as Pallas wants it described."""
        mode = None if self.buffers == 2 else pl.Buffered(self.buffers)
        return pl.BlockSpec(self.block, self.index, pipeline_mode=mode)


def _arrays(call: Call, *, gradient: bool) -> dict[str, _Array]:
    """Return every array that either kernel can read or write, by the name it has there."""
    b, s = call.block, call.shape
    tiles, lattices, chunks, blocks = call.grid
    at = call.first // call.sets  # of the parameter sets, in blocks of as many

    def origin(g, axis):
        places = [origin[axis] for origin in call.origins]
        place = places[0]
        for i, other in enumerate(places[1:], 1):
            place = place if other == places[0] and len(set(places)) == 1 else jnp.where(g == i, other, place)
        return place

    def chunk(c):
        """Return which chunk of the image is taken c-th; the way back begins where the walk ends."""
        return chunks - 1 - c if call.reverse != gradient else c

    def pixels(rest, block, index, dtype):
        def place(i, g, c, d):
            rows, columns = call.place(chunk(c))
            return (rows, origin(g, 0), columns, origin(g, 1), *index(i, g, c, d))

        def flat_place(i, g, c, d):
            return (*call.place(chunk(c)), *index(i, g, c, d))

        if b.flat:
            return _Array((s.rows * s.columns, 1, *rest), dtype, (*b.axes, *block), flat_place)
        full = (s.rows, s.step[0], s.columns, s.step[1], *rest)
        return _Array(full, dtype, (b.rows, None, b.columns, None, *block), place)

    def image(dtype):
        return pixels((s.channels, s.images), (b.channels, b.lanes), lambda i, g, c, d: (d, i), dtype)

    def plain(full, block, index, dtype=FLOAT32):
        return _Array(full, dtype, block, index)

    rows, sets = call.sets * s.set_rows, call.sets
    packed = pixels((s.slots * s.set_rows, s.images), (rows, b.lanes), lambda i, g, c, d: (at, i), FLOAT32)
    steps = pixels((s.slots, s.channels, s.images), (sets, b.channels, b.lanes), lambda i, g, c, d: (at, d, i), s.steps)
    state = plain(
        (lattices, s.state, s.channels, s.images),
        (None, s.state, b.channels, b.lanes),
        lambda i, g, c, d: (g, 0, d, i),
    )
    borders = plain(  # between two chunks; the way back begins after the last one and needs none before the first
        (chunks - 1, lattices, s.state, s.channels, s.images),
        (None, None, s.state, b.channels, b.lanes),
        lambda i, g, c, d: (jnp.maximum(chunks - 2 - c, 0) if gradient else c, g, 0, d, i),
    )
    high, wide = b.together * b.channels, b.together * b.slab
    parameters = {
        "A": plain(
            (lattices, s.slots, s.state, s.channels, b.lanes),
            (None, sets, s.state, b.channels, b.lanes),
            lambda i, g, c, d: (g, at, 0, d, 0),
        ),
        "bias": plain(
            (lattices, s.slots, s.channels, b.lanes),
            (None, sets, b.channels, b.lanes),
            lambda i, g, c, d: (g, at, d, 0),
        ),
        "skip": plain((lattices, s.channels, b.lanes), (None, b.channels, b.lanes), lambda i, g, c, d: (g, d, 0)),
        "weights": plain(
            (lattices, s.slots, blocks, high, wide),
            (None, sets, None, high, wide),
            lambda i, g, c, d: (g, at, d, 0, 0),
            s.dtype,
        ),
        "weights_back": plain(
            (lattices, s.slots, blocks, wide, high),
            (None, sets, None, wide, high),
            lambda i, g, c, d: (g, at, d, 0, 0),
            s.dtype,
        ),
    }

    def summed(name, of):
        """Return the gradient of a parameter: one for each tile of images, and only of the sets of this call."""
        array = parameters[of]
        full = array.shape if of == "skip" else (array.shape[0], sets, *array.shape[2:])

        def index(i, g, c, d):
            g, *rest = array.index(i, g, c, d)
            return (i, g, *([0, *rest[1:]] if of != "skip" else rest))

        return {name: plain((tiles, *full), (None, *array.block), index)}

    arrays = {
        **{name: image(s.dtype) for name in ("x", "dy")},
        **{name: image(s.result) for name in ("y", "dx")},
        **dict.fromkeys(("packed", "d_packed"), packed),
        **dict.fromkeys(("delta", "d_delta"), steps),
        **dict.fromkeys(("start", "final", "d_start", "d_final"), state),
        **dict.fromkeys(("borders", "kept"), borders),
        **parameters,
        **summed("dA", "A"),
        **summed("d_bias", "bias"),
        **summed("d_skip", "skip"),
        **summed("d_weights", "weights_back"),
    }
    return arrays | {name: dataclasses.replace(arrays[name], buffers=1) for name in call.single}


def _scratch(call: Call, *, gradient: bool, names: tuple[str, ...]) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return shape and type of what a kernel keeps on the chip, by the name it has there."""
    b = call.block
    tile, state = (TILE, b.lanes), (b.state, b.channels, b.lanes)
    arrays: dict[str, tuple[int, ...]] = {"dt": (*b.axes, b.channels, b.lanes)}
    if call.shape.result != FLOAT32 and ("dx" if gradient else "y") in names:
        arrays["sum"] = (*b.axes, b.channels, b.lanes)
    if b.chunks > 1 or gradient:
        arrays["state"] = (b.blocks if b.chunks > 1 else 1, *state)
    if gradient:
        if b.tokens > b.pixels:
            arrays["d_raw"] = arrays["dt"]
        arrays["h"] = (b.tokens + 1, b.state, b.flying, b.lanes)
        if b.keep_decays:
            arrays["a"] = (b.tokens, b.state, b.flying, b.lanes)
        if not b.at_once:
            arrays["sum_B"] = arrays["sum_C"] = (b.tokens, b.state, *tile)
        if b.chunks > 1:
            arrays["acc_A"] = (b.blocks, call.sets, *state)
            arrays["acc_bias"] = (b.blocks, call.sets, b.channels, b.lanes)
            arrays["acc_skip"] = (b.blocks, b.channels, b.lanes)
            if b.rank:
                arrays["acc_weights"] = (b.blocks, call.sets, b.together * b.slab, b.together * b.channels)
    return {name: (size, FLOAT32) for name, size in arrays.items()}


SHARED = ("packed", "d_packed")
RESULTS = ("y", "dx")
FORWARD = ("x", "packed", "A", "bias", "skip")
BACKWARD = (*FORWARD, "dy")
IMAGES = ("y", "dx", "d_packed", "d_delta")
GRADIENTS = ("dx", "d_packed", "dA", "d_bias", "d_skip")


def memory(call: Call, *, gradient: bool) -> int:
    """Return the bytes of VMEM that a call takes."""
    names = [*(BACKWARD if gradient else FORWARD), *(GRADIENTS if gradient else ("y",))]
    names += ["weights", *(["weights_back", "d_weights"] if gradient else [])] if call.block.rank else []
    names += [] if call.block.rank else ["delta", *(["d_delta"] if gradient else [])]
    arrays = _arrays(call, gradient=gradient)
    scratch = _scratch(call, gradient=gradient, names=tuple(names))
    return sum(arrays[name].bytes for name in names) + sum(_bytes(*array) for array in scratch.values())


def run(
    call: Call,
    values: dict[str, jax.Array],
    results: tuple[str, ...],
    onto: dict[str, jax.Array],
    target: Target,
    *,
    gradient: bool,
) -> dict[str, jax.Array]:
    """Call a kernel.

    Args:
        call: from :func:`plan`.
        values: its inputs by name.
        results: the names of its outputs.
        onto: outputs of earlier calls that this one writes other parts of.
        target: what to compile for.
        gradient: which of the two kernels.

    Returns:
        The outputs by name.
    """
    arrays = _arrays(call, gradient=gradient)
    scratch = _scratch(call, gradient=gradient, names=results)
    kernel = kernels.backward if gradient else kernels.forward

    inputs, hidden = list(values), [name for name in results if name in onto]

    def body(*references):
        seen = references[: len(inputs)] + references[len(inputs) + len(hidden) :]
        kernel(*seen, names=(*inputs, *results, *scratch), block=call.block)

    def seen_as(name, value):
        return value.reshape(arrays[name].shape)  # images with or without their pixels on one axis

    b = call.block
    tiles, lattices, chunks, blocks = call.grid
    grid = (tiles, lattices, chunks - 1 if "borders" in results else chunks, blocks)  # no border follows the last chunk
    elements = math.prod(grid) * b.tokens * b.channels * b.lanes * len(b.walks)
    outputs = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[arrays[name].spec for name in inputs] + [pl.BlockSpec(memory_space=pl.ANY) for _ in hidden],
        out_specs=[arrays[name].spec for name in results],
        out_shape=[shape_like(arrays[name].shape, arrays[name].dtype, values["x"]) for name in results],
        scratch_shapes=[pltpu.VMEM(size, dtype) for size, dtype in scratch.values()],
        input_output_aliases={len(inputs) + i: results.index(name) for i, name in enumerate(hidden)},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=target.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=elements * b.state * (20 if gradient else 6),
            transcendentals=elements * (b.state * (2 if gradient else 1) + 2),
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in values.values())
            + sum(math.prod(arrays[name].shape) * jnp.dtype(arrays[name].dtype).itemsize for name in results),
        ),
        interpret=target.interpret or False,
        name=name_of(call, gradient=gradient),
    )(*vary_alike(*(seen_as(*item) for item in values.items()), *(seen_as(name, onto[name]) for name in hidden)))
    whole = (call.shape.rows, call.shape.step[0], call.shape.columns, call.shape.step[1])
    return {
        name: output.reshape(*whole, *output.shape[2:]) if b.flat and name in IMAGES else output
        for name, output in zip(results, outputs, strict=True)
    }


def name_of(call: Call, *, gradient: bool) -> str:
    """Return the name under which a call appears in profiles and in the compiler's dumps."""
    b = call.block
    walks = "".join("r" if not w.orders[0][0] else "c" for w in b.walks)
    kind = "backward" if gradient else "forward"
    return f"scan_{kind}_{call.shape.rows}x{call.shape.columns}_{walks}{call.first}_e{call.shape.channels}_n{b.state}"


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _divisors(n: int) -> list[int]:
    """Return all divisors, the largest first."""
    return [d for d in range(n, 0, -1) if n % d == 0]


def _bytes(size, dtype) -> int:
    """Return what an array takes of the chip's memory: its last two axes in whole tiles."""
    *rest, rows, lanes = size
    return math.prod(rest) * _up(rows, TILE) * _up(lanes, LANES) * jnp.dtype(dtype).itemsize
