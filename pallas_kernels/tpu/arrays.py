"""Every array of the kernels: which axes it has, and which block of it a step of the grid sees."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tpu.blocks import FLOAT32, Call
from pallas_kernels.tpu.chip import LANES, SUBLANES, round_up

# Arrays that all channels share; results; results that have the pixels of the image.
SHARED = ("packed", "d_packed")
RESULTS = ("y", "dx")
IMAGES = ("y", "dx", "d_packed", "d_delta")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in the accelerator's memory, and the block of it that a step of the grid sees.

    ``block`` has None for an axis of which the kernel sees one entry; ``index`` goes from the step of the grid (tile of
    images, sub-lattice, chunk, block of channels) to the number of the block.
    """

    shape: tuple[int, ...]
    dtype: Any
    block: tuple[int | None, ...]
    index: Callable[..., tuple]
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


@dataclasses.dataclass(frozen=True)
class _Axes:
    """One axis of an array, or several that go together: size, size of the block, and the number of the block."""

    size: tuple[int, ...]
    block: tuple[int | None, ...]
    index: Callable[..., tuple]


def arrays(call: Call, *, gradient: bool) -> dict[str, Array]:
    """Return every array that either kernel can read or write, by the name it has there."""
    shape, axes = call.shape, _axes(call, gradient=gradient)
    table = {
        # What comes in with the image, and its gradients.
        "x dy": ("pixels channels images", shape.dtype),
        "y dx": ("pixels channels images", shape.result),
        "packed d_packed": ("pixels packed_rows images", FLOAT32),
        "delta d_delta": ("pixels sets channels images", shape.steps),
        # States.
        "start final d_start d_final": ("lattices states channels images", FLOAT32),
        "borders kept": ("borders lattices states channels images", FLOAT32),
        # Parameters, repeated over the lanes.
        "A": ("lattices sets states channels lanes", FLOAT32),
        "bias": ("lattices sets channels lanes", FLOAT32),
        "skip": ("lattices channels lanes", FLOAT32),
        "weights": ("lattices sets blocks product_channels product_rows", shape.dtype),
        "weights_back": ("lattices sets blocks product_rows product_channels", shape.dtype),
        # Their gradients: one for each tile of images, and only of the sets of this call.
        "dA": ("tiles lattices own_sets states channels lanes", FLOAT32),
        "d_bias": ("tiles lattices own_sets channels lanes", FLOAT32),
        "d_skip": ("tiles lattices channels lanes", FLOAT32),
        "d_weights": ("tiles lattices own_sets blocks product_rows product_channels", FLOAT32),
    }
    found = {}
    for names, (words, dtype) in table.items():
        parts = [axes[word] for word in words.split()]
        for name in names.split():
            found[name] = Array(
                shape=tuple(n for part in parts for n in part.size),
                dtype=dtype,
                block=tuple(n for part in parts for n in part.block),
                index=lambda *step, parts=parts: tuple(n for part in parts for n in part.index(*step)),
                buffers=1 if name in call.single_buffered else 2,
            )
    return found


def _axes(call: Call, *, gradient: bool) -> dict[str, _Axes]:
    """Return the axes of the table above, by name; step (i, g, c, d) of the grid sees the block with their indices."""
    block, shape, maths = call.block, call.shape, call.block.maths
    tiles, lattices, chunks, blocks = call.grid
    at = call.first // call.sets  # of the parameter sets, in blocks of as many
    rows, high, wide = maths.set_rows, *_product_sides(call)

    def origin(g, axis: int):
        """Return where sub-lattice g begins; a constant where all of them begin at the same place."""
        places = [origin[axis] for origin in call.origins]
        place = places[0]
        for i, other in enumerate(places[1:], 1):
            place = place if other == places[0] and len(set(places)) == 1 else jnp.where(g == i, other, place)
        return place

    def place(c):
        """Return the place of the c-th chunk that is taken: the way back begins where the walk ends."""
        return call.place(chunks - 1 - c if call.reverse != gradient else c)

    def pixel_of_lattice(i, g, c, d):
        row, column = place(c)
        return row, origin(g, 0), column, origin(g, 1)

    if block.flat:
        pixels = _Axes((shape.rows * shape.columns, 1), block.axes, lambda i, g, c, d: place(c))
    else:
        down, right = shape.step
        size, part = (shape.rows, down, shape.columns, right), (block.rows, None, block.columns, None)
        pixels = _Axes(size, part, pixel_of_lattice)

    def border(i, g, c, d):
        """Return the border before a chunk; the way back begins after the last chunk, and the first needs none."""
        return (jnp.maximum(chunks - 2 - c, 0) if gradient else c,)

    def first(i, g, c, d):
        return (0,)

    return {
        "pixels": pixels,
        "channels": _Axes((shape.channels,), (block.channels,), lambda i, g, c, d: (d,)),
        "images": _Axes((shape.images,), (block.lanes,), lambda i, g, c, d: (i,)),
        "lanes": _Axes((block.lanes,), (block.lanes,), first),
        "states": _Axes((maths.state,), (maths.state,), first),
        "lattices": _Axes((lattices,), (None,), lambda i, g, c, d: (g,)),
        "tiles": _Axes((tiles,), (None,), lambda i, g, c, d: (i,)),
        "borders": _Axes((chunks - 1,), (None,), border),
        "sets": _Axes((shape.slots,), (call.sets,), lambda i, g, c, d: (at,)),
        "own_sets": _Axes((call.sets,), (call.sets,), first),
        "packed_rows": _Axes((shape.slots * rows,), (call.sets * rows,), lambda i, g, c, d: (at,)),
        "blocks": _Axes((blocks,), (None,), lambda i, g, c, d: (d,)),
        "product_channels": _Axes((high,), (high,), first),
        "product_rows": _Axes((wide,), (wide,), first),
    }


def _product_sides(call: Call) -> tuple[int, int]:
    """Return the sides of the block-diagonal weights: channels and rows of all pixels of one product."""
    block, together = call.block, call.block.schedule.pixels_a_product
    return together * block.channels, together * block.maths.slab


def scratch(call: Call, *, gradient: bool, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a kernel keeps on the chip, all float32, by the name it has there.

    ``names`` are those of the arrays that the kernel reads and writes.
    """
    block, maths = call.block, call.block.maths
    tile, state = (SUBLANES, block.lanes), (maths.state, block.channels, block.lanes)
    in_flight = (maths.state, block.schedule.channels_in_flight, block.lanes)
    image = (*block.axes, block.channels, block.lanes)
    found: dict[str, tuple[int, ...]] = {"dt": image}
    several = gradient or sum(len(walk.orders) for walk in block.walks) > 1
    if call.shape.result != FLOAT32 and several and ("dx" if gradient else "y") in names:
        found["sum"] = image  # results are rounded once, at the end
    if block.chunks > 1 or gradient:
        found["state"] = (block.blocks if block.chunks > 1 else 1, *state)  # from chunk to chunk
    if gradient:
        if block.tokens > block.pixels:
            found["d_raw"] = image  # a chain comes to every pixel again, and needs its time step then
        found["h"] = (block.tokens + 1, *in_flight)
        if block.schedule.keep_decays:
            found["a"] = (block.tokens, *in_flight)
        if not block.schedule.sum_each_token:
            found["sum_B"] = found["sum_C"] = (block.tokens, maths.state, *tile)
        if block.chunks > 1:  # gradients of parameters, until all chunks are done
            high, wide = _product_sides(call)
            found["acc_A"] = (block.blocks, call.sets, *state)
            found["acc_bias"] = (block.blocks, call.sets, block.channels, block.lanes)
            found["acc_skip"] = (block.blocks, block.channels, block.lanes)
            if maths.rank:
                found["acc_weights"] = (block.blocks, call.sets, wide, high)
    return found


def memory(call: Call, *, gradient: bool) -> int:
    """Return the bytes of VMEM that a call takes."""
    names = [
        "x",
        "packed",
        "A",
        "bias",
        "skip",
        *(["dy", "dx", "d_packed", "dA", "d_bias", "d_skip"] if gradient else ["y"]),
    ]
    steps = ["weights", "weights_back", "d_weights"] if call.block.maths.rank else ["delta", "d_delta"]
    names += steps if gradient else steps[:1]
    found = arrays(call, gradient=gradient)
    kept = scratch(call, gradient=gradient, names=names)
    return sum(found[name].bytes for name in names) + sum(_bytes(shape, FLOAT32) for shape in kept.values())


def _bytes(size, dtype) -> int:
    """Return what an array takes of the chip's memory: its last two axes in whole tiles."""
    *rest, rows, lanes = size
    return math.prod(rest) * round_up(rows, SUBLANES) * round_up(lanes, LANES) * jnp.dtype(dtype).itemsize
